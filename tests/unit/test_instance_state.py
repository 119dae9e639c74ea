"""The operator's word: what becomes of it when persons and turns speak, for whom is waited, and the module on a host made of files."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import host_agent, instance_state, instance_state_host
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_state import Stand, Wanted, decided
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_state_host import InstanceHost
from ansible_collections.gpufleet.llm.plugins.modules import instance_state as module

from tests.upstream import Upstream, listening

ADA = host_agent.word(host_agent.spoken("drained", "ada", "monday", "new fan"))
STOPPED = host_agent.word(host_agent.spoken("stopped", "ada", "monday", "moved"))
TURN = host_agent.word(host_agent.spoken("drained", "bob@ctl", "monday", "0.34", "upgrade"))
UP = host_agent.word(None)
CANARY = host_agent.word(host_agent.spoken("up", "bob@ctl", "tuesday", "", "upgrade", share="10"))


def wanted(operator: str, **given: Any) -> Wanted:
    """What bob says on tuesday."""
    return Wanted(operator, "bob@ctl", "tuesday", **given)


@pytest.mark.parametrize(
    ("before", "said", "after"),
    [
        # a person
        (UP, wanted("drained", reason="fan"), {"operator": "drained", "by": "bob@ctl", "since": "tuesday", "reason": "fan"}),
        (ADA, wanted("drained"), ADA),
        (ADA, wanted("drained", reason="new fan"), ADA),
        (ADA, wanted("drained", reason="fire"), {"operator": "drained", "by": "bob@ctl", "since": "monday", "reason": "fire"}),
        (ADA, wanted("drained", force=True), {**ADA, "by": "bob@ctl", "force": "yes"}),
        (ADA, wanted("up"), {"operator": "up", "by": "bob@ctl", "since": "tuesday"}),
        (ADA, wanted("stopped"), {"operator": "stopped", "by": "bob@ctl", "since": "tuesday"}),
        (UP, wanted("up"), UP),
        # a person takes over what a turn left
        (TURN, wanted("drained"), {"operator": "drained", "by": "bob@ctl", "since": "monday", "reason": "0.34"}),
        (TURN, wanted("up"), {"operator": "up", "by": "bob@ctl", "since": "tuesday"}),
        # a turn
        (UP, wanted("drained", turn="site"), {"operator": "drained", "by": "bob@ctl", "since": "tuesday", "turn": "site"}),
        (ADA, wanted("drained", turn="site"), ADA),
        (STOPPED, wanted("drained", turn="site"), STOPPED),
        (ADA, wanted("up", turn="site"), ADA),
        (STOPPED, wanted("up", turn="site"), STOPPED),
        (UP, wanted("up", turn="site"), UP),
        (TURN, wanted("up", turn="site"), {"operator": "up", "by": "bob@ctl", "since": "tuesday"}),
        # of another run that died
        (TURN, wanted("drained", turn="upgrade"), TURN),
        (TURN, wanted("drained", turn="site"), {**TURN, "turn": "site"}),
        ({**TURN, "by": "eve"}, wanted("drained", turn="upgrade"), TURN),
        # a canary
        (TURN, wanted("up", turn="upgrade", share=10), CANARY),
        (UP, wanted("up", turn="upgrade", share=10), CANARY),
        (CANARY, wanted("up", turn="upgrade", share=10), CANARY),
        (CANARY, wanted("up", turn="site"), {"operator": "up", "by": "bob@ctl", "since": "tuesday"}),
        (CANARY, wanted("up"), {"operator": "up", "by": "bob@ctl", "since": "tuesday"}),
        (CANARY, wanted("drained", turn="upgrade", share=10), {"operator": "drained", "by": "bob@ctl", "since": "tuesday", "turn": "upgrade"}),
        (ADA, wanted("up", turn="upgrade", share=10), ADA),
    ],
)  # fmt: skip
def test_what_becomes_of_a_word(before: Mapping[str, str], said: Wanted, after: Mapping[str, str]) -> None:
    assert decided(before, said) == {**dict.fromkeys(host_agent.FIELDS, ""), **after}


def test_why_a_turn_leaves_a_word_alone() -> None:
    assert instance_state.left(ADA, wanted("drained", turn="site")) == "drained by ada: new fan"
    assert instance_state.left(STOPPED, wanted("up", turn="site")) == "stopped by ada: moved"
    assert instance_state.left(TURN, wanted("up", turn="site")) == ""
    assert instance_state.left(ADA, wanted("up")) == ""
    assert instance_state.in_words(TURN) == "drained for a turn (upgrade) by bob@ctl: 0.34"


def test_a_turn_stops_nothing_on_purpose() -> None:
    assert "a person's word" in instance_state.problem(wanted("stopped", turn="site"))
    assert instance_state.problem(wanted("stopped")) == ""


@pytest.mark.parametrize("share", [-1, 0, 101])
def test_a_share_is_a_percentage(share: int) -> None:
    assert (
        instance_state.problem(wanted("up", share=share)) == f"share is {share}; it must be a percentage from 1 to 100"
    )


def test_a_word_in_its_file() -> None:
    assert json.loads(host_agent.spoken("up", "ada", "now", "")) == {
        "operator": "up",
        "by": "ada",
        "since": "now",
        "reason": "",
    }
    assert host_agent.word(host_agent.spoken(**TURN)) == TURN
    forced = {**ADA, "force": "yes"}
    assert host_agent.word(host_agent.spoken(**forced)) == forced
    assert host_agent.word(host_agent.spoken(**CANARY)) == CANARY
    assert instance_state.in_words(CANARY) == "up with 10 % of the requests for a turn (upgrade) by bob@ctl"


class Clockwork:
    """A host on which time passes only while somebody sleeps."""

    def __init__(
        self,
        out: float = 0.0,
        idle: float = 0.0,
        back: float = 0.0,
        keeps: tuple[float, float] = (0.0, 0.0),
        answers: bool = True,
    ) -> None:
        self.time, self.out, self.idle, self.back, self.keeps, self.answers = 100.0, out, idle, back, keeps, answers
        self.looks = 0

    def passed(self) -> float:
        return self.time - 100.0

    def awaited(self, _instance: str, _waited: float, kept_seconds: float) -> dict[str, str]:
        assert kept_seconds > 1e9  # nobody is forgotten because time passes
        return {"gw-1": "still uses it"} if self.passed() < self.out or self.kept("") else {}

    def unused(self, _instance: str) -> dict[str, str]:
        return {"gw-1": "does not use it yet"} if self.passed() < self.back else {}

    def kept(self, _instance: str) -> dict[str, str]:
        return {"gw-1": "the last one"} if self.keeps[0] <= self.passed() < self.keeps[1] else {}

    def running(self, _instance: str) -> int | None:
        self.looks += 1
        return (2 if self.passed() < self.idle else 0) if self.answers else None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def settled(host: Clockwork, out: bool = True, timeout: float = 60, kept: str = "fail", engine: bool = True) -> Stand:
    return instance_state.settle(host, {"chat": out}, timeout, kept, engine)["chat"]


def test_it_waits_for_gateways_and_then_for_the_engine() -> None:
    stand = settled(Clockwork(out=5, idle=30))
    assert stand.settled
    assert 30 <= stand.seconds < 31
    assert settled(Clockwork(out=5, idle=30), engine=False).seconds < 6
    host = Clockwork(out=5)
    settled(host)
    assert host.looks == 1  # only once the gateways are done


def test_it_waits_until_it_is_used_again() -> None:
    assert 7 <= settled(Clockwork(out=99, idle=99, back=7), out=False).seconds < 8


def test_waiting_has_an_end() -> None:
    stand = settled(Clockwork(idle=90))
    assert (stand.settled, stand.running) == (False, 2)
    assert 60 <= stand.seconds < 61
    assert instance_state.complaint("chat", stand, ADA).startswith(
        "chat: its engine has 2 requests, after 60 s. It is drained"
    )
    assert "gw-1 still uses it, after 60 s" in instance_state.complaint("chat", settled(Clockwork(out=90)), ADA)
    assert "nothing has to be said again" in instance_state.complaint(
        "chat", settled(Clockwork(back=90), out=False), UP
    )


def test_an_engine_that_tells_nothing_is_not_waited_for_for_long() -> None:
    stand = settled(Clockwork(answers=False))
    assert stand.settled
    assert 0 < stand.seconds < 2


def test_a_gateway_that_keeps_it_is_refused_or_waited_for() -> None:
    refused = settled(Clockwork(out=0, keeps=(0, 90)))
    assert refused.kept == {"gw-1": "the last one"}
    assert 6 <= refused.seconds < 7
    assert "stays in use: gw-1 (the last one). Nothing has been changed" in instance_state.complaint(
        "chat", refused, ADA
    )
    # a moment is no refusal
    assert settled(Clockwork(keeps=(0, 4))).settled
    assert settled(Clockwork(keeps=(0, 20)), kept="wait").settled


def test_progress_is_told_once() -> None:
    told: list[str] = []
    instance_state.settle(Clockwork(out=5, idle=9), {"chat": True}, 60, "fail", True, told.append)
    assert told == ["chat: gw-1 still uses it", "chat: its engine has 2 requests"]


# --- on a host


class Engine(Upstream):
    """An engine with requests."""

    load = 0

    def get(self) -> tuple[int, str]:
        return (
            200,
            f'vllm:num_requests_running{{model_name="m"}} {self.load}\nvllm:num_requests_waiting{{model_name="m"}} 1\n',
        )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with an agent that has the instance chat."""
    for directory in ("etc/vllm-fleet", "run/vllm-fleet/agent", "var/lib/vllm-fleet"):
        (tmp_path / directory).mkdir(parents=True)
    configure(tmp_path, 1)
    return tmp_path


