"""What the tests of the scenario vllm_docker have in common: its instances, as the operator and the clients of the host see them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from testinfra.host import Host

from tests.roles import host_name, until
from tests.served import KEY, MODEL

ROLE = "vllm_docker"


@dataclass(frozen=True)
class Instances:
    """The instances of the host, as the operator and the clients of the host see them."""

    host: Host

    def sh(self, command: str, *arguments: str) -> str:
        return str(self.host.check_output(command, *arguments))

    def ask(
        self, port: int = 8000, tokens: int = 1, key: str = KEY, timeout: int = 100, **more: object
    ) -> tuple[int, Any]:
        """Ask for so many tokens; the status, 0 without an answer, and the answer."""
        body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": tokens, "temperature": 0, **more}
        done = self.host.run(
            "curl -sS -m %s -w '\\n%%{http_code}' -H %s -H 'Content-Type: application/json' -d %s %s",
            str(timeout),
            f"Authorization: Bearer {key}",
            json.dumps(body),
            f"http://127.0.0.1:{port}/v1/completions",
        )
        answer, _, status = done.stdout.rpartition("\n")
        return int(status or 0), json.loads(answer) if answer.startswith("{") else answer

    def version(self, port: int = 8010) -> str:
        """What an image that plays vLLM says of itself."""
        shown = f"Authorization: Bearer {KEY}"
        return str(json.loads(self.sh("curl -sS -m 10 -H %s http://127.0.0.1:%s/version", shown, str(port)))["version"])

    def show(self, name: str, key: str) -> str:
        """A property of the unit."""
        return self.sh("systemctl show --property=%s --value vllm@%s", key, name)

    def generation(self, name: str) -> str:
        return self.sh("cat /run/vllm/%s/generation", name)

    def container(self, name: str) -> str:
        """The container that the instance runs in."""
        return f"vllm-{name}-{self.generation(name)}"

    def pid(self, name: str) -> str:
        """The first process of the container, as the host sees it; 0 while it does not run."""
        number = self.host.run("cat /run/vllm/%s/generation", name).stdout.strip()
        return (
            str(self.host.run("docker inspect --format '{{.State.Pid}}' %s", f"vllm-{name}-{number}").stdout).strip()
            or "0"
        )

    def inspected(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.sh("docker inspect %s", self.container(name)))[0]
        return found

    def inside(self, name: str, script: str) -> str:
        """What a shell in the container says."""
        return self.sh("docker exec %s sh -c %s", self.container(name), script)

    def until_it_answers(self, port: int, seconds: float = 180) -> None:
        until(lambda: self.ask(port, timeout=5)[0] == 200, seconds, f"port {port} does not answer")

    def reboot(self) -> None:
        """End every process of the host and start it again, as a reboot does."""
        name = host_name(self.host)
        for command in (["kill", "--signal=SIGRTMIN+3", name], ["wait", name], ["start", name]):
            subprocess.run(["docker", *command], check=True, capture_output=True, timeout=180)
        until(lambda: self.host.run("systemctl is-active multi-user.target").rc == 0, 120, "the host does not come up")
