"""Stands in for vLLM: says what it received, and misbehaves when told to. Real vLLM is behind the gateway in tests/e2e.

The request's JSON body may hold `fake`: stream (an event each 0.3 s), slow (answers after 1.5 s), hang (never answers),
refuse (503 with vLLM's own JSON), drop (closes the connection without an answer).
"""

from __future__ import annotations

import http.server
import json
import sys
import time

ADDRESS, NAME = sys.argv[1], sys.argv[2]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Request-Id", "made-by-the-backend")
        self.end_headers()
        self.wfile.write(data)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in [*range(8), "[DONE]"]:
            event = f"data: {number}\n\n".encode()
            self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            self.wfile.flush()
            time.sleep(0.3)
        self.wfile.write(b"0\r\n\r\n")

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            fake = json.loads(body).get("fake")
        except ValueError:
            fake = None
        if fake == "stream":
            self.stream()
        elif fake == "hang":
            time.sleep(30)
        elif fake == "refuse":
            self.answer(503, {"error": {"message": "queue is full", "type": "from_vllm", "param": None, "code": 503}})
        elif fake == "drop":
            self.close_connection = True
        else:
            if fake == "slow":
                time.sleep(1.5)
            headers = [[name.lower(), value] for name, value in self.headers.items()]
            self.answer(
                200, {"backend": NAME, "method": self.command, "path": self.path, "headers": headers, "size": len(body)}
            )

    def __getattr__(self, name: str) -> object:
        if name.startswith("do_"):
            return self.handle_any
        raise AttributeError(name)


http.server.ThreadingHTTPServer.request_queue_size = 128
http.server.ThreadingHTTPServer((ADDRESS, 8000), Handler).serve_forever()
