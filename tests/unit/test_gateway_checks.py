"""Which backends a gateway uses: the decisions. tests/gateway/test_checks_program.py has the program that carries them out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import gateway_checks
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks import (
    FAILED,
    GOOD,
    HUNG,
    REFUSED,
    SILENT,
    WORKING,
    Answer,
    Check,
    Fleet,
    FleetFileError,
    OtherKeyError,
    Progress,
    Route,
    Use,
    Wish,
    decide,
    lines,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks_host import not_after
from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds import Work, work

KEY = "internal"
OK, NEW, OUT = Check("ok", 1.0, ""), Check(), Check("failed", 1.0, "it refuses connections")
UP = Wish()
A, B, C = "chat@a", "chat@b", "chat@c"


def fleet_text(**more: Any) -> str:
    told = {
        "internal_key_sha256": hashlib.sha256(KEY.encode()).hexdigest(),
        "gateway": "gw-1",
        "backends": {
            name: {"instance": "chat", "host": name[-1], "address": "10.0.0.1", "port": 8000, "agent": "10.0.0.1:9440"}
            for name in (A, B, C)
        },
        "routes": [
            {"model": "one", "backends": [A, B], "min_available": 1},
            {"model": "two", "backends": [B], "min_available": 0},
        ],
    }
    return json.dumps({**told, **more})


def test_a_backend_is_asked_for_the_model_of_its_first_route() -> None:
    fleet = Fleet.read(fleet_text(), KEY)
    assert {name: one.model for name, one in fleet.backends.items()} == {A: "one", B: "one"}, "C has no route"
    assert fleet.routes == (Route("one", (A, B), 1), Route("two", (B,), 0))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", fleet_text(routes=[{"model": "one", "backends": ["nobody"], "min_available": 1}])]
)
def test_a_fleet_that_cannot_be_used_is_refused_in_words(text: str) -> None:
    with pytest.raises(FleetFileError, match="cannot be read"):
        Fleet.read(text, KEY)


def test_a_fleet_for_another_key_is_refused() -> None:
    """With it every backend would answer 401, and be taken out."""
    with pytest.raises(OtherKeyError):
        Fleet.read(fleet_text(), "another")


# --- one backend ----------------------------------------------------------------------------------------------------


def heard(check: Check, *answers: str) -> list[str]:
    """The results after each answer."""
    found = []
    for answer in answers:
        check = check.after(Answer(answer, "why"), 5.0)
        found.append(check.result)
    return found


@pytest.mark.parametrize(
    ("check", "answers", "expected"),
    [
        (NEW, [GOOD], ["ok"]),
        (NEW, [REFUSED, GOOD], ["new", "ok"]),
        (NEW, [FAILED, FAILED, FAILED], ["new", "new", "failed"]),
        (OK, [REFUSED, REFUSED], ["ok", "failed"]),
        (OK, [REFUSED, GOOD, REFUSED, REFUSED], ["ok", "ok", "ok", "failed"]),
        (OK, [FAILED, FAILED, FAILED], ["ok", "ok", "failed"]),
        (OK, [FAILED, FAILED, GOOD, FAILED, FAILED], ["ok"] * 5),
        (OK, [FAILED, REFUSED, FAILED], ["ok", "ok", "failed"]),
        (OK, [HUNG], ["failed"]),
        (OUT, [GOOD, GOOD], ["failed", "ok"]),
        (OUT, [GOOD, FAILED, GOOD, GOOD], ["failed", "failed", "failed", "ok"]),
        # a full engine
        (OK, [WORKING] * 5, ["ok"] * 5),
        (OK, [FAILED, FAILED, WORKING, FAILED], ["ok"] * 4),
        (NEW, [WORKING], ["ok"]),
        (OUT, [WORKING] * 5, ["failed"] * 5),
    ],
)
def test_a_result_changes_with_the_answers(check: Check, answers: list[str], expected: list[str]) -> None:
    assert heard(check, *answers) == expected


def test_why_and_since_are_those_of_the_change() -> None:
    check = OK.after(Answer(REFUSED, "it refuses"), 10.0).after(Answer(REFUSED, "it refuses"), 11.0)
    assert (check.since, check.why) == (11.0, "it refuses")
    later = check.after(Answer(FAILED, "HTTP 500"), 12.0).after(Answer(HUNG, "no answer"), 13.0)
    assert (later.since, later.why) == (11.0, "it refuses"), "else state.json would change with each check"
    back = later.after(Answer(GOOD), 14.0).after(Answer(GOOD), 15.0)
    assert (back.result, back.since, back.why) == ("ok", 15.0, "")


def test_what_may_change_soon_is_asked_soon() -> None:
    assert OK.after(Answer(FAILED), 1.0).undecided
    assert OUT.after(Answer(GOOD), 1.0).undecided
    for check in (OK, NEW, OUT, OUT.after(Answer(FAILED), 1.0), OK.after(Answer(GOOD), 1.0)):
        assert not check.undecided


def test_what_is_written_down_is_remembered() -> None:
    assert Check.remembered(OUT.written()) == OUT
    for damaged in ({}, {"check": "new"}, {"check": 5}):
        assert Check.remembered(damaged) == NEW
    wish = Wish("drained", False, "alice", "disk", 7.0, force=True)
    assert Wish.remembered(wish.written()) == wish
    assert Wish.remembered({}) == UP


# --- hung, or busy --------------------------------------------------------------------------------------------------

IDLE = Work((5.0, 5.0, 5.0, 5.0), 0.0, 0.0)


def test_an_engine_that_moves_nothing_hangs() -> None:
    progress = Progress(100.0, 20.0)
    for now in (104.0, 108.0, 119.9):
        progress.see(IDLE, now)
        assert not progress.hangs(now)
    assert progress.left(119.0) == 1.0
    assert progress.hangs(120.0)
    assert not progress.worked


def test_an_engine_that_tells_nothing_hangs() -> None:
    assert Progress(100.0, 20.0).hangs(120.0)


def test_a_prompt_of_a_minute_moves_the_cache_alone() -> None:
    """As vLLM 0.32 does it (docs/gateway.md): no iteration is counted before the first token, and the question waits."""
    progress = Progress(0.0, 20.0)
    for second in range(4, 64, 4):
        progress.see(Work((5.0, 5.0, 5.0, 5.0), 2.0, second / 64), float(second))
        assert not progress.hangs(float(second))
    assert progress.worked


def test_a_question_that_is_taken_in_is_no_work() -> None:
    progress = Progress(0.0, 20.0)
    progress.see(IDLE, 1.0)
    progress.see(replace(IDLE, load=1.0), 5.0)
    assert not progress.worked
    assert not progress.hangs(24.0)
    assert progress.hangs(25.0)


def test_aborted_requests_are_no_movement() -> None:
    """An engine that hangs lets its server count those who went away."""
    text = 'vllm:request_success_total{{finished_reason="{}"}} {}\nvllm:kv_cache_usage_perc{{engine="0"}} 0.25\n'
    assert work(text.format("abort", 1)) == work(text.format("abort", 9))
    assert work(text.format("stop", 1)) != work(text.format("stop", 9))
    assert work(text.format("stop", 1)).kv == 0.25


# --- which are used -------------------------------------------------------------------------------------------------

ROUTE = Route("one", (A, B, C), 2)


def used(*names: str) -> dict[str, Use]:
    """What was before."""
    return {name: Use(name in names, "", "ok", since=1.0) for name in (A, B, C)}


def leaving(asked: float) -> Wish:
    return Wish(leaving=True, asked=asked)


def of(uses: dict[str, Use]) -> dict[str, str]:
    """Each in a word."""
    return {name[-1]: "kept" if use.kept else "used" if use.use else "out" for name, use in uses.items()}


@pytest.mark.parametrize(
    ("checks", "wishes", "before", "expected"),
    [
        # those that answer are used, those that were not asked yet are not
        ((OK, OK, NEW), (UP, UP, UP), (), "used used out"),
        ((OK, OUT, OUT), (UP, UP, UP), (A, B, C), "used out out"),
        # the minimum never keeps those that do not answer
        ((OUT, OUT, OUT), (UP, UP, leaving(1)), (A, B, C), "out out out"),
        # one of three may go, the second that asks may not
        ((OK, OK, OK), (leaving(5), UP, UP), (A, B, C), "out used used"),
        ((OK, OK, OK), (leaving(5), leaving(3), UP), (A, B, C), "kept out used"),
        ((OK, OK, OK), (leaving(3), leaving(3), UP), (A, B, C), "out kept used"),
        (
            (OK, OK, OK),
            (Wish("drained", asked=2.0), leaving(3), Wish("stopped", asked=4.0)),
            (A, B, C),
            "out kept kept",
        ),
        # unless an operator forces it; who is forced out does not count for the others
        ((OK, OK, OK), (leaving(3), Wish("drained", asked=9.0, force=True), UP), (A, B, C), "kept out used"),
        # one that failed counts for nothing: nobody else may go
        ((OK, OK, OUT), (leaving(5), UP, UP), (A, B, C), "kept used out"),
        # who was let go stays out, whatever becomes of the others: it may be gone in the next moment
        ((OK, OK, OUT), (leaving(5), UP, UP), (B, C), "out used out"),
        # who comes does not come while it is drained, nobody else being there
        ((OK, OUT, OUT), (Wish("drained", asked=1.0), UP, UP), (), "out out out"),
        # and is used when nobody wants it out any more
        ((OK, OK, OK), (UP, UP, UP), (B, C), "used used used"),
    ],
)
def test_who_is_used(
    checks: tuple[Check, ...], wishes: tuple[Wish, ...], before: tuple[str, ...], expected: str
) -> None:
    names = (A, B, C)
    uses = decide(
        [ROUTE], dict(zip(names, checks, strict=True)), dict(zip(names, wishes, strict=True)), used(*before), 9.0
    )
    assert " ".join(of(uses).values()) == expected


def test_a_forced_drain_is_heard() -> None:
    told = {"operator": "drained", "force": "yes", "since": "2026-11-30T00:00:00Z"}
    assert Wish.of(told, UP, 9.0).force
    assert not Wish.of({**told, "force": ""}, UP, 9.0).force
    assert not Wish.of({**told, "operator": "up"}, UP, 9.0).force


def test_a_share_of_the_requests_is_heard_and_told() -> None:
    """By who is up: an instance that leaves has no share."""
    told = {"operator": "up", "share": "10", "turn": "upgrade"}
    wish = Wish.of(told, UP, 9.0)
    assert (wish.share, wish.wants_out, wish.says_something) == (0.1, False, True)
    assert Wish.remembered(wish.written()) == wish
    assert Wish.of({**told, "operator": "drained"}, UP, 9.0).share == 1
    for damaged in ("", "0", "101", "ten", "-5", "1e1"):
        assert Wish.of({**told, "share": damaged}, UP, 9.0) == UP
    before = used(A, B)
    after = decide([Route("one", (A, B), 2)], {A: OK, B: OK}, {A: wish}, before, 9.0)
    assert after[A] == Use(True, "gets 10% of the requests at most", "ok", since=9.0, share=0.1)
    assert [line for _warning, line in gateway_checks.lines([], before, after)] == [
        f"{A} gets 10% of the requests at most []"
    ]
    fresh = decide([Route("one", (A, B), 2)], {A: OK, B: OK}, {A: wish}, used(B), 9.0)
    [line] = [line for _warning, line in gateway_checks.lines([], used(B), fresh)]
    assert line == f"{A} is used: nobody wants it out any more; it gets 10% of the requests at most []"
    back = decide([Route("one", (A, B), 2)], {A: OK, B: OK}, {A: UP}, after, 12.0)
    assert [line for _warning, line in gateway_checks.lines([], after, back)] == [
        f"{A} gets as many requests as the others []"
    ]


def test_a_backend_of_several_routes_goes_when_all_of_them_allow_it() -> None:
    checks = {A: OK, B: OK, C: OK}
    routes = [Route("one", (A, B, C), 1), Route("two", (A, B), 2)]
    kept = decide(routes, checks, {A: leaving(1)}, used(A, B, C), 9.0)[A]
    assert kept.kept and kept.use
    assert "the route two needs at least 2" in kept.why
    assert of(decide([routes[0], Route("two", (A, B), 1)], checks, {A: leaving(1)}, used(A, B, C), 9.0))["a"] == "out"


def test_the_last_one_goes_where_the_route_needs_none() -> None:
    assert of(decide([Route("one", (A,), 0)], {A: OK}, {A: leaving(1)}, used(A), 9.0)) == {"a": "out"}


def test_since_stays_where_nothing_changes() -> None:
    one = decide([ROUTE], {A: OK, B: OUT, C: OK}, {C: leaving(2)}, used(A, B, C), 9.0)
    assert one == decide([ROUTE], {A: OK, B: OUT, C: OK}, {C: leaving(2)}, one, 20.0)
    two = decide([ROUTE], {A: OK, B: OK, C: OK}, {C: leaving(2)}, one, 20.0)
    assert (two[A].since, two[B].since) == (1.0, 20.0)
    assert of(two) == {"a": "used", "b": "used", "c": "out"}, "now it may go"


def test_a_host_wants_an_instance_out_whose_gpu_is_sick_and_leaves_the_operators_word_alone() -> None:
    told = {"operator": "up", "leaving": False, "sick": "GPU 1 needs\na reset", "asked": 40.0}
    wish = Wish.of(told, UP, 60.0)
    assert wish.wants_out
    assert (wish.words, wish.asked, wish.operator) == ("its host wants it out: GPU 1 needs a reset", 40.0, "up")
    assert Wish.remembered(wish.written()) == wish
    spoken = {**told, "operator": "drained", "by": "ada", "reason": "new fan", "since": "1970-01-01T00:00:50Z"}
    assert (Wish.of(spoken, UP, 60.0).words, Wish.of(spoken, UP, 60.0).asked) == ("drained by ada: new fan", 40.0)
    assert Wish.of({**told, "leaving": True}, UP, 60.0).words == "its host is about to stop it"
    assert not Wish.of({**told, "sick": ""}, wish, 70.0).wants_out, "it is well again"
    assert not wish.force


def test_an_engine_of_which_nobody_takes_connections_fails_as_one_that_answers_wrongly() -> None:
    check = Check("ok")
    for _ in range(3):
        assert check.result == "ok"
        check = check.after(Answer(SILENT, "no connection within 3 s"), 1.0)
    assert (check.result, check.why) == ("failed", "no connection within 3 s")


def test_the_words_of_a_wish() -> None:
    told = {"operator": "drained", "by": "alice", "reason": "new\nfan", "leaving": False}
    wish = Wish.of(told, UP, 50.0)
    assert (wish.words, wish.asked) == ("drained by alice: new fan", 50.0)
    assert Wish.of(told, wish, 60.0).asked == 50.0, "since it asked first"
    leaving = {**told, "leaving": True, "asked": 40.0}
    assert Wish.of(leaving, UP, 60.0).asked == 40.0, "the host knows best"
    assert Wish.of({**leaving, "since": "1970-01-01T00:00:30Z"}, UP, 60.0).asked == 30.0, (
        "it was drained before it stopped"
    )
    for damaged in ("now", "", "1970-01-01T00:00:30", None):
        assert Wish.of({**leaving, "since": damaged}, UP, 60.0).asked == 40.0
    assert Wish.of({"operator": "up", "leaving": False}, wish, 60.0) == UP


# --- what is told ---------------------------------------------------------------------------------------------------


def told_lines(before: dict[str, Use], after: dict[str, Use]) -> list[tuple[bool, str]]:
    return list(lines([ROUTE], before, after))


def test_each_change_is_one_line_with_its_meaning_for_the_route() -> None:
    one = decide([ROUTE], {A: OK, B: OUT, C: OK}, {}, used(A, B, C), 9.0)
    assert told_lines(used(A, B, C), one) == [
        (True, "chat@b is out of use: it refuses connections [route one: 2 of 3 backends in use]")
    ]
    assert told_lines(one, one) == []
    two = decide([ROUTE], {A: OK, B: OK, C: OK}, {}, one, 9.0)
    assert told_lines(one, two) == [(False, "chat@b is used: it answers [route one: 3 of 3 backends in use]")]
    three = decide([ROUTE], {A: OK, B: OUT, C: OK}, {A: Wish("drained", by="alice", asked=1.0)}, used(A, C), 9.0)
    [(warning, line)] = [one for one in told_lines(used(A, C), three) if "chat@a" in one[1]]
    assert warning
    assert line.startswith(
        "chat@a stays in use although it wants to leave: drained by alice; kept, because the route one needs"
    )
    none = decide([ROUTE], {A: OUT, B: OUT, C: OUT}, {}, used(A), 9.0)
    assert "NO BACKEND LEFT, clients get 503" in told_lines(used(A), none)[0][1]


def test_a_first_start_tells_nothing_of_what_was_not_asked() -> None:
    assert told_lines({}, decide([ROUTE], {A: NEW, B: NEW, C: NEW}, {}, {}, 9.0)) == []


def test_an_agent_is_told_what_is_out_once_nginx_knows() -> None:
    fleet = Fleet.read(fleet_text(), KEY)
    uses = decide(fleet.routes, {A: OK, B: OK}, {A: leaving(1)}, used(A, B), 9.0)
    told = gateway_checks.told(fleet, "a", uses, set(), {A: 3, "other@a": 1}, ["chat", "other"])
    assert told == {
        "gateway": "gw-1",
        "out": ["other"],
        "kept": {},
        "in_flight": {"chat": 3, "other": 1},
        "unrouted": ["other"],
        "tls": False,
    }
    assert gateway_checks.told(fleet, "a", uses, {A}, {}, ["chat"])["out"] == ["chat"]
    kept = decide([Route("one", (A, B), 2)], {A: OK, B: OK}, {A: leaving(1)}, used(A, B), 9.0)
    assert "needs at least 2" in gateway_checks.told(fleet, "a", kept, set(), {}, ["chat"])["kept"]["chat"]


def test_a_use_is_written_as_the_contract_has_it() -> None:
    use = Use(True, "", "ok", since=2.0)
    assert set(use.written()) == {"use", "why", "check", "operator", "leaving", "kept", "since", "share", "tls"}
    assert Use.remembered(use.written()) == use
    before = {name: value for name, value in use.written().items() if name not in ("share", "tls")}
    assert Use.remembered(before) == use, "as a former version wrote it"


@pytest.mark.parametrize("text", ["", "none", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_has_no_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "cert.pem").write_text(text)
    assert not_after(tmp_path / "cert.pem") is None
    assert not_after(tmp_path / "nothing.pem") is None
