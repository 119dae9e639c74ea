"""The fleet of the end-to-end tests: one gateway and two inference hosts, made by the demo and by site.yml.

E2E_RUNTIME=docker in the environment runs vLLM in containers (tests/drills/test_docker_fleet.py), on Debian 13: Debian 12 has a Docker that is
too old. Their image is Debian 12 with the very release that the hosts build otherwise, and it comes to them as an archive.

With E2E_KEEP=1 in the environment the fleet stays after the tests and is used again by the next ones: for working on a
test. `DEMO_FLEET=e2e python -m demo down` removes it.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.hosts import hosts
from tests.stand_in import wheel

ROOT = Path(__file__).resolve().parents[2]
NAME = "e2e"
DIRECTORY = ROOT / ".cache" / NAME
GATEWAY = f"{NAME}-gateway"
WORKERS = (f"{NAME}-gpu1", f"{NAME}-gpu2")
UNIT = "vllm@chat"
RUNTIME = os.environ.get("E2E_RUNTIME", "systemd")
ENVIRONMENT = {
    **os.environ,
    "DEMO_FLEET": NAME,
    "DEMO_PORT": "9443",
    "DEMO_HOSTS": str(len(WORKERS)),
    "DEMO_DIR": str(DIRECTORY),
    # One host is bare, and builds its release; the other one has it from the image that other scenarios start from, too.
    "DEMO_OS": "debian13" if RUNTIME == "docker" else f"debian12,debian12{hosts.PREPARED}",
    "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
    "LC_ALL": "C.UTF-8",
    "ANSIBLE_FORCE_COLOR": "0",
}
KEEP = os.environ.get("E2E_KEEP", "") == "1"
LEASE = "/run/vllm-fleet/lease.json"
# Of a run on another controller, which nobody here can ask.
STRANGERS_LEASE = {
    "run": "x",
    "who": "alice",
    "controller": "ctl9",
    "pid": 7,
    "place": "elsewhere",
    "since": "2026-01-02 03:04:05",
}
# Its request comes in on its input: keys do not belong into a command line.
CURL = "curl --silent --output /dev/null --write-out '%{http_code}' --config -"
# Modules run as `/usr/bin/python3`, or quickly as `/usr/bin/python3 -I -`, that reads its program from its input.
KILL_MODULES = (
    "for process in /proc/[0-9]*; do case \"$(tr '\\0' ' ' <$process/cmdline 2>/dev/null)\" in"
    " '/usr/bin/python3 '|'/usr/bin/python3 -I - ') kill -9 ${process#/proc/};; esac; done; true"
)
# What a run keeps beside its files while it works.
LEFTOVERS = (
    "find / -xdev \\( -name '.tree-*' -o -name '*.ansible_tmp' -o -name journal.json -path '/var/lib/vllm-fleet/*' \\)"
    " -not -path '/proc/*' 2>/dev/null"
)
# What was measured on the way; printed at the end.
FIGURES: dict[str, str] = {}


@dataclass(frozen=True)
class Done:
    """A program that ended."""

    status: int
    output: str
    seconds: float

    def recap(self) -> dict[str, dict[str, int]]:
        """Ansible's recap: host -> counter -> number."""
        lines = self.output[self.output.rfind("PLAY RECAP") :].splitlines()[1:]
        pairs = [line.split(":", 1) for line in lines if ":" in line and "changed=" in line]
        return {
            name.strip(): {key: int(value) for key, value in (entry.split("=") for entry in counters.split())}
            for name, counters in pairs
        }


@dataclass(frozen=True)
class Reply:
    """What came back for one HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def program(*command: str, check: bool = True, environment: dict[str, str] | None = None) -> Done:
    """Run a program in the clone, as a person would."""
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**ENVIRONMENT, **(environment or {})},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert not check or done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}"
    return Done(done.returncode, done.stdout, time.monotonic() - began)


def demo(command: str, **environment: str) -> Done:
    """Run the demo with the name and the size of this fleet."""
    return program(sys.executable, "-m", "demo", command, environment=environment)


def playbook_command(name: str, *arguments: str, variables: dict[str, Any] | None = None) -> list[str]:
    """The command that runs a playbook on the fleet; `variables` go into a file, because they may hold keys."""
    extra: list[str] = []
    if variables is not None:
        file = DIRECTORY / "extra-vars.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(variables))
        extra = ["-e", f"@{file}"]
    return ["ansible-playbook", name, "-i", "inventories/demo", *arguments, *extra]


def playbook(name: str, *arguments: str, variables: dict[str, Any] | None = None, check: bool = True) -> Done:
    """Run a playbook on the fleet."""
    return program(*playbook_command(name, *arguments, variables=variables), check=check)


def on(host: str, command: str, *, stdin: str = "", check: bool = True) -> str:
    """Run a shell command on a host as root, and return what it prints. What is no UTF-8, as a journal's binary fields, is replaced."""
    words = ("docker", "exec", "--interactive", host, "sh", "-c", command)
    return hosts.run(*words, input=stdin, check=check, errors="replace").stdout


