"""A server on loopback that stands for an instance, in tests of what asks instances."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers as a test wants, which says what: status and text."""

    def get(self) -> tuple[int, str]:
        """The answer to a GET of self.path."""
        raise NotImplementedError

    def post(self, body: bytes) -> tuple[int, str]:
        """The answer to a POST to self.path."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answer a GET."""
        self.reply(*self.get())

    def do_POST(self) -> None:
        """Answer a POST."""
        self.reply(*self.post(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, status: int, text: str) -> None:
        """Answer, and end the connection."""
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


class Server(http.server.ThreadingHTTPServer):
    """Whose queue holds some hundred connections that are made at once: of a short one, Linux leaves the rest to be tried again."""

    daemon_threads = True
    request_queue_size = 1024


@contextmanager
def listening(kind: type[Upstream]) -> Iterator[Any]:
    """A class of handlers of its own, which has the address of its server as `url`, while that listens."""
    handler: Any = type("Handler", (kind,), {})
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
