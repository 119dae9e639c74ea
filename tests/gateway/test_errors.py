"""What clients see when something goes wrong, and where else it was tried."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import Answer, Asked, Backend, Handler, failing, held, right, tokens
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running
from tests.ports import free_port

FIRST, SECOND, ONLY, STUBBORN = (
    Backend("chat@gpu-1"),
    Backend("chat@gpu-2"),
    Backend("one@gpu-1"),
    Backend("stubborn@gpu-1"),
)
TWO = [FIRST, SECOND]


class Nobody(Backend):
    """Refuses connections."""

    def __post_init__(self) -> None:
        self.port = free_port()


NOBODY = Nobody("gone@gpu-1")
ROUTES = [
    route("two", TWO), route("one", [ONLY]), route("gone", [NOBODY]),
    route("stubborn", [STUBBORN, SECOND], retry=False),
]  # fmt: skip
FLEET = document(ROUTES, [*TWO, ONLY, NOBODY, STUBBORN])
SERVER_ERRORS = {500: "internal_error", 502: "bad_gateway", 503: "unavailable", 504: "timeout"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("gateway")
    with running(directory, FLEET, list(FLEET["backends"]), gateway_max_body_mib=1) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh(gateway: Gateway) -> None:
    for backend in (*TWO, ONLY, STUBBORN):
        backend.reset()
    # who comes back begins anew, without the failures of the test before
    gateway.state({})
    gateway.state({name: {} for name in FLEET["backends"]})


def breaking(handler: Handler, _asked: Asked) -> None:
    handler.reset()


def closing(handler: Handler, _asked: Asked) -> None:
    handler.close_connection = True


def told(gateway: Gateway, model: str, answers: Answer) -> Any:
    """What a client gets when all backends answer like this."""
    for backend in (*TWO, ONLY, STUBBORN):
        backend.answer = answers
    return gateway.ask(CHAT, {"model": model})


# --- answers of vLLM that are errors


def test_a_bad_question_is_passed_on_as_it_is(gateway: Gateway) -> None:
    answer = told(gateway, "two", failing(400))
    assert (answer.status, answer.json) == (
        400,
        {"error": {"message": "of vLLM", "type": "from_vllm", "param": None, "code": 400}},
    )
    assert answer.headers["content-type"] == "application/json"
    assert len(FIRST.asked + SECOND.asked) == 1


@pytest.mark.parametrize(
    ("status", "text", "content_type", "message"),
    [
        (404, '{"detail":"Not Found"}', "application/json", "The model does not have this path."),
        (405, '{"detail":"Method Not Allowed"}', "application/json", "Method Not Allowed"),
        (422, '{"detail":[{"type":"missing","loc":["body","x"],"msg":"Field required"}]}', "application/json", "Field required"),
        (400, "Invalid HTTP request received.", "text/plain; charset=utf-8", "The request is malformed."),
        (403, '{"error":"Forbidden"}', "application/json", None), (400, "", "text/plain", "The request is malformed."),
        (501, '{"detail":"The model does not support it"}', "application/json", "The model does not support it"),
    ],
)  # fmt: skip
def test_other_shapes_become_openais(
    gateway: Gateway, status: int, text: str, content_type: str, message: str | None
) -> None:
    answer = told(gateway, "one", lambda handler, _asked: handler.reply(status, text, content_type))
    assert answer.status == status
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json["error"]["message"] == message or message is None


# --- once more, elsewhere


@pytest.mark.parametrize(
    "answer", [breaking, closing, failing(503), failing(502)], ids=["reset", "closed", "503", "502"]
)
def test_what_failed_before_its_answer_began_goes_to_another(gateway: Gateway, answer: Answer) -> None:
    body = b'{"model":"two","messages":"' + b"x" * 50000 + b'"}'
    FIRST.answer = answer
    for _ in range(12):
        got = gateway.ask(CHAT, body)
        assert (got.status, got.json["backend"]) == (200, SECOND.id)
    assert FIRST.asked, "it was never asked"
    assert {asked.body for asked in FIRST.asked + SECOND.asked} == {body}
    assert len(SECOND.asked) == 12


def test_a_long_body_goes_to_another_as_well(gateway: Gateway) -> None:
    body = b'{"priority": 1, "model":"two","messages":"' + b"x" * 1000000 + b'"}'
    FIRST.answer = SECOND.answer = once = Once(breaking)
    assert gateway.ask(CHAT, body).status == 200
    assert once.count == 2
    first, second = (asked for backend in TWO for asked in backend.asked)
    assert first.body == second.body
    assert first.json == {"model": "two", "messages": "x" * 1000000}


class Once:
    """The first request fails, the others do not."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.count = answer, 0

    def __call__(self, handler: Handler, asked: Asked) -> None:
        self.count += 1
        (self.answer if self.count == 1 else right)(handler, asked)


