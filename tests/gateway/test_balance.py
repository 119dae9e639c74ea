"""Which backend gets a request, and what changes that without a reload."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import Backend, failing, held, right
from tests.gateway.harness import CHAT, KEY, Answer, Gateway, document, route, running

FIRST, SECOND, THIRD, SIX = (
    Backend("chat@gpu-1"),
    Backend("chat@gpu-2"),
    Backend("old@gpu-1"),
    Backend("six@gpu-1", "::1"),
)
ROUTES = [
    route("two", [FIRST, SECOND]), route("shared", [FIRST], weight=3), route("shared", [THIRD], aliases=["older"]),
    route("six", [SIX]), route("prefix", [FIRST, SECOND], balance="prefix"), route("urgent", [FIRST, SECOND], priority=True),
    route("session", [FIRST, SECOND], balance="session", session_header="x-chat-id"),
]  # fmt: skip
BACKENDS = [FIRST, SECOND, THIRD, SIX]
EARLY = "early-0123456789abcdef"
FLEET = document(
    ROUTES, BACKENDS, {"team-a": {}, "early": {"priority": -5}}, {KEY: {"client": "team-a"}, EARLY: {"client": "early"}}
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("gateway")
    with running(directory, FLEET) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    for backend in BACKENDS:
        backend.reset()
    if request.node.name != "test_without_a_state_all_are_used":
        gateway: Gateway = request.getfixturevalue("gateway")
        gateway.state({})
        gateway.state({backend.id: {} for backend in BACKENDS})


def asked(gateway: Gateway, model: str, count: int, at_once: int = 1) -> Counter[str]:
    """How often each backend answered."""

    def ask(_number: int) -> Answer:
        return gateway.ask(CHAT, {"model": model})

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(ask, range(count)))
    assert {answer.status for answer in answers} == {200}
    return Counter(answer.json["backend"] for answer in answers)


def test_without_a_state_all_are_used(gateway: Gateway) -> None:
    assert set(asked(gateway, "two", 20)) == {FIRST.id, SECOND.id}


def test_who_has_least_to_do_is_asked(gateway: Gateway) -> None:
    FIRST.answer = held(1.5)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        gateway.state({FIRST.id: {}})
        slow = pool.submit(gateway.ask, CHAT, {"model": "two"})
        gateway.until(lambda: len(FIRST.asked) == 1)
        gateway.state({FIRST.id: {}, SECOND.id: {}})
        assert set(asked(gateway, "two", 10)) == {SECOND.id}
        assert slow.result().status == 200


def test_among_equals_it_is_chance(gateway: Gateway) -> None:
    counted = asked(gateway, "two", 60)
    assert min(counted[FIRST.id], counted[SECOND.id]) > 12


def test_eight_at_once_are_four_and_four(gateway: Gateway) -> None:
    FIRST.answer = SECOND.answer = held(0.5)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        requests = [pool.submit(gateway.ask, CHAT, {"model": "two"}) for _ in range(8)]
        gateway.until(lambda: len(FIRST.asked) + len(SECOND.asked) == 8)
        told = gateway.admin("/in_flight")["in_flight"]
        assert (told[FIRST.id], told[SECOND.id]) == (4, 4)
        assert all(request.result().status == 200 for request in requests)


def test_who_fails_fast_does_not_win(gateway: Gateway) -> None:
    """Two hundred requests, sixteen at a time: the one that works gets nearly all of them, and nobody sees an error."""
    FIRST.answer = failing(503)
    SECOND.answer = held(0.02)
    assert asked(gateway, "two", 200, 16) == {SECOND.id: 200}
    assert len(FIRST.asked) < 20


def test_a_drain_needs_no_reload(gateway: Gateway) -> None:
    workers = gateway.workers()
    gateway.state({FIRST.id: {"use": False}, SECOND.id: {}})
    assert set(asked(gateway, "two", 12)) == {SECOND.id}
    gateway.state({SECOND.id: {}})
    assert set(asked(gateway, "two", 12)) == {SECOND.id}
    gateway.state({FIRST.id: {}, SECOND.id: {}})
    assert set(asked(gateway, "two", 30)) == {FIRST.id, SECOND.id}
    assert gateway.workers() == workers


def test_a_canary_gets_its_share_at_most(gateway: Gateway) -> None:
    """Of 300 requests some 30, however they are balanced; all of them where nobody else takes any, and as many as the other one in the end."""
    gateway.state({FIRST.id: {"share": 0.1}, SECOND.id: {}})
    for body in ({"model": "two"}, {"model": "prefix"}):
        counted: Counter[str] = Counter()
        for number in range(300):
            answer = gateway.ask(CHAT, {**body, "messages": [{"role": "user", "content": f"{number} of many"}]})
            counted[answer.json["backend"]] += 1
        assert 0 < counted[FIRST.id] < 60, body
    gateway.state({FIRST.id: {"share": 0.1}})
    assert asked(gateway, "two", 30) == {FIRST.id: 30}
    gateway.state({FIRST.id: {"share": 1}, SECOND.id: {}})
    assert asked(gateway, "two", 60)[FIRST.id] > 12


def test_a_state_that_is_broken_or_gone_leaves_the_last_one_in_use(gateway: Gateway) -> None:
    gateway.state({SECOND.id: {}})
    for text in ("", "{", "[]", "null"):
        gateway.write("run/vllm-gateway/state.json", text)
        time.sleep(0.5)
        assert set(asked(gateway, "two", 8)) == {SECOND.id}
    (gateway.directory / "run/vllm-gateway/state.json").unlink()
    time.sleep(0.5)
    assert set(asked(gateway, "two", 8)) == {SECOND.id}


def test_a_reload_keeps_the_state_and_the_counts(gateway: Gateway) -> None:
    gateway.state({SECOND.id: {}, THIRD.id: {}})
    SECOND.answer = held(2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gateway.ask, CHAT, {"model": "two"})
        gateway.until(lambda: SECOND.asked)
        gateway.configure({**FLEET, "gateway": "gw-2"})
        assert gateway.admin("/in_flight")["in_flight"][SECOND.id] == 1
        assert slow.result().status == 200
    gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][SECOND.id] == 0)
    SECOND.answer = right
    assert set(asked(gateway, "two", 8)) == {SECOND.id}
    gateway.configure(FLEET)


def test_what_old_workers_still_have_is_told_when_the_backend_is_gone(gateway: Gateway) -> None:
    gateway.state({SECOND.id: {}, THIRD.id: {}})
    SECOND.answer = held(2)
    kept = [one for one in FLEET["backends"] if one != SECOND.id]
    left = {
        **FLEET,
        "backends": {one: FLEET["backends"][one] for one in kept},
        "routes": [{**one, "backends": [name for name in one["backends"] if name in kept]} for one in FLEET["routes"]],
    }
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gateway.ask, CHAT, {"model": "two"})
        gateway.until(lambda: SECOND.asked)
        gateway.configure(left)
        assert gateway.admin("/in_flight")["in_flight"][SECOND.id] == 1
        assert slow.result().status == 200
    gateway.until(lambda: SECOND.id not in gateway.admin("/in_flight")["in_flight"])
    SECOND.answer = right
    gateway.configure(FLEET)


def test_routes_of_one_model_share_it_by_weight(gateway: Gateway) -> None:
    counted = asked(gateway, "shared", 200)
    assert 25 < counted[THIRD.id] < 80
    assert set(asked(gateway, "older", 5)) == {THIRD.id}
    gateway.state({THIRD.id: {}})
    assert set(asked(gateway, "shared", 5)) == {THIRD.id}


def test_ipv6(gateway: Gateway) -> None:
    assert asked(gateway, "six", 2) == {SIX.id: 2}


@pytest.mark.parametrize("wrong", ["not JSON", "another version", "another key", "a missing backend"])
def test_data_that_is_wrong_leaves_the_former_in_use(gateway: Gateway, wrong: str) -> None:
    before = gateway.ask("/healthz").json
    fleet = {
        "another version": {**FLEET, "version": 2}, "another key": {**FLEET, "internal_key_sha256": "0" * 64},
        "a missing backend": {**FLEET, "backends": {}}, "not JSON": {},
    }[wrong]  # fmt: skip
    gateway.configure(fleet, reload=False)
    if wrong == "not JSON":
        gateway.write("etc/vllm-gateway/fleet.json", "{")
    gateway.process.send_signal(1)
    gateway.until(lambda: "init_by_lua error" in gateway.errors())
    assert gateway.ask("/healthz").json == before
    assert asked(gateway, "two", 4).total() == 4
    gateway.configure(FLEET)


# --- what belongs together


def chats(gateway: Gateway, model: str, count: int, **more: Any) -> Counter[str]:
    """The backends of requests that have the same beginning."""
    backends: Counter[str] = Counter()
    for number in range(count):
        said = [{"role": "system", "content": more.get("system", "You are kind.")}, {"role": "user", "content": "Hi"}]
        grown = [{"role": "assistant", "content": f"answer {at}"} for at in range(number)]
        body = {"model": model, "messages": [*said, *grown], **more.get("fields", {})}
        answer = gateway.ask(CHAT, body, headers=more.get("headers"))
        backends[answer.json["backend"]] += 1
    return backends


def test_prefix_keeps_a_conversation_where_its_beginning_was(gateway: Gateway) -> None:
    homes = [chats(gateway, "prefix", 6, system=f"You are number {number}.") for number in range(12)]
    assert all(len(home) == 1 for home in homes)
    assert len(set().union(*homes)) > 1


def test_session_keeps_a_user_in_one_place(gateway: Gateway) -> None:
    for said in ("user", "prompt_cache_key"):
        homes = [chats(gateway, "session", 6, fields={said: f"{said}-{number}"}) for number in range(12)]
        assert all(len(home) == 1 for home in homes)
        assert len(set().union(*homes)) > 1
    homes = [chats(gateway, "session", 6, headers={"X-Chat-Id": str(number)}) for number in range(12)]
    assert all(len(home) == 1 for home in homes)
    assert len(set().union(*homes)) > 1
    # without any of them it is as if nothing had been asked for
    assert len(chats(gateway, "session", 30)) == 2


def test_who_is_at_home_nowhere_else_goes_elsewhere_when_home_is_gone_or_has_too_much_to_do(gateway: Gateway) -> None:
    (home,) = chats(gateway, "prefix", 3)
    (other,) = {FIRST.id, SECOND.id} - {home}
    gateway.state({other: {}})
    assert set(chats(gateway, "prefix", 3)) == {other}
    gateway.state({FIRST.id: {}, SECOND.id: {}})
    assert set(chats(gateway, "prefix", 3)) == {home}
    FIRST.answer = SECOND.answer = held(0.5)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        many = Counter[str]()
        for one in pool.map(lambda _number: chats(gateway, "prefix", 1), range(8)):
            many += one
    assert set(many) == {FIRST.id, SECOND.id}


def test_who_fails_is_not_asked_again_for_the_same(gateway: Gateway) -> None:
    (home,) = chats(gateway, "prefix", 3)
    backend = next(backend for backend in BACKENDS if backend.id == home)
    backend.answer = failing(503)
    assert home not in chats(gateway, "prefix", 3)


# --- urgency and fullness


@pytest.mark.parametrize(
    ("key", "model", "priority"),
    [(KEY, "urgent", None), (EARLY, "urgent", -5), (EARLY, "two", None)],
    ids=["no priority of its own", "a client with one", "instances without"],
)
def test_the_priority_is_the_clients_as_the_gateway_knows_it(
    gateway: Gateway, key: str, model: str, priority: int | None
) -> None:
    for said in ({}, {"priority": -100}):
        FIRST.reset()
        SECOND.reset()
        assert gateway.ask(CHAT, {"model": model, **said}, key=key).status == 200
        (asked,) = FIRST.asked + SECOND.asked
        assert asked.json.get("priority") == priority


def test_a_full_backend_is_passed_over_and_full_ones_say_so(gateway: Gateway) -> None:
    fleet = json.loads(json.dumps(FLEET))
    fleet["backends"][FIRST.id]["most_requests"] = 1
    fleet["backends"][SECOND.id]["most_requests"] = 2
    gateway.configure(fleet)
    try:
        FIRST.answer = SECOND.answer = held(1.5)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _number: gateway.ask(CHAT, {"model": "two"}), range(6)))
    finally:
        gateway.configure(FLEET)
    assert sorted(answer.status for answer in answers) == [200] * 3 + [503] * 3
    assert (len(FIRST.asked), len(SECOND.asked)) == (1, 2)
    refused = next(answer for answer in answers if answer.status == 503)
    assert refused.error["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) > 0
