"""The agent of a host: tells gateways the state of its instances and hears what they do with them, and hands out metrics.

It listens by TLS and takes certificates of the fleet's authority only. What it decides is in host_agent.py; everything here has a limit in
bytes and in seconds, so that no peer holds up the others.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import agent_files
import host_agent
import instance_tls
from host_agent import RefusedError, Request

CERTIFICATES = Path("/etc/ssl/vllm-fleet/fleet")
# Connections at the same time, of all and of one address. A gateway has one.
CONNECTIONS, CONNECTIONS_OF_ADDRESS = 128, 16
HANDSHAKE_SECONDS = 5.0
# Until the head of a further request is whole, for its body, and for its answer to be taken.
IDLE_SECONDS, BODY_SECONDS, ANSWER_SECONDS = 30.0, 5.0, 20.0
# What an instance has for its metrics: whoever asks this host gives up after 10 s.
METRICS_SECONDS = 4.0
UNITS_SECONDS = 1.0
TEXT = "text/plain; version=0.0.4; charset=utf-8"
REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
           413: "Content Too Large", 431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
           502: "Bad Gateway"}  # fmt: skip

log = logging.getLogger("vllm-fleet-agent")


class Certificates:
    """The TLS of new connections, made again when the files change. When new ones cannot be used, those of before go on."""

    def __init__(self, directory: Path) -> None:
        self.files = [directory / name for name in ("ca.pem", "cert.pem", "key.pem")]
        self.seen: object = None
        self.made = self.make()

    def make(self) -> ssl.SSLContext:
        """From the files as they are now."""
        self.seen = self.stamps()
        authority, certificate, key = self.files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED  # for its purpose, client authentication, and not past its time
        context.options |= ssl.OP_NO_TICKET  # nobody comes back by a session of a certificate that has ended since
        context.num_tickets = 0
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
        return context

    def stamps(self) -> object:
        """What tells that a file is another one."""
        return [(found.st_ino, found.st_mtime_ns) for found in (path.stat() for path in self.files)]

    def current(self) -> ssl.SSLContext:
        """For the connection that comes now."""
        try:
            if self.seen != self.stamps():
                self.made = self.make()
                log.info("the certificate was read again")
        except (OSError, ssl.SSLError) as error:
            log.warning("the certificate cannot be read again: %s", error)
        return self.made


class Units:
    """The states of the units of instances, asked for at most once a second."""

    def __init__(self, instances: list[str]) -> None:
        self.names = {f"vllm@{name}.service": name for name in instances}
        self.asked = 0.0
        self.states: dict[str, str] = {}
        self.lock = asyncio.Lock()

    async def current(self) -> dict[str, str]:
        """By instance, in systemd's words."""
        async with self.lock:
            if self.names and time.monotonic() - self.asked > UNITS_SECONDS:
                with contextlib.suppress(OSError, asyncio.TimeoutError):
                    self.states = await self.ask()
                self.asked = time.monotonic()
        return self.states

    async def ask(self) -> dict[str, str]:
        command = ["systemctl", "show", "--property=Id,ActiveState", *self.names]
        nothing = (
            asyncio.subprocess.DEVNULL
        )  # where nobody answers it, its complaint would be in the journal each second
        program = await asyncio.create_subprocess_exec(
            *command, stdin=nothing, stdout=asyncio.subprocess.PIPE, stderr=nothing
        )
        try:
            output, _ = await asyncio.wait_for(program.communicate(), 3)
        except asyncio.TimeoutError:
            program.kill()
            raise
        shown = [dict(line.split("=", 1) for line in unit.splitlines()) for unit in output.decode().split("\n\n")]
        return {self.names[unit["Id"]]: unit["ActiveState"] for unit in shown if unit.get("Id") in self.names}


