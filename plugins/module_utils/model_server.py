# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Hands out the files of one model over HTTP, read-only, until nobody has asked for a while.

The module model_share has systemd run this file as a program, as a user of its own who sees nothing of the store but this
model. It is plain HTTP: whoever receives the files compares them with hashes that came another way. The secret
keeps out who was not asked; it does not hide anything from someone who can read the network.
"""

from __future__ import annotations

import hmac
import http.server
import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any


class IdleError(Exception):
    """Nobody has asked for a while."""


class Server(socketserver.ThreadingTCPServer):
    """One address, one port, one model."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, job: dict[str, Any]) -> None:
        self.token: str = job["token"]
        self.directory = Path(job["directory"])
        self.files: set[str] = set(job["files"])
        self.idle: float = job["idle"]
        self.lock = threading.Lock()
        self.busy, self.last = 0, time.monotonic()
        if ":" in job["address"]:
            self.address_family = socket.AF_INET6
        super().__init__((job["address"], job["port"]), Handler)

    def count(self, change: int) -> None:
        """Somebody came or went."""
        with self.lock:
            self.busy += change
            self.last = time.monotonic()

    def service_actions(self) -> None:
        """Between two requests: end when there was none for a while."""
        with self.lock:
            if not self.busy and time.monotonic() - self.last > self.idle:
                raise IdleError


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET, whole files and parts of them, and nothing else."""

    server: Server
    timeout = 60  # a receiver that is gone does not keep the server up
    server_version, sys_version = "model-share", ""

    def log_message(self, format: str, *args: Any) -> None:
        """To the journal, without the time, which is there already."""
        print(f"{self.client_address[0]} {format % args}", flush=True)

    def do_GET(self) -> None:
        """Send one file."""
        self.server.count(1)
        try:
            self.file()
        except OSError as error:  # the receiver went away, or the file did
            self.log_message("%s", error)
            self.close_connection = True
        finally:
            self.server.count(-1)

    def file(self) -> None:
        """Only files that are on the list: no path is made from what somebody asks for."""
        shown = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(shown, f"Bearer {self.server.token}".encode()):
            return self.empty(401)
        name = urllib.parse.unquote(self.path.partition("?")[0]).removeprefix("/")
        if name not in self.server.files:
            return self.empty(404)
        with (self.server.directory / name).open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            first, last = 0, size - 1
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or last), last)
                if first > last:
                    return self.empty(416, f"bytes */{size}")
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            if size:
                self.connection.sendfile(content, first, last + 1 - first)
        return None

    def empty(self, status: int, part: str = "") -> None:
        """An answer without a body."""
        self.send_response(status)
        if part:
            self.send_header("Content-Range", part)
        self.send_header("Content-Length", "0")
        self.end_headers()


def ready() -> None:
    """Tell systemd that the port is open."""
    if name := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect(f"\0{name[1:]}" if name.startswith("@") else name)
            notify.send(b"READY=1")


def main() -> int:
    """Serve until nobody has asked for a while."""
    job = json.loads((Path(os.environ["CREDENTIALS_DIRECTORY"]) / "job").read_text())
    try:
        server = Server(job)
    except OSError as error:
        print(f"{job['address']} port {job['port']}: {error.strerror}", flush=True)
        return 1
    with server:
        ready()
        try:
            server.serve_forever()
        except IdleError:
            print(f"nobody asked for {job['idle']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
