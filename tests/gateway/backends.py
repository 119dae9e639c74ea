"""Servers on loopback that stand for instances behind a gateway: they keep what reached them, and answer as a test wants."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

INTERNAL = "internal-0123456789abcdef0123456789abcdef"


@dataclass
class Asked:
    """A request that reached a backend."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a gateway to a backend."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def read(self) -> bytes:
        """The body, by its length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        """Keep the request and answer it."""
        asked = Asked(self.command, self.path, {key.lower(): value for key, value in self.headers.items()}, self.read())
        backend = self.server.backend
        backend.asked.append(asked)
        backend.connections[self.client_address[1]] = shown(self.connection)
        backend.answer(self, asked)

    def __getattr__(self, name: str) -> Any:
        """Every method is handled alike."""
        if name.startswith("do_"):
            return self.handle_any
        raise AttributeError(name)

    def reply(
        self, status: int, body: bytes | str | dict[str, Any], content_type: str = "application/json", **headers: str
    ) -> None:
        """A whole answer."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, parts: Iterator[bytes], content_type: str = "text/event-stream") -> None:
        """An answer in pieces; sets `cut` of the backend when the gateway hangs up."""
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for part in parts:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.backend.cut.set()
            self.close_connection = True

    def reset(self) -> None:
        """Break the connection without an answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


class Server(http.server.ThreadingHTTPServer):
    """The socket of a backend."""

    daemon_threads = True
    request_queue_size = 1024
    backend: Backend

    def handle_error(self, *_arguments: object) -> None:
        """Who hangs up is no error here."""


def shown(connection: socket.socket) -> str:
    """The common name of the certificate that was shown on a connection; empty without one."""
    told: dict[str, Any] = (connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None) or {}
    names = [value for part in told.get("subject", ()) for name, value in part if name == "commonName"]
    return str(names[0]) if names else ""


def right(handler: Handler, asked: Asked) -> None:
    """A completion, or its stream of five tokens."""
    model = asked.json.get("model") if asked.body.startswith(b"{") else None
    if asked.body.startswith(b"{") and asked.json.get("stream"):
        handler.stream(tokens(5))
    else:
        handler.reply(200, {"object": "chat.completion", "model": model, "backend": handler.server.backend.id})


def tokens(count: int, seconds: float = 0.0) -> Iterator[bytes]:
    """The events of a stream."""
    for number in range(count):
        time.sleep(seconds)
        yield b"data: " + json.dumps({"choices": [{"delta": {"content": f"{number} "}}]}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def failing(status: int) -> Answer:
    """Answers with an error of vLLM's."""
    return lambda handler, _asked: handler.reply(
        status, {"error": {"message": "of vLLM", "type": "from_vllm", "param": None, "code": status}}
    )


def breaking(handler: Handler, _asked: Asked) -> None:
    """Streams three tokens and breaks the connection."""

    def parts() -> Iterator[bytes]:
        yield from list(tokens(3))[:3]
        time.sleep(0.1)
        handler.reset()
        raise OSError

    handler.stream(parts())


def held(seconds: float) -> Answer:
    """Answers late."""

    def answer(handler: Handler, asked: Asked) -> None:
        time.sleep(seconds)
        right(handler, asked)

    return answer


Answer = Callable[[Handler, Asked], None]


@dataclass
class Backend:
    """A backend: its id, what reached it, and how it answers."""

    id: str
    host: str = "127.0.0.1"
    answer: Answer = right
    asked: list[Asked] = field(default_factory=list)
    cut: threading.Event = field(default_factory=threading.Event)
    # With it, it speaks TLS.
    tls: ssl.SSLContext | None = None
    # Where it listens; 0: wherever there is room.
    port: int = 0
    # The connections on which it was asked, by their ports, and whose certificates were shown there.
    connections: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        """Take connections."""
        kind = type("Server6", (Server,), {"address_family": socket.AF_INET6}) if ":" in self.host else Server
        self.server = kind((self.host, self.port), Handler)
        if self.tls:
            self.server.socket = self.tls.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.server.backend = self
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        """As it was."""
        self.answer = right
        self.asked.clear()
        self.cut.clear()

    def close(self) -> None:
        """Refuse connections from now on."""
        self.server.shutdown()
        self.server.server_close()

    def described(self) -> dict[str, Any]:
        """Its entry in fleet.json."""
        instance, _, host = self.id.partition("@")
        return {
            "instance": instance,
            "host": host,
            "address": self.host,
            "port": self.port,
            "agent": f"{self.host}:9440",
            "tls": self.tls is not None,
        }