def request(
    url: str,
    method: str,
    path: str,
    *,
    key: str | None = None,
    body: object = None,
    tls: ssl.SSLContext | None = None,
    timeout: float = 60,
) -> Reply:
    """Send one HTTP request exactly as it is given: no redirects, no retries, no tidying of the path."""
    parts = urlsplit(url)
    assert parts.hostname
    connection: http.client.HTTPConnection
    if tls:
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout, context=tls)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


@dataclass
class Fleet:
    """The fleet as its users see it: through .../access.json, the playbooks and a shell on each host."""

    access: dict[str, Any]
    first_run: Done
    internal_key: str
    tls: ssl.SSLContext = field(init=False)

    def __post_init__(self) -> None:
        self.tls = ssl.create_default_context(cafile=self.access["ca_file"])

    @property
    def key(self) -> str:
        return str(self.access["api_key"])

    @property
    def model(self) -> str:
        return str(self.access["model"])

    def client(self, key: str | None = None) -> openai.OpenAI:
        """The OpenAI client, trusting the fleet's certificate authority alone. It does not try again by itself."""
        return openai.OpenAI(
            base_url=self.access["base_url"],
            api_key=key or self.key,
            max_retries=0,
            timeout=120,
            http_client=openai.DefaultHttpxClient(verify=self.tls, trust_env=False),
        )

    def ask(self, method: str, path: str, *, key: str | None = None, body: object = None, timeout: float = 60) -> Reply:
        """Ask the gateway."""
        root = str(self.access["base_url"]).removesuffix("/v1")
        return request(root, method, path, key=key, body=body, tls=self.tls, timeout=timeout)

    def prompt(self, tokens: int = 1) -> dict[str, Any]:
        """The body of a completion that is as long as asked for."""
        return {"model": self.model, "prompt": "Count: one, two,", "max_tokens": tokens, "ignore_eos": True}

    def complete(self, key: str | None = None, timeout: float = 60) -> Reply:
        """Ask the gateway for one token."""
        return self.ask("POST", "/v1/completions", key=key or self.key, body=self.prompt(), timeout=timeout)

    def stream(self, tokens: int, key: str | None = None) -> Iterator[int]:
        """Ask for a streamed answer; yields with each piece the tokens so far, which a busy server joins. An error of the stream is raised."""
        with self.client(key).completions.create(
            model=self.model,
            prompt="Count: one, two,",
            max_tokens=tokens,
            stream=True,
            extra_body={"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        ) as pieces:
            for piece in pieces:
                assert piece.usage, "every piece tells the tokens so far"
                yield piece.usage.completion_tokens

    def backend(self, worker: str) -> str:
        """Address and port of a host's vLLM, as the gateway's log names it."""
        return f"{self.access['hosts'][worker]}:8000"

    def direct(self, worker: str, timeout: float = 60) -> int:
        """Ask one vLLM past the gateway; the status, or 0 when it does not answer."""
        return self.inside(
            worker, "POST", "/v1/completions", key=self.internal_key, body=self.prompt(), timeout=timeout
        )

    def inside(
        self, worker: str, method: str, path: str, *, key: str | None = None, body: object = None, timeout: float = 60
    ) -> int:
        """Ask one vLLM from the gateway's host, which its firewall lets in; the status, or 0 when it does not answer."""
        lines = [f'url = "http://{self.backend(worker)}{path}"', f'request = "{method}"', f"max-time = {timeout}"]
        if key:
            lines.append(f'header = "Authorization: Bearer {key}"')
        if body is not None:
            lines += ['header = "Content-Type: application/json"', f"data = {json.dumps(json.dumps(body))}"]
        return int(on(GATEWAY, CURL, stdin="\n".join(lines), check=False) or 0)

    def log_lines(self) -> int:
        """Length of the gateway's access log."""
        return int(on(GATEWAY, "wc -l </var/log/nginx/access.log"))

    def log(self, since: int = 0) -> list[dict[str, str]]:
        """The gateway's access log, without the first lines."""
        text = on(GATEWAY, f"tail -n +{since + 1} /var/log/nginx/access.log")
        return [json.loads(line) for line in text.splitlines()]

    def journal(self, worker: str) -> list[str]:
        """What vLLM logged on a host."""
        return on(worker, f"journalctl --unit {UNIT} --output cat --no-pager").splitlines()


def until(what: str, true: Callable[[], bool], seconds: float = 420, pause: float = 1) -> float:
    """Wait until something is true, and say how long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not after {seconds} s: {what}"
        time.sleep(pause)
    return time.monotonic() - began


def secret(name: str) -> str:
    """A secret that the demo made for this fleet."""
    return (DIRECTORY / name).read_text()


def build_image() -> dict[str, str]:
    """Make an archive of an image that runs vLLM, from the host image that has its release. Returns the variables that name both."""
    archive = DIRECTORY / "image.tar"
    image = hosts.image(f"debian12{hosts.PREPARED}")
    release = hosts.docker("run", "--rm", image, "sh", "-c", "dirname /opt/vllm/releases/*/.complete").strip()
    # A third of it would be Triton, which vLLM does not use on a CPU.
    tar = "tar -c -C / --one-file-system --exclude=./var/log --exclude='*/site-packages/triton*' ."
    changes = (
        f"--change 'ENV PATH={release}/bin:/usr/local/bin:/usr/bin:/bin' --change 'ENTRYPOINT [\"vllm\", \"serve\"]'"
    )
    made = program(
        "bash", "-o", "pipefail", "-c", f"docker run --rm --log-driver=none {image} {tar} | docker import {changes} -"
    ).output.split()[-1]
    hosts.docker("save", "--output", str(archive), made)
    hosts.docker("image", "rm", made)
    # As the hosts' engine will call it. This machine's may count otherwise: with containerd's store an id is that of the manifest.
    with tarfile.open(archive) as file:
        manifest = file.extractfile("manifest.json")
        assert manifest
        config = Path(json.load(manifest)[0]["Config"]).name
    return {"vllm_image": f"sha256:{config.removesuffix('.json')}", "vllm_image_archive": str(archive)}


def prepare_containers() -> None:
    """Have site.yml run vLLM in containers on the bare hosts."""
    variables = {"vllm_runtime": "docker", "docker_source": "distribution", **build_image()}
    (DIRECTORY / "vars.json").write_text(json.dumps(variables))
    for worker in WORKERS:
        drop_in = "/etc/systemd/system/docker.service.d"
        on(
            worker,
            f"mkdir {drop_in} && cat >{drop_in}/test-host.conf",
            stdin=(ROOT / "molecule/shared/engine.conf").read_text(),
        )


@pytest.fixture(scope="session")
def bare_hosts() -> Iterator[Sequence[str]]:
    """The hosts of the fleet with nothing on them but systemd and sshd."""
    if KEEP and (DIRECTORY / "access.json").exists():
        pytest.skip("the hosts of the last run are still there (E2E_KEEP)")

    def remove() -> None:
        hosts.down(NAME)  # not `demo down`: it would stop an engine that other tests are about to use
        shutil.rmtree(DIRECTORY, ignore_errors=True)

    remove()
    try:
        demo("hosts")
        if RUNTIME == "docker":
            prepare_containers()
        yield (GATEWAY, *WORKERS)
    finally:
        if not KEEP:
            remove()


def command(worker: str, **settings: object) -> None:
    """Command the stand-in for vLLM on a host, see tests/stand_in/vllm/stand_in/settings.py."""
    on(worker, "cat >/var/cache/vllm/chat/stand_in.json", stdin=json.dumps(settings))


@pytest.fixture(scope="session")
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """The fleet, serving."""
    if not (KEEP and (DIRECTORY / "access.json").exists()):
        request.getfixturevalue("bare_hosts")
    done = demo("up")
    FIGURES["demo up, from bare hosts"] = f"{done.seconds:.0f} s"
    return Fleet(json.loads((DIRECTORY / "access.json").read_text()), done, secret("internal_key"))


@pytest.fixture(scope="session")
def stand_in(fleet: Fleet) -> None:
    """The fleet has the stand-in for vLLM as its release: what the tests break from here on is not vLLM, and it starts in a second.

    The drill with containers goes on with the real one.
    """
    if RUNTIME == "docker":
        return
    made, lock = wheel.write(DIRECTORY / "stand-in")
    for worker in WORKERS:
        on(worker, "mkdir --parents /srv/stand-in")
        hosts.docker("cp", str(made), f"{worker}:/srv/stand-in/{made.name}")
    variables = {"vllm_lock_file": str(lock), "vllm_torch_backend": "", "uv_find_links": ["/srv/stand-in"]}
    (DIRECTORY / "vars.json").write_text(json.dumps(variables))
    done = playbook("site.yml")
    FIGURES["site.yml, another release"] = f"{done.seconds:.0f} s"
    assert {fleet.direct(worker) for worker in WORKERS} == {200}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was measured."""
    if FIGURES:
        terminalreporter.section("measured on the way")
        for name, value in FIGURES.items():
            terminalreporter.write_line(f"{name}: {value}")
