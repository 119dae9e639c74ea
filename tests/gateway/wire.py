"""Requests byte by byte and frame by frame, as no client's library would send them, and a backend that says exactly what reached it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events

from tests.gateway.backends import INTERNAL, Asked, Backend, Handler, right
from tests.gateway.harness import CHAT, KEY, NAME, Gateway

PATHS = {CHAT, "/v1/completions"}
# All that a backend learns of a request besides its body.
HEADERS = {
    "host",
    "authorization",
    "content-length",
    "content-type",
    "accept",
    "x-request-id",
    "traceparent",
    "x-forwarded-for",
    "x-forwarded-proto",
}
# Which errors a client may get for what is its own fault; none that says something of a backend.
REFUSALS = {400, 401, 404, 405, 408, 411, 413, 414, 415, 421, 501, 505}
BODY = b'{"model": "small"}'


@dataclass
class Reached:
    """A request as it reached the backend, with every header as often as it came."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def header(self) -> dict[str, str]:
        return dict(self.headers)


@dataclass
class Witness(Backend):
    """A backend that keeps everything and answers."""

    reached: list[Reached] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.answer = self.keep

    def keep(self, handler: Handler, asked: Asked) -> None:
        headers = [(name.lower(), value) for name, value in handler.headers.items()]
        self.reached.append(Reached(asked.method, asked.path, headers, asked.body))
        right(handler, asked)

    def judge(self, models: Sequence[str]) -> None:
        """What reached it is what may, whatever a test did."""
        for reached in self.reached:
            names = [name for name, _value in reached.headers]
            assert (reached.method, reached.path) in {("POST", path) for path in PATHS}, reached
            assert set(names) <= HEADERS, reached
            assert len(names) == len(set(names)), reached
            assert reached.header["authorization"] == f"Bearer {INTERNAL}", reached
            assert reached.header["host"] == "vllm", reached
            assert re.fullmatch("[0-9a-f]{32}", reached.header["x-request-id"]), reached
            assert KEY not in str(reached), reached
            assert json.loads(reached.body)["model"] in models, reached


def request(
    target: bytes = CHAT.encode(), method: bytes = b"POST", headers: bytes = b"", body: bytes = BODY, key: str = KEY
) -> bytes:
    """A request; it is the last one on its connection."""
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    head = b"%s %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n" % (method, target, NAME.encode(), key.encode())
    return head + headers + length + b"Connection: close\r\n\r\n" + body


def staying(data: bytes) -> bytes:
    """The same request, on a connection that others may follow on."""
    return data.replace(b"Connection: close\r\n", b"", 1)


def send(gateway: Gateway, data: bytes, seconds: float = 15) -> bytes:
    """Everything that comes back, until the connection is closed or that long nothing came."""
    received = b""
    with gateway.connect(seconds) as connection, contextlib.suppress(TimeoutError, ConnectionError):
        connection.sendall(data)
        while part := connection.recv(65536):
            received += part
    return received


def judge_logs(gateway: Gateway) -> None:
    """Whatever came: every line of the access log is JSON in UTF-8, no key is in a log, and nothing in the program went wrong."""
    logs = gateway.directory / "var/log/nginx"
    access = (logs / "access.log").read_text()
    errors = (logs / "error.log").read_text(errors="replace")  # what came is there byte by byte
    for line in access.splitlines():
        assert {"client", "status", "uri", "backend"} <= set(json.loads(line)), line
    for text in (access, errors):
        assert KEY not in text
        assert INTERNAL not in text
        assert not re.search(r"\[(alert|crit|emerg)\]|traceback|runtime error", text), text[-3000:]


class _Kept(io.BytesIO):
    """Bytes that http.client reads as a socket, answer after answer."""

    def makefile(self, _mode: str) -> _Kept:
        return self

    def close(self) -> None:
        """Not with the first answer."""


def answers(data: bytes) -> list[int]:
    """The statuses of all answers in what came back; each of them has to be a proper one, errors in the shape of OpenAI's."""
    file, statuses = _Kept(data), []
    while file.tell() < len(data):
        response = http.client.HTTPResponse(file)  # type: ignore[arg-type]
        response.begin()
        judge_answer(response.status, response.headers["Content-Type"], response.read())
        statuses.append(response.status)
    return statuses


def judge_answer(status: int, content_type: str | None, content: bytes) -> None:
    if status >= 400:
        assert content_type == "application/json", content
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}, content


class Http2:
    """A connection over HTTP/2 whose client checks nothing of what it sends."""

    def __init__(self, gateway: Gateway) -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        tls.set_alpn_protocols(["h2"])
        self.socket = tls.wrap_socket(socket.create_connection(("127.0.0.1", gateway.port), 10), server_hostname=NAME)
        config = h2.config.H2Configuration(
            validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None
        )
        self.frames = h2.connection.H2Connection(config)
        self.frames.initiate_connection()
        self.statuses: dict[int, int] = {}
        self.types: dict[int, str] = {}
        self.contents: dict[int, bytes] = {}
        self.open: set[int] = set()
        self.whole: set[int] = set()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.frames.data_to_send())

    def ask(
        self, headers: Sequence[tuple[bytes, bytes]], body: bytes = b"", trailers: Sequence[tuple[bytes, bytes]] = ()
    ) -> int:
        """Send a request; returns its stream."""
        stream: int = self.frames.get_next_available_stream_id()
        self.frames.send_headers(stream, headers, end_stream=not body and not trailers)
        if body:
            self.frames.send_data(stream, body, end_stream=not trailers)
        if trailers:
            self.frames.send_headers(stream, trailers, end_stream=True)
        self.open.add(stream)
        self.flush()
        return stream

    def reset(self, stream: int) -> None:
        """Give a request up."""
        self.frames.reset_stream(stream)
        self.open.discard(stream)

    def wait(self, seconds: float = 10) -> None:
        """Until all requests have their answer, or the connection is closed."""
        end = time.monotonic() + seconds
        while self.open:
            self.socket.settimeout(max(0.01, end - time.monotonic()))
            data = self.socket.recv(65536)
            if not data:
                break
            for event in self.frames.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    told = dict(event.headers)
                    self.statuses[event.stream_id] = int(told[b":status"])
                    self.types[event.stream_id] = told.get(b"content-type", b"").decode()
                elif isinstance(event, h2.events.DataReceived):
                    self.contents[event.stream_id] = self.contents.get(event.stream_id, b"") + event.data
                    self.frames.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self.whole.add(event.stream_id)
                    self.open.discard(event.stream_id)
                elif isinstance(event, h2.events.StreamReset):
                    self.open.discard(event.stream_id)
            self.flush()
        for stream, status in self.statuses.items():
            judge_answer(status, self.types[stream], self.contents.get(stream, b""))
