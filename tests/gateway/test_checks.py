"""The checks with a real Nginx in front of them and stand-ins for vLLM behind: what a fault means for clients, and when it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.gateway.backends import INTERNAL
from tests.gateway.checks import INTERVAL, TIMEOUT, Agent, Checks, Host, serve
from tests.gateway.harness import CHAT, Gateway, document, route, running
from tests.stand_in.local import Running, unpack, up

FILES = {
    "fleet": "etc/vllm-gateway/fleet.json", "state": "run/vllm-gateway/state.json", "admin": "run/vllm-gateway/admin.sock",
    "tls-certificate": "etc/ssl/vllm-fleet/fullchain.pem",
}  # fmt: skip
QUESTION = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


@dataclass
class Instance:
    """A stand-in as the harness wants to know it, and the agent of its host."""

    id: str
    server: Running
    agent: Agent = field(default_factory=Agent)

    def described(self) -> dict[str, Any]:
        instance, _, host = self.id.partition("@")
        return {
            "instance": instance, "host": host, "address": "127.0.0.1", "port": self.server.port,
            "agent": f"127.0.0.1:{self.agent.port}",
        }  # fmt: skip


@dataclass
class Fleet:
    """Two instances, the gateway in front of them, and its checks."""

    one: Instance
    two: Instance
    gateway: Gateway
    checks: Checks


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture
def fleet(site: Path, tmp_path: Path) -> Iterator[Fleet]:
    authority = Authority()
    made = []
    for name in ("chat@gpu-1", "chat@gpu-2"):
        home = tmp_path / name
        home.mkdir()
        (home / "stand_in.json").write_text('{"start_seconds": 0}')
        instance = Instance(name, up(site, home, INTERNAL))
        instance.agent.says("chat")
        serve(instance.agent, authority, home)
        made.append(instance)
    one, two = made
    directory = tmp_path / "gateway"
    checks = Checks(directory, authority, key=INTERNAL, files=FILES)
    told: Any = document([route("small", made, min_available=1)], made)  # type: ignore[arg-type]
    try:
        with running(directory, told) as gateway:
            checks.prepare()
            checks.start()
            gateway.until(lambda: gateway.admin("/in_flight")["serial"] == checks.state["serial"])
            assert checks.used(one.id) and checks.used(two.id)
            yield Fleet(one, two, gateway, checks)
    finally:
        for instance in made:
            instance.agent.stop()
            with contextlib.suppress(ProcessLookupError):
                instance.server.process.send_signal(signal.SIGCONT)
            instance.server.process.kill()
            instance.server.process.wait()
        checks.end(signal.SIGKILL)


class Clients:
    """Clients that ask one after the other, until it is enough."""

    def __init__(self, gateway: Gateway, count: int, seconds_per_token: float = 0.02) -> None:
        self.gateway = gateway
        self.body = {**QUESTION, "stand_in": {"seconds_per_token": seconds_per_token}}
        self.enough = threading.Event()
        self.answers: list[tuple[float, int, str]] = []
        self.threads = [threading.Thread(target=self.ask) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def ask(self) -> None:
        while not self.enough.is_set():
            begun = time.monotonic()
            try:
                answer = self.gateway.ask(CHAT, self.body)
                self.answers.append((begun, answer.status, answer.body.decode()[:200]))
            except Exception as error:
                self.answers.append((begun, 0, repr(error)))

    def end(self) -> list[tuple[float, int, str]]:
        """Those that were not answered as they should."""
        self.enough.set()
        for thread in self.threads:
            thread.join()
        return [answer for answer in self.answers if answer[1] != 200]


def stream(gateway: Gateway, gaps: list[float], tokens: int) -> None:
    """Read a stream, and note the time between its pieces."""
    connection = gateway.connection()
    body = {**QUESTION, "max_tokens": tokens, "stream": True, "stand_in": {"seconds_per_token": 0.05}}
    headers = {"Authorization": "Bearer team-a-0123456789abcdef0123456789abcdef", "Content-Type": "application/json"}
    connection.request("POST", CHAT, json.dumps(body), headers)
    response = connection.getresponse()
    last, text = time.monotonic(), b""
    while part := response.read1(65536):
        now = time.monotonic()
        gaps.append(now - last)
        last, text = now, text + part
    assert text.endswith(b"data: [DONE]\n\n"), text[-200:]
    gaps.append(0.0)


def test_an_instance_that_stands_still_leaves_while_streams_of_the_other_go_on(fleet: Fleet) -> None:
    gaps: list[list[float]] = [[] for _ in range(8)]
    # Only the second is asked for these: the first is drained while they begin.
    fleet.one.agent.says("chat", "drained")
    fleet.checks.until(lambda: not fleet.checks.used(fleet.one.id))
    fleet.gateway.until(lambda: fleet.gateway.admin("/in_flight")["serial"] == fleet.checks.state["serial"])
    threads = [threading.Thread(target=stream, args=(fleet.gateway, found, 160)) for found in gaps]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    fleet.one.agent.says("chat")
    fleet.checks.until(lambda: fleet.checks.used(fleet.one.id))
    fleet.one.server.process.send_signal(signal.SIGSTOP)
    assert fleet.checks.until(lambda: not fleet.checks.used(fleet.one.id)) < INTERVAL + TIMEOUT + 0.5
    fleet.gateway.until(lambda: fleet.gateway.admin("/in_flight")["serial"] == fleet.checks.state["serial"])
    for _ in range(20):
        assert fleet.gateway.ask(CHAT, QUESTION).status == 200
    for thread in threads:
        thread.join(30)
    assert all(found and found[-1] == 0.0 for found in gaps), "a stream was cut"
    fleet.one.server.process.send_signal(signal.SIGCONT)
    fleet.checks.until(lambda: fleet.checks.used(fleet.one.id))


def test_a_planned_stop_of_one_of_two_loses_no_request_of_sixteen_clients(fleet: Fleet) -> None:
    clients = Clients(fleet.gateway, 16)
    time.sleep(1)
    fleet.one.agent.says("chat", leaving=True)
    # What `leave` waits for on the host.
    fleet.checks.until(
        lambda: fleet.one.agent.told[-1]["out"] == ["chat"] and not fleet.one.agent.told[-1]["in_flight"]["chat"]
    )
    answered = len(clients.answers)
    fleet.one.server.process.terminate()
    assert fleet.one.server.process.wait(10) == 0
    time.sleep(1)
    failed = clients.end()
    assert failed == []
    assert len(clients.answers) > answered > 50


@dataclass
class Leaving:
    """A run of the program that `systemctl stop` of an instance runs first."""

    host: Host
    process: subprocess.Popen[str]

    def end(self) -> str:
        """Wait for it. Returns what it said."""
        output, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, output
        return output


@pytest.fixture
def hosts(fleet: Fleet, tmp_path: Path) -> Iterator[dict[str, Host]]:
    """The real agents, in the place of those that say what a test wants."""
    made = {}
    for instance in (fleet.one, fleet.two):
        instance.agent.stop()
        instance.agent.stop = lambda: None
        name = instance.id.partition("@")[2]
        made[instance.id] = Host(tmp_path / "hosts" / name, instance.agent.port)
        made[instance.id].start(fleet.checks.authority, "chat", instance.server.port, kept_seconds=3)
    heard = [host.directory / "run/vllm-fleet/agent/gw-1.json" for host in made.values()]
    fleet.checks.until(lambda: all(file.exists() for file in heard), 20)
    yield made
    for host in made.values():
        host.end()


def leave(host: Host, instance: Instance) -> Leaving:
    return Leaving(host, host.run("leave", "chat", MAINPID=str(instance.server.process.pid)))


def test_with_the_real_agent_a_planned_stop_loses_no_request(fleet: Fleet, hosts: dict[str, Host]) -> None:
    clients = Clients(fleet.gateway, 16)
    time.sleep(1)
    begun = time.monotonic()
    said = leave(hosts[fleet.one.id], fleet.one).end()
    assert "every gateway has let it go" in said
    assert time.monotonic() - begun < 10
    assert not fleet.checks.used(fleet.one.id)
    fleet.one.server.process.terminate()
    assert fleet.one.server.process.wait(10) == 0
    time.sleep(1)
    assert clients.end() == []


def test_with_the_real_agent_the_last_one_is_kept_for_a_while(fleet: Fleet, hosts: dict[str, Host]) -> None:
    """Both stop at once: one goes at once, the other when its patience ends."""
    clients = Clients(fleet.gateway, 4)
    begun = time.monotonic()
    first = leave(hosts[fleet.one.id], fleet.one)
    fleet.checks.until(lambda: not fleet.checks.used(fleet.one.id))
    second = leave(hosts[fleet.two.id], fleet.two)
    assert "every gateway has let it go" in first.end()
    fleet.checks.until(lambda: fleet.checks.use(fleet.two.id)["kept"])
    said = second.end()
    assert "gw-1 keeps it: its host is about to stop it; kept, because the route small needs at least 1" in said
    assert time.monotonic() - begun > 3
    assert clients.end() == [], "it went on serving"


def test_with_the_real_agent_an_operator_drains_and_changes_his_mind(fleet: Fleet, hosts: dict[str, Host]) -> None:
    hosts[fleet.two.id].says("chat", operator="drained", by="alice", since="2026-11-30T01:00:00Z", reason="new fan")
    fleet.checks.until(lambda: not fleet.checks.used(fleet.two.id))
    assert fleet.checks.use(fleet.two.id)["why"] == "drained by alice: new fan"
    fleet.checks.until(
        lambda: '"out": ["chat"]' in (hosts[fleet.two.id].directory / "run/vllm-fleet/agent/gw-1.json").read_text()
    )
    hosts[fleet.two.id].says("chat", operator="up")
    fleet.checks.until(lambda: fleet.checks.used(fleet.two.id))


def test_a_route_that_would_have_nobody_keeps_who_wants_to_leave(fleet: Fleet) -> None:
    fleet.two.server.process.kill()
    fleet.checks.until(lambda: not fleet.checks.used(fleet.two.id))
    fleet.one.agent.says("chat", leaving=True)
    fleet.checks.until(lambda: "chat" in fleet.one.agent.told[-1]["kept"])
    assert fleet.gateway.ask(CHAT, QUESTION).status == 200


def test_an_instance_that_is_killed_is_out_within_seconds(fleet: Fleet) -> None:
    clients = Clients(fleet.gateway, 4)
    fleet.one.server.process.kill()
    fleet.checks.until(lambda: not fleet.checks.used(fleet.one.id), INTERVAL + 1.5)
    time.sleep(0.5)
    killed = time.monotonic()
    time.sleep(0.5)
    failed = clients.end()
    assert [answer for answer in failed if answer[0] > killed] == []
    assert "NO BACKEND LEFT" not in fleet.checks.log