def configure(root: Path, port: int) -> None:
    known = {"host": "gpu-1", "gateways": ["gw-1"], "instances": {"chat": {"address": "127.0.0.1", "port": port}}}
    (root / "etc/vllm-fleet/agent.json").write_text(json.dumps(known))


def gateway(root: Path, **said: Any) -> None:
    """What gw-1 said just now."""
    known = {"time": time.monotonic(), "told": [], "out": [], "kept": {}, "in_flight": {}, "unrouted": [], **said}
    aside = root / "aside"
    aside.write_text(json.dumps(known))
    aside.replace(root / "run/vllm-fleet/agent/gw-1.json")


def test_the_requests_of_an_engine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = InstanceHost(root)
    assert host.running("other") == 0
    assert host.running("chat") == 0  # nobody listens
    with listening(Engine) as engine:
        configure(root, int(engine.url.rpartition(":")[2]))
        assert InstanceHost(root).running("chat") == 1
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        configure(root, hangs.getsockname()[1])
        monkeypatch.setattr(instance_state_host, "LOOK_SECONDS", 0.2)
        assert InstanceHost(root).running("chat") is None


def test_who_uses_it(root: Path) -> None:
    host = InstanceHost(root)
    assert host.unused("chat") == {"gw-1": "has not asked this host yet"}
    assert host.awaited("chat", 0, 1e12) == {}
    host.begin -= 60
    assert host.unused("chat") == {}
    gateway(root, told=["chat"], out=["chat"])
    assert host.unused("chat") == {"gw-1": "was told last that its host wants it out"}
    assert host.awaited("chat", 0, 1e12) == {}
    gateway(root, out=["chat"])
    assert "does not use it yet" in host.unused("chat")["gw-1"]
    gateway(root, out=["chat"], unrouted=["chat"])
    assert host.unused("chat") == {}
    gateway(root, told=["chat"], kept={"chat": ""})
    assert host.kept("chat") == {"gw-1": "no reason given"}
    gateway(root, told=["chat"], kept={"chat": ""}, time=time.monotonic() - 60)
    assert host.kept("chat") == {}
    assert host.awaited("other", 0, 1e12) == host.unused("other") == {}


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The module on that host."""

    class EndedError(Exception):
        """The module has answered."""

    class Module:
        def __init__(self, argument_spec: Mapping[str, Any], **_more: Any) -> None:
            self.params, self.check_mode = {name: spec.get("default") for name, spec in argument_spec.items()}, False
            self.params.update(given)
            self.check_mode = self.params.pop("check", False)

        def exit_json(self, **result: Any) -> None:
            raise EndedError(result)

        def fail_json(self, **result: Any) -> None:
            raise EndedError({**result, "failed": True})

    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "AnsibleModule", Module)
    monkeypatch.setattr(module, "InstanceHost", lambda: InstanceHost(root))

    def call(state: str, **arguments: Any) -> dict[str, Any]:
        given.clear()
        given.update({"instances": ["chat"], "state": state, "by": "bob@ctl", "timeout": 0, **arguments})
        umask = os.umask(0o022)
        try:
            module.main()
        except EndedError as ended:
            return dict(ended.args[0])
        finally:
            os.umask(umask)
        raise AssertionError("it does not answer")

    return call


def test_the_module_writes_once(run: Run, root: Path) -> None:
    file = root / "var/lib/vllm-fleet/chat.json"
    assert not run("up")["changed"]
    assert not file.exists()
    assert run("drained", check=True)["changed"]
    assert not file.exists()
    first = run("drained", reason="fan")
    assert (first["changed"], first["instances"]["chat"]["word"]["by"]) == (True, "bob@ctl")
    assert (json.loads(file.read_text())["reason"], file.stat().st_mode & 0o777) == ("fan", 0o644)
    assert not run("drained")["changed"]
    assert not run("up", turn="site")["changed"]
    assert run("up", turn="site")["instances"]["chat"]["left"] == "drained by bob@ctl: fan"
    assert run("up")["changed"]


def test_the_module_waits_for_the_gateway(run: Run, root: Path) -> None:
    gateway(root, told=[])

    def obeys() -> None:
        while not (root / "var/lib/vllm-fleet/chat.json").exists():
            time.sleep(0.02)
        gateway(root, told=["chat"], in_flight={"chat": 1})
        time.sleep(0.5)
        gateway(root, told=["chat"], out=["chat"])

    thread = threading.Thread(target=obeys)
    thread.start()
    result = run("drained", timeout=5, engine_wait=True)
    thread.join()
    assert not result.get("failed")
    assert 0.4 < result["instances"]["chat"]["seconds"] < 3
    assert result["instances"]["chat"]["waiting"] == {}


def test_the_module_fails_and_the_word_stays(run: Run, root: Path) -> None:
    gateway(root, told=["chat"], out=["chat"], in_flight={"chat": 3})
    result = run("drained", timeout=0.5)
    assert result["msg"].startswith("chat: gw-1 has 3 running requests, after")
    assert InstanceHost(root).word("chat")["operator"] == "drained"
    gateway(root, told=["chat"])
    assert "gw-1 was told last that its host wants it out" in run("up", timeout=0.5)["msg"]


def test_a_word_that_a_gateway_refuses_is_taken_back(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_state, "KEPT_SECONDS", 0.2)
    gateway(root, told=["chat"], kept={"chat": "route m needs it"})
    result = run("drained", timeout=5)
    assert result["msg"].startswith(
        "chat stays in use: gw-1 (route m needs it). Nothing has been changed. Bring another"
    )
    assert not result["changed"]
    assert not (root / "var/lib/vllm-fleet/chat.json").exists()
    assert run("drained", timeout=0.6, kept="wait")["instances"]["chat"]["word"]["operator"] == "drained"


def test_a_host_without_an_agent(run: Run, root: Path) -> None:
    (root / "etc/vllm-fleet/agent.json").unlink()
    for state in ("drained", "up"):
        result = run(state, timeout=5)
        assert not result["changed"]
        assert "has no agent" in result["skipped_reason"]
    assert run("stopped", timeout=5)["changed"]
    assert InstanceHost(root).word("chat")["operator"] == "stopped"
    assert run("up", timeout=5)["changed"]