@pytest.mark.parametrize("answer", [failing(400), failing(500), held(5)], ids=["400", "500", "silence"])
def test_what_may_have_been_worked_on_does_not(gateway: Gateway, answer: Answer) -> None:
    got = told(gateway, "two", answer)
    assert got.status in (400, 500, 504)
    assert len(FIRST.asked + SECOND.asked) == 1


@pytest.mark.parametrize("said", [{"use": True, "leaving": True}, {"use": False}], ids=["leaving", "out"])
def test_an_engine_that_stops_is_not_its_requests_fault(gateway: Gateway, said: dict[str, Any]) -> None:
    """It answers 500 to what it had: by then it is leaving, or out."""

    def stopping(handler: Handler, asked: Asked) -> None:
        gateway.state({**{name: {} for name in FLEET["backends"]}, FIRST.id: said})
        failing(500)(handler, asked)

    gateway.decide(chat_at_gpu_1=True)
    FIRST.answer = stopping
    assert gateway.ask(CHAT, {"model": "two"}).json["backend"] == SECOND.id
    assert len(FIRST.asked) == 1


def test_twice_is_enough(gateway: Gateway) -> None:
    assert told(gateway, "two", breaking).status == 502
    assert len(FIRST.asked + SECOND.asked) == 2


def test_a_route_may_be_without(gateway: Gateway) -> None:
    STUBBORN.answer = breaking
    gateway.state({STUBBORN.id: {}, SECOND.id: {"use": False}})
    assert gateway.ask(CHAT, {"model": "stubborn"}).status == 502
    assert len(STUBBORN.asked) == 1
    assert not SECOND.asked


def test_what_began_is_never_repeated(gateway: Gateway) -> None:
    def cut(handler: Handler, asked: Asked) -> None:
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
        )
        handler.wfile.flush()
        time.sleep(0.1)
        handler.reset()

    FIRST.answer = SECOND.answer = cut
    raw = gateway.raw(
        f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 15\r\n\r\n".encode()
        + b'{"model":"two"}'
    )
    assert raw.startswith(b"HTTP/1.1 200")
    assert b"hello" in raw
    assert not raw.endswith(b"0\r\n\r\n"), "the client must see that it is not whole"
    assert len(FIRST.asked + SECOND.asked) == 1


# --- the end of all attempts


@pytest.mark.parametrize(
    ("model", "answer", "status"),
    [
        ("two", breaking, 502), ("one", closing, 502), ("gone", right, 502), ("one", held(5), 504), ("two", failing(503), 503),
        ("one", failing(500), 500), ("one", failing(503), 503),
    ],
)  # fmt: skip
def test_the_client_is_told_in_openais_shape(gateway: Gateway, model: str, answer: Answer, status: int) -> None:
    got = told(gateway, model, answer)
    assert (got.status, got.error["code"], got.error["type"]) == (status, SERVER_ERRORS[status], "server_error")
    assert ("retry-after" in got.headers) == (status == 503)


def test_without_a_backend_that_is_used_the_client_is_told(gateway: Gateway) -> None:
    gateway.state({FIRST.id: {"use": False}, SECOND.id: {"use": False}})
    got = gateway.ask(CHAT, {"model": "two"})
    assert (got.status, got.error["code"]) == (503, "unavailable")
    assert int(got.headers["retry-after"]) >= 1
    assert not FIRST.asked + SECOND.asked


def test_what_nobody_counted_is_given_back(gateway: Gateway) -> None:
    for answer in (breaking, failing(500), failing(503), failing(400), right):
        told(gateway, "two", answer)
    gateway.until(lambda: not any(gateway.admin("/in_flight")["in_flight"].values()))


# --- errors of Nginx


