# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Asks backends, agents of hosts and Nginx for a gateway's checks: many at once, in one thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks import (
    BUSY,
    FAILED,
    GOOD,
    HUNG,
    REFUSED,
    SILENT,
    WORKING,
    Answer,
    Backend,
    Progress,
    one_line,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds_host import judged

# More than the metrics of any server; an answer that is longer is none of ours.
MOST_BYTES = 8 << 20
Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class AnswerError(Exception):
    """What came is no HTTP, too much, or ends too early."""


@dataclass(frozen=True)
class Times:
    """How patient the checks are, in seconds."""

    # Between two questions to a backend, and between two when the next answer may change something.
    interval: float = 5.0
    retry: float = 1.0
    connect: float = 3.0
    # Without an answer and without a movement of its metrics for as long as this, an engine hangs.
    timeout: float = 20.0

    @property
    def look(self) -> float:
        """How often the metrics of an engine are looked at that has not answered yet."""
        return self.timeout / 5

    def patience(self, result: str) -> float:
        """How long a question may wait in the queue of an engine that works, before it is asked anew."""
        return self.timeout if result == "new" else self.timeout * 6


async def exchange(opened: Opened, head: str, body: bytes) -> tuple[int, bytes]:
    """One request on a connection, and status and body of its answer. Raises OSError or AnswerError."""
    reader, writer = opened
    writer.write(head.encode("latin-1") + body)
    await writer.drain()
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split(" ", 2)[1])
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return status, await chunks(reader)
        if (length := headers.get("content-length")) is not None:
            return status, await reader.readexactly(limited(int(length)))
        content = b""
        while part := await reader.read(1 << 16):
            content += part
            limited(len(content))
        return status, content
    except asyncio.IncompleteReadError:
        raise AnswerError("the connection was closed before the answer was complete") from None
    except (ValueError, IndexError, asyncio.LimitOverrunError):
        raise AnswerError("what came is no HTTP") from None


async def chunks(reader: asyncio.StreamReader) -> bytes:
    """A body that comes in chunks."""
    content = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        content += (await reader.readexactly(limited(size) + 2))[:-2]
        limited(len(content))
    await reader.readline()
    return content


def limited(size: int) -> int:
    """A size that is not too much."""
    if not 0 <= size <= MOST_BYTES:
        raise AnswerError(f"an answer of {size} bytes is too long")
    return size


def request(method: str, path: str, host: str, headers: Mapping[str, str], body: bytes) -> str:
    """The head of a request."""
    lines = {"Host": host, **headers, **({"Content-Length": str(len(body))} if method == "POST" else {})}
    return f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"


def in_url(address: str) -> str:
    """An address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address


async def connected(address: str, port: int, tls: ssl.SSLContext | None, seconds: float) -> Opened:
    """A connection that is there within so many seconds. The handshake of TLS is made by the server itself, which may be busy: it has the time
    that an answer has.
    """
    if tls is None:
        return await asyncio.wait_for(asyncio.open_connection(address, port), seconds)
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(made, (address, port)), seconds)
        return await asyncio.open_connection(sock=made, ssl=tls, server_hostname=address)
    except BaseException:
        made.close()
        raise


class Asker:
    """Asks one backend, as the gate of the role vllm does: with the smallest question of its kind, and for its metrics."""

    def __init__(
        self, backend: Backend, key: str, times: Times, tls: Callable[[], ssl.SSLContext | None] = lambda: None
    ) -> None:
        self.backend, self.times = backend, times
        # What it is asked with at this moment, nothing for plain HTTP; raises OSError or AnswerError where it cannot be asked.
        self.tls = tls
        self.headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
        self.host = f"{in_url(backend.address)}:{backend.port}"
        self.kind = ""

    async def request(self, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, bytes]:
        """Status and body of one answer, on a connection of its own: that there is one to be had is a part of the check."""
        tls = self.tls()
        opened = await connected(self.backend.address, self.backend.port, tls, self.times.connect)
        try:
            headers = {**self.headers, **({"Content-Type": kind} if kind else {})}
            return await exchange(opened, request(method, path, self.host, headers, body), body)
        finally:
            opened[1].transport.abort()  # nothing more is to come, and a close could wait for a peer that hangs

    async def ask(self) -> Answer:
        """Ask once, by each kind's path until the backend has one; the one that it had last first."""
        for kind, path in sorted(model_kinds.askable(), key=lambda one: one[0].name != self.kind):
            try:
                status, content = await self.request("POST", path.path, *path.body(self.backend.model))
            except (OSError, asyncio.TimeoutError, AnswerError) as error:
                return unreachable(error, self.times.connect)
            if model_kinds.lacks(status, content):
                continue
            self.kind = kind.name
            asked = judged(kind, path, status, content)
            if not asked.reason:
                return Answer(GOOD)
            return Answer(BUSY if asked.waiting else FAILED, one_line(asked.reason))
        self.kind = ""
        return Answer(FAILED, "it serves no kind of model that can be asked")

    async def until_it_answers(self) -> Answer:
        """Ask until the answer is another than that it is too busy."""
        while (answer := await self.ask()).heard == BUSY:
            await asyncio.sleep(self.times.retry)
        return answer

    async def work(self, seconds: float) -> model_kinds.Work | None:
        """What its metrics say; nothing when they do not come in time."""
        try:
            status, content = await asyncio.wait_for(self.request("GET", "/metrics"), seconds)
            return model_kinds.work(content.decode(errors="replace")) if status == 200 else None
        except (OSError, asyncio.TimeoutError, AnswerError, ValueError):
            return None

    async def check(self, patience: float) -> Answer:
        """One check. It may take long: an answer is waited for as long as the engine gets on with its work."""
        begun = time.monotonic()
        progress = Progress(begun, self.times.timeout)
        question = asyncio.ensure_future(self.until_it_answers())
        try:
            while True:
                await asyncio.wait({question}, timeout=min(self.times.look, progress.left(time.monotonic())))
                if question.done():
                    return question.result()
                left = progress.left(time.monotonic())
                if left and (work := await self.work(min(left, self.times.timeout / 2))):
                    progress.see(work, time.monotonic())
                now = time.monotonic()
                if question.done():
                    continue
                if progress.hangs(now):
                    return Answer(
                        HUNG,
                        f"no answer for {now - begun:.0f} s, and its engine did nothing for {now - progress.moved:.0f} s",
                    )
                if progress.worked and now - begun >= patience:
                    return Answer(WORKING)
        finally:
            question.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await question


