"""What browsers are told: which pages of other origins may ask, and read the answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.backends import Backend, failing, right
from tests.gateway.harness import CHAT, Answer, Gateway, document, route, running

ONLY = Backend("chat@gpu-1")
FLEET = document([route("small", [ONLY])], [ONLY], {"team-a": {"tokens_per_minute": 1000000}})
PAGE, APP, OTHER = "https://chat.example.com", "http://localhost:3000", "https://chat.example.com.evil.test"
HEADERS = "authorization,content-type,x-stainless-os"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = {**FLEET["settings"], "cors_origins": [PAGE, APP]}
    directory: Path = tmp_path_factory.mktemp("gateway")
    with running(directory, {**FLEET, "settings": settings}, [ONLY.id], gateway_max_body_mib=1) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh() -> None:
    ONLY.reset()


def beforehand(gateway: Gateway, path: str, origin: str, method: str = "POST") -> Answer:
    """What a browser asks before its page may."""
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": HEADERS}
    return gateway.ask(path, None, None, "OPTIONS", asked)


def told(answer: Answer) -> dict[str, str]:
    """What an answer tells a browser."""
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@pytest.mark.parametrize("origin", [PAGE, APP])
@pytest.mark.parametrize(
    ("path", "methods"), [(CHAT, "POST"), ("/v1/models", "GET, HEAD"), ("/v1/models/small", "GET, HEAD")]
)
def test_a_browser_may_ask_beforehand_without_a_key(gateway: Gateway, origin: str, path: str, methods: str) -> None:
    answer = beforehand(gateway, path, origin)
    assert (answer.status, answer.body) == (204, b"")
    assert told(answer) == {
        "access-control-allow-origin": origin, "access-control-allow-methods": methods,
        "access-control-allow-headers": HEADERS, "access-control-max-age": "7200",
    }  # fmt: skip
    assert answer.headers["vary"] == "Origin, Access-Control-Request-Headers"
    assert ONLY.asked == []


@pytest.mark.parametrize("origin", [OTHER, "null", "*", "http://chat.example.com", "https://CHAT.example.com"])
def test_other_origins_are_told_nothing(gateway: Gateway, origin: str) -> None:
    answer = beforehand(gateway, CHAT, origin)
    assert (answer.status, told(answer)) == (204, {})
    assert answer.headers["vary"].startswith("Origin")
    asked = gateway.ask(CHAT, {"model": "small"}, headers={"Origin": origin})
    assert (asked.status, told(asked), asked.headers["vary"]) == (200, {}, "Origin")


def test_a_path_that_is_not_let_through_stays_so(gateway: Gateway) -> None:
    assert beforehand(gateway, "/v1/load_lora_adapter", PAGE).status == 404


def test_options_that_no_browser_sends_need_a_key_and_are_no_method(gateway: Gateway) -> None:
    assert gateway.ask(CHAT, None, None, "OPTIONS", {"Origin": PAGE}).status == 401
    assert gateway.ask(CHAT, None, method="OPTIONS", headers={"Access-Control-Request-Method": "POST"}).status == 405


def readable(answer: Answer) -> bool:
    """Whether a page of the origin can read an answer, and all that it is to read of its header."""
    exposed = answer.headers["access-control-expose-headers"].split(", ")
    limits = [name for name in answer.headers if name.startswith("x-ratelimit-")]
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers
    return answer.headers["access-control-allow-origin"] == PAGE and {"x-request-id", "retry-after", *limits} <= set(
        exposed
    )


def test_a_page_reads_answers_streams_and_errors(gateway: Gateway) -> None:
    page = {"Origin": PAGE}
    answers = [
        gateway.ask(CHAT, {"model": "small"}, headers=page),
        gateway.ask(CHAT, {"model": "small", "stream": True}, headers=page),
        gateway.ask("/v1/models", headers=page),
        gateway.ask(CHAT, b"no JSON", headers=page),
        gateway.ask(CHAT, {"model": "small"}, key=None, headers=page),
        gateway.ask("/nothing", headers=page),
        gateway.ask(CHAT, {"model": "large"}, headers=page),
        gateway.ask(CHAT, None, method="PUT", headers=page),
        gateway.ask(CHAT, b" " * (2 << 20), headers=page),
    ]
    assert [answer.status for answer in answers] == [200, 200, 200, 400, 401, 404, 404, 405, 413]
    assert [readable(answer) for answer in answers] == [True] * len(answers)
    assert b"[DONE]" in answers[1].body
    assert "x-ratelimit-remaining-requests" in answers[0].headers
    assert "x-ratelimit-remaining-tokens" in answers[0].headers


def test_a_page_reads_errors_of_the_backend(gateway: Gateway) -> None:
    for status in (422, 500):
        ONLY.answer = failing(status)
        answer = gateway.ask(CHAT, {"model": "small"}, headers={"Origin": PAGE})
        assert (answer.status, readable(answer)) == (status, True)


def test_what_a_backend_says_of_origins_is_not_passed_on(gateway: Gateway) -> None:
    ONLY.answer = lambda handler, _asked: handler.reply(
        200, {}, Access_Control_Allow_Origin="*", Access_Control_Allow_Credentials="true"
    )
    assert told(gateway.ask(CHAT, {"model": "small"}, headers={"Origin": OTHER})) == {}
    assert readable(gateway.ask(CHAT, {"model": "small"}, headers={"Origin": PAGE}))


def test_by_default_browsers_are_told_nothing(tmp_path: Path) -> None:
    ONLY.answer = right
    with running(tmp_path, FLEET, [ONLY.id]) as gateway:
        assert beforehand(gateway, CHAT, PAGE).status == 401
        answer = gateway.ask(CHAT, {"model": "small"}, headers={"Origin": PAGE})
        assert (told(answer), "vary" in answer.headers) == ({}, False)
