"""What the tests of the role vllm have in common, whatever the runtime: its instances as the operator and the clients of the host see them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from testinfra.host import Host

from tests.roles import ROOT
from tests.stand_in import contract

KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
MODEL = "smollm2-135m-instruct"


def send(host: Host, port: int, path: str, body: object = None, key: str = KEY) -> tuple[int, Any]:
    """Ask an instance from its own host; returns the status and the answer."""
    data = ["-d", json.dumps(body)] if body is not None else []
    done = host.run(
        f"curl -sS -m 100 -w '\\n%%{{http_code}}' -H %s -H 'Content-Type: application/json' {'%s ' * len(data)}%s",
        f"Authorization: Bearer {key}",
        *data,
        f"http://127.0.0.1:{port}{path}",
    )
    answer, status = done.stdout.rsplit("\n", 1)
    return int(status), json.loads(answer) if answer.startswith("{") else answer


def ask(
    host: Host, port: int = 8000, model: str = MODEL, tokens: int = 4, key: str = KEY, **more: object
) -> tuple[int, Any]:
    """Ask for exactly so many tokens; returns the status and the answer."""
    request = {
        "model": model,
        "prompt": "The capital of France is",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        **more,
    }
    return send(host, port, "/v1/completions", request, key)


def play_gpus(host: Host) -> None:
    """A `nvidia-smi` that says that there are two GPUs, and that what runs has left no memory for a proof beside it."""
    smi = (ROOT / "tests/unit/recordings/nvidia/a100/nvidia-smi.csv").read_text()
    full = "\n".join(f"{number}, 900, 81920" for number in range(2))
    played = f"#!/bin/sh\ncase $* in\n*memory.free*) echo '{full}' ;;\n*) echo '{smi.strip()}' ;;\nesac\n"
    host.check_output("mkdir -p /etc/cdi; printf %s >/usr/bin/nvidia-smi && chmod 0755 /usr/bin/nvidia-smi", played)


def main_pid(host: Host, name: str) -> int:
    return int(host.check_output("systemctl show --property=MainPID --value vllm@%s", name))


def generation(host: Host, name: str) -> str:
    """Number of the generation that runs."""
    return str(host.check_output("cat /run/vllm/%s/generation", name))


def nothing_is_left_of_a_proof(host: Host) -> None:
    """The unit, the generation and the caches of the instance that proved are gone."""
    for path in ("/etc/vllm", "/run/systemd/system", "/var/cache/vllm"):
        assert host.run("ls %s | grep proof_", path).rc == 1, path


def ends_before_a_stop(
    host: Host,
    name: str,
    asked: Callable[[], tuple[int, Any]],
    tokens: int,
    meanwhile: Callable[[], object] | None = None,
) -> None:
    """A request for so many tokens, which takes some seconds, is answered to its end though its unit is stopped as it runs."""
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(asked()))
    client.start()
    time.sleep(1.5)
    assert not answers, "it was over before its unit was stopped"
    host.check_output("systemctl stop --no-block vllm@%s", name)
    if meanwhile:
        time.sleep(0.5)
        meanwhile()
    client.join()
    host.check_output("systemctl stop vllm@%s", name)
    status, answer = answers[0]
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == tokens
    assert host.check_output("systemctl show --property=Result --value vllm@%s", name) == "success"


class Client:
    """One who goes on asking an instance while something happens."""

    def __init__(self, host: Host, port: int, model: str) -> None:
        self.answers: list[int] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.work, args=(host, port, model))

    def work(self, host: Host, port: int, model: str) -> None:
        while not self.over.wait(0.5):
            self.answers.append(ask(host, port, model, tokens=1)[0])

    def __enter__(self) -> Client:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


@dataclass(frozen=True)
class Asked:
    """An instance, asked from its own host, as tests/stand_in/contract.py wants it."""

    host: Host
    name: str = "chat"
    port: int = 8000
    model: str = MODEL
    max_model_len: int = 1024

    def ask(self, path: str, body: object = None, *, key: str | None = "", raw: str | None = None) -> contract.Answer:
        lines = [f'url = "http://127.0.0.1:{self.port}{path}"', "silent", "max-time = 100"]
        if key is not None:
            lines.append(f'header = "Authorization: Bearer {key or KEY}"')
        data = raw if raw is not None else (None if body is None else json.dumps(body))
        if data is not None:
            lines += ['header = "Content-Type: application/json"', f"data = {json.dumps(data)}"]
        done = self.host.run("printf %%s %s | curl --write-out '\\n%%{http_code}' --config -", "\n".join(lines))
        text, _, status = done.stdout.rpartition("\n")
        return contract.Answer(int(status), text)

    def log(self) -> str:
        return str(self.host.check_output("journalctl --unit vllm@%s --output cat --no-pager", self.name))
