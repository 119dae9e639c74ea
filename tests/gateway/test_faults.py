"""Every fault of a backend, against what the client sees, when, and who was asked how often.

All cases run at the same time, once: each has a route of its own, whose first backend is the one with the fault. The second, where there is one,
always has something to do, so that the first is asked first.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import Answer, Asked, Backend, Handler, failing, right, tokens
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running
from tests.gateway.streams import Stream, process, watch
from tests.ports import free_port

# Seconds after which the gateway gives a silent backend up, and a connection to it.
SILENCE = 2
CONNECT = 1
STOPPING = {
    "error": {
        "message": "cannot schedule new futures after shutdown",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
}
UNKNOWN = {
    "error": {
        "message": "The internal key is missing or wrong.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
}
HEADER = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n'
FIRST_CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)


def hang(_handler: Handler, _asked: Asked) -> None:
    """Never answer."""
    time.sleep(SILENCE * 3)


def reset(handler: Handler, _asked: Asked) -> None:
    handler.reset()


def close(handler: Handler, _asked: Asked) -> None:
    """End the connection properly, without an answer."""
    handler.close_connection = True


def begun(*parts: bytes, after: Callable[[Handler], object]) -> Answer:
    """Send the beginning of an answer, then something else."""

    def answer(handler: Handler, _asked: Asked) -> None:
        handler.close_connection = True
        for part in parts:
            handler.wfile.write(part)
        time.sleep(0.1)  # so that the gateway has seen it
        after(handler)

    return answer


def wait(handler: Handler) -> None:
    hang(handler, Asked("", "", {}, b""))


def end(_handler: Handler) -> None:
    """Just that: the connection is closed."""


def trickle(handler: Handler, _asked: Asked) -> None:
    """An answer that comes byte by byte, never silent for long, and takes longer than a silence may."""
    body = json.dumps({"object": "chat.completion", "padding": "x" * 30}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    for byte in head + body:
        handler.wfile.write(bytes([byte]))
        time.sleep(SILENCE * 1.3 / (len(head) + len(body)))


def busy(**headers: str) -> Answer:
    """vLLM's answer when its queue is full."""
    error = {"error": {"message": "queue is full", "type": "ServiceUnavailableError", "param": None, "code": 503}}
    return lambda handler, _asked: handler.reply(503, error, **headers)


def raw(data: bytes) -> Answer:
    return begun(data, after=end)


@dataclass(frozen=True)
class Fault:
    """What a backend does, and what is to come of it."""

    answer: Answer | None  # None: nobody takes the question
    # What the client gets when no other backend is asked.
    status: int
    # Whether another backend is asked.
    again: bool
    # How long it takes at least.
    seconds: float = 0.0


