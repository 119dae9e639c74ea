# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Looks at a host for the status of the fleet: its instances, its GPUs, its gateway, and what somebody may have to do there.

Everything has a limit in time, and a part that cannot be had is named in `missing`: it takes nothing else with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.gpufleet.llm.plugins.module_utils import (
    generations_host,
    host,
    host_agent,
    instance_tls,
    silence,
    systemctl,
    vllm_keys,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.lease import Lease, LeaseError
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Program

ROOT = Path("/")
# What the role fleet_authority gives a host.
CERTIFICATES = instance_tls.CERTIFICATES.relative_to("/")
UNIT_PROPERTIES = (
    "Id", "LoadState", "ActiveState", "SubState", "UnitFileState", "Result", "NRestarts",
    "ExecMainStartTimestampMonotonic", "InactiveExitTimestampMonotonic",
)  # fmt: skip
# Beside those of instances. What is not there is left out.
UNITS = ("vllm-fleet-agent.service", "nginx.service", "vllm-gateway-checks.service", "vllm-fleet-*.service")
GPU_FIELDS = ("index", "memory.used", "memory.total", "temperature.gpu", "utilization.gpu")
# Where an instance, a release, a log and a container grow; models are where an instance has its own.
DISKS = ("/", "/var", "/var/log", "/opt/vllm", "/var/lib/docker")
# A start so soon after the host's is the boot's.
BOOT_SECONDS = 180
# From when a generation is made the current one, or the watch says that it acts, to the start that follows: running requests may end before it.
SWITCH_SECONDS = 300
# What a turn may take beside the seconds that it has an instance out of traffic: until it is drained, and for what follows.
TURN_SECONDS = 900
# What an instance has to say how it is: the counters of its metrics by what they are called here.
GAUGES = {"running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting"}
COUNTERS = {"generated": "vllm:generation_tokens_total", "prompt": "vllm:prompt_tokens_total"}
KV_USE = "vllm:kv_cache_usage_perc"
# For its metrics, and for what Nginx says on its socket.
ENGINE_SECONDS = 3.0
WORDS_LIMIT = 300
# Of an instance whose files cannot be read.
UNREADABLE: dict[str, Any] = {
    "model": "", "model_path": None, "runtime": "", "runs": "", "generation": None, "confirmed": False, "previous": None, "held": "", "port": None,
    "gpus": [],
}  # fmt: skip


# --- texts


def line_of(value: object, limit: int = WORDS_LIMIT) -> str:
    """Words of somebody else as one short line."""
    text = " ".join("".join(character if character.isprintable() else " " for character in str(value)).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def moment(value: object) -> float | None:
    """A time in seconds of the epoch, whether it was written as that or as programs for people write it."""
    if isinstance(value, bool) or value in (None, ""):
        return None
    if isinstance(value, int | float):
        return float(value)
    try:
        found = datetime.fromisoformat(str(value).strip().replace("Z", "+00:00").removesuffix(" UTC"))
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()


def data(text: str) -> dict[str, Any]:
    """An object in JSON; an empty one where there is none that can be read."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def listed_turns(text: str) -> list[dict[str, Any]]:
    """The turns that a host remembers, the newest last."""
    found = json.loads(text or "[]")
    return [turn for turn in found if isinstance(turn, dict)] if isinstance(found, list) else []


def number(text: str) -> float | None:
    """A number of a program; nothing for `[N/A]` and its like."""
    try:
        return float(text)
    except ValueError:
        return None


def gpus(text: str) -> list[dict[str, Any]]:
    """The GPUs as nvidia-smi lists them, with nothing for what one does not tell."""
    found = []
    for line in text.splitlines():
        name, *values = line.split(",")
        if len(values) == len(GPU_FIELDS) - 1 and name.strip().isdigit():
            used, total, temperature, busy = (number(value.strip()) for value in values)
            found.append(
                {"index": int(name), "memory_used_mib": used, "memory_total_mib": total, "temperature_c": temperature, "utilization": busy}
            )  # fmt: skip
    return found


def metrics(text: str) -> dict[str, float]:
    """What the metrics of an instance say of its engines: of gauges and counters the sums, of the KV cache the fullest one."""
    sums = {name: key for key, name in {**GAUGES, **COUNTERS}.items()}
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("vllm:"):
            continue
        name = line.partition("{")[0].partition(" ")[0]
        if name not in sums and name != KV_USE:
            continue
        value = number(line.rsplit(" ", 1)[1])
        if value is None or value != value:  # NaN
            continue
        if name == KV_USE:
            found["kv_use"] = max(found.get("kv_use", 0.0), value)
        else:
            found[sums[name]] = found.get(sums[name], 0.0) + value
    return found


def rates(first: Mapping[str, float], second: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """What an instance does, from two looks at its metrics; without a second one, what it does not tell by itself is nothing."""
    last = second or first
    told: dict[str, Any] = {name: int(last[name]) if name in last else None for name in GAUGES}
    told["kv_use"] = last.get("kv_use")
    for name in COUNTERS:
        both = name in first and name in second and seconds > 0
        # an engine that was started anew in between counts from nothing
        told[f"{name}_tokens_per_second"] = max(0.0, (second[name] - first[name]) / seconds) if both else None
    return told


def disk(path: str, text: str) -> dict[str, Any] | None:
    """A file system as `stat --file-system` prints DISK_FORMAT, and its identity."""
    fields = text.split()
    if len(fields) != 4 or not all(field.isdigit() for field in fields[1:]):
        return None
    size, blocks, free = map(int, fields[1:])
    return {"id": fields[0], "path": path, "size_bytes": size * blocks, "free_bytes": size * free} if blocks else None


DISK_FORMAT = "%i %S %b %a"


def updates(available: str, held: Mapping[str, Any], required: bool, packages: str) -> dict[str, Any]:
    """Updates that wait: as far as a file says it, without asking apt."""
    waiting = re.search(r"^(\d+) (?:updates?|packages?) can be", available, re.MULTILINE)
    security = re.search(r"^(\d+) .*security updates?", available, re.MULTILINE)
    return {
        "waiting": int(waiting[1]) if waiting else None,
        "security": int(security[1]) if security else None,
        "held_security": sorted(held),
        "reboot_required": required,
        "reboot_for": sorted(set(packages.split())),
    }


def findings(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the watch of the host found."""
    listed = told.get("findings")
    return [
        {
            "key": line_of(one.get("key") or "", 60),
            "level": "critical" if one.get("level") == "critical" else "warning",
            "what": line_of(one.get("what") or "something that it does not name"),
            "since": moment(one.get("since")),
            "instances": [str(name) for name in one.get("instances") or []],
            "gpu": (one.get("gpu") or {}).get("index"),
            "do": line_of(one.get("advice") or ""),
        }
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict)
    ]


@dataclass(frozen=True)
class Acts:
    """What was done to an instance, as far as a host remembers."""

    # When its current generation became that.
    switched: float | None = None
    # The operator's word on it, which may be that of a turn.
    word: Mapping[str, str] = field(default_factory=dict)
    # The turns of the host, the newest last.
    turns: Sequence[Mapping[str, Any]] = ()
    # The last restart by the watch.
    healed: Mapping[str, Any] = field(default_factory=dict)

    def turn(self, name: str, at: float) -> str:
        """The act in which the instance started at a time, if it was one."""
        since = moment(self.word.get("since"))
        if self.word.get("turn") and since is not None and at >= since:
            return str(self.word["turn"])
        for turn in reversed(self.turns):
            ended = moment(turn.get("ended"))
            if ended is None or name not in (turn.get("instances") or []):
                continue
            if ended - float(turn.get("seconds") or 0) - TURN_SECONDS <= at <= ended:
                return line_of(turn.get("act") or "turn", 30)
        return ""

    def watch(self, at: float) -> str:
        """Why the watch started it at a time, if it did."""
        last = moment(self.healed.get("last"))
        if last is None or not -30 <= at - last <= SWITCH_SECONDS:
            return ""
        return line_of(self.healed.get("why") or "it hung", 60)


def why_it_started(name: str, unit: Mapping[str, str], at: float, booted: float, acts: Acts) -> tuple[str, str]:
    """Why an instance that started at a time did so: a kind, and words."""
    restarts = int(unit.get("NRestarts") or 0)
    turn, boot = acts.turn(name, at), at - booted <= BOOT_SECONDS
    if restarts:
        return "restart", f"systemd, restart {restarts}"
    if why := acts.watch(at):
        return "watch", f"watch: {why}"
    if turn and (turn == "reboot" or not boot):
        return "turn", turn
    if boot and (acts.switched is None or acts.switched < booted):
        return "boot", "boot"
    if acts.switched is not None and -5 <= at - acts.switched <= SWITCH_SECONDS:
        return "switch", "new generation"
    return "command", "by hand"


# --- asking


async def asked(opening: Any, path: str, patience: float) -> str:
    """The body of what is answered to GET on a connection of its own. OSError, ValueError or asyncio.TimeoutError when nothing comes."""

    async def exchange() -> bytes:
        reader, writer = await opening
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: instance\r\nConnection: close\r\n\r\n".encode())
            answer = bytearray()
            while part := await reader.read(65536):
                answer += part
                if len(answer) > host_agent.METRICS_BYTES:
                    raise ValueError("the answer is too long")
            return bytes(answer)
        finally:
            writer.transport.abort()

    return host_agent.content(await asyncio.wait_for(exchange(), patience))


async def sampled(scheme: str, address: str, port: int, apart: float, patience: float) -> dict[str, Any]:
    """What an instance does, by two looks at its metrics; why where it does not say."""

    async def once() -> tuple[float, dict[str, float]]:
        tls = instance_tls.context() if scheme == instance_tls.HTTPS else None
        text = await asked(asyncio.open_connection(address, port, ssl=tls), "/metrics", patience)
        return time.monotonic(), metrics(text)

    try:
        began, first = await once()
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        return {"why": no_answer(error, patience), "listens": not isinstance(error, ConnectionRefusedError)}
    ended = began
    second: dict[str, float] = {}
    if apart > 0:
        await asyncio.sleep(apart)
        with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):
            ended, second = await once()
    return rates(first, second, ended - began)


