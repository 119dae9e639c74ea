"""Stands in front of vLLM and lets in only requests that show the internal key: `vllm serve --middleware fleet_internal_key.InternalKey`.

The file that FLEET_INTERNAL_KEYS names has the SHA-256 of each key that is taken, one a line; behind one that is about to end, the second of the epoch
at which it does. It is looked at for every request, so a change needs no restart. While nothing can be read there, every request is refused.
Runs in vLLM's process, whatever its Python is; needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# What is asked without a key: by whoever watches, and no more than is said there.
OPEN = {("GET", "/health"), ("GET", "/metrics")}
LINE = re.compile(r"([0-9a-f]{64})(?: ([0-9]+))?")
ERROR = {"message": "The internal key is missing or wrong.", "type": "authentication_error", "param": None, "code": "invalid_api_key"}  # fmt: skip
BODY = json.dumps({"error": ERROR}).encode()
HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
    (b"www-authenticate", b"Bearer"),
]
log = logging.getLogger("vllm.fleet_internal_key")  # below vLLM's own, whose handler it has
# Without it vLLM does not start.
KEYS_FILE = Path(os.environ["FLEET_INTERNAL_KEYS"])


class InternalKey:
    """The ASGI application that lets requests through to another one, or refuses them."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.seen: object = ()
        self.keys: list[tuple[bytes, float]] = []

    def taken(self) -> list[tuple[bytes, float]]:
        """The hashes of the keys that are taken, each with the moment at which it ends."""
        try:
            found = KEYS_FILE.stat()
            seen: object = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen != self.seen:
                with KEYS_FILE.open(encoding="ascii", errors="replace") as file:
                    lines = [LINE.fullmatch(line.strip()) for line in file]
                self.keys = [(line[1].encode(), float(line[2] or "inf")) for line in lines if line]
                if not self.keys:
                    log.error("%s has no key: every request is refused", KEYS_FILE)
        except OSError as error:
            seen, self.keys = str(error), []
            if seen != self.seen:
                log.error("%s: every request is refused", error)
        self.seen = seen
        return self.keys

    def lets_in(self, scope: Message) -> bool:
        """Whether a request is open to everybody, or shows a key that is taken."""
        if scope["type"] == "http" and (scope["method"], scope["path"]) in OPEN:
            return True
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = shown[0].partition(b" ") if len(shown) == 1 else (b"", b"", b"")
        digest, now = hashlib.sha256(key.strip(b" ")).hexdigest().encode(), time.time()
        good = scheme.lower() == b"bearer"
        match = False
        for known, end in self.taken():  # all of them, each in constant time
            match |= hmac.compare_digest(digest, known) and now < end
        return good and match

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self.lets_in(scope):
            await self.app(scope, receive, send)
            return
        answer = "http.response"
        if scope["type"] == "websocket":
            if "websocket.http.response" not in (scope.get("extensions") or {}):
                await send({"type": "websocket.close", "code": 1008})
                return
            answer = "websocket.http.response"
        await send({"type": f"{answer}.start", "status": 401, "headers": HEADERS})
        await send({"type": f"{answer}.body", "body": BODY})