CUT = -1  # an answer that began breaks off
CLOSED = 0  # nothing: the connection is closed
LARGE = b"HTTP/1.1 200 OK\r\nX-Large: %s\r\nContent-Length: 2\r\n\r\n{}" % (b"x" * 20000)
FAULTS = {
    # before the answer began
    "refuses": Fault(None, 502, True),
    "takes no connection": Fault(None, 504, True, CONNECT),
    "hangs before the header": Fault(hang, 504, False, SILENCE),
    "is stopped (SIGSTOP)": Fault(None, 504, False, SILENCE),
    "resets before the header": Fault(reset, 502, True),
    "closes before the header": Fault(close, 502, True),
    "breaks off in the header": Fault(raw(b"HTTP/1.1 200 OK\r\nContent-Ty"), 502, True),
    "sends a header too large": Fault(raw(LARGE), 502, True),
    "speaks no HTTP": Fault(raw(b"SSH-2.0-OpenSSH_9.2p1\r\n"), CLOSED, False),
    "says 500": Fault(failing(500), 500, False),
    "is stopping and says 500": Fault(lambda handler, _asked: handler.reply(500, STOPPING), 500, True),
    "says 502": Fault(failing(502), 502, True),
    "is full": Fault(busy(), 503, True),
    "is full and says until when": Fault(busy(Retry_After="7"), 503, True),
    "says 504": Fault(failing(504), 504, False),
    "does not know the gateway's key": Fault(lambda handler, _asked: handler.reply(401, UNKNOWN, WWW_Authenticate="Bearer"), 502, True),
    # no fault of the backend
    "finds the question wrong": Fault(failing(400), 400, False),
    "says 422": Fault(failing(422), 422, False),
    "says 501": Fault(failing(501), 501, False),
    "comes byte by byte": Fault(trickle, 200, False, SILENCE),
    # after the answer began
    "hangs in mid stream": Fault(begun(HEADER, FIRST_CHUNK, after=wait), CUT, False, SILENCE),
    "resets in mid stream": Fault(begun(HEADER, FIRST_CHUNK, after=Handler.reset), CUT, False),
    "closes in mid stream": Fault(begun(HEADER, FIRST_CHUNK, after=end), CUT, False),
    "resets after the header": Fault(begun(HEADER, after=Handler.reset), CUT, False),
    "breaks its chunks": Fault(begun(HEADER, FIRST_CHUNK, after=lambda handler: handler.wfile.write(b"zz\r\nwhat\r\n")), CUT, False),
    "cuts its content short": Fault(raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n" + b'{"id": '), CUT, False),
}  # fmt: skip
# Each of them with one backend and with two, with `retry` and without, streamed and not.
CASES = [
    (name, backends, retry, stream)
    for name in FAULTS
    for backends, retry, stream in itertools.product((1, 2), (True, False), (True, False))
]


@dataclass
class Seen:
    """What a client got, and when."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool
    seconds: float


def name_of(case: tuple[str, int, bool, bool]) -> str:
    name, backends, retry, stream = case
    return f"{name}, {backends} backends, {'' if retry else 'no '}retry, {'streamed' if stream else 'whole'}"


def ask(gateway: Gateway, model: str, stream: bool) -> Seen:
    connection = gateway.connection()
    start = time.monotonic()
    connection.request("POST", CHAT, json.dumps({"model": model, "stream": stream}), {"Authorization": f"Bearer {KEY}"})
    try:
        response = connection.getresponse()
    except http.client.RemoteDisconnected:
        return Seen(CLOSED, {}, b"closed", False, time.monotonic() - start)
    whole, body = True, b""
    try:
        while part := response.read1():
            body += part
        whole = not response.length
    except (http.client.HTTPException, OSError):
        whole = False
    connection.close()
    return Seen(
        response.status,
        {name.lower(): value for name, value in response.getheaders()},
        body,
        whole,
        time.monotonic() - start,
    )


@contextlib.contextmanager
def stopped() -> Iterator[int]:
    """The port of a process that was stopped: the kernel still takes connections for it."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = int(listener.getsockname()[1])
        process = subprocess.Popen(["sleep", "600"], pass_fds=[listener.fileno()])
    process.send_signal(signal.SIGSTOP)
    yield port
    process.kill()
    process.wait()


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A port whose queue of connections is full: what comes now is not even refused, as with a host without power."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])


@dataclass
class Ran:
    """What came of all cases."""

    seen: dict[str, Seen]
    asked: dict[str, list[str]]  # by model: the backends that were asked, in their order


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    order: list[tuple[float, str, str]] = []

    def kept(who: str, answer: Answer) -> Answer:
        def answer_kept(handler: Handler, asked: Asked) -> None:
            order.append((time.monotonic(), asked.json["model"], who))
            answer(handler, asked)

        return answer_kept

    good = Backend("good@gpu-2", answer=kept("good", right))
    with contextlib.ExitStack() as stack:
        ports = {
            "refuses": free_port(),
            "takes no connection": stack.enter_context(deaf()),
            "is stopped (SIGSTOP)": stack.enter_context(stopped()),
        }
        ports |= {
            name: Backend("bad", answer=kept("bad", fault.answer)).port
            for name, fault in FAULTS.items()
            if fault.answer
        }
        fleet = document([route("hold", [good])], [good])
        for case in CASES:
            name, backends, retry, _stream = case
            bad = f"{name_of(case)}@gpu-1"
            fleet["backends"][bad] = {**good.described(), "port": ports[name]}
            fleet["routes"].append(route(name_of(case), [good], retry=retry) | {"backends": [bad, good.id][:backends]})
        states = {f"{name_of(case)}@gpu-1": {"leaving": "stopping" in case[0]} for case in CASES} | {good.id: {}}
        directory: Path = tmp_path_factory.mktemp("faults")
        numbers: dict[str, Any] = {"gateway_read_timeout_seconds": SILENCE, "gateway_connect_timeout_seconds": CONNECT}
        gateway = stack.enter_context(running(directory, fleet, **numbers))
        gateway.state(states)
        good.answer = lambda handler, _asked: handler.stream(tokens(200, 0.1))
        holding = gateway.connection()
        holding.request("POST", CHAT, json.dumps({"model": "hold"}), {"Authorization": f"Bearer {KEY}"})
        holding.getresponse()
        good.answer = kept("good", right)
        with ThreadPoolExecutor(40) as pool:
            seen = dict(
                zip(
                    map(name_of, CASES), pool.map(lambda case: ask(gateway, name_of(case), case[3]), CASES), strict=True
                )
            )
        asked: dict[str, list[str]] = {}
        for _when, model, who in sorted(order):
            asked.setdefault(model, []).append(who)
        gateway.until(lambda: sum(gateway.admin("/in_flight")["in_flight"].values()) == 1)
        holding.close()
        yield Ran(seen, asked)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(ran: Ran, name: str) -> None:
    for case in CASES:
        if case[0] == name:
            judge(case, ran.seen[name_of(case)], ran.asked.get(name_of(case), []))


def judge(case: tuple[str, int, bool, bool], seen: Seen, asked: list[str]) -> None:
    """What one client got, and whom its question reached."""
    name, backends, retry, stream = case
    fault, told = FAULTS[name], (name_of(case), seen, asked)
    again = fault.again and backends == 2 and retry
    assert "www-authenticate" not in seen.headers, told
    assert asked == (["bad"] if fault.answer else []) + (["good"] if again else []), told
    assert -0.1 <= seen.seconds - fault.seconds < 3, told
    if again:
        assert (seen.status, seen.whole) == (200, True), told
        assert (
            seen.body.endswith(b"data: [DONE]\n\n") if stream else json.loads(seen.body)["backend"] == "good@gpu-2"
        ), told
    elif fault.status == CUT:
        assert (seen.status, seen.whole) == (200, False), told
    elif fault.status == CLOSED:
        assert (seen.status, seen.body) == (0, b"closed"), told
    elif fault.status == 200:
        assert (seen.status, seen.whole) == (200, True), told
        assert json.loads(seen.body)["object"] == "chat.completion", told
    else:
        refused(seen, fault.status)


def refused(seen: Seen, status: int) -> None:
    """An error in the shape of OpenAI's, which says when to come again if that helps."""
    assert (seen.status, seen.whole, seen.headers["content-type"]) == (status, True, "application/json")
    error: dict[str, Any] = json.loads(seen.body)["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"]
    assert ("retry-after" in seen.headers) == (status == 503)
    assert seen.headers["x-request-id"]


def test_a_process_that_is_stopped_in_mid_stream(tmp_path: Path) -> None:
    """Its clients wait as long as a silence may be, and are cut; when it goes on, so do new requests."""
    numbers: dict[str, Any] = {"gateway_read_timeout_seconds": SILENCE}
    with (
        process("chat@gpu-1") as backend,
        running(tmp_path, document([route("small", [backend])], [backend]), **numbers) as gateway,
    ):

        async def stopping() -> list[Stream]:
            body: dict[str, object] = {"model": "small", "events": 100, "seconds": 0.05}
            tasks = [asyncio.create_task(watch(gateway, body)) for _ in range(5)]
            await asyncio.sleep(0.7)
            backend.process.send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            streams = await asyncio.gather(*tasks)
            assert SILENCE - 0.5 < time.monotonic() - begun < SILENCE + 3
            return streams

        streams = asyncio.run(stopping())
        assert [(stream.status, stream.whole) for stream in streams] == [(200, False)] * 5
        assert all(3 < stream.events < 30 for stream in streams)
        backend.process.send_signal(signal.SIGCONT)
        gateway.until(lambda: gateway.ask(CHAT, {"model": "small", "events": 1}).status == 200)
        gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][backend.id] == 0)
