"""HTTP/1.1 as a client speaks it, on asyncio's streams. It hides nothing: whoever asks sees each piece when it comes, and how the body ended."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

LIMIT = 1 << 22


class BrokenError(Exception):
    """The connection ended where an answer has to go on."""


@dataclass
class Head:
    """The first lines of an answer."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


class Connection:
    """One connection, for one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self.reader, self.writer, self.host = reader, writer, host
        self.used = False  # an answer came on it before
        self.reusable = False

    @classmethod
    async def open(cls, address: str, port: int, tls: ssl.SSLContext | None, name: str) -> Connection:
        """Connect, by TLS where a context is given."""
        reader, writer = await asyncio.open_connection(
            address, port, ssl=tls, server_hostname=name if tls else None, limit=LIMIT
        )
        return cls(reader, writer, name)

    async def ask(self, path: str, body: bytes, key: str) -> Head:
        """Send a request, and read the head of its answer."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.reusable = False
        self.writer.write(head.encode() + body)
        await self.writer.drain()
        try:
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise BrokenError(f"the head of the answer is cut: {error.partial[:100]!r}") from error
            raise ConnectionResetError("it was closed before anything came") from error
        headers = dict(line.split(":", 1) for line in lines[1:] if ":" in line)
        found = {name.strip().lower(): value.strip() for name, value in headers.items()}
        return Head(int(lines[0].split(" ")[1]), found)

    async def pieces(self, head: Head) -> AsyncIterator[bytes]:
        """The body, in the pieces in which it comes. It is whole when this ends without an exception."""
        try:
            if "chunked" in head.headers.get("transfer-encoding", ""):
                while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    yield (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readuntil(b"\r\n")
            else:
                yield await self.reader.readexactly(int(head.headers["content-length"]))
        except asyncio.IncompleteReadError as error:
            raise BrokenError("the connection ended in the middle of the answer") from error
        except (ValueError, KeyError) as error:
            raise BrokenError(f"the body has no length: {error!r}") from error
        self.used = True
        self.reusable = head.headers.get("connection", "").lower() != "close"

    def close(self) -> None:
        """Hang up at once. By the closing words of TLS a server would learn of it half a minute later."""
        self.writer.transport.abort()
