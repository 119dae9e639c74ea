"""The watch of a host: asks its instances, reads what the kernel and nvidia-smi say of the GPUs, and looks at how full disks are.

It restarts nothing itself: it has no rights, and puts a request where heal.py finds it. What it finds is told in files below /run/vllm-fleet/watch.
What is decided, and how, is in host_watch.py and gpu_health.py; questions are those of a gateway's checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agent_files
from ansible_collections.gpufleet.llm.plugins.module_utils import gpu_health, host_watch, instance_tls, systemctl
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks import Backend
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks_host import Asker, Times
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu_health import Finding, Gpu, Look, Messages

CONFIGURATION = Path("/etc/vllm-fleet/watch.json")
DIRECTORY = Path("/run/vllm-fleet/watch")
# What heal.py did.
HISTORIES = Path("/run/vllm-fleet/heal")
PCI_DEVICES = Path("/sys/bus/pci/devices")
PROGRAM_SECONDS = 5.0
SMI_SECONDS = 30.0
# health.json and watch.prom are written again after this, so that whoever reads them sees that somebody is there.
TELL_SECONDS = 5.0
# A key that is refused is read again by a new start, but not all the time.
KEY_SECONDS = 60.0
PRIORITIES = {"ok": "<6>", "warn": "<4>", "critical": "<3>"}
# What systemd said of a unit that answers is believed for so long.
UNIT_SECONDS = 30.0
# A line of the kernel is shorter.
LINE_BYTES = 1 << 20


def log(text: str, level: str = host_watch.OK) -> None:
    """A line of the journal."""
    print(f"{PRIORITIES[level]}{text}", flush=True)


async def output(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Status and output of a program; no status when it cannot be run or does not end in time. One that cannot be killed is left behind."""
    try:
        program = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        return 127, f"{command[0]} cannot be run: {error.strerror}"
    try:
        told, _ = await asyncio.wait_for(program.communicate(), seconds)
        return program.returncode, told.decode(errors="replace")
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            program.kill()
        return None, ""


async def units_of(instances: list[str]) -> dict[str, host_watch.Unit]:
    """The units of instances."""
    names = {f"vllm@{name}.service": name for name in instances}
    properties = "--property=Id,ActiveState,InvocationID,ActiveEnterTimestampMonotonic"
    status, told = await output(["systemctl", "show", properties, *names], PROGRAM_SECONDS)
    found = {names[unit]: host_watch.Unit.of(shown) for unit, shown in systemctl.by_unit(told).items() if unit in names}
    return {name: found.get(name, host_watch.Unit()) for name in instances} if status == 0 else {}


