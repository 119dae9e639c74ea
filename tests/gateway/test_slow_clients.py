"""Clients that are slow, by the hundred, and clients that go away: others are served meanwhile, and nothing of them stays."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.backends import Asked, Backend, Handler, held, right, tokens
from tests.gateway.harness import CHAT, KEY, NAME, Gateway, document, route, running
from tests.gateway.streams import Process, process
from tests.gateway.wire import BODY, Http2, request

SLOW, FEW = "slow-0123456789abcdef0123456789abcdef", "few-0123456789abcdef0123456789abcdef"
HEAD = request(body=b"", key=SLOW).replace(b"Connection: close\r\n\r\n", b"Content-Length: 5000\r\n\r\n")
BACKEND = Backend("chat@gpu-1")


@pytest.fixture(scope="module")
def endless() -> Iterator[Process]:
    with process("endless@gpu-2") as backend:
        yield backend


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, endless: Process) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("slow")
    routes = [route("small", [BACKEND]), route("endless", [endless])]
    clients: dict[str, dict[str, object]] = {"team-a": {}, "slow": {}, "few": {"concurrent_requests": 2}}
    keys = {KEY: {"client": "team-a"}, SLOW: {"client": "slow"}, FEW: {"client": "few"}}
    with running(directory, document(routes, [BACKEND, endless], clients, keys), [BACKEND.id, endless.id]) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh(gateway: Gateway) -> Iterator[None]:
    BACKEND.reset()
    yield
    gateway.until(lambda: set(gateway.admin("/in_flight")["in_flight"].values()) == {0})


# Slow ones ------------------------------------------------------------------------------------------------------------------------------------------


def usual_seconds(gateway: Gateway, requests: int = 100) -> float:
    """The median of an ordinary request."""
    return gateway.median_seconds([(BODY, KEY)] * requests)


def memory(gateway: Gateway) -> int:
    """Kilobytes that all workers have for themselves."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text().split() for pid in gateway.workers()]
    return sum(int(words[words.index("Private_Dirty:") + 1]) for words in rollups)


def closed_after(connection: socket.socket) -> bytes | None:
    """What came before the gateway closed the connection; None while it is open."""
    connection.settimeout(0.01)
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except TimeoutError:
        return received or None
    except ConnectionError:
        return received
    return received


def test_slow_headers_and_bodies(gateway: Gateway) -> None:
    """Two hundred that send a byte a second. Those with a header are closed after 10 s in all, those with a body 15 s after they fell silent."""
    with contextlib.ExitStack() as stack:
        headers = [stack.enter_context(gateway.connect()) for _ in range(100)]
        bodies = [stack.enter_context(gateway.connect()) for _ in range(100)]
        begun = time.monotonic()
        for connection in bodies:
            connection.sendall(HEAD + b"x")
        for connection in headers:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
        alone = usual_seconds(gateway, 10)
        ended: dict[socket.socket, float] = {}
        while len(ended) < 100 and time.monotonic() < begun + 20:
            for connection in headers:
                if connection not in ended:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"X")
                    if closed_after(connection) is not None:
                        ended[connection] = time.monotonic() - begun
            assert usual_seconds(gateway, 20) < alone + 0.1
            time.sleep(0.3)
        assert len(ended) == 100
        assert min(ended.values()) > 9
        assert max(ended.values()) < 15
        for connection in bodies:
            connection.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(65536) == b""
        assert 14 < time.monotonic() - begun < 25
        assert {line["status"] for line in gateway.log(0) if line["client"] == "slow"} == {"408"}
        assert BACKEND.asked and not any(b"xx" in asked.body for asked in BACKEND.asked)


def test_readers_that_do_not_read(gateway: Gateway, endless: Process) -> None:
    """A hundred streams of 5 MB that nobody reads: the gateway keeps little of them, and stops the backend from making more."""
    before = memory(gateway)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(gateway.connect())
            data = json.dumps({"model": "endless", "events": 5000, "bytes": 1000}).encode()
            connection.sendall(request(body=data, key=SLOW))
        gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][endless.id] == 100)
        alone = usual_seconds(gateway)
        assert alone < 0.1
        assert memory(gateway) - before < 100 * 300
        assert gateway.admin("/in_flight")["in_flight"][endless.id] == 100


