"""HTTP/1.1 on asyncio streams, as much of it as clients, Nginx and probes use."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Response:
    """A whole answer."""

    status: int
    content: bytes
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, status: int, content: object) -> Response:
        """An answer in JSON, spelt as vLLM spells it."""
        return cls(status, json.dumps(content, separators=(",", ":")).encode())


async def read(reader: asyncio.StreamReader) -> Request | None:
    """The next request of a connection; None when the client closed it."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.split("\r\n")
    method, target, _version = first.split(" ", 2)
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
    }
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length") or 0))
    return Request(method, target, headers, body)


def head(status: int, headers: dict[str, str]) -> bytes:
    """The first lines of an answer."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "server: uvicorn"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")


class Stream:
    """An answer that is sent in events, each in a chunk of its own."""

    def __init__(self, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        self.writer = writer
        kind = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
        writer.write(head(200, {**kind, **headers}))

    async def event(self, data: object) -> None:
        """Send an event; raises ConnectionError when the client is gone."""
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        event = f"data: {text}\n\n".encode()
        self.writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        await self.writer.drain()

    async def end(self) -> None:
        """Say that nothing follows."""
        await self.event("[DONE]")
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()
