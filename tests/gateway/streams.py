"""Many streams at once: a backend in a process of its own, whose every event says when it was sent, and clients that note how late it came.

Body of a request: `events`, how many; `seconds`, between two of them; `bytes`, of padding in each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.gateway.backends import Backend
from tests.gateway.harness import CHAT, KEY, NAME, ROOT, Gateway

HEADER = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"data: [DONE]\n\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of a gateway."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length:")[2].partition("\r\n")[0])
            asked = json.loads(await reader.readexactly(length))
            begun = time.monotonic()
            writer.write(HEADER)
            for number in range(asked.get("events", 5)):
                await asyncio.sleep(begun + asked.get("seconds", 0) * number - time.monotonic())
                event = f'data: {{"number": {number}, "sent": {time.monotonic()}, "padding": "{"x" * asked.get("bytes", 0)}"}}\n\n'
                writer.write(f"{len(event):x}\r\n{event}\r\n".encode())
                await writer.drain()
            writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(LAST), LAST))
            await writer.drain()
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096, limit=1 << 25)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@dataclass
class Process(Backend):
    """A backend that is a process."""

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gateway.streams"], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def process(name: str) -> Iterator[Process]:
    backend = Process(name)
    try:
        yield backend
    finally:
        backend.close()


@dataclass
class Stream:
    """What one client saw."""

    status: int = 0
    events: int = 0
    whole: bool = False
    lateness: list[float] = field(default_factory=list)


async def watch(
    gateway: Gateway, body: dict[str, object], key: str = KEY, port: int = 0, tls: ssl.SSLContext | None = None
) -> Stream:
    """Ask for one stream and follow it to its end. With `port` and no TLS: past the gateway."""
    context = None if port else tls or gateway.tls
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port or gateway.port, ssl=context, server_hostname=NAME if context else None
    )
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {NAME}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    seen = Stream()
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        seen.status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        async for line in reader:
            now = time.monotonic()
            if line.startswith(b"data: {"):
                seen.events += 1
                seen.lateness.append(now - float(line.partition(b'"sent": ')[2].partition(b",")[0]))
            if line == b"0\r\n":
                seen.whole = True
                break
    writer.close()
    return seen


if __name__ == "__main__":
    asyncio.run(main())
