"""How much a client and an address may ask, and what they are told."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import Backend, held, right
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running

SLOW, NARROW = ("slow-0123456789abcdef", "narrow-0123456789abcdef")
ONLY = Backend("chat@gpu-1")
CLIENTS = {"team-a": {}, "slow": {"requests_per_minute": 6, "burst": 2}, "narrow": {"concurrent_requests": 2}}
KEYS = {KEY: {"client": "team-a"}, SLOW: {"client": "slow"}, NARROW: {"client": "narrow"}}
FLEET = document([route("small", [ONLY])], [ONLY], CLIENTS, KEYS)
BODY = {"model": "small"}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    ONLY.reset()
    with running(tmp_path, FLEET, [ONLY.id]) as gateway:
        yield gateway


def test_a_client_beyond_its_rate_waits_and_others_do_not(gateway: Gateway) -> None:
    answers = [gateway.ask(CHAT, BODY, key=SLOW) for _ in range(6)]
    # one, and the burst of two
    assert [answer.status for answer in answers] == [200] * 3 + [429] * 3
    error = answers[-1].error
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert answers[-1].headers["retry-after"] in ("9", "10")
    assert [answer.headers.get("x-ratelimit-remaining-requests") for answer in answers[:3]] == ["2", "1", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "6"
    assert gateway.ask(CHAT, BODY).status == 200
    # it is the client's, whatever it asks for, and a reload does not give it back
    assert gateway.ask("/v1/models", key=SLOW).status == 429
    gateway.configure({**FLEET, "gateway": "gw-2"})
    assert gateway.ask(CHAT, BODY, key=SLOW).status == 429


def test_what_is_refused_uses_up_nobodys_share(gateway: Gateway) -> None:
    for _ in range(6):
        assert gateway.ask("/nowhere", key=SLOW).status == 404
        assert gateway.ask(CHAT, method="GET", key=SLOW).status == 405
    assert gateway.ask(CHAT, BODY, key=SLOW).status == 200


def test_a_client_beyond_its_concurrency_is_refused_and_others_are_not(gateway: Gateway) -> None:
    ONLY.answer = held(1)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        running_ones = [pool.submit(gateway.ask, CHAT, BODY, NARROW) for _ in range(5)]
        other = pool.submit(gateway.ask, CHAT, BODY, KEY)
        answers = [future.result() for future in running_ones]
        assert other.result().status == 200
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status == 429)
    assert refused.error["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    ONLY.answer = right
    assert gateway.ask(CHAT, BODY, key=NARROW).status == 200


@pytest.mark.parametrize("body", [b"{", {"model": "none"}, b""], ids=["no JSON", "no such model", "empty"])
def test_a_refused_request_gives_its_place_back(gateway: Gateway, body: object) -> None:
    for _ in range(5):
        assert gateway.ask(CHAT, body, key=NARROW).status in (400, 404)
    broken = f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {NARROW}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    for _ in range(3):
        assert b" 400 " in gateway.raw(broken.encode())
    assert gateway.ask(CHAT, BODY, key=NARROW).status == 200


def test_a_worker_that_is_killed_holds_nothing(gateway: Gateway) -> None:
    ONLY.answer = held(30)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        lost = [pool.submit(gateway.ask, CHAT, BODY, NARROW) for _ in range(2)]
        gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][ONLY.id] == 2)
        ONLY.answer = right
        for pid in gateway.workers():
            os.kill(pid, signal.SIGKILL)
        for future in lost:
            with pytest.raises(OSError):
                future.result()
    gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][ONLY.id] == 0)
    gateway.until(lambda: gateway.ask(CHAT, BODY, key=NARROW).status == 200)


def test_guessing_keys_is_slowed_down(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"gateway_unauthorized_requests_per_minute": 30, "gateway_unauthorized_burst": 5}
    with running(tmp_path, FLEET, [ONLY.id], **limits) as gateway:
        told = [gateway.ask(CHAT, BODY, key="guess") for _ in range(10)]
        assert [answer.status for answer in told] == [401] * 6 + [429] * 4
        assert told[-1].error["code"] == "rate_limit_exceeded"
        assert told[-1].headers["retry-after"] == "2"
        assert gateway.ask(CHAT, BODY).status == 200


def test_an_address_has_limits_of_its_own(tmp_path: Path) -> None:
    limits: dict[str, Any] = {
        "gateway_address_requests_per_minute": 60,
        "gateway_address_burst": 3,
        "gateway_address_concurrent_requests": 2,
    }
    with running(tmp_path, FLEET, [ONLY.id], **limits) as gateway:
        told = [gateway.ask(CHAT, BODY) for _ in range(6)]
        assert [answer.status for answer in told] == [200] * 4 + [429] * 2
        assert told[-1].headers["retry-after"] == "1"
        assert told[-1].error["code"] == "rate_limit_exceeded"
        time.sleep(3)
        ONLY.answer = held(0.5)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            statuses = sorted(answer.status for answer in pool.map(lambda _number: gateway.ask(CHAT, BODY), range(3)))
        assert statuses == [200, 200, 429]
        ONLY.answer = right
