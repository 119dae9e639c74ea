# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The checks of a gateway: asks its backends whether they answer and their hosts what is wanted, and tells Nginx which of them to use.

What is decided, and how, is in gateway_checks.py and gateway_checks_host.py, which lie beside this file on a gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks import (
    Backend,
    Check,
    Fleet,
    FleetFileError,
    OtherKeyError,
    Use,
    Wish,
    decide,
    lines,
    one_line,
    told,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks_host import (
    Agent,
    AnswerError,
    Asker,
    InFlight,
    Times,
    not_after,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_tls import HTTPS

# state.json is written again after this, so that whoever reads it sees that somebody is there.
ALIVE_SECONDS = 5.0
# A host that says nothing for so long is worth a line.
SILENT_SECONDS = 10.0
FIRST_SECONDS = 5.0
AGENT_SECONDS = 3.0
# How often it is looked when the certificates end.
CERTIFICATES_SECONDS = 3600.0
# What the hosts said last, beside the files of the backends, which all have an @ in their names.
WISHES = "hosts.json"
NEW = Check()


def log(text: str, warning: bool = False) -> None:
    """A line of the journal."""
    print(f"{'<4>' if warning else '<6>'}{text}", flush=True)


def notify(text: str) -> None:
    """Tell systemd."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
            channel.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)


def read(path: Path) -> dict[str, Any]:
    """A file in JSON; nothing where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, content: Mapping[str, Any], durable: bool = True) -> None:
    """Replace a file by rename."""
    partial = path.with_name(f".{path.name}.new")
    with partial.open("w") as file:
        json.dump(content, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    partial.rename(path)


def seen(path: Path) -> tuple[int, int]:
    """Tells one content of a file from another; the same for all that are not there."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)


class Service:
    """The checks of one gateway. All of it runs in one thread; decide() has the last word."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.times = Times(settings.interval, settings.retry, settings.connect_timeout, settings.timeout)
        self.key = (settings.credentials / "internal_key").read_text().strip()
        self.certificate_seen, self.tls = seen(settings.certificate), self.context()
        self.fleet_seen = (0, 0)
        self.fleet = Fleet("", (), {})
        self.checks: dict[str, Check] = {}
        self.wishes: dict[str, Wish] = {}
        self.agents: dict[str, Agent] = {}
        # The instances of each host, as its agent lists them.
        self.theirs: dict[str, list[str]] = {}
        # Since when each agent cannot be asked; negative once that was told.
        self.silent: dict[str, float] = {}
        self.tasks: dict[Backend | Agent, asyncio.Task[None]] = {}
        # When they end, by name.
        self.certificates: dict[str, int] = {}
        self.nginx = InFlight(str(settings.admin), settings.drain)
        self.changed = asyncio.Event()
        state = read(settings.state)
        self.serial, self.written = int(state.get("serial") or 0), 0.0
        self.uses = {name: Use.remembered(use) for name, use in state.get("backends", {}).items()}
        # The state with which each backend that is not used went out of use.
        self.out = {name: self.serial for name, use in self.uses.items() if not use.use}

    def context(self) -> ssl.SSLContext | None:
        """What agents are asked with; nothing on a gateway that has no certificate of the fleet."""
        ca, *pair = (self.settings.credentials / f"fleet_{name}" for name in ("ca", "cert", "key"))
        if any(not file.is_file() or "-----BEGIN" not in file.read_text() for file in (ca, *pair)):
            return None
        try:
            context = ssl.create_default_context(cafile=str(ca))
            context.load_cert_chain(*pair)
        except ssl.SSLError as error:
            log(
                f"the certificate of the fleet cannot be used ({error.reason}): no host is asked what it wants",
                warning=True,
            )
            return None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    # What is known

    def speaks_tls(self, name: str) -> bool:
        """Whether a backend speaks TLS: as its host says, or as the inventory has it while that has said nothing."""
        scheme = self.wishes[name].scheme
        return scheme == HTTPS if scheme else self.fleet.backends[name].tls

    def asked_with(self, name: str) -> ssl.SSLContext | None:
        """What a backend is asked with; nothing for plain HTTP."""
        if not self.speaks_tls(name):
            return None
        if self.tls is None or not self.settings.backend_tls:
            raise AnswerError("it speaks TLS, and this gateway has no certificate of the fleet for it")
        return self.tls

    def follow_fleet(self) -> None:
        """Read fleet.json again when it has changed."""
        if (now := seen(self.settings.fleet)) == self.fleet_seen:
            return
        self.fleet_seen = now
        try:
            self.take(Fleet.read(self.settings.fleet.read_text(), self.key))
        except (OSError, FleetFileError) as error:
            log(f"{self.settings.fleet}: {error}", warning=True)
            # Where the key is new, systemd gives it to who starts.
            if not self.checks or isinstance(error, OtherKeyError):
                raise SystemExit(1) from None

    def take(self, fleet: Fleet) -> None:
        """Know the backends and the hosts of a fleet: as before, or as they were written down, or as new ones."""
        old, self.fleet = self.fleet.backends, fleet
        wishes = read(self.settings.memory / WISHES)
        for name, one in fleet.backends.items():
            self.wishes.setdefault(name, Wish.remembered(wishes.get(name, {})))
            before = old.get(name, one)
            other_tls = before.tls != one.tls and not self.wishes[name].scheme
            if (before.address, before.port) != (one.address, one.port) or other_tls:
                self.checks[name] = Check()  # what was asked was something else
            self.checks.setdefault(name, Check.remembered(read(self.settings.memory / f"{name}.json")))
        for name in set(self.checks) - set(fleet.backends):
            del self.checks[name], self.wishes[name]
            self.out.pop(name, None)
        for file in self.settings.memory.glob("*@*.json"):
            if file.name.removesuffix(".json") not in fleet.backends:
                file.unlink(missing_ok=True)
        endpoints = {one.host: one.agent for one in fleet.backends.values() if one.agent}
        self.agents = {
            host: known
            if (known := self.agents.get(host)) and known.endpoint == endpoint
            else Agent(host, endpoint, self.tls)
            for host, endpoint in endpoints.items()
            if self.tls
        }

    def write_down(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write what outlives a restart. A full disk stops no check."""
        try:
            write(path, content)
        except OSError as error:
            log(f"{path} cannot be written ({error.strerror}): a restart would not know it", warning=True)

    # What is decided

    def decide(self) -> None:
        """Decide, and tell it when something changes."""
        before = self.uses
        secured = {name for name in self.fleet.backends if self.speaks_tls(name)}
        self.uses = decide(self.fleet.routes, self.checks, self.wishes, before, time.time(), secured)
        if self.uses != before:
            self.serial += 1
            unused = [name for name, use in self.uses.items() if not use.use]
            self.out = {name: self.out.get(name, self.serial) for name in unused}
        if self.uses != before or time.monotonic() - self.written >= self.settings.alive:
            told = {
                "serial": self.serial,
                "time": time.time(),
                "backends": {name: use.written() for name, use in self.uses.items()},
                "certificates": self.certificates,
            }
            write(self.settings.state, told, durable=False)
            self.written = time.monotonic()
        for warning, line in lines(self.fleet.routes, before, self.uses):
            log(line, warning)

    # Who is asked

    async def follow_backend(self, backend: Backend) -> None:
        """Check one backend again and again."""
        asker = Asker(backend, self.key, self.times, lambda: self.asked_with(backend.id))
        if self.checks[backend.id].result != "new":
            await asyncio.sleep(random.uniform(0, self.times.interval))  # noqa: S311 - so that not all are asked at once
        while True:
            begun, before, tls = time.monotonic(), self.checks[backend.id], self.speaks_tls(backend.id)
            answer = await asker.check(self.times.patience(before.result))
            if self.speaks_tls(backend.id) != tls:
                continue  # what was asked is no more
            check = self.checks[backend.id] = before.after(answer, time.time())
            if check.result != before.result:
                self.write_down(self.settings.memory / f"{backend.id}.json", check.written())
            if (check.result, check.why) != (before.result, before.why):
                self.changed.set()
            left = self.times.interval - (time.monotonic() - begun)
            await asyncio.sleep(self.times.retry if check.undecided else max(self.times.retry, left))

    async def ask(self, agent: Agent) -> None:
        """Tell one host what this gateway does with its instances, and hear what is wanted of them."""
        gone = {name for name, serial in self.out.items() if self.nginx.has(serial)}
        theirs = self.theirs.get(agent.host, [])
        body = told(self.fleet, agent.host, self.uses, gone, self.nginx.requests, theirs, self.settings.backend_tls)
        try:
            self.hear(agent.host, await agent.ask(body, AGENT_SECONDS))
        except (OSError, AnswerError, asyncio.TimeoutError, ValueError, TypeError, AttributeError) as error:
            self.miss(agent.host, error)

    def hear(self, host: str, instances: Mapping[str, Mapping[str, Any]]) -> None:
        """What a host says of its instances."""
        before = dict(self.wishes)
        for one in self.fleet.backends.values():
            if one.host == host and one.instance in instances:
                tls = self.speaks_tls(one.id)
                self.wishes[one.id] = Wish.of(instances[one.instance], before[one.id], time.time())
                if self.speaks_tls(one.id) != tls:
                    self.checks[one.id] = Check()  # it was started anew, and is used when it has answered
                    log(f"{one.id} is asked by {'TLS' if not tls else 'plain HTTP'} from now on, as {host} says")
        self.theirs[host] = sorted(instances)
        if self.silent.pop(host, 0.0) < 0:
            log(f"{host}: its agent answers again")
        if self.wishes != before:
            known = {name: wish.written() for name, wish in self.wishes.items() if wish.says_something}
            self.write_down(self.settings.memory / WISHES, known)
            self.changed.set()

    def miss(self, host: str, error: Exception) -> None:
        """A host says nothing: what it said last counts. Told once, when it lasts."""
        since = self.silent.setdefault(host, time.monotonic())
        if 0 <= since <= time.monotonic() - SILENT_SECONDS:
            self.silent[host] = -1.0
            reason = one_line(getattr(error, "strerror", "") or error or "no answer in time")
            log(f"{host}: its agent cannot be asked ({reason}); what it said last counts", warning=True)

    async def follow_agent(self, agent: Agent) -> None:
        """Ask one host again and again."""
        while True:
            await asyncio.sleep(self.settings.agent_interval)
            await self.ask(agent)

    async def follow_nginx(self) -> None:
        """Ask Nginx again and again what it has of the state, and in flight."""
        known = ""
        while True:
            await self.nginx.look()
            if self.nginx.problem and not known:
                log(
                    f"Nginx does not say what it has in flight ({self.nginx.problem}): hosts that stop wait for it",
                    warning=True,
                )
            known = self.nginx.problem
            await asyncio.sleep(self.settings.agent_interval)

    async def follow_certificates(self) -> None:
        """Look again and again when the certificate for clients and that of the fleet end: at once when clients get another one."""
        files = {"tls": self.settings.tls_certificate, "fleet": self.settings.credentials / "fleet_cert"}
        while True:
            before, looked = seen(self.settings.tls_certificate), time.monotonic()
            found = {name: await asyncio.to_thread(not_after, file) for name, file in files.items()}
            self.certificates = {name: end for name, end in found.items() if end is not None}
            while seen(self.settings.tls_certificate) == before and time.monotonic() - looked < CERTIFICATES_SECONDS:
                await asyncio.sleep(1.0)

    def follow_all(self, group: asyncio.TaskGroup) -> None:
        """One task for each backend and each agent that there is."""
        wanted: set[Backend | Agent] = {*self.fleet.backends.values(), *self.agents.values()}
        for one in set(self.tasks) - wanted:
            self.tasks.pop(one).cancel()
        for one in wanted - set(self.tasks):
            job = self.follow_backend(one) if isinstance(one, Backend) else self.follow_agent(one)
            self.tasks[one] = group.create_task(job)

    async def run(self) -> None:
        """Know first, then tell, then follow."""
        self.follow_fleet()
        await self.nginx.look()
        self.serial = max(self.serial, self.nginx.serial)
        await asyncio.gather(*(self.ask(agent) for agent in self.agents.values()))
        log(f"{self.fleet.gateway}: {len(self.fleet.backends)} backends are checked, {len(self.agents)} hosts asked")
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follow_nginx())
            group.create_task(self.follow_certificates())
            self.follow_all(group)
            # Without a state Nginx uses all backends: those that nobody knows yet are asked before the first one is told.
            first = time.monotonic() + FIRST_SECONDS
            while self.unasked and time.monotonic() < first:
                await self.wait(0.2)
            self.decide()
            notify("READY=1")
            while seen(self.settings.certificate) == self.certificate_seen:
                await self.wait(1.0)
                self.follow_fleet()
                self.follow_all(group)
                self.decide()
                notify("WATCHDOG=1")
            log("the certificate of the fleet has changed: starting again, to be given the new one")
            raise SystemExit(0)

    async def wait(self, seconds: float) -> None:
        """Wait for news, but not longer than that."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.changed.wait(), seconds)
        self.changed.clear()

    @property
    def unasked(self) -> bool:
        """Whether there are backends of which nothing is known yet."""
        return NEW in self.checks.values()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    seconds = {
        "interval": 5.0,
        "retry": 1.0,
        "connect-timeout": 3.0,
        "timeout": 20.0,
        "agent-interval": 1.0,
        "drain": 1800.0,
    }
    for name, default in {**seconds, "alive": ALIVE_SECONDS}.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    paths = {
        "fleet": "/etc/vllm-gateway/fleet.json",
        "state": "/run/vllm-gateway/state.json",
        "memory": "/var/lib/vllm-gateway",
        "admin": "/run/vllm-gateway/admin.sock",
        "certificate": "/etc/ssl/vllm-fleet/fleet/cert.pem",
        "tls-certificate": "/etc/ssl/vllm-fleet/fullchain.pem",
        "credentials": os.environ.get("CREDENTIALS_DIRECTORY", "."),
    }
    parser.add_argument("--backend-tls", action="store_true", help="Nginx can ask backends by TLS")
    for name, default_path in paths.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default_path))
    asyncio.run(Service(parser.parse_args()).run())


if __name__ == "__main__":
    main()