def test_a_body_that_is_too_large(gateway: Gateway) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {KEY}\r\n"
    told = gateway.raw(f"{head}Content-Length: {1 << 21}\r\n\r\n".encode())
    assert told.startswith(b"HTTP/1.1 413 ")
    assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with gateway.connect() as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(24):
                connection.sendall(chunk)
        except OSError:
            pass
        assert b" 413 " in connection.recv(65536)
    assert not ONLY.asked
    gateway.until(lambda: not any(gateway.admin("/in_flight")["in_flight"].values()))


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("GET /v1/models HTTP/1.1\r\nBroken\r\n\r\n", 400), (f"GET /{'x' * 20000} HTTP/1.1\r\n\r\n", 414),
        (f"GET / HTTP/1.1\r\nHost: llm.test\r\nX: {'x' * 20000}\r\n\r\n", 400),
        (f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
        (f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {KEY}\r\nContent-Length: -1\r\n\r\n", 400),
        ("GET / HTTP/3.7\r\n\r\n", 505), ("\x16\x03\r\n\r\n", 400),
    ],
    ids=["header", "path", "long header", "chunk", "two lengths", "coding", "length", "version", "rubbish"],
)  # fmt: skip
def test_what_is_no_request_gets_json(gateway: Gateway, request_text: str, status: int) -> None:
    head, _, body = gateway.raw(request_text.encode("latin1")).partition(b"\r\n\r\n")
    assert int(head.split(b" ")[1]) in (status, 400), head
    assert json.loads(body)["error"]["type"] == "invalid_request_error" or status >= 500
    assert b"application/json" in head


# --- health


@pytest.mark.parametrize("host", ["llm.test", "10.0.0.1", "anything.example"])
@pytest.mark.parametrize("path", ["/health", "/healthz"])
def test_health_needs_neither_key_nor_name(gateway: Gateway, host: str, path: str) -> None:
    answer = gateway.ask(path, key=None, headers={"Host": host})
    assert (answer.status, answer.json["status"]) == (200, "ok")
    assert {"configuration", "program"} <= set(answer.json)


def test_another_name_gets_no_answer(gateway: Gateway) -> None:
    with pytest.raises(ConnectionError):
        gateway.ask("/v1/models", headers={"Host": "evil.test"})


# --- streams


def test_a_stream_comes_as_it_is_made(gateway: Gateway) -> None:
    ONLY.answer = lambda handler, _asked: handler.stream(tokens(6, 0.15))
    connection = gateway.connection()
    connection.request("POST", CHAT, json.dumps({"model": "one", "stream": True}), {"Authorization": f"Bearer {KEY}"})
    response = connection.getresponse()
    arrived = []
    while part := response.read1():
        arrived.append((time.monotonic(), part))
    assert len(arrived) >= 5
    assert arrived[-1][0] - arrived[0][0] > 0.5
    assert arrived[-1][1].endswith(b"[DONE]\n\n")


def test_who_hangs_up_ends_the_work_and_frees_its_place(gateway: Gateway) -> None:
    ONLY.answer = lambda handler, _asked: handler.stream(tokens(100, 0.05))
    connection = gateway.connection()
    connection.request("POST", CHAT, json.dumps({"model": "one", "stream": True}), {"Authorization": f"Bearer {KEY}"})
    assert connection.getresponse().read(6) == b"data: "
    assert gateway.admin("/in_flight")["in_flight"][ONLY.id] == 1
    began = time.monotonic()
    connection.sock.shutdown(socket.SHUT_RDWR)
    assert ONLY.cut.wait(2)
    assert time.monotonic() - began < 1
    gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][ONLY.id] == 0)


def test_who_hangs_up_before_the_answer_is_not_asked_for_elsewhere(gateway: Gateway) -> None:
    for backend in TWO:
        backend.answer = held(0.5)
    connection = gateway.connection()
    connection.request("POST", CHAT, json.dumps({"model": "two"}), {"Authorization": f"Bearer {KEY}"})
    gateway.until(lambda: FIRST.asked + SECOND.asked)
    connection.sock.shutdown(socket.SHUT_RDWR)
    gateway.until(lambda: not any(gateway.admin("/in_flight")["in_flight"].values()))
    time.sleep(0.3)
    assert len(FIRST.asked + SECOND.asked) == 1