async def metrics_of(address: str, port: int, config: str) -> str:
    """What an instance tells, in its own connection."""

    async def ask() -> bytes:
        tls = instance_tls.context_of(config)
        reader, writer = await asyncio.open_connection(address, port, ssl=tls)
        try:
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: instance\r\nAccept: text/plain\r\nConnection: close\r\n\r\n")
            answer = bytearray()
            while part := await reader.read(65536):
                answer += part
                if len(answer) > host_agent.METRICS_BYTES:
                    raise ValueError("the answer is too long")
            return bytes(answer)
        finally:
            writer.transport.abort()

    return host_agent.content(await asyncio.wait_for(ask(), METRICS_SECONDS))


class Agent:
    """Answers peers."""

    def __init__(self, configuration: dict[str, Any]) -> None:
        self.host: str = configuration["host"]
        self.gateways: list[str] = configuration["gateways"]
        self.monitoring: list[str] = configuration["monitoring"]
        self.instances: dict[str, dict[str, Any]] = configuration["instances"]
        self.units = Units(list(self.instances))
        # Which instances want out, as each gateway was told by the last answer to it.
        self.told: dict[str, list[str]] = {}

    async def answer(self, asked: Request, body: bytes, peer: str) -> tuple[str, str]:
        """The type and the text of an answer."""
        host_agent.check_allowed(asked, peer, self.gateways, self.monitoring)
        if asked.path == "/state":
            try:
                return "application/json", json.dumps(await self.state(body, peer))
            except OSError as error:
                raise RefusedError(500, f"a file of the agent cannot be used: {error}") from None
        if asked.path == "/metrics":
            return TEXT, host_agent.merged(await self.all_metrics()) + self.own_metrics()
        name = asked.path.removeprefix("/metrics/")
        if name not in self.instances:
            raise RefusedError(404, "there is no instance of this name")
        try:
            return TEXT, await metrics_of(**self.instances[name])
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            raise RefusedError(
                502, f"the instance does not tell its metrics: {error or type(error).__name__}"
            ) from None

    async def state(self, body: bytes, gateway: str) -> dict[str, Any]:
        """Hear a gateway, and tell it what is wanted of each instance."""
        said = host_agent.statement(body, gateway, self.instances)
        agent_files.hear(gateway, {**said, "told": self.told.get(gateway, [])})
        units = await self.units.current()
        told = {
            name: {**agent_files.wishes(name), "unit": units.get(name, "unknown"), "scheme": instance_tls.scheme(one["config"])}
            for name, one in self.instances.items()
        }  # fmt: skip
        self.told[gateway] = [name for name, instance in told.items() if host_agent.wants_out(instance)]
        return {"host": self.host, "instances": told}

    def own_metrics(self) -> str:
        """Those of the host itself; without them where they cannot be read: others are told all the same."""
        try:
            return agent_files.metrics()
        except OSError as error:
            log.warning("the metrics of the watch cannot be read: %s", error)
            return ""

    async def all_metrics(self) -> dict[str, str | None]:
        """Those of every instance, asked at the same time; nothing of one that does not answer."""
        asked = [metrics_of(**instance) for instance in self.instances.values()]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return {name: text if isinstance(text, str) else None for name, text in zip(self.instances, found, strict=True)}


def peer_of(writer: asyncio.StreamWriter) -> str:
    """The common name of the certificate by which a peer came."""
    certificate = writer.get_extra_info("peercert") or {}
    names = [value for attribute in certificate.get("subject", ()) for name, value in attribute if name == "commonName"]
    return names[0] if len(names) == 1 else ""


def response(status: int, kind: str, text: str, keep_alive: bool) -> bytes:
    """An answer as it is sent."""
    body = text.encode()
    head = [f"HTTP/1.1 {status} {REASONS[status]}", f"Content-Type: {kind}", f"Content-Length: {len(body)}",
            f"Connection: {'keep-alive' if keep_alive else 'close'}"]  # fmt: skip
    return "\r\n".join([*head, "", ""]).encode() + body


