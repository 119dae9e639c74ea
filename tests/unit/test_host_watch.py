"""When the watch of a host restarts an instance, when it does not, and what it tells. Whatever happens, never more often than is allowed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import gpu_health, host_watch
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks import (
    BUSY,
    FAILED,
    GOOD,
    HUNG,
    REFUSED,
    SILENT,
    WORKING,
    Answer,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu_health import Finding, Gpu
from ansible_collections.gpufleet.llm.plugins.module_utils.host_watch import (
    Disk,
    Engine,
    History,
    Limits,
    Request,
    Settings,
    Situation,
    Unit,
    Verdict,
)
from hypothesis import given
from hypothesis import strategies as st

A, B = "a" * 32, "b" * 32
RUNS = Unit("active", A, 100.0)
UP = {"operator": "up"}
HANGS = Answer(HUNG, "no answer for 45 s, and its engine did nothing for 45 s")


def engine(*answers: Answer, **settings: Any) -> Engine:
    """One that has given these answers since its start, each a while after the other."""
    made = Engine("chat", Settings(**settings))
    for number, answer in enumerate(answers):
        made.hears(answer, RUNS, 1000.0 + 50 * number)
    return made


def verdict(made: Engine, time: float = 2000.0, **situation: Any) -> Verdict:
    return made.verdict(Situation(**{"unit": RUNS, **situation}), time)


# --- who hangs


def test_an_engine_that_hangs_after_it_answered_is_restarted() -> None:
    found = verdict(engine(Answer(GOOD), HANGS))
    assert found.restart.startswith("chat hangs (no answer for 45 s")
    assert (found.cause, found.finding and found.finding.level) == ("hung", "critical")


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [Answer(GOOD)],
        [Answer(WORKING)],
        [Answer(GOOD), Answer(BUSY)],
        [Answer(GOOD), Answer(REFUSED, "refused")],
        [Answer(GOOD), Answer(FAILED, "HTTP 500")] * 5,
        # it has not answered since its start
        [HANGS],
        [HANGS] * 9,
        [Answer(REFUSED, "refused"), HANGS],
        [Answer(BUSY), HANGS],
        # and it is back
        [Answer(GOOD), HANGS, Answer(GOOD)],
        [Answer(GOOD), HANGS, Answer(WORKING)],
        # nobody takes the connection, for a moment
        [Answer(GOOD), Answer(SILENT, "no connection")],
    ],
)
def test_nothing_else_is_a_reason(answers: list[Answer]) -> None:
    assert not verdict(engine(*answers)).restart


def test_one_that_nobody_takes_connections_of_hangs_as_well() -> None:
    made = engine(Answer(GOOD))
    for second in range(0, 60, 8):
        made.hears(Answer(SILENT, "no connection within 3 s"), RUNS, 2000.0 + second)
        assert made.hangs == (second >= 45)
    assert verdict(made).restart


def test_that_it_has_answered_before_is_seen_by_what_it_counts() -> None:
    """After a start of the watch itself: what is there hangs already."""
    made = engine()
    made.hears(HANGS, RUNS, 2000.0, served=True)
    assert verdict(made).restart


def test_a_new_start_has_to_answer_first() -> None:
    made = engine(Answer(GOOD))
    again = Unit("active", B, 1900.0)
    made.hears(HANGS, again, 2000.0)
    assert not made.verdict(Situation(again), 2000.0).restart


def test_a_start_that_takes_long_is_told_and_left_alone() -> None:
    made = engine(Answer(REFUSED, "it refuses connections"), start_seconds=600)
    assert verdict(made, 699.0) == Verdict()
    found = verdict(made, 3700.0)
    assert not found.restart
    assert found.finding and "60 min ago and has not answered" in found.finding.what


@pytest.mark.parametrize("state", ["inactive", "deactivating", "activating", "failed", "unknown"])
def test_what_does_not_run_is_systemd_s_business(state: str) -> None:
    assert verdict(engine(Answer(GOOD), HANGS), unit=Unit(state, A, 100.0)) == Verdict()
    made = engine(Answer(GOOD), HANGS)
    made.gone()
    assert verdict(made) == Verdict()


@pytest.mark.parametrize(
    ("situation", "words"),
    [
        ({"word": {"operator": "drained", "turn": "upgrade"}}, "the turn upgrade is at work"),
        ({"word": {"operator": "stopped"}}, "it is said to be stopped"),
        ({"word": {"operator": "drained", "by": "ada"}}, "left as it is for whoever looks at it"),
        ({"sick": "GPU 0 needs a reset"}, "a restart does not help"),
        ({"restarts": (500.0, 1500.0, 1900.0)}, "it was restarted 3 times within 60 min"),
    ],
)
def test_one_that_hangs_and_is_left_alone_is_told(situation: dict[str, Any], words: str) -> None:
    found = verdict(engine(Answer(GOOD), HANGS), **situation)
    assert not found.restart
    assert found.finding and words in found.finding.what
    assert "hangs" in found.finding.what


def test_the_switch_turns_restarts_off() -> None:
    found = verdict(engine(Answer(GOOD), HANGS, restart=False))
    assert not found.restart
    assert found.finding and "host_agent_watch_restart is off" in found.finding.what
    assert "systemctl kill --signal=KILL vllm@chat" in found.finding.advice


def test_it_is_asked_for_once() -> None:
    made = engine(Answer(GOOD), HANGS)
    assert verdict(made, 2000.0).restart
    again = verdict(made, 2000.0 + host_watch.ASKED_SECONDS - 1)
    assert not again.restart and again.finding
    assert verdict(made, 2000.0 + host_watch.ASKED_SECONDS).restart


def test_an_error_of_the_gpu_restarts_what_does_not_answer_after_it() -> None:
    wrong = Answer(FAILED, "HTTP 500: CUDA error")
    assert not verdict(engine(Answer(GOOD)), harm="XID 94").restart, "it answers: it was not hit"
    assert not verdict(engine(Answer(GOOD), wrong), harm="XID 94").restart, "it may be about to end by itself"
    found = verdict(engine(Answer(GOOD), wrong, wrong), harm="XID 94")
    assert (found.cause, "XID 94" in found.restart) == ("gpu", True)
    assert not verdict(engine(Answer(GOOD), wrong, wrong)).restart
    told = verdict(engine(Answer(GOOD), wrong, wrong)).finding
    assert told and told.level == "warn" and "HTTP 500" in told.what


# --- limits

ANSWERS = [Answer(kind, "why") for kind in (GOOD, WORKING, BUSY, FAILED, HUNG, REFUSED, SILENT)]
STEP = st.tuples(
    st.floats(0.0, 2000.0), st.sampled_from([*ANSWERS, HANGS, HANGS, HANGS]), st.sampled_from([True, True, True, False]),
    st.sampled_from([UP, UP, UP, {"operator": "drained"}, {"operator": "stopped"}, {"operator": "drained", "turn": "site"}]),
    st.booleans(),
)  # fmt: skip


@given(st.lists(STEP, max_size=80), st.integers(1, 4), st.sampled_from([60.0, 600.0, 3600.0]))
def test_never_more_restarts_than_allowed_whatever_happens(
    steps: list[tuple[float, Answer, bool, dict[str, str], bool]], most: int, seconds: float
) -> None:
    """The watch may lose its memory, and be wrong: heal.py counts by itself, and asks for the word and the start again."""
    limits, now, number = Limits(most, seconds), 0.0, 0
    made = Engine("chat", Settings(limits=limits))
    history, times = History(), []
    for later, answer, active, word, forgets in steps:
        now += later
        unit = Unit("active" if active else "failed", f"{number:032x}", 0.0)
        if forgets:
            made = Engine("chat", made.settings, answered=made.answered)
        made.hears(answer, unit, now)
        # a watch that knows of no history asks for more
        known = () if forgets else history.times
        found = made.verdict(Situation(unit, word, known), now)
        if not found.restart:
            continue
        assert active and word == UP
        request = Request("chat", unit.invocation, found.restart)
        if host_watch.refusal(request, ["chat"], unit, word, history.times, limits, now):
            history = history.refusing()
            continue
        history = History.read(history.restarted(request, now, "now", limits.restarts).written())
        times.append(now)
        number += 1
    for index, time in enumerate(times):
        assert len([other for other in times[: index + 1] if time - other < seconds]) <= most
    assert history.causes.get("hung", 0) == len(times)


def test_the_limits() -> None:
    limits = Limits(3, 3600.0)
    assert limits.left([], 0.0) == 3
    assert limits.left([100.0, 200.0], 300.0) == 1
    assert limits.left([100.0, 200.0, 300.0], 400.0) == 0
    assert limits.again([100.0, 200.0, 300.0], 400.0) == 3300.0
    assert limits.left([100.0, 200.0, 300.0], 3700.0) == 1
    assert limits.again([100.0, 200.0], 300.0) == 0.0
    # of a clock that went back, nothing is believed that would allow more
    assert limits.left([9e9, 9e9, 9e9], 1.0) == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"instances": ["embed"]}, "no such instance"),
        ({"unit": Unit("active", B)}, "meanwhile"),
        ({"unit": Unit("deactivating", A)}, "meanwhile"),
        ({"word": {"operator": "stopped"}}, "it is stopped"),
        ({"word": {"operator": "drained"}}, "it is drained"),
        ({"word": {"operator": "drained", "turn": "upgrade"}}, "it is drained"),
        ({"before": [1.0, 2.0, 3.0]}, "restarted 3 times within 60 min"),
        ({"before": [1.0, 2.0]}, ""),
    ],
)
def test_what_is_asked_for_is_judged_again_by_who_has_the_rights(changes: dict[str, Any], why: str) -> None:
    asked: dict[str, Any] = {
        "instances": ["chat"],
        "unit": RUNS,
        "word": UP,
        "before": [],
        "limits": Limits(),
        "now": 10.0,
    }
    found = host_watch.refusal(Request("chat", A, "it hangs"), **{**asked, **changes})
    assert why in found if why else found == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chat", ""), ("chat", "[]"), ("chat", "null"), ("chat", "{}"), ("chat", '{"invocation": "x"}'), ("../chat", Request("chat", A, "w").written()),
        ("chat;reboot", Request("chat", A, "w").written()), ("", Request("chat", A, "w").written()), ("-H", Request("chat", A, "w").written()),
        ("chat", Request("chat", A, "w", "fun").written()), ("chat", Request("chat", "A" * 32, "w").written()),
    ],
)  # fmt: skip
def test_a_request_that_is_none(name: str, text: str) -> None:
    assert Request.read(name, text) is None


def test_a_request_is_read_as_it_was_written() -> None:
    asked = Request("chat-2.b", A, "it hangs\n<0>and lies", "gpu")
    assert Request.read("chat-2.b", asked.written()) == Request("chat-2.b", A, "it hangs <0>and lies", "gpu")


@given(st.text())
def test_no_file_breaks_it(text: str) -> None:
    Request.read("chat", text)
    assert History.read(text).refused >= 0
    assert host_watch.shown(text, 1.0)[1] == 2


# --- disks


@pytest.mark.parametrize(
    ("used", "inodes", "level"),
    [(84.9, 10, None), (85.0, 10, "warn"), (95.0, 10, "critical"), (10, 96, "critical"), (99, 86, "critical")],
)
def test_disks(used: float, inodes: float, level: str | None) -> None:
    found = host_watch.disk_findings([Disk("/srv/models", "models", used, inodes, 12.34)], 85, 95)
    assert [one.level for one in found] == ([level] if level else [])
    if found:
        assert "12.3 GiB are free" in found[0].what and "du -xsh /srv/models" in found[0].advice
        assert ("out of inodes" in found[0].what) == (inodes > used)


# --- what is told

GPU = Gpu(1, "0000:3d:00.0", "GPU-b")
RESET = Finding(
    "recovery 0000:3d:00.0", "critical", "it wants a reset", "reset_gpu", "Reset it.", GPU, ("chat", "embed"), out=True
)
HOT = Finding("hot", "warn", "it is hot", "inspect", "Cool it.", GPU, ("chat",))


def test_a_gpu_takes_its_instances_out_and_not_the_host() -> None:
    assert host_watch.sick([RESET, HOT]) == {
        "chat": "GPU 1 (0000:3d:00.0): it wants a reset",
        "embed": "GPU 1 (0000:3d:00.0): it wants a reset",
    }
    assert host_watch.sick([HOT]) == {}


def test_the_report_of_a_person() -> None:
    text = host_watch.health("gpu-1", [HOT, RESET], {"hot": "2026-11-30T10:00:00Z"}, 1000.0, 1.0)
    lines, status = host_watch.shown(text, 1010.0)
    assert status == 2
    assert lines[0] == "CRITICAL GPU 1 (0000:3d:00.0): it wants a reset"
    assert lines[1].strip() == "instances: chat, embed"
    assert lines[2].strip() == "Reset it."
    assert "WARN     GPU 1 (0000:3d:00.0): it is hot" in lines
    assert host_watch.shown(host_watch.health("gpu-1", [HOT], {}, 1000.0, 1.0), 1010.0)[1] == 1
    assert host_watch.shown(host_watch.health("gpu-1", [], {}, 1000.0, 1.0), 1010.0) == (
        ["OK       nothing to report"],
        0,
    )
    for old in (1000.0 + host_watch.STALE_SECONDS + 1, 1.0):
        lines, status = host_watch.shown(host_watch.health("gpu-1", [], {}, 1000.0, 1.0), old)
        assert status == 2 and "has said nothing" in lines[0]
    assert host_watch.shown(None, 1.0)[1] == 2


def test_the_metrics_are_prometheus_text() -> None:
    made = engine(Answer(GOOD), HANGS)
    history = History((1.0,), {"hung": 2}, 1)
    told = host_watch.Told(
        12.5, [made], {"chat": history}, Limits(), [RESET, HOT], [GPU, Gpu(0, "0000:17:00.0", 'a"\\\nb')],
        {("0000:3d:00.0", 94): 3}, [Disk("/", "root", 50, 1, 1)], 10.0,
    )  # fmt: skip
    lines = host_watch.metrics(told).splitlines()
    for line in (
        'vllm_fleet_restarts_total{instance_name="chat",cause="hung"} 2',
        'vllm_fleet_restarts_left{instance_name="chat"} 2',
        'vllm_fleet_restarts_refused_total{instance_name="chat"} 1',
        'vllm_fleet_instance_hangs{instance_name="chat"} 1',
        'vllm_fleet_instance_sick{instance_name="chat"} 1',
        'vllm_fleet_gpu_level{gpu="1",pci="0000:3d:00.0",uuid="GPU-b"} 2',
        'vllm_fleet_gpu_level{gpu="0",pci="0000:17:00.0",uuid="a\\"\\\\\\nb"} 0',
        'vllm_fleet_gpu_xid_total{gpu="1",pci="0000:3d:00.0",xid="94"} 3',
        'vllm_fleet_findings{level="critical"} 1',
        'vllm_fleet_disk_used_ratio{path="/",holds="root"} 0.5',
        "vllm_fleet_watch_time_seconds 12.5",
    ):
        assert line in lines
    for line in lines:
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{(\w+="(\\.|[^"\\])*",?)*\})? [-0-9.e+]+', line), line


def test_a_unit_as_systemd_shows_it() -> None:
    shown = {
        "Id": "vllm@chat.service",
        "ActiveState": "active",
        "InvocationID": A,
        "ActiveEnterTimestampMonotonic": "1500000",
    }
    assert Unit.of(shown) == Unit("active", A, 1.5)
    assert Unit.of({"ActiveState": "inactive", "InvocationID": "", "ActiveEnterTimestampMonotonic": "0"}) == Unit(
        "inactive", "", 0.0
    )


def test_levels_are_in_their_order() -> None:
    assert host_watch.worst([]) == "ok"
    assert host_watch.worst([HOT, RESET, HOT]) == "critical"
    assert json.loads(host_watch.health("a", [HOT, RESET], {}, 1.0, 1.0))["findings"][0]["level"] == "critical"
    assert set(gpu_health.ADVICE) == set(gpu_health.ACTIONS)