# Gone ones ------------------------------------------------------------------------------------------------------------------------------------------


def asking(gateway: Gateway, body: bytes, key: str = FEW) -> socket.socket:
    connection = gateway.connect()
    connection.sendall(request(body=body, key=key))
    return connection


def thinking(handler: Handler, asked: Asked) -> None:
    """A backend that says nothing for two seconds; it notices when the gateway hangs up."""
    handler.connection.settimeout(2)
    try:
        if handler.connection.recv(1) == b"":
            handler.server.backend.cut.set()
            handler.close_connection = True
            return
    except TimeoutError:
        pass
    handler.connection.settimeout(None)
    right(handler, asked)


def free_slots(gateway: Gateway) -> int:
    """How many of two a client has left."""
    answer, BACKEND.answer = BACKEND.answer, held(0.3)
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(gateway.ask(CHAT, BODY, key=FEW).status)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    BACKEND.answer = answer
    return statuses.count(200)


@pytest.mark.parametrize("stream", [True, False], ids=["in mid stream", "before the header"])
def test_a_client_that_hangs_up_frees_its_slot_and_ends_the_work(gateway: Gateway, stream: bool) -> None:
    BACKEND.answer = (lambda handler, _asked: handler.stream(tokens(60, 0.05))) if stream else thinking
    held = [asking(gateway, BODY), asking(gateway, BODY)]
    gateway.until(lambda: len(BACKEND.asked) == 2)
    assert gateway.ask(CHAT, BODY, key=FEW).status == 429
    begun = time.monotonic()
    held[0].close()
    assert BACKEND.cut.wait(2), "the backend goes on with what nobody waits for"
    gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][BACKEND.id] == 1, 1)
    assert time.monotonic() - begun < 1
    held[1].close()
    gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][BACKEND.id] == 0, 1)
    assert free_slots(gateway) == 2


def test_a_client_that_hangs_up_in_its_body(gateway: Gateway) -> None:
    for _ in range(4):
        with gateway.connect() as connection:
            connection.sendall(HEAD.replace(SLOW.encode(), FEW.encode()) + b"{")
            time.sleep(0.1)
    assert BACKEND.asked == []
    time.sleep(0.2)
    assert free_slots(gateway) == 2


def test_a_client_that_hangs_up_while_its_long_body_is_read(gateway: Gateway) -> None:
    """It is looked through in slices, with turns for others in between."""
    body = json.dumps({"model": "small", "messages": ["x" * 15_000_000]}).encode()
    for _ in range(3):
        asking(gateway, body).close()
    gateway.until(lambda: free_slots(gateway) == 2)


def test_a_client_that_gives_up_over_http_2(gateway: Gateway) -> None:
    BACKEND.answer = lambda handler, _asked: handler.stream(tokens(60, 0.05))
    client = Http2(gateway)
    usual = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", NAME.encode()), (b":path", CHAT.encode())]
    streams = [client.ask([*usual, (b"authorization", f"Bearer {FEW}".encode())], BODY) for _ in range(2)]
    gateway.until(lambda: len(BACKEND.asked) == 2)
    client.reset(streams[0])
    client.flush()
    assert BACKEND.cut.wait(2)
    gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][BACKEND.id] == 1, 1)
    client.socket.close()
    gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][BACKEND.id] == 0, 1)
    assert free_slots(gateway) == 2


def test_errors_free_the_slot(gateway: Gateway) -> None:
    """Whatever ends a request."""
    for body in (b"{", b"[]", b"", b'{"model": "none"}', b'{"model": 7}', b"\xff"):
        for _ in range(3):
            assert gateway.ask(CHAT, body, key=FEW, method="POST").status in (400, 404)
    for _ in range(3):
        with contextlib.suppress(http.client.HTTPException, OSError):
            assert gateway.ask(CHAT, b"x" * (21 << 20), key=FEW).status == 413
    BACKEND.answer = lambda handler, _asked: handler.reset()
    for _ in range(3):
        assert gateway.ask(CHAT, BODY, key=FEW).status == 502
    BACKEND.answer = right
    assert free_slots(gateway) == 2
