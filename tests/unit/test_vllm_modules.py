"""The modules of the vllm role, without a host: the gate against a small HTTP server, generations in a temporary directory."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import (
    generations_host,
    host_agent,
    vllm_container,
    vllm_fit,
    vllm_keys,
    vllm_named_files_host,
)
from ansible_collections.gpufleet.llm.plugins.modules import (
    completion_gate,
    vllm_generation,
    vllm_look,
    vllm_release,
)

from tests.upstream import Upstream, listening

# What vLLM 0.32 logs when the engine refuses its configuration, shortened to one of each kind of line.
JOURNAL = """Started vllm@chat.service - vLLM instance chat.
(APIServer pid=101) INFO 11-21 04:58:10 [api_server.py:1]   vLLM API server version 0.32.0
(EngineCore pid=102) ERROR 11-21 04:58:30 [core.py:9] EngineCore failed to start.
(EngineCore pid=102) ERROR 11-21 04:58:30 [core.py:9] Traceback (most recent call last):
(EngineCore pid=102) ERROR 11-21 04:58:30 [core.py:9]   File "/opt/vllm/core.py", line 9, in run
(EngineCore pid=102) ERROR 11-21 04:58:30 [core.py:9]     raise RuntimeError(
(EngineCore pid=102) ERROR 11-21 04:58:30 [core.py:9] RuntimeError: Insufficient space in /dev/shm
(APIServer pid=101) RuntimeError: Engine core initialization failed.
(APIServer pid=101) RuntimeError: Engine core initialization failed.
vllm@chat.service: Main process exited, code=exited, status=1/FAILURE
Failed to attach 3245 to compat systemd cgroup /system.slice/x: No such file or directory
"""


def test_the_journal_is_reduced_to_what_matters() -> None:
    assert completion_gate.telling_lines(JOURNAL) == [
        "EngineCore failed to start.",
        "RuntimeError: Insufficient space in /dev/shm",
        "RuntimeError: Engine core initialization failed.",
        "vllm@chat.service: Main process exited, code=exited, status=1/FAILURE",
    ]


def test_a_journal_that_says_nothing_is_shown_by_its_end() -> None:
    assert completion_gate.telling_lines("one\n\ntwo\nthree\n", limit=2) == ["two", "three"]


class Instances(Upstream):
    """Answers as the test wants."""

    answer: Callable[[dict[str, Any], str], tuple[int, str]]
    without_key = 401

    def get(self) -> tuple[int, str]:
        return self.without_key, ""

    def post(self, body: bytes) -> tuple[int, str]:
        return type(self).answer({**json.loads(body), "path": self.path}, self.headers["Authorization"])


@pytest.fixture
def upstream() -> Iterator[Any]:
    """A server on loopback; `answer` is set by the test."""
    with listening(Instances) as handler:
        yield handler


def instance(url: str, **change: str) -> dict[str, Any]:
    return {"name": "chat", "url": url, "model": "qwen", **change}


@pytest.mark.parametrize(("status", "passes"), [(401, True), (403, True), (200, False)])
def test_an_instance_that_answers_anybody_does_not_pass(upstream: Any, status: int, passes: bool) -> None:
    upstream.answer = staticmethod(lambda _body, _key: (200, '{"choices": [{"text": "x"}]}'))
    upstream.without_key = status
    gate = completion_gate.Gate(FakeModule(Path("/nowhere"), timeout=30, request_timeout=5, api_key="k"))
    told = gate.wait(instance(upstream.url))
    assert told.get("reason") == (None if passes else "it answers without the internal key")


def test_a_queued_restart_is_waited_for(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the old process answers, the unit is inactive for a moment, and its count of restarts begins anew."""
    asked: list[int] = []
    states = [
        {"Job": "7", "ActiveState": "deactivating", "NRestarts": "3"},
        {"Job": "7", "ActiveState": "inactive", "NRestarts": "3", "Result": "success"},
        {"ActiveState": "active", "NRestarts": "0"},
    ]

    def answer(_body: dict[str, Any], _key: str) -> tuple[int, str]:
        asked.append(len(states))
        return 200, '{"choices": [{"text": "x"}]}'

    upstream.answer = staticmethod(answer)
    module = FakeModule(Path("/nowhere"), timeout=30, request_timeout=5, api_key="k")
    gate = completion_gate.Gate(module)
    monkeypatch.setattr(completion_gate, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(gate, "unit_state", lambda _unit: states.pop(0) if len(states) > 1 else states[0])
    assert gate.wait(instance(upstream.url, unit="vllm@chat.service")).get("seconds") is not None
    assert asked == [1]


def test_a_unit_is_not_dead_while_its_restart_is_queued_or_systemd_says_nothing(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy host: the restart is seen only after the old process was asked, and systemctl is not answered in time."""
    answers = [(500, "draining"), (500, "draining"), (500, "draining"), (200, '{"choices": [{"text": "x"}]}')]
    states: list[dict[str, str]] = [
        {},
        {"ActiveState": "active", "NRestarts": "3"},
        {"Job": "7", "ActiveState": "inactive", "NRestarts": "0", "Result": "success"},
        {},
        {"ActiveState": "active", "NRestarts": "3"},
    ]
    upstream.answer = staticmethod(lambda _body, _key: answers.pop(0))
    gate = completion_gate.Gate(FakeModule(Path("/nowhere"), timeout=30, request_timeout=5, api_key="k"))
    monkeypatch.setattr(completion_gate, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(gate, "unit_state", lambda _unit: states.pop(0))
    assert gate.wait(instance(upstream.url, unit="vllm@chat.service")).get("seconds") is not None
    assert states == []


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"ActiveState": "activating", "NRestarts": "1", "Result": "exit-code"}, "exit-code"),
        ({"ActiveState": "active", "NRestarts": "1", "Result": "success"}, "systemd has started it again"),
        ({"ActiveState": "inactive", "NRestarts": "0", "Result": "success"}, "success"),
    ],
)
def test_a_unit_that_died_is_told(
    upstream: Any, monkeypatch: pytest.MonkeyPatch, state: dict[str, str], told: str
) -> None:
    states = [{"ActiveState": "active", "NRestarts": "0"}, state]
    upstream.answer = staticmethod(lambda _body, _key: (500, "starting"))
    gate = completion_gate.Gate(FakeModule(Path("/nowhere"), timeout=30, request_timeout=5, api_key="k"))
    monkeypatch.setattr(completion_gate, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(gate, "unit_state", lambda _unit: states.pop(0))
    monkeypatch.setattr(gate, "journal", lambda _unit, _since: [])
    assert gate.wait(instance(upstream.url, unit="vllm@chat.service"))["reason"] == f"vllm@chat.service died ({told})"


def test_the_journal_is_that_of_the_process_that_was_waited_for(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before it may have filled thousands of lines while it stopped. With --since, --lines would count from the beginning."""
    clock = iter([1000.0, 2000.0])
    states = [
        {"Job": "7", "ActiveState": "deactivating"},
        {"ActiveState": "active", "NRestarts": "0"},
        {"ActiveState": "failed", "NRestarts": "0", "Result": "exit-code"},
    ]
    module = FakeModule(Path("/nowhere"), timeout=30, request_timeout=5, api_key="k")
    upstream.answer = staticmethod(lambda _body, _key: (500, "starting"))
    gate = completion_gate.Gate(module)
    monkeypatch.setattr(completion_gate, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(time, "time", lambda: next(clock, 3000.0))  # the upstream's clock, too
    monkeypatch.setattr(gate, "unit_state", lambda _unit: states.pop(0))
    assert "died" in gate.wait(instance(upstream.url, unit="vllm@chat.service"))["reason"]
    (command,) = module.commands
    assert "--since=@1995 " in command
    assert "--lines" not in command


class FakeModule:
    """Stands in for AnsibleModule: records commands instead of running systemctl."""

    def __init__(self, path: Path, **parameters: Any) -> None:
        self.params = {
            "config_path": str(path),
            "inputs": {},
            "container_unit": None,
            "accepted_keys": "/nonexistent",
            "release": "/opt/r1",
            "keep": 2,
            "releases_path": None,
            "files_path": None,
            "user": "root",
            "generations": {},
            "idle": [],
            "seconds": None,
            **parameters,
        }
        self.check_mode = False
        self.commands: list[str] = []

    def run_command(self, command: list[str], **_options: object) -> tuple[int, str, str]:
        self.commands.append(" ".join(command))
        return 0, "", ""


def wanted(length: int = 1, **environment: str) -> dict[str, Any]:
    return {
        "name": "chat",
        "config": {"model": "/nowhere/qwen", "max-model-len": length},
        "environment": environment,
        "gate": {"name": "chat", "model": "qwen"},
    }


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where running instances say which generation they run."""
    monkeypatch.setattr(generations_host, "RUNTIME", tmp_path / "run")
    monkeypatch.setattr(generations_host, "UNITS", tmp_path / "units")
    monkeypatch.setattr(generations_host, "WORDS", tmp_path / "words")
    monkeypatch.setattr(generations_host, "CACHES", tmp_path / "caches")
    (tmp_path / "run/chat").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    return tmp_path / "run/chat/generation"


def prepare(path: Path, length: int = 1, **parameters: Any) -> dict[str, Any]:
    return vllm_generation.prepared(FakeModule(path / "etc", wanted=[wanted(length)], **parameters))


def switch(path: Path, runtime: Path, confirm: bool = True) -> generations_host.Deployed:
    module = FakeModule(path / "etc")
    chat = generations_host.Deployed(module, "chat")
    vllm_generation.activated(chat)
    runtime.write_text(f"{chat.current()}\n")
    if confirm:
        vllm_generation.confirmed(module, [chat])
    return chat


def test_a_generation_is_written_once(tmp_path: Path, runtime: Path) -> None:
    assert prepare(tmp_path)["pending"] == ["chat"]
    switch(tmp_path, runtime)
    again = prepare(tmp_path)
    assert (again["changed"], again["pending"]) == (False, [])
    assert sorted(path.name for path in (tmp_path / "etc/chat").iterdir()) == ["1", "current"]
    assert (tmp_path / "etc/chat/1/environment").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", [{"length": 2}, {"release": "/opt/r2"}])
def test_what_differs_becomes_a_new_generation(tmp_path: Path, runtime: Path, change: dict[str, Any]) -> None:
    prepare(tmp_path)
    switch(tmp_path, runtime)
    assert prepare(tmp_path, **change)["pending"] == ["chat"]
    assert switch(tmp_path, runtime).current() == 2


def test_how_an_instance_is_asked_is_no_reason_to_restart_it(tmp_path: Path, runtime: Path) -> None:
    """A former version wrote by which path; nobody reads that any more, and a generation that comes back must be asked all the same."""
    prepare(tmp_path)
    chat = switch(tmp_path, runtime)
    (tmp_path / "etc/chat/1/gate.json").write_text('{"name": "chat", "model": "qwen", "api": "completions"}')
    assert prepare(tmp_path)["pending"] == []
    assert vllm_generation.gates([chat]) == [{"name": "chat", "model": "qwen"}]


def test_what_somebody_holds_stays_as_it_is(tmp_path: Path, runtime: Path) -> None:
    """Nothing is written for it, and it is not removed either when nobody wants it any more."""
    prepare(tmp_path)
    chat = switch(tmp_path, runtime)
    file = tmp_path / "etc/chat/held"
    for text, said in (("ann,\n since noon\n", "ann, since noon"), ("", "nobody said why")):
        file.write_text(text)
        assert chat.held() == said
    again = prepare(tmp_path, length=2)
    assert (again["changed"], again["pending"], chat.numbers()) == (False, [], [1])
    assert generations_host.obsolete(str(tmp_path / "etc"), set()) == []
    file.unlink()
    assert chat.held() == ""
    assert prepare(tmp_path, length=2)["pending"] == ["chat"]
    assert generations_host.obsolete(str(tmp_path / "etc"), set()) == ["chat"]


def test_another_revision_of_an_adapter_is_a_new_generation(tmp_path: Path) -> None:
    link = tmp_path / "poet"
    texts = []
    for revision in ("r1", "r2"):
        (tmp_path / revision).mkdir()
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / revision)
        adapted = wanted(1)
        adapted["config"]["lora-modules"] = [{"name": "poet", "path": str(link)}]
        texts.append(generations_host.wanted_content(adapted, {}, "/opt/r1")["config.yaml"])
    assert [str(tmp_path / "r1") in texts[0], str(tmp_path / "r2") in texts[1]] == [True, True]


def test_an_adapter_that_is_not_there_is_told(tmp_path: Path) -> None:
    adapted = wanted(1)
    adapted["config"]["lora-modules"] = [{"name": "poet", "path": str(tmp_path)}]

    def missing(instance: dict[str, Any]) -> list[str]:
        named = {"chat": vllm_named_files_host.findings(instance, "root", tmp_path)}
        return vllm_fit.named_problems(named, [instance], {"models_path": str(tmp_path)}, store=True, host=True)

    assert missing(wanted(1)) == []
    assert f"option 'lora-modules'[0].path: there is no {tmp_path}/adapter_config.json" in missing(adapted)[0]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert missing(adapted) == []


def test_an_input_that_changed_is_a_new_generation(tmp_path: Path, runtime: Path) -> None:
    unit = tmp_path / "unit"
    unit.write_text("one")
    prepare(tmp_path, inputs={"systemd": [str(unit)]})
    switch(tmp_path, runtime)
    assert prepare(tmp_path, inputs={"systemd": [str(unit)]})["pending"] == []
    unit.write_text("two")
    assert prepare(tmp_path, inputs={"systemd": [str(unit)]})["pending"] == ["chat"]


def test_a_run_that_died_after_writing_or_switching_is_finished(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    assert prepare(tmp_path)["pending"] == ["chat"]
    assert generations_host.Deployed(FakeModule(tmp_path / "etc"), "chat").numbers() == [1], (
        "the generation that is there is used"
    )
    switch(tmp_path, runtime, confirm=False)
    assert prepare(tmp_path)["pending"] == ["chat"], "switched, but it never answered"
    switch(tmp_path, runtime)
    runtime.unlink()
    assert prepare(tmp_path)["pending"] == ["chat"], "it does not run"


def test_going_back_goes_to_the_last_that_answered(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    switch(tmp_path, runtime)
    prepare(tmp_path, length=2)
    chat = switch(tmp_path, runtime, confirm=False)
    assert vllm_generation.reverted(chat) == "reverted"
    assert (chat.current(), chat.numbers()) == (1, [1])


def test_a_generation_that_answered_once_is_never_taken_for_the_failed_one(tmp_path: Path, runtime: Path) -> None:
    """Somebody stopped the instance, the run starts it again, and it does not answer: its configuration is not to blame."""
    for length in (1, 2):
        prepare(tmp_path, length=length)
        chat = switch(tmp_path, runtime)
    runtime.unlink()
    assert prepare(tmp_path, length=2)["pending"] == ["chat"]
    chat = switch(tmp_path, runtime, confirm=False)
    assert vllm_generation.reverted(chat) == "kept"
    assert (chat.current(), chat.numbers()) == (2, [1, 2])
    done = [command for command in chat.module.commands if "is-active" not in command]
    assert done[-1] == "systemctl restart --no-block vllm@chat.service"


def test_what_a_dead_run_left_is_not_switched_to_when_nobody_wants_it_any_more(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    switch(tmp_path, runtime)
    prepare(tmp_path, length=2)  # and the run dies, and the change is taken back
    runtime.unlink()
    assert prepare(tmp_path)["pending"] == ["chat"]
    assert switch(tmp_path, runtime).current() == 1


def test_what_was_written_and_is_refused_is_gone(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    chat = switch(tmp_path, runtime)
    prepare(tmp_path, length=2)
    vllm_generation.drop(FakeModule(tmp_path / "etc"), [chat])
    assert (chat.current(), chat.numbers()) == (1, [1])
    prepare(tmp_path, length=2)  # stopped for it, which then failed
    assert vllm_generation.reverted(chat) == "kept"
    assert (chat.current(), chat.numbers()) == (1, [1])


def test_with_nothing_to_go_back_to_the_instance_is_stopped(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    chat = switch(tmp_path, runtime, confirm=False)
    assert vllm_generation.reverted(chat) == "stopped"
    assert chat.current() is None
    assert chat.module.commands[-1] == "systemctl stop vllm@chat.service"


def test_an_operator_goes_back_and_what_was_left_is_no_good_one_any_more(tmp_path: Path, runtime: Path) -> None:
    for length in (1, 2, 3):
        prepare(tmp_path, length=length)
        chat = switch(tmp_path, runtime)
    module = FakeModule(tmp_path / "etc", generations={"chat": 2}, holder="ann@ctl", reason="slow")
    vllm_generation.hold(module, [chat])
    assert vllm_generation.activate(module, [chat])["gates"] == [{"name": "chat", "model": "qwen"}]
    runtime.write_text("2\n")
    assert vllm_generation.outdate(module, [chat]) == {"changed": True}
    assert vllm_generation.outdate(module, [chat]) == {"changed": False}
    assert (chat.current(), chat.numbers(), chat.confirmed()) == (2, [2, 3], [2])
    assert re.fullmatch(r"ann@ctl, since 20\d\d-\d\d-\d\d \d\d:\d\d UTC, slow", chat.held())
    assert prepare(tmp_path, length=3)["pending"] == []
    assert vllm_generation.release(module, [chat]) == {"changed": True}
    assert vllm_generation.release(module, [chat]) == {"changed": False}
    assert prepare(tmp_path, length=3)["pending"] == ["chat"]
    prepare(tmp_path, length=4)
    chat = switch(tmp_path, runtime, confirm=False)
    assert (chat.current(), vllm_generation.reverted(chat), chat.current()) == (4, "reverted", 2)


def test_a_stopped_instance_is_switched_and_not_started(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    module = FakeModule(tmp_path / "etc", idle=["chat"])
    chat = generations_host.Deployed(module, "chat")
    assert vllm_generation.activate(module, [chat])["gates"] == []
    assert chat.current() == 1
    assert [command for command in module.commands if "start" in command] == []


def test_a_generation_remembers_how_long_it_took_to_answer(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    chat = switch(tmp_path, runtime, confirm=False)
    assert chat.start_seconds(1) is None
    assert vllm_generation.confirmed(FakeModule(tmp_path / "etc", seconds={"chat": 41.27}), [chat])
    assert (chat.start_seconds(1), chat.start_seconds(None)) == (41.3, None)
    assert not vllm_generation.confirmed(FakeModule(tmp_path / "etc", seconds={"chat": 1}), [chat])
    (chat.path / "1/confirmed").write_text("")  # of an earlier release of this collection
    assert (chat.confirmed(), chat.start_seconds(1)) == ([1], None)


def test_old_generations_go_but_never_the_last_good_ones(tmp_path: Path, runtime: Path) -> None:
    for length in range(1, 6):
        prepare(tmp_path, length=length)
        chat = switch(tmp_path, runtime)
    assert chat.numbers() == [4, 5]
    prepare(tmp_path, length=9)
    for length in (10, 11, 12):
        prepare(tmp_path, length=length)
    chat.prune(2)
    assert {4, 5} <= set(chat.numbers())


def test_files_that_no_generation_names_are_removed(tmp_path: Path, runtime: Path) -> None:
    """Those of a generation that one may go back to stay."""
    files = tmp_path / "files"
    for number in (1, 2, 3):
        (files / f"h{number}").mkdir(parents=True)
        (files / f"h{number}/t.jinja").touch()
    for number in (1, 2):
        named = wanted()
        named["config"]["chat-template"] = str(files / f"h{number}/t.jinja")
        vllm_generation.prepared(FakeModule(tmp_path / "etc", wanted=[named]))
        chat = switch(tmp_path, runtime)
    assert vllm_generation.confirmed(FakeModule(tmp_path / "etc", files_path=str(files)), [chat])
    assert sorted(path.name for path in files.iterdir()) == ["h1", "h2"]


def test_releases_that_no_generation_needs_are_removed(tmp_path: Path, runtime: Path) -> None:
    for name in ("r1", "r2"):
        (tmp_path / "releases" / name).mkdir(parents=True)
    prepare(tmp_path, release=str(tmp_path / "releases/r1"))
    module = FakeModule(tmp_path / "etc", releases_path=str(tmp_path / "releases"))
    chat = switch(tmp_path, runtime)
    assert vllm_generation.confirmed(module, [chat])
    assert [path.name for path in (tmp_path / "releases").iterdir()] == ["r1"]


def test_instances_that_nobody_wants_are_named(tmp_path: Path, runtime: Path) -> None:
    (tmp_path / "etc/old").mkdir()
    assert prepare(tmp_path)["obsolete"] == ["old"]


def test_the_environment_is_in_no_diff(tmp_path: Path, runtime: Path) -> None:
    module = FakeModule(tmp_path / "etc", wanted=[wanted(TOKEN="hunter2")])
    assert "hunter2" not in json.dumps(vllm_generation.prepared(module))


def test_what_the_facts_of_a_host_say_against_its_instances() -> None:
    def instance(name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "config": {"port": 8000}, "environment": {}, "gpus": [], **more}

    ports = [
        {"port": 8000, "program": "python3", "unit": "nginx.service"},
        {"port": 8001, "program": "python3", "unit": "vllm@other.service"},
    ]
    gpu = {
        "index": 0,
        "name": "Tesla V100",
        "memory_mib": 16384,
        "compute_capability": 7.0,
        "driver": "570.1",
        "mig": True,
    }
    facts = {"ports": ports, "gpus": [gpu], "gpu_error": "", "memory_bytes": 8 * vllm_fit.GB}
    assert vllm_fit.problems([instance("a"), instance("b", config={"port": 8001})], facts, "cpu") == [
        "vllm_instances (a): port 8000 is taken by python3; choose another or stop it",
        "vllm_instances need about 12.6 GB of memory, but the host has 8.0 GB; run fewer instances or lower VLLM_CPU_KVCACHE_SPACE"
        " (an estimate: `vllm_fit: warn` goes on nevertheless)",
    ]
    told = " ".join(vllm_fit.problems([instance("b", config={"port": 8001}, gpus=[0, 7])], facts, "cuda"))
    for problem in (
        "driver is 570.1, but vLLM needs 580",
        "compute capability 7.0",
        "gpus names 7, but the host has 0",
        "GPU 0 is in MIG mode",
    ):
        assert problem in told
    assert vllm_fit.problems([instance("b", gpus=[7])], {**facts, "ports": []}, "cuda", driver_due=True) == []
    assert "nvidia-smi is not there" in vllm_fit.problems([], {**facts, "gpus": []}, "cuda")[0]
    assert "nvidia-smi fails: no" in vllm_fit.problems([], {**facts, "gpus": [], "gpu_error": "no"}, "cuda")[0]
    old = [instance("c", gpus=[0])]
    assert len(vllm_fit.problems(old, {**facts, "ports": []}, "cuda")) == 3
    for fit in ("warn", "off"):
        told = " ".join(vllm_fit.problems(old, {**facts, "ports": []}, "cuda", fit=fit))
        assert "MIG" in told and "driver" not in told, "what is known is refused, what is estimated is not"
    other = {**gpu, "index": 3, "driver": "580.1", "compute_capability": 9.0, "mig": False}
    facts = {**facts, "ports": [], "gpus": [gpu, other]}
    assert vllm_fit.problems([instance("d", gpus=[3])], facts, "cuda") == [], "a GPU that nobody uses may be old"


class Systemd(FakeModule):
    """One that has units which run."""

    def run_command(self, command: list[str], **options: object) -> tuple[int, str, str]:
        super().run_command(command, **options)
        if command[:2] != ["systemctl", "show"]:
            return 1, "", "no Docker here"
        return 0, "\n\n".join(f"Id={unit}\nActiveState=active\nUnitFileState=enabled" for unit in command[3:]), ""


def look(path: Path, *instances: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return vllm_look.look(Systemd(path / "etc", wanted=list(instances), judgement=None, **parameters))


def judge(
    findings: dict[str, Any], *instances: dict[str, Any], check_mode: bool = False, **more: Any
) -> dict[str, Any]:
    settings = {
        "device": "cpu", "release_gb": 1, "gpus": [], "memory_bytes": 64 * vllm_fit.GB, "require_models": False,
        "internal_key": vllm_keys.digest("new"), "former_key_seconds": 60,
    }  # fmt: skip
    return vllm_fit.judge(findings, instances, {**settings, **more}, check_mode)


def complete(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """A release that is there."""
    release = path / "release"
    release.mkdir()
    (release / ".complete").touch()
    (release / "options.json").write_text(json.dumps(table))
    return {"release": str(release)}


def test_the_look_at_a_bare_host_finds_nothing_and_what_is_wanted(tmp_path: Path) -> None:
    bare = look(tmp_path)
    assert (bare["deployed"], bare["instances"], bare["release"]["complete"]) == (False, [], False)
    chat = {**wanted(), "config": {"model": "/nowhere/qwen", "port": 8000}}
    found = look(tmp_path, chat, release=str(tmp_path / "releases/r1"))
    (entry,) = found["instances"]
    assert (entry["wanted"], entry["differs"], entry["current"], entry["runs"]) == (True, True, None, "")
    said = judge(found, chat, require_models=True, release_gb=10**9)
    assert (said["pending"], said["obsolete"], said["release_complete"]) == (["chat"], [], False)
    assert [problem.split(";")[0].split(" has ")[0] for problem in said["problems"]] == [
        "vllm_instances (chat): the model 'qwen' is not in /nowhere (no /nowhere/qwen/config.json, nor params.json)",
        str(tmp_path),
    ]
    assert judge(found, chat, require_models=True, check_mode=True)["problems"] == [], "the run would bring the model"


def test_the_look_says_which_generations_there_are_and_what_they_run(tmp_path: Path, runtime: Path) -> None:
    there = complete(tmp_path, {"max-model-len": "int", "dtype": "any"})

    def chat(length: int) -> dict[str, Any]:
        config = {"model": "/nowhere/qwen", "port": 8000, "max-model-len": length}
        return {**wanted(CUDA_VISIBLE_DEVICES="0,2"), "config": config}

    for length in (1, 2, 3):
        vllm_generation.prepared(FakeModule(tmp_path / "etc", wanted=[chat(length)], **there))
        switch(tmp_path, runtime, confirm=length < 3)
    (tmp_path / "etc/old").mkdir()
    found = look(tmp_path, chat(4), **there)
    entry, old = found["instances"]
    seen = {key: entry[key] for key in ("current", "previous", "running", "confirmed", "active", "enabled", "runtime")}
    assert seen == {
        "current": 3, "previous": 2, "running": 3, "confirmed": [1, 2], "active": "active", "enabled": True, "runtime": "systemd",
    }  # fmt: skip
    assert (entry["runs"], entry["port"], entry["gpus"]) == (there["release"], 8000, [0, 2])
    assert (old["name"], old["wanted"], old["current"]) == ("old", False, None)
    assert found["release"] == {"complete": True, "options": {"max-model-len": "int"}}, "only what is asked about"
    said = judge(found, chat(4))
    assert (said["pending"], said["obsolete"], said["problems"], said["warnings"]) == (["chat"], ["old"], [], [])

    for name in ("chat", "old"):
        (tmp_path / "etc" / name / "held").write_text("ann, since noon")
    found = look(tmp_path, chat(4), **there)
    said = judge(found, {**chat(4), "gate": {"name": "chat", "model": "renamed"}})
    assert (said["pending"], said["obsolete"]) == ([], [])
    assert "stays as it is, because it is held: ann, since noon. Without" in said["warnings"][0]
    assert said["gates"] == [{"name": "chat", "model": "qwen"}], "it is asked as it is"


def test_the_look_says_which_keys_are_taken_and_which_are_to_be(tmp_path: Path) -> None:
    old, new = (f"{vllm_keys.digest(key)}\n" for key in ("old", "new"))
    file = tmp_path / "accepted"

    def keys() -> tuple[dict[str, Any], int]:
        found = look(tmp_path, accepted_keys=str(file))
        return judge(found)["internal_keys"], found["clock"]

    assert keys()[0] | {"ending": ""} == {"accepted": new, "ending": "", "former": False, "notes": []}
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/internal_key").write_text("old")  # of instances that were started before there was such a file
    assert (keys()[0]["accepted"], keys()[0]["former"]) == (new + old, True)
    file.write_text(new + old)
    said, clock = keys()
    assert (said["accepted"], said["ending"], said["former"]) == (new + old, f"{new}{old.strip()} {clock + 60}\n", True)
    file.write_text(new)
    assert keys()[0]["accepted"] == new, "a key that was taken away does not come back"


def test_a_container_that_reads_the_key_itself_is_known(tmp_path: Path) -> None:
    generation = tmp_path / "etc/chat/1"
    generation.mkdir(parents=True)
    assert look(tmp_path)["container_key"] is False
    volumes = [vllm_container.mount("/etc/vllm/container_key", "/run/secrets/internal_key")]
    (generation / "compose.json").write_text(json.dumps({"services": {"vllm": {"volumes": volumes}}}, indent=2))
    assert look(tmp_path)["container_key"] is True


def test_the_whole_table_of_options_comes_for_one_that_is_not_in_it(tmp_path: Path) -> None:
    there = complete(tmp_path, {"max-model-len": "int", "dtype": "any"})
    wrong = {**wanted(), "config": {"model": "/nowhere/qwen", "port": 8000, "max-modellen": 1}}
    said = judge(look(tmp_path, wrong, **there), wrong)
    assert said["problems"] == [
        "vllm_instances (chat): option 'max-modellen' is not one of vllm serve's; did you mean 'max-model-len'?"
    ]


def test_copied_files_of_a_release_are_no_newer_than_what_was_compiled_from_them(tmp_path: Path) -> None:
    (tmp_path / "flashinfer/data").mkdir(parents=True)
    kernel = tmp_path / "flashinfer/data/sampling.cu"
    kernel.write_text("")
    (tmp_path / "link").symlink_to("/etc/hostname")
    vllm_release.forget_times(tmp_path)
    assert kernel.stat().st_mtime == vllm_release.WHEEL_EPOCH


# --- what a person stopped


def says(path: Path, operator: str) -> None:
    """An operator's word."""
    (path / "words").mkdir(exist_ok=True)
    (path / "words/chat.json").write_text(host_agent.spoken(operator, "ada", "now", ""))


def test_what_a_person_stopped_is_prepared_and_need_not_run(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    switch(tmp_path, runtime)
    runtime.unlink()  # it does not run
    assert prepare(tmp_path)["pending"] == ["chat"]
    says(tmp_path, "stopped")
    assert prepare(tmp_path)["pending"] == []
    # what is new is written and switched to, once, and nothing is started for it
    assert prepare(tmp_path, 2)["pending"] == ["chat"]
    module = FakeModule(tmp_path / "etc", idle=["chat"])
    vllm_generation.activate(module, [chat := generations_host.Deployed(module, "chat")])
    assert chat.current() == 2
    assert not [command for command in module.commands if "restart" in command or "enable" in command]
    assert prepare(tmp_path, 2)["pending"] == []
    # drained is not stopped
    says(tmp_path, "drained")
    assert prepare(tmp_path, 2)["pending"] == ["chat"]


def test_what_operators_said_goes_with_the_instance(tmp_path: Path, runtime: Path) -> None:
    prepare(tmp_path)
    chat = switch(tmp_path, runtime)
    says(tmp_path, "stopped")
    chat.erase()
    assert list((tmp_path / "words").iterdir()) == []
