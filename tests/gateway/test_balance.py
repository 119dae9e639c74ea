"""Which backend gets a request, and what changes that without a reload."""

from __future__ import annotations

import concurrent.futures
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.backends import Backend, failing, held, right
from tests.gateway.harness import CHAT, Answer, Gateway, document, route, running

FIRST, SECOND, THIRD, SIX = (
    Backend("chat@gpu-1"),
    Backend("chat@gpu-2"),
    Backend("old@gpu-1"),
    Backend("six@gpu-1", "::1"),
)
ROUTES = [
    route("two", [FIRST, SECOND]), route("shared", [FIRST], weight=3), route("shared", [THIRD], aliases=["older"]),
    route("six", [SIX]), route("none", [THIRD], weight=0),
]  # fmt: skip
BACKENDS = [FIRST, SECOND, THIRD, SIX]
FLEET = document(ROUTES, BACKENDS)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("gateway")
    with running(directory, FLEET) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    for backend in BACKENDS:
        backend.reset()
    if "gateway" in request.fixturenames and "without a state" not in request.node.name:
        gateway: Gateway = request.getfixturevalue("gateway")
        if request.node.name != "test_without_a_state_all_are_used":
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
    FIRST.answer = held(1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(gateway.ask, CHAT, {"model": "two"}) for _ in range(2)]
        gateway.until(lambda: len(FIRST.asked) == 1)
        assert set(asked(gateway, "two", 10)) == {SECOND.id}
        assert {future.result().status for future in slow} == {200}


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