def unreachable(error: Exception, seconds: float) -> Answer:
    """What it means that no answer came."""
    if isinstance(error, ConnectionRefusedError):
        return Answer(REFUSED, "it refuses connections")
    if isinstance(error, asyncio.TimeoutError):
        return Answer(SILENT, f"no connection within {seconds:g} s")
    if isinstance(error, AnswerError):
        return Answer(FAILED, str(error))
    if isinstance(error, ssl.SSLCertVerificationError):
        return Answer(
            FAILED, one_line(f"its certificate is not the one of the fleet that was expected: {error.verify_message}")
        )
    return Answer(FAILED, one_line(getattr(error, "strerror", "") or error or type(error).__name__))


class Agent:
    """The agent of one host: asked again and again on one connection."""

    def __init__(self, host: str, endpoint: str, tls: ssl.SSLContext) -> None:
        self.host, self.endpoint, self.tls = host, endpoint, tls
        address, _, port = endpoint.rpartition(":")
        self.address, self.port = address.strip("[]"), int(port)
        self.opened: Opened | None = None

    async def ask(self, body: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """What it says of its instances. Raises OSError, AnswerError or asyncio.TimeoutError."""
        return await asyncio.wait_for(self.once_more(body), seconds)

    async def once_more(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """On the connection that there is, or on a new one: it may have been closed since."""
        if self.opened:
            with contextlib.suppress(OSError, AnswerError):
                return await self.once(self.opened, body)
        self.opened = await asyncio.open_connection(self.address, self.port, ssl=self.tls, server_hostname=self.address)
        return await self.once(self.opened, body)

    async def once(self, opened: Opened, body: Mapping[str, Any]) -> dict[str, Any]:
        """One question; the connection is only kept after a whole answer."""
        data = json.dumps(body).encode()
        done = False
        try:
            headers = {"Content-Type": "application/json"}
            status, content = await exchange(opened, request("POST", "/state", self.endpoint, headers, data), data)
            if status != 200:
                raise AnswerError(one_line(f"it answers HTTP {status}: {content.decode(errors='replace')}"))
            found = json.loads(content)
            if not isinstance(found, dict) or not isinstance(found.get("instances"), dict):
                raise AnswerError("its answer has no instances")
            done = True
            return dict(found["instances"])
        except ValueError:
            raise AnswerError("its answer is no JSON") from None
        finally:
            if not done:
                opened[1].transport.abort()
                self.opened = None


@dataclass
class InFlight:
    """What Nginx on this host has taken up of the state, and how many requests it has for each backend."""

    path: str
    # How long requests may go on after Nginx was told to stop.
    drain: float
    serial: int = 0
    requests: Mapping[str, int] = field(default_factory=dict)
    # Since when nobody listens there.
    silent_since: float | None = None
    problem: str = ""

    async def look(self) -> None:
        """Ask it. Whoever does not listen takes no request; those that it has may go on, so what it said last stands for a while."""
        try:
            self.serial, self.requests = await asyncio.wait_for(self.ask(), 5.0)
            self.silent_since, self.problem = None, ""
        except (FileNotFoundError, ConnectionRefusedError):
            self.silent_since = self.silent_since or time.monotonic()
            if time.monotonic() - self.silent_since > self.drain:
                self.requests = {}
        except (OSError, AnswerError, asyncio.TimeoutError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.problem = one_line(error or type(error).__name__)

    async def ask(self) -> tuple[int, dict[str, int]]:
        """Its serial and its counts."""
        opened = await asyncio.open_unix_connection(self.path)
        try:
            status, content = await exchange(
                opened, request("GET", "/in_flight", "admin", {"Connection": "close"}, b""), b""
            )
            if status != 200:
                raise AnswerError(f"it answers HTTP {status}")
            told = json.loads(content)
            return int(told["serial"]), {name: int(count) for name, count in dict(told["in_flight"]).items()}
        finally:
            opened[1].transport.abort()

    def has(self, serial: int) -> bool:
        """Whether no request is sent any more that this state forbids."""
        return self.silent_since is not None or self.serial >= serial


def not_after(certificate: Path) -> int | None:
    """When a certificate ends, in unix seconds; None where it is not there or is none. Of a chain the first one counts."""
    command = ["openssl", "x509", "-in", str(certificate), "-noout", "-enddate"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return ssl.cert_time_to_seconds(run.stdout.strip().removeprefix("notAfter="))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