async def read_request(reader: asyncio.StreamReader) -> tuple[Request, bytes] | None:
    """One request, whole, or nothing when no further one comes."""
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE_SECONDS)
    except asyncio.LimitOverrunError:
        raise RefusedError(431, f"the head may have {host_agent.HEAD_BYTES} bytes") from None
    except (asyncio.TimeoutError, asyncio.IncompleteReadError):
        return None
    asked = host_agent.request(head)
    try:
        return asked, await asyncio.wait_for(reader.readexactly(asked.length), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise RefusedError(408, f"the body has to come within {BODY_SECONDS:.0f} s") from None


async def serve(agent: Agent, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection, until the peer has had enough or does not keep to the limits."""
    peer, keep_alive = peer_of(writer), True
    while keep_alive:
        kind, keep_alive = "application/json", False
        try:
            came = await read_request(reader)
            if came is None:
                return
            kind, text = await agent.answer(*came, peer)
            status, keep_alive = 200, came[0].keep_alive
        except RefusedError as error:
            status, text = error.status, json.dumps({"error": str(error)})
            log.warning("%s: %s", peer or "a peer without a name", error)
        writer.write(response(status, kind, text, keep_alive))
        await asyncio.wait_for(writer.drain(), ANSWER_SECONDS)


class Listener:
    """Takes connections, as many as there is room for."""

    def __init__(self, agent: Agent, certificates: Certificates) -> None:
        self.agent = agent
        self.certificates = certificates
        self.open: collections.Counter[str] = collections.Counter()

    async def run(self, listening: socket.socket) -> None:
        """Take connections for ever."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
            except OSError as error:  # a peer that went already, or no more descriptors
                log.warning("a connection cannot be taken: %s", error)
                await asyncio.sleep(0.1)
                continue
            source = address[0]
            if self.open.total() >= CONNECTIONS or self.open[source] >= CONNECTIONS_OF_ADDRESS:
                connection.close()
                continue
            self.open[source] += 1
            task = loop.create_task(self.connected(connection, source))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def connected(self, connection: socket.socket, source: str) -> None:
        """One connection, from its handshake to its end."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=host_agent.HEAD_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport = None
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self.certificates.current(), ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
            await serve(self.agent, reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        except ssl.SSLError as error:
            log.warning("%s: %s", source, error)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            pass  # the peer went, or takes no answer
        except Exception:
            log.exception("a request of %s", source)
        finally:
            self.open[source] -= 1
            self.open += collections.Counter()  # without those that are at zero
            if transport:
                transport.close()
                # a peer that does not take the end of the connection has a moment, and no more
                loop.call_later(HANDSHAKE_SECONDS, cut, transport)
            else:
                connection.close()


def cut(transport: asyncio.Transport) -> None:
    """End a connection, if it has not ended yet: of one that has, Python 3.11 cannot tell."""
    with contextlib.suppress(AttributeError):
        transport.abort()


def listen(address: str, port: int) -> socket.socket:
    """A socket at an address that the host may get a moment later: at a boot the network can be behind."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setblocking(False)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    level, option = (socket.IPPROTO_IPV6, 78) if family == socket.AF_INET6 else (socket.IPPROTO_IP, 15)
    listening.setsockopt(level, option, 1)  # IPV6_FREEBIND and IP_FREEBIND, which have no names in Python
    listening.bind((address, port))
    listening.listen(CONNECTIONS)
    return listening


def tell_systemd(text: str) -> None:
    """READY=1, so that the unit is started when the agent listens."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(text.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


async def main() -> None:
    """Listen until systemd ends it."""
    configuration = agent_files.configuration()
    listener = Listener(Agent(configuration), Certificates(CERTIFICATES))
    running = asyncio.ensure_future(listener.run(listen(configuration["address"], configuration["port"])))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    tell_systemd("READY=1")
    with contextlib.suppress(asyncio.CancelledError):
        await running


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    asyncio.run(main())