def no_answer(error: Exception, patience: float) -> str:
    """Why nothing was answered, in words."""
    if isinstance(error, asyncio.TimeoutError):
        return f"no answer within {patience:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "it refuses connections"
    return line_of(getattr(error, "strerror", "") or error or type(error).__name__)


async def everything(
    instances: Mapping[str, tuple[str, str, int]], admin: Path | None, apart: float, patience: float
) -> tuple[dict[str, dict[str, Any]], str]:
    """All instances at once, and what Nginx says on the socket for its administrators."""

    async def gateway() -> str:
        if admin is None:
            return ""
        try:
            return await asked(asyncio.open_unix_connection(str(admin)), "/status.json", patience)
        except (OSError, ValueError, asyncio.TimeoutError):
            return ""

    nginx = asyncio.ensure_future(gateway())
    said = [sampled(scheme, address, port, apart, patience) for scheme, address, port in instances.values()]
    found = await asyncio.gather(*said)
    return dict(zip(instances, found, strict=True)), await nginx


# --- looking


class Look:
    """One look at one host."""

    def __init__(self, module: Any, root: Path = ROOT) -> None:
        self.module = module
        self.root = root
        self.patience = float(module.params["patience"])
        self.apart = float(module.params["sample_seconds"])
        self.began = time.monotonic()
        self.until = self.began + self.patience
        self.missing: dict[str, str] = {}
        self.names = self.part("instances", lambda: generations_host.there(module.params["config_path"]), [])

    def part(self, name: str, look: Callable[[], Any], otherwise: Any) -> Any:
        """A part of the whole; where it cannot be had, why is written down."""
        try:
            return look()
        except Exception as error:  # whatever it is: it must not hide the rest of the host
            self.missing[name] = line_of(f"{type(error).__name__}: {error}")
            return otherwise

    def text(self, path: str) -> str:
        """A file of the host; an absent one is empty."""
        return read(self.root / path)

    def output(self, name: str, program: Program) -> str:
        """What a program printed; nothing, and why, when it did not in time."""
        well, text = program.output(max(0.1, self.until - time.monotonic()))
        if not well:
            self.missing[name] = self.silent(program) if "did not answer" in text else line_of(text)
        return text if well else ""

    def silent(self, program: Program) -> str:
        """That a program did not answer, in all the time that it had."""
        return f"{program.name} did not answer within {time.monotonic() - self.began:.0f} s"

    def everything(self) -> dict[str, Any]:
        """What is to be known."""
        now, even = time.time(), time.monotonic()
        # all programs at once: none waits for another
        listed = ["systemctl", "show", f"--property={','.join(UNIT_PROPERTIES)}", *UNITS]
        systemd = Program([*listed, *(f"vllm@{name}.service" for name in self.names)])
        smi = Program(["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"])
        certificates = {
            name: Program(["openssl", "x509", "-noout", "-enddate", "-in", str(file)])
            for name, file in (
                ("fleet", self.root / CERTIFICATES / "cert.pem"),
                ("authority", self.root / CERTIFICATES / "ca.pem"),
            )
            if file.exists()
        }
        details = {
            name: self.part(f"instance {name}", functools.partial(self.deployed, name), UNREADABLE)
            for name in self.names
        }
        disks = {
            path: Program(["stat", "--file-system", f"--format={DISK_FORMAT}", path]) for path in self.places(details)
        }

        states = systemctl.by_unit(self.output("units", systemd))
        running = {
            name: (details[name]["scheme"], details[name]["address"], details[name]["port"])
            for name in self.names
            if states.get(f"vllm@{name}.service", {}).get("ActiveState") == "active" and details[name].get("port")
        }
        admin = self.root / "run/vllm-gateway/admin.sock"
        gateway_here = (self.root / "etc/vllm-gateway/fleet.json").exists()
        answers, nginx = asyncio.run(
            everything(running, admin if gateway_here else None, self.apart, min(ENGINE_SECONDS, self.patience))
        )
        self.until = max(self.until, time.monotonic() + 1.0)
        found = self.found_gpus(smi)
        heard = self.part("heard", self.heard, {})
        turns = self.part("turns", lambda: listed_turns(self.text("var/lib/vllm-fleet/turn/turns.json")), [])
        words = {name: host_agent.word(self.text(f"var/lib/vllm-fleet/{name}.json") or None) for name in self.names}
        healed = {name: data(self.text(f"run/vllm-fleet/heal/{name}.json")) for name in self.names}
        booted = even - self.part("boot", self.up, 0.0)
        instances = [
            {
                "name": name,
                **{key: value for key, value in details[name].items() if key not in ("scheme", "address", "switched")},
                **self.unit_of(
                    name,
                    states.get(f"vllm@{name}.service", {}),
                    details[name],
                    Acts(details[name].get("switched"), words[name], turns, healed[name]),
                    (now, even, booted),
                ),
                "word": words[name],
                "leaving": (self.root / "run/vllm-fleet/leaving" / name).exists(),
                "gateways": standing(name, heard, even),
                "metrics": answers.get(name),
                "gpu": use_of([gpu for gpu in found if gpu["index"] in details[name].get("gpus", [])]),
            }
            for name in self.names
        ]
        others = {name: state["ActiveState"] for name, state in states.items() if not name.startswith("vllm@")}
        health = data(self.text("run/vllm-fleet/watch/health.json"))
        agent = data(self.text("etc/vllm-fleet/agent.json"))
        return {
            "up_since": now - (even - booted),
            "instances": instances,
            "gateway": self.part("gateway", lambda: self.gateway(nginx, now), None) if gateway_here else None,
            "agent": {"gateways": [str(name) for name in agent.get("gateways") or []]} if agent else None,
            "units": others,
            "gpus": found,
            "lease": self.part("lease", self.lease, None),
            "certificates": {
                name: self.part(f"certificate {name}", functools.partial(self.ends, name, program), None)
                for name, program in certificates.items()
            },
            "updates": self.part("updates", self.updates, {}),
            "disks": self.part("disks", lambda: self.found_disks(disks), []),
            "health": findings(health),
            "health_age_seconds": None if (told := moment(health.get("time"))) is None else max(0.0, now - told),
            "silence": self.part("silence", self.silence, None),
            "internal_keys": self.part("internal_keys", lambda: self.internal_keys(now), 0),
            "missing": self.missing,
            "time": time.time(),
        }  # fmt: skip

    def deployed(self, name: str) -> dict[str, Any]:
        """What the files of an instance say."""
        one = generations_host.Deployed(self.module, name)
        current, confirmed = one.current(), one.confirmed()
        said = generations_host.described(one.content(current))
        url = urlsplit(str(said["gate"].get("url") or ""))
        content = read(one.path / str(current) / "config.yaml")
        model = re.search(r'^model: "?([^"\n]+)', content, re.MULTILINE)
        with contextlib.suppress(OSError):
            said["switched"] = one.link.lstat().st_mtime
        return {
            "model": str(said["gate"].get("model") or ""),
            "model_path": model[1] if model else None,
            "runtime": said["runtime"],
            "runs": said["runs"],
            "generation": current,
            "confirmed": current in confirmed,
            "previous": max((one for one in confirmed if one < (current or 0)), default=None),
            "running_generation": one.started(),
            "held": line_of(one.held()),
            "scheme": url.scheme or instance_tls.HTTP,
            "address": url.hostname or "127.0.0.1",
            "port": said["port"],
            "gpus": said["gpus"],
            "switched": said.get("switched"),
        }

    def unit_of(
        self,
        name: str,
        unit: Mapping[str, str],
        details: Mapping[str, Any],
        acts: Acts,
        clocks: tuple[float, float, float],
    ) -> dict[str, Any]:
        """The unit of an instance, when it started last, and why."""
        now, even, booted = clocks
        state = unit.get("ActiveState", "")
        micros = int(unit.get("ExecMainStartTimestampMonotonic") or 0)
        told: dict[str, Any] = {
            "unit": {
                "active": state or None,
                "sub": unit.get("SubState") or None,
                "enabled": unit.get("UnitFileState") == "enabled",
                "result": unit.get("Result") or None,
                "restarts": int(unit.get("NRestarts") or 0),
            },
            "start": None,
            "running_generation": details.get("running_generation") if state == "active" else None,
        }
        if micros:
            started = now - (even - micros / 1e6)
            # what it waited for before its program began, such as its turn on a GPU, does not make it later
            begun = int(unit.get("InactiveExitTimestampMonotonic") or 0) / 1e6 or micros / 1e6
            kind, why = why_it_started(name, unit, now - (even - begun), now - (even - booted), acts)
            told["start"] = {"at": started, "kind": kind, "why": why}
        return told

    def up(self) -> float:
        """Seconds since the first process of the host, or of its container, began."""
        fields = self.text("proc/1/stat").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")

    def found_gpus(self, program: Program) -> list[dict[str, Any]]:
        """The GPUs. A host without a driver has none, and misses nothing."""
        if program.process is None:
            return []
        return gpus(self.output("gpus", program))

    def heard(self) -> dict[str, dict[str, Any]]:
        """What each gateway said last to the agent."""
        files = sorted((self.root / "run/vllm-fleet/agent").glob("[!.]*.json"))
        return {file.stem: said for file in files if (said := data(read(file)))}

    def lease(self) -> dict[str, Any] | None:
        """Which run changes the host now."""
        try:
            holder = Lease(self.root / "run/vllm-fleet/lease.json").read()
        except LeaseError as error:
            return {"who": str(error), "controller": "", "pid": 0, "since": ""}
        if holder is None:
            return None
        return {"who": line_of(holder.who), "controller": line_of(holder.controller), "pid": holder.pid, "since": holder.since}  # fmt: skip

    def ends(self, name: str, program: Program) -> int | None:
        """When the certificate of the fleet ends, or that of its authority. Of several in a file it is the first, which signs."""
        text = self.output(f"certificate {name}", program)
        return ssl.cert_time_to_seconds(text.strip().removeprefix("notAfter=")) if text else None

    def updates(self) -> dict[str, Any]:
        """Updates that wait."""
        held = host.held_updates(self.root / str(host.HELD_UPDATES).lstrip("/"))
        return updates(
            self.text("var/lib/update-notifier/updates-available"), held,
            (self.root / "run/reboot-required").exists(), self.text("run/reboot-required.pkgs"),
        )  # fmt: skip

    def places(self, details: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Where it matters how full a disk is. One that does not answer holds nobody up."""
        own = [path for path in DISKS if Path(path).is_dir()]
        return list(dict.fromkeys([*own, *(one["model_path"] for one in details.values() if one["model_path"])]))

    def found_disks(self, programs: Mapping[str, Program]) -> list[dict[str, Any]]:
        """The file systems, each once, by the first path on it."""
        found: dict[str, dict[str, Any]] = {}
        for path, program in programs.items():
            well, text = program.output(max(0.1, self.until - time.monotonic()))
            if not well and "did not answer" in text:  # a model that was taken away is not the disk's trouble
                self.missing[f"disk {path}"] = self.silent(program)
            elif well and (one := disk(path, text)):
                found.setdefault(one.pop("id"), one)
        return list(found.values())

    def silence(self) -> dict[str, Any] | None:
        """Until when monitoring is asked to be silent about this host."""
        told = silence.read(self.text(silence.PATH.lstrip("/")), time.time())
        if told is None:
            return None
        said = {name: line_of(told.get(name) or "") for name in ("by", "turn", "reason")}
        return {"until": float(told["ends"]), **said}

    def internal_keys(self, now: float) -> int:
        """How many internal keys its instances take."""
        path = self.module.params["config_path"].lstrip("/") + "-keys/accepted"
        return sum(end is None or end > now for end in vllm_keys.parsed(self.text(path)).values())

    def gateway(self, status: str, now: float) -> dict[str, Any]:
        """What the gateway of this host does, by its files; and by its own words when Nginx answers."""
        text = self.text("etc/vllm-gateway/fleet.json")
        fleet, state, said = data(text), data(self.text("run/vllm-gateway/state.json")), data(status)
        flying = {one["id"]: one["in_flight"] for route in said.get("routes") or [] for one in route["backends"]}
        used = state.get("backends") or {}
        backends = {
            name: {
                "use": bool(one.get("use")), "why": line_of(one.get("why") or ""), "check": str(one.get("check") or ""),
                "operator": str(one.get("operator") or "up"), "leaving": bool(one.get("leaving")), "kept": bool(one.get("kept")),
                "since": moment(one.get("since")), "in_flight": flying.get(name),
            }
            for name, one in used.items()
        }  # fmt: skip
        common = {name: fleet.get(name) for name in ("backends", "routes", "clients", "keys")}
        time_of_state = moment(state.get("time"))
        return {
            "name": fleet.get("gateway"),
            "answers": bool(said),
            "configuration": hashlib.sha256(text.encode()).hexdigest()[:12],
            "configuration_used": said.get("configuration"),
            # the same for gateways that were told the same
            "configuration_common": hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:12],
            "state_age_seconds": None if time_of_state is None else max(0.0, now - time_of_state),
            "in_flight": sum(flying.values()) if said else None,
            "backends": backends,
            "routes": [
                {
                    "model": str(route.get("model")), "instance": str(route.get("instance")),
                    "backends": list(route.get("backends") or []), "min_available": route.get("min_available"),
                    "used": sum(backends[name]["use"] for name in route.get("backends") or [] if name in backends),
                }
                for route in fleet.get("routes") or []
            ],
            "certificates": {
                str(name): int(end) for name, end in (state.get("certificates") or {}).items() if isinstance(end, int | float)
            },
        }  # fmt: skip


def use_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What several GPUs do together: memory in all, the hottest, and how busy they are on average."""
    if not found:
        return None

    def known(key: str) -> list[float]:
        return [gpu[key] for gpu in found if gpu[key] is not None]

    busy = known("utilization")
    return {
        "memory_used_mib": sum(known("memory_used_mib")) if known("memory_used_mib") else None,
        "memory_total_mib": sum(known("memory_total_mib")) if known("memory_total_mib") else None,
        "temperature_c": max(known("temperature_c"), default=None),
        "utilization": sum(busy) / len(busy) if busy else None,
    }


def standing(instance: str, heard: Mapping[str, Mapping[str, Any]], now: float) -> dict[str, dict[str, Any]]:
    """What each gateway does with an instance, as it told the agent of the host."""
    told = {}
    for gateway, said in heard.items():
        kept = said.get("kept") or {}
        use = "out" if instance in (said.get("out") or []) else "kept" if instance in kept else "in"
        told[gateway] = {
            "use": use,
            "why": line_of(kept[instance]) if use == "kept" else "",
            "in_flight": int((said.get("in_flight") or {}).get(instance, 0)),
            "silent_seconds": max(0.0, now - float(said.get("time") or 0.0)),
        }
    return told
