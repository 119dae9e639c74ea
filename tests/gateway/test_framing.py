"""Where a request ends: two lengths, broken chunks, pipelines, and the frames of HTTP/2. One request is one request, and nothing in it is another."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.backends import breaking
from tests.gateway.harness import CHAT, KEY, NAME, Gateway, document, route, running
from tests.gateway.wire import BODY, REFUSALS, Http2, Witness, answers, judge_logs, request, send, staying

BACKEND = Witness("chat@gpu-1")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("framing")
    with running(directory, document([route("small", [BACKEND])], [BACKEND]), [BACKEND.id]) as gateway:
        yield gateway
        judge_logs(gateway)


@pytest.fixture(autouse=True)
def nothing_else_arrives() -> Iterator[None]:
    BACKEND.reached.clear()
    yield
    BACKEND.judge(["small"])


INNER = request(b"/v1/load_lora_adapter")
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize("headers", [
    b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n", b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: xchunked\r\n", b"Transfer-Encoding : chunked\r\n", b"Transfer-Encoding: chunked, identity\r\n",
    b"Transfer-Encoding: identity, chunked\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding:\x0bchunked\r\n",
    b"Transfer-Encoding: \"chunked\"\r\n", b"Transfer-Encoding\x00: chunked\r\n", b"X: y\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding:\n chunked\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n", b"Content-Length: +6\r\n", b"Content-Length: -1\r\n", b"Content-Length: 0x6\r\n",
    b"Content-Length: 6, 6\r\n",
    b"Content-Length: 99999999999999999999999\r\n", b"Content-Length: 6 6\r\n", b"Content-Length:\r\n", b"Content-Length: 0\r\n",
], ids=repr)  # fmt: skip
def test_two_ways_to_frame_a_body(gateway: Gateway, headers: bytes) -> None:
    """Whichever way the gateway takes, one request is one request, and what stands behind it is no second one to a path that is not served."""
    head = b"POST %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n" % (
        CHAT.encode(),
        NAME.encode(),
        KEY.encode(),
    )
    statuses = answers(gateway.raw(head + headers + b"\r\n" + b"0\r\n\r\n" + INNER))
    assert statuses, "no answer at all"
    assert set(statuses) <= REFUSALS
    assert BACKEND.reached == []


@pytest.mark.parametrize("body", [
    b"%x\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), b"%x;ext=\"\r\n\r\n\"\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    b"0%x\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(BODY), BODY),
    b"-1\r\n", b"0x12\r\n", b"fffffffffffffffff\r\n", b"\r\n" + CHUNKED, b" %x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    b"%x\r\n%sXX0\r\n\r\n" % (len(BODY), BODY),
    b"0\r\n" + INNER, CHUNKED[:-2], CHUNKED + INNER,
], ids=lambda body: repr(body[:30]))  # fmt: skip
def test_chunks(gateway: Gateway, body: bytes) -> None:
    data = request(headers=b"Transfer-Encoding: chunked\r\n", body=b"") + body
    # without an answer it waits for the rest of the body
    assert set(answers(send(gateway, data, 0.5))) <= {200, *REFUSALS}
    assert {reached.body for reached in BACKEND.reached} <= {BODY}


@pytest.mark.parametrize("first", [
    request(b"/nowhere"), request(b"/v1/models"), request(key="wrong-0123456789abcdef"), request(body=b"{"), request(body=b'{"model": "none"}'),
    request(body=b"[]"),
], ids=["404", "405", "401", "broken", "no model", "no object"])  # fmt: skip
def test_the_body_of_a_refused_request_is_no_request(gateway: Gateway, first: bytes) -> None:
    """A body that reads like a request, behind a refused one on a connection that stays: one answer for each request, in their order."""
    head, _, body = staying(first).partition(b"\r\n\r\n")
    filler = body + request() if b"nowhere" in head or b"wrong" in head or b"/v1/models" in head else body
    kept = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(filler), head) + b"\r\n\r\n" + filler
    statuses = answers(gateway.raw(kept + request(b"/v1/models", b"GET", body=b"")))
    # after a 400 Nginx trusts nothing else that comes on the connection
    assert statuses[1:] == ([] if statuses[0] == 400 else [200])
    assert statuses[0] in REFUSALS
    assert BACKEND.reached == []


def test_a_pipeline(gateway: Gateway) -> None:
    one = staying(request())
    assert answers(gateway.raw(one + staying(request(b"/nowhere")) + one + request())) == [200, 404, 200, 200]
    assert [reached.body for reached in BACKEND.reached] == [BODY] * 3


def test_expect_100_continue(gateway: Gateway) -> None:
    """A wrong key is told so before a body is asked for."""
    for key, first in ((KEY, b"HTTP/1.1 100"), ("wrong-0123456789abcdef", b"HTTP/1.1 401")):
        with gateway.connect() as connection:
            connection.sendall(request(headers=b"Expect: 100-continue\r\n", key=key)[: -len(BODY)])
            assert connection.recv(65536).startswith(first)
            if key == KEY:
                connection.sendall(BODY)
                assert answers(b"".join(iter(lambda: connection.recv(65536), b""))) == [200]


@pytest.mark.parametrize("data", [
    b"GET /healthz\r\n", b"\r\n\r\n", b"GET\r\n\r\n", b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n", b"\x00" * 100, b"\xff" * 5000,
    b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.0\r\n\r\n", b"GET /healthz HTTP/1.1\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET  /healthz  HTTP/1.1\r\nHost: llm.test\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET http:// HTTP/1.1\r\nHost: llm.test\r\n\r\n",
    b"GET http://llm.test:99999/v1/models HTTP/1.1\r\nHost: llm.test\r\n\r\n", b"\x16\x03\x01\x00\x05hello",
], ids=lambda data: repr(data[:40]))  # fmt: skip
def test_what_is_no_request(gateway: Gateway, data: bytes) -> None:
    received = send(gateway, data, 0.5)
    assert b" 500 " not in received.split(b"\r\n")[0]
    assert BACKEND.reached == []


def test_plain_http_on_the_port_for_https(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), 5) as connection:
        connection.sendall(request())
        assert answers(b"".join(iter(lambda: connection.recv(65536), b""))) == [400]


# HTTP/2 ---------------------------------------------------------------------------------------------------------------------------------------------


def fields(path: bytes = CHAT.encode(), **others: bytes) -> list[tuple[bytes, bytes]]:
    """The header of a request; `authority`, `method` and `scheme` replace what is usual."""
    usual = {"method": b"POST", "scheme": b"https", "authority": NAME.encode(), "path": path, **others}
    return [
        *((f":{name}".encode(), value) for name, value in usual.items()),
        (b"authorization", b"Bearer " + KEY.encode()),
    ]


USUAL = fields()
ODD_HEADERS: dict[str, list[tuple[bytes, bytes]]] = {
    "two lengths": [(b"content-length", b"18"), (b"content-length", b"5")],
    "a length too small": [(b"content-length", b"5")],
    "a length too large": [(b"content-length", b"50")],
    "a length that is no number": [(b"content-length", b"+18")],
    "chunked": [(b"transfer-encoding", b"chunked")],
    "chunked and a length": [(b"transfer-encoding", b"chunked"), (b"content-length", b"18")],
    "a connection": [(b"connection", b"keep-alive")],
    "an upgrade": [(b"connection", b"upgrade"), (b"upgrade", b"websocket")],
    "another host": [(b"host", b"other.test")],
    "a second path": [(b":path", b"/metrics")],
    "a second method": [(b":method", b"GET")],
    "an unknown pseudo header": [(b":protocol", b"websocket")],
    "capital letters": [(b"X-Upper", b"1")],
    "a line end in a value": [(b"x-a", b"1\r\nx-b: 2")],
    "a line end in a name": [(b"x-a: 1\r\nx-b", b"2")],
    "a zero byte": [(b"x-a", b"1\0")],
    "a colon in a name": [(b"x:a", b"1")],
    "an empty name": [(b"", b"1")],
    "a space in a name": [(b"x a", b"1")],
    "a request in a value": [(b"x-a", b"1\r\n\r\nPOST /metrics HTTP/1.1\r\nHost: x\r\n\r\n")],
    "crumbs of cookies": [(b"cookie", b"a=1"), (b"cookie", b"b=2")],
    "expect": [(b"expect", b"100-continue")],
    "te": [(b"te", b"trailers, chunked")],
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_headers_over_http_2(gateway: Gateway, name: str) -> None:
    client = Http2(gateway)
    client.ask([*USUAL, *ODD_HEADERS[name]], BODY)
    client.wait()
    assert set(client.statuses.values()) <= {200, *REFUSALS}
    assert {reached.body for reached in BACKEND.reached} <= {BODY}


@pytest.mark.parametrize("header", [
    fields(b""), fields(b"*"), fields(b"metrics"), fields(b"http://llm.test/metrics"), fields(b"/metrics#/v1/chat/completions"),
    fields(b"/v1/chat/completions/../../metrics"),
    fields(b"/v1/chat/completions HTTP/1.1\r\nX: y"), fields(b"/metrics\0"), fields(b"/%00"), fields(method=b"CONNECT"), fields(method=b"PO ST"),
    fields(method=b""),
    fields(method=b"POST /metrics HTTP/1.1\r\nX:"), fields(scheme=b"ftp"), fields(scheme=b"https://llm.test/metrics?"), fields(authority=b""),
    fields(authority=b"other.test"),
    fields(authority=b"llm.test/metrics"), fields(authority=b"llm.test@other"), fields(authority=b"llm.test\r\nX: y"), USUAL[1:],
    USUAL[:3] + USUAL[4:], USUAL[::-1],
], ids=lambda header: repr(header[:4])[:90])  # fmt: skip
def test_pseudo_headers_over_http_2(gateway: Gateway, header: list[tuple[bytes, bytes]]) -> None:
    client = Http2(gateway)
    client.ask(header, BODY)
    client.wait()
    assert set(client.statuses.values()) <= {200, *REFUSALS}


def test_many_requests_over_http_2(gateway: Gateway) -> None:
    """Good and bad ones side by side on one connection, and with what reads like a request behind a body."""
    client = Http2(gateway)
    good = [client.ask(USUAL, BODY), client.ask([*USUAL, (b"content-length", b"18")], BODY)]
    bad = [
        client.ask(fields(b"/metrics"), request()),
        client.ask(USUAL, BODY + request()),
        client.ask(USUAL),
        client.ask(USUAL[:-1], BODY),
    ]
    client.wait()
    assert [client.statuses[stream] for stream in good] == [200, 200]
    assert [client.statuses[stream] for stream in bad] == [404, 400, 400, 401]
    assert [reached.body for reached in BACKEND.reached] == [BODY] * 2


def test_an_answer_that_breaks_off_over_http_2(gateway: Gateway) -> None:
    """Its stream is reset; an end as if that were all would be a lie."""

    client = Http2(gateway)
    BACKEND.answer = breaking
    cut = client.ask(USUAL, BODY)
    client.wait()
    BACKEND.answer = BACKEND.keep
    good = client.ask(USUAL, BODY)
    client.wait()
    assert client.statuses == {cut: 200, good: 200}
    assert client.contents[cut].count(b"data:") == 3
    assert client.whole == {good}


def test_trailers_over_http_2(gateway: Gateway) -> None:
    """Nginx 1.22 closes the connection on them."""
    client = Http2(gateway)
    client.ask(USUAL, BODY, [(b"authorization", b"Bearer wrong"), (b"x-data-parallel-rank", b"1")])
    client.wait()
    assert set(client.statuses.values()) <= {200, *REFUSALS}


def test_requests_that_are_given_up_at_once(gateway: Gateway) -> None:
    """What was told as "rapid reset": others are served, and nothing stays in flight."""
    client = Http2(gateway)
    for _ in range(300):
        client.reset(client.ask(USUAL, BODY))
    client.flush()
    assert gateway.ask(CHAT, BODY).status == 200
    gateway.until(lambda: set(gateway.admin("/in_flight")["in_flight"].values()) == {0})
