#!/usr/bin/python3
"""Stands in for vLLM in images that are small: answers as it does, in no time, and ends as it does. The real one is in an image of its own.

    vllm serve --config FILE

PLAYED_VERSION is what it says its version is. With PLAYED_BROKEN it fails at once. A completion takes a tenth of a second for each token
that is asked for.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

VERSION = os.environ.get("PLAYED_VERSION", "none")
SECONDS_PER_TOKEN = 0.1


def read(path: Path) -> dict[str, Any]:
    """The options of a file in which every line is a name and a JSON value."""
    options = {}
    for line in path.read_text().splitlines():
        name, colon, value = line.partition(": ")
        if colon and not line.startswith("#"):
            try:
                options[name] = json.loads(value)
            except ValueError:
                options[name] = value
    return options


class Handler(http.server.BaseHTTPRequestHandler):
    """One request on each connection: no idle one is there when the program is to end."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        """Leave out the log of requests."""

    def answer(self, status: int, content: object) -> None:
        """Answer with JSON."""
        data = json.dumps(content, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        """Whether the request lacks the key, which it is told."""
        key = os.environ.get("VLLM_API_KEY")
        if key and self.path.startswith("/v1") and self.headers.get("Authorization") != f"Bearer {key}":
            self.answer(401, {"error": "Unauthorized"})
            return True
        return False

    def do_GET(self) -> None:
        """What needs no engine."""
        if self.refused():
            return
        if self.path == "/health":
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
        elif self.path == "/version":
            self.answer(200, {"version": VERSION})
        elif self.path == "/v1/models":
            models = [{"id": name, "object": "model", "owned_by": "vllm"} for name in self.server.models]
            self.answer(200, {"object": "list", "data": models})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        """A completion."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refused():
            return
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            self.answer(404, {"detail": "Not Found"})
            return
        try:
            request = json.loads(body)
            tokens = int(request.get("max_tokens") or 16)
        except (ValueError, AttributeError, TypeError) as error:
            self.answer(400, {"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}})
            return
        model = request.get("model") or self.server.models[0]
        if model not in self.server.models:
            message = f"The model `{model}` does not exist."
            self.answer(404, {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}})
        elif request.get("stream"):
            self.stream(model, tokens)
        else:
            time.sleep(tokens * SECONDS_PER_TOKEN)
            usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
            self.answer(200, {**self.piece(model, " word" * tokens, whole=True, last=True), "usage": usage})

    def piece(self, model: str, text: str, *, whole: bool, last: bool) -> dict[str, Any]:
        """An answer, or a part of one that is streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
        kind = "text_completion"
        if "chat" in self.path:
            choice["message" if whole else "delta"] = {"role": "assistant", "content": text}
            kind = "chat.completion" if whole else "chat.completion.chunk"
        else:
            choice["text"] = text
        return {
            "id": "cmpl-played",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
            "system_fingerprint": VERSION,
        }

    def stream(self, model: str, tokens: int) -> None:
        """Answer token by token."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(tokens):
            time.sleep(SECONDS_PER_TOKEN)
            self.event(json.dumps(self.piece(model, " word", whole=False, last=number == tokens - 1)))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, text: str) -> None:
        """Send one event."""
        event = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        self.wfile.flush()


class Server(http.server.ThreadingHTTPServer):
    """Knows how many requests run."""

    request_queue_size = 128

    def __init__(self, address: tuple[str, int], models: list[str]) -> None:
        self.models = models
        self.running = 0
        self.change = threading.Condition()
        super().__init__(address, Handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """Counted before its thread begins, so that none is missed."""
        with self.change:
            self.running += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """The thread of a request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.change:
                self.running -= 1
                self.change.notify_all()

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """A client that went away is no news."""


def main() -> int:
    """Serve until SIGTERM, and then until what runs has ended."""
    if os.environ.get("PLAYED_BROKEN"):
        print("RuntimeError: this image is broken", file=sys.stderr, flush=True)
        return 1
    if len(sys.argv) != 4 or sys.argv[1:3] != ["serve", "--config"]:
        print(f"usage: vllm serve --config FILE, not {sys.argv[1:]}", file=sys.stderr, flush=True)
        return 2
    options = read(Path(sys.argv[3]))
    served = options.get("served-model-name") or options["model"]
    server = Server(
        (options.get("host", "127.0.0.1"), int(options.get("port", 8000))),
        [served] if isinstance(served, str) else served,
    )

    def stop(number: int, frame: FrameType | None) -> None:
        # shutdown() waits for the loop, which is in this very thread
        threading.Thread(target=server.shutdown).start()

    # The first process of a container has no default for these.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"played vLLM {VERSION} listens on port {server.server_port}", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.socket.close()
    with server.change:
        ended = server.change.wait_for(lambda: not server.running, timeout=float(options.get("shutdown-timeout", 0)))
    print("all requests have ended" if ended else f"{server.running} requests did not end in time", flush=True)
    sys.stdout.flush()
    os._exit(0)  # the threads of requests that did not end are not waited for


if __name__ == "__main__":
    sys.exit(main())
