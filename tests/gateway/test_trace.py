"""Traces: vLLM gets one of the gateway's own, and the client's is noted down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.backends import Backend
from tests.gateway.harness import CHAT, Gateway, document, route, running

FIRST, SECOND = Backend("chat@gpu-1"), Backend("chat@gpu-2")
FLEET = document([route("small", [FIRST, SECOND])], [FIRST, SECOND])
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-01"]
INVALID = [
    "", f"00-{TRACE}-{SPAN}", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", "a" * 5000, 'x","client":"root',
]  # fmt: skip


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("gateway"), FLEET, [FIRST.id, SECOND.id]) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh() -> None:
    for backend in (FIRST, SECOND):
        backend.reset()


def asked(gateway: Gateway, traceparent: str) -> tuple[str, str]:
    """A request's id, and the parent that the log has of it."""
    answer = gateway.ask(CHAT, {"model": "small"}, headers={"traceparent": traceparent, "tracestate": "mine=1"})
    assert answer.status == 200
    request_id = answer.headers["x-request-id"]
    return request_id, gateway.logged(request_id)["parent"]


@pytest.mark.parametrize("traceparent", VALID + INVALID)
def test_the_trace_is_the_request_and_never_the_clients(gateway: Gateway, traceparent: str) -> None:
    request_id, parent = asked(gateway, traceparent)
    [got] = [backend.asked[0] for backend in (FIRST, SECOND) if backend.asked]
    version, trace, span, flags = got.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", request_id, "01")
    assert len(span) == 16
    assert int(span, 16)
    assert "tracestate" not in got.headers
    assert parent == (traceparent if traceparent in VALID else "")


def test_a_second_attempt_belongs_to_the_same_trace(gateway: Gateway) -> None:
    FIRST.answer = SECOND.answer = lambda handler, _asked: handler.reset()
    gateway.ask(CHAT, {"model": "small"})
    assert FIRST.asked[0].headers["traceparent"] == SECOND.asked[0].headers["traceparent"]


def test_it_can_be_left_out(tmp_path: Path) -> None:
    with running(tmp_path, FLEET, [FIRST.id], gateway_traceparent=False) as gateway:
        _, parent = asked(gateway, VALID[0])
        assert ("traceparent" in FIRST.asked[0].headers, parent) == (False, VALID[0])