class Watch:
    """The watch of one host."""

    def __init__(self, settings: dict[str, Any], key: str) -> None:
        self.host: str = settings["host"]
        self.instances: dict[str, dict[str, Any]] = settings["instances"]
        self.settings, self.key, self.begun = settings, key, time.monotonic()
        limits = host_watch.Limits(int(settings["restarts"]), float(settings["restart_seconds"]))
        rules = host_watch.Settings(
            float(settings["hung_seconds"]), float(settings["start_seconds"]), bool(settings["restart"]), limits
        )
        self.limits = limits
        before = self.remembered("engines")
        self.engines = {
            name: host_watch.Engine(name, rules, answered=str(before.get(name, ""))) for name in self.instances
        }
        self.verdicts: dict[str, Finding] = {}
        # What systemd said last of each instance's unit, and when.
        self.units: dict[str, tuple[host_watch.Unit, float]] = {}
        self.look = Look()
        self.messages = Messages()
        self.gpus = [Gpu(0, address, str(uuid)) for address, uuid in self.remembered("gpus").items()]
        self.hot: dict[str, int] = {}
        self.disks: list[host_watch.Disk] = []
        # When each finding was there first, in a person's time.
        self.since: dict[str, str] = {key: str(time_) for key, time_ in self.remembered("since").items()}
        self.told: dict[str, Finding] = {}
        self.wake = asyncio.Event()

    # What it remembers, for the time after a start of its own

    def remembered(self, name: str) -> dict[str, Any]:
        """A file of its own from before."""
        try:
            found = json.loads((DIRECTORY / f"{name}.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def remember(self, name: str, told: dict[str, Any]) -> None:
        """Keep it, when it is another one."""
        if told != self.remembered(name):
            agent_files.replace(DIRECTORY / f"{name}.json", json.dumps(told))

    # Engines

    def histories(self) -> dict[str, host_watch.History]:
        """What heal.py did."""
        return {name: host_watch.History.read(agent_files.text(HISTORIES / f"{name}.json")) for name in self.instances}

    async def follow(self, name: str) -> None:
        """Ask one instance for ever."""
        told, engine = self.instances[name], self.engines[name]
        backend = Backend(name, name, self.host, told["address"], int(told["port"]), told["model"])
        times = Times(timeout=engine.settings.hung_seconds)
        asker = Asker(backend, self.key, times, lambda: instance_tls.context_of(told["config"]))
        while True:
            with contextlib.suppress(OSError):
                await self.once(engine, asker)
            await asyncio.sleep(float(self.settings["interval_seconds"]))

    async def once(self, engine: host_watch.Engine, asker: Asker) -> None:
        """Ask it once, and do what follows. As long as all is well, systemd is not asked each time."""
        name = engine.name
        if name not in self.units:
            self.units.update({one: (unit, time.monotonic()) for one, unit in (await units_of([name])).items()})
        unit, looked = self.units.get(name, (host_watch.Unit(), -UNIT_SECONDS))
        answer = await asker.check(asker.times.timeout)
        if answer.heard != host_watch.GOOD or time.monotonic() - looked >= UNIT_SECONDS:
            found = (await units_of([name])).get(name)
            if found is None:
                return  # systemd does not say: nothing is known, and nothing is done
            self.units[name] = (found, time.monotonic())
            if found.state != host_watch.ACTIVE:
                engine.gone()
                self.verdicts.pop(name, None)
                return
            if found != unit:
                return  # it was stopped or started meanwhile, so nobody knows whose answer that was
        if "HTTP 401" in answer.reason and time.monotonic() - self.begun > KEY_SECONDS:
            log("the internal key is refused: it is read again by a new start")
            raise SystemExit(0)
        served = False
        if answer.heard == host_watch.HUNG and engine.answered != unit.invocation:
            work = await asker.work(PROGRAM_SECONDS)
            served = work is not None and work.done[-1] > 0
        moment = time.monotonic()
        engine.hears(answer, unit, moment, served)
        verdict = engine.verdict(self.situation(engine, unit), moment)
        if verdict.finding:
            self.verdicts[name] = verdict.finding
        else:
            self.verdicts.pop(name, None)
        if verdict.restart:
            self.request(engine, unit, verdict)
        self.remember("engines", {one.name: one.answered for one in self.engines.values()})

    def situation(self, engine: host_watch.Engine, unit: host_watch.Unit) -> host_watch.Situation:
        """What an engine's case depends on."""
        name = engine.name
        harmed = (gpu_health.harmed(self.messages.xids, one, unit.started) for one in self.used_by(name))
        harm = next((xid for xid in harmed if xid), None)
        history = host_watch.History.read(agent_files.text(HISTORIES / f"{name}.json"))
        return host_watch.Situation(
            unit, agent_files.word(name), history.times, host_watch.sick(self.of_gpus()).get(name, ""),
            f"XID {harm.number}" if harm else "",
        )  # fmt: skip

    def used_by(self, name: str) -> list[Gpu]:
        """The GPUs of an instance."""
        uses = {name: self.instances[name]["gpus"]}
        return [one for one in self.gpus if gpu_health.users(one, uses)]

    def request(self, engine: host_watch.Engine, unit: host_watch.Unit, verdict: host_watch.Verdict) -> None:
        """Ask heal.py to restart an instance."""
        asked = host_watch.Request(engine.name, unit.invocation, verdict.restart, verdict.cause)
        agent_files.replace(DIRECTORY / "restart" / f"{engine.name}.json", asked.written())
        self.write()  # it may be over before the next time

    # GPUs

    def of_gpus(self) -> list[Finding]:
        """What is to be said of the GPUs now."""
        uses = {name: told["gpus"] for name, told in self.instances.items()}
        dealt_with = agent_files.text(agent_files.DEALT_WITH) or ""
        with contextlib.suppress(ValueError):
            self.messages.forget(float(dealt_with or 0))
        if not self.look.time and not self.messages.xids:
            return []
        return gpu_health.findings(self.gpus, self.look, self.messages, uses, time.monotonic(), self.hot)

    def on_the_bus(self) -> list[str]:
        """The addresses of the GPUs that the kernel lists for NVIDIA's driver."""
        found = []
        for device in PCI_DEVICES.glob("*"):
            with contextlib.suppress(OSError):
                vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
                driver = (device / "driver").resolve().name
                if (vendor, kind[:6]) in (("0x10de", "0x0300"), ("0x10de", "0x0302")) and driver == "nvidia":
                    found.append(device.name)
        return found

    async def look_at_gpus(self) -> None:
        """Ask nvidia-smi again and again, and at once when the kernel said something."""
        while True:
            self.wake.clear()
            status, told = await output(["nvidia-smi", "-q", "-x"], SMI_SECONDS)
            self.look = gpu_health.look(status, told, time.monotonic())
            self.gpus = gpu_health.known(self.gpus, self.on_the_bus(), self.look)
            slowed = {address for address, one in self.look.gpus.items() if one["slowed"]}
            self.hot = {address: self.hot.get(address, 0) + 1 for address in slowed}
            with contextlib.suppress(OSError):
                self.remember("gpus", {one.address: one.uuid for one in self.gpus})
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.wake.wait(), float(self.settings["gpu_seconds"]))

    async def listen_to_the_kernel(self) -> None:
        """Read its messages of this boot, and then those that come."""
        command = [
            "journalctl",
            "--dmesg",
            "--boot",
            "--follow",
            "--no-tail",
            "--output=json",
            "--output-fields=MESSAGE",
        ]
        nothing = asyncio.subprocess.DEVNULL
        while True:
            behind = [f"--after-cursor={self.messages.cursor}"] if self.messages.cursor else []
            with contextlib.suppress(OSError, ValueError):
                program = await asyncio.create_subprocess_exec(
                    *command, *behind, stdin=nothing, stdout=asyncio.subprocess.PIPE, stderr=nothing, limit=LINE_BYTES
                )
                try:
                    while program.stdout and (line := await program.stdout.readline()):
                        if xid := self.messages.read(line.decode(errors="replace")):
                            log(f"the kernel: XID {xid.number} of {xid.address}: {xid.text}", host_watch.WARN)
                            self.wake.set()
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        program.kill()
                    await program.wait()
            await asyncio.sleep(PROGRAM_SECONDS)

    # Disks

    def look_at_disks(self) -> None:
        """How full the file systems are, each once."""
        found: dict[int, tuple[str, list[str], os.statvfs_result]] = {}
        for holds, path in self.settings["disks"].items():
            with contextlib.suppress(OSError):
                device, told = Path(path).stat().st_dev, os.statvfs(path)
                found.setdefault(device, (path, [], told))[1].append(holds)
        self.disks = [disk(path, ", ".join(holds), told) for path, holds, told in found.values()]

    # What is told

    async def tell(self) -> None:
        """Write down what is known, again and again."""
        while True:
            try:
                self.look_at_disks()
                self.write()
            except OSError as error:
                log(f"what was found cannot be written: {error}", host_watch.WARN)
            await asyncio.sleep(TELL_SECONDS)

    def findings(self) -> list[Finding]:
        """All of them."""
        of_disks = host_watch.disk_findings(
            self.disks, float(self.settings["disk_warn_percent"]), float(self.settings["disk_critical_percent"])
        )
        return [*self.of_gpus(), *self.verdicts.values(), *of_disks]

    def write(self) -> None:
        """Files for the agent, for operators and for monitoring; a line of the journal for what is new and what is gone."""
        found, now = self.findings(), time.monotonic()
        each = {one.key: one for one in found}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.since = {key: self.since.get(key, stamp) for key in each}
        for line, level in changes(self.told, each):
            log(line, level)
        self.told = each
        self.remember("since", dict(self.since))
        health = host_watch.health(self.host, found, self.since, now, time.time())
        agent_files.replace(DIRECTORY / "health.json", health)
        told = host_watch.Told(
            time.time(), list(self.engines.values()), self.histories(), self.limits, found, self.gpus, self.messages.counts,
            self.disks, now,
        )  # fmt: skip
        agent_files.replace(DIRECTORY / "watch.prom", host_watch.metrics(told))
        self.write_sick(host_watch.sick(found))

    def write_sick(self, sick: dict[str, str]) -> None:
        """A file for each instance that should get no requests; it is as old as the wish."""
        for path in agent_files.SICK.glob("[!.]*"):
            if path.name not in sick:
                path.unlink()
                log(f"gateways may use {path.name} again, as far as its GPU goes")
        for name, why in sick.items():
            if (before := agent_files.text(agent_files.SICK / name)) != why:
                made = agent_files.SICK / name
                stamp = made.stat() if before is not None else None
                agent_files.replace(made, why)
                if stamp:
                    os.utime(made, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
                else:
                    log(f"gateways are asked to send nothing to {name}: {why}", host_watch.CRITICAL)

    async def run(self) -> None:
        """Watch until somebody ends it."""
        for directory in (agent_files.SICK, DIRECTORY / "restart"):
            directory.mkdir(parents=True, exist_ok=True)
        tasks = [self.follow(name) for name in self.instances]
        if any(told["gpus"] for told in self.instances.values()):
            tasks += [self.look_at_gpus(), self.listen_to_the_kernel()]
        await asyncio.gather(*tasks, self.tell())


def disk(path: str, holds: str, told: os.statvfs_result) -> host_watch.Disk:
    """How full a file system is. What only root may use is not free."""
    blocks = told.f_blocks - told.f_bfree + told.f_bavail
    used = 100 * (1 - told.f_bavail / blocks) if blocks else 0.0
    inodes = 100 * (1 - told.f_favail / told.f_files) if told.f_files else 0.0
    return host_watch.Disk(path, holds, used, inodes, told.f_bavail * told.f_frsize / 2**30)


def changes(before: dict[str, Finding], after: dict[str, Finding]) -> Iterator[tuple[str, str]]:
    """What is new or worse, and what is over, each a line and its level."""
    for key, one in after.items():
        last = before.get(key)
        if last is None or (last.level, last.action) != (one.level, one.action):
            words = f"{one.gpu.words}: {one.what}" if one.gpu else one.what
            yield f"{one.level}: {words}{' | ' + one.advice if one.advice else ''}", one.level
    for key, one in before.items():
        if key not in after:
            words = f"{one.gpu.words}: {one.what}" if one.gpu else one.what
            yield f"over: {words}", host_watch.OK


def ready() -> None:
    """Tell systemd that it watches."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", f"\0{address[1:]}" if address.startswith("@") else address)


async def main() -> None:
    """Watch until systemd ends it."""
    settings = json.loads(CONFIGURATION.read_text())
    key = Path(os.environ["CREDENTIALS_DIRECTORY"], "internal_key").read_text().strip()
    running = asyncio.ensure_future(Watch(settings, key).run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    ready()
    with contextlib.suppress(asyncio.CancelledError):
        await running


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
