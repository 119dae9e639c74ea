# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""When a host restarts one of its instances by itself, what it tells of disks, and how all of it is written down.

Decides only; roles/host_agent's watch.py asks, heal.py restarts. Times are seconds of a clock that goes on evenly within a boot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks import (
    BUSY,
    GOOD,
    HUNG,
    SILENT,
    WORKING,
    Answer,
    one_line,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu_health import (
    CRITICAL,
    INSPECT,
    LEVELS,
    NOTHING,
    OK,
    RESTART_APP,
    WARN,
    Finding,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.host_agent import DRAINED, STOPPED, UP

# As systemd calls what runs; and what is on its way.
ACTIVE = "active"
INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
INVOCATION = re.compile(r"[0-9a-f]{32}")
# So many checks an engine whose GPU had an error must have failed.
BAD_CHECKS = 2
# A request that nobody has taken up after this is made again.
ASKED_SECONDS = 60.0
# health.json is written again every few seconds; one that is older than this is of a watcher that is gone.
STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """How often an instance is restarted at most."""

    restarts: int = 3
    seconds: float = 3600.0

    def left(self, before: Iterable[float], now: float) -> int:
        """How many restarts it has left now, after those at these times. Times that are yet to come are counted: no clock is trusted that far."""
        return max(0, self.restarts - len([time for time in before if now - time < self.seconds]))

    def again(self, before: Iterable[float], now: float) -> float:
        """Seconds until it has one more; 0 when it has one now."""
        counted = sorted(time for time in before if now - time < self.seconds)
        if len(counted) < self.restarts or not self.restarts:
            return 0.0 if self.restarts else self.seconds
        return counted[-self.restarts] + self.seconds - now


@dataclass(frozen=True)
class Unit:
    """The unit of an instance, as systemd tells it."""

    state: str = "unknown"
    # Another one after each start.
    invocation: str = ""
    started: float = 0.0

    @classmethod
    def of(cls, shown: Mapping[str, str]) -> Unit:
        """From `systemctl show`."""
        started = shown.get("ActiveEnterTimestampMonotonic", "")
        return cls(
            shown.get("ActiveState", "unknown"),
            shown.get("InvocationID", ""),
            int(started) / 1e6 if started.isdigit() else 0.0,
        )


@dataclass(frozen=True)
class Settings:
    """What the role wrote of the watch of engines."""

    # No answer and no movement for as long as this, after it answered once: it hangs.
    hung_seconds: float = 45.0
    # So long a start may take before it is worth a word.
    start_seconds: float = 1800.0
    restart: bool = True
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Situation:
    """What an engine's case depends on beside its answers."""

    unit: Unit
    word: Mapping[str, str] = field(default_factory=lambda: {"operator": UP})
    # When it was restarted by the watch since the boot.
    restarts: Sequence[float] = ()
    # Why its GPU keeps it out of traffic: a restart would not help.
    sick: str = ""
    # A message of the kernel after which what uses its GPU has to be restarted if it was hit.
    harm: str = ""


@dataclass(frozen=True)
class Verdict:
    """What is to be done with an engine, and told."""

    # Restart it, for this reason; empty is not to.
    restart: str = ""
    cause: str = ""  # hung, or gpu
    finding: Finding | None = None


FINE = Verdict()


@dataclass
class Engine:
    """One instance, as the watch sees it."""

    name: str
    settings: Settings
    # The start since which it has answered.
    answered: str = ""
    answers: bool = False
    hangs: bool = False
    # Since when nobody takes its connections.
    silent: float | None = None
    # Checks in a row that it did not pass.
    bad: int = 0
    last: Answer | None = None
    # The start for which a restart was asked, and when.
    asked: tuple[str, float] = ("", 0.0)

    def gone(self) -> None:
        """It does not run: systemd's business, or a person's."""
        self.answers = self.hangs = False
        self.silent = self.last = None
        self.bad = 0

    def hears(self, answer: Answer, unit: Unit, now: float, served: bool = False) -> None:
        """What a check came to. `served`: its metrics say that it has answered since it started."""
        self.last = answer
        self.answers = answer.heard in (GOOD, WORKING, BUSY)
        self.bad = 0 if self.answers else self.bad + 1
        if answer.heard in (GOOD, WORKING) or (served and unit.invocation):
            self.answered = unit.invocation
        if answer.heard != SILENT:
            self.silent = None
        elif self.silent is None:
            self.silent = now
        self.hangs = answer.heard == HUNG or (
            self.silent is not None and now - self.silent >= self.settings.hung_seconds
        )

    def verdict(self, now: Situation, time: float) -> Verdict:
        """What is to be done with it now."""
        unit = now.unit
        if unit.state != ACTIVE or self.last is None:
            return FINE
        why = f"{self.name} hangs ({self.last.reason})" if self.hangs else ""
        if self.answered != unit.invocation:
            return self.starting(unit, time)
        # an engine that was hit mostly ends by itself, and then that is systemd's business
        if not why and now.harm and self.bad >= BAD_CHECKS:
            why = f"{self.name} was hit by an error of its GPU ({now.harm}), and does not answer as it should ({self.last.reason})"
        if not why:
            return FINE if self.answers else self.wrong()
        cause = "hung" if self.hangs else "gpu"
        return self.broken(why, cause, now, time)

    def starting(self, unit: Unit, time: float) -> Verdict:
        """It has not answered since it was started: that is its gate's to judge, and nothing to restart it for."""
        if not unit.started or time - unit.started < self.settings.start_seconds:
            return FINE
        minutes = (time - unit.started) / 60
        what = f"{self.name} was started {minutes:.0f} min ago and has not answered since"
        return Verdict(finding=self.finding("start", WARN, what, INSPECT, f"Look at journalctl -u vllm@{self.name}."))

    def wrong(self) -> Verdict:
        """It answers, but nothing that is right, or nobody takes its connections: the process lives, so systemd does nothing."""
        what = f"{self.name} does not answer as it should: {self.last.reason if self.last else ''}"
        advice = f"Look at journalctl -u vllm@{self.name}; sudo systemctl restart vllm@{self.name} starts it anew."
        return Verdict(finding=self.finding("answer", WARN, what, INSPECT, advice))

    def broken(self, why: str, cause: str, now: Situation, time: float) -> Verdict:
        """It has to be restarted, unless something speaks against it."""
        by_hand = f"sudo systemctl kill --signal=KILL vllm@{self.name} starts it anew."
        word, turn = str(now.word.get("operator") or UP), str(now.word.get("turn") or "")
        if turn or word == STOPPED:
            reason = f"the turn {turn} is at work" if turn else "it is said to be stopped"
            return Verdict(finding=self.finding(cause, WARN, f"{why}; it is left alone: {reason}", NOTHING, ""))
        if word == DRAINED:
            what = f"{why}; it is drained, so it is left as it is for whoever looks at it"
            return Verdict(finding=self.finding(cause, WARN, what, RESTART_APP, by_hand))
        if now.sick:
            what = f"{why}; a restart does not help, because of its GPU"
            return Verdict(finding=self.finding(cause, CRITICAL, what, INSPECT, f"First {now.sick}."))
        if not self.settings.restart:
            what = f"{why}; host_agent_watch_restart is off"
            return Verdict(finding=self.finding(cause, CRITICAL, what, RESTART_APP, by_hand))
        limits = self.settings.limits
        left = limits.left(now.restarts, time)
        if not left:
            minutes = limits.again(now.restarts, time) / 60
            what = (
                f"{why}; it was restarted {limits.restarts} times within {limits.seconds / 60:.0f} min "
                f"(host_agent_watch_restarts) and is left alone for {minutes:.0f} min"
            )
            advice = f"Look at journalctl -u vllm@{self.name} and nvidia-smi; {by_hand}"
            return Verdict(finding=self.finding(cause, CRITICAL, what, INSPECT, advice))
        told = self.finding(cause, CRITICAL, f"{why}; it is being restarted", NOTHING, "")
        invocation, when = self.asked
        if invocation == now.unit.invocation and time - when < ASKED_SECONDS:
            return Verdict(finding=told)
        self.asked = (now.unit.invocation, time)
        return Verdict(why, cause, told)

    def finding(self, key: str, level: str, what: str, action: str, advice: str) -> Finding:
        """One of this instance."""
        return Finding(f"{key} {self.name}", level, one_line(what, 400), action, advice, instances=(self.name,))


# --- the restart itself


@dataclass(frozen=True)
class Request:
    """What the watch asks heal.py for, which has the rights that it takes."""

    instance: str
    invocation: str
    why: str
    cause: str = "hung"

    @classmethod
    def read(cls, name: str, text: str) -> Request | None:
        """From a file of this name; nothing where it is none."""
        try:
            told = json.loads(text)
            found = cls(name, str(told["invocation"]), one_line(told.get("why", ""), 300), str(told.get("cause")))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        good = INSTANCE.fullmatch(name) and INVOCATION.fullmatch(found.invocation) and found.cause in ("hung", "gpu")
        return found if good else None

    def written(self) -> str:
        """The content of its file."""
        return json.dumps({"invocation": self.invocation, "why": self.why, "cause": self.cause}) + "\n"


def refusal(
    request: Request,
    instances: Iterable[str],
    unit: Unit,
    word: Mapping[str, str],
    before: Sequence[float],
    limits: Limits,
    now: float,
) -> str:
    """Why a request is not followed; empty when it is. Whoever asks is not trusted with more than that."""
    if request.instance not in set(instances):
        return "this host has no such instance"
    if word.get("turn") or word.get("operator", UP) != UP:
        return f"it is {word.get('operator')}"
    if unit.state != ACTIVE or unit.invocation != request.invocation:
        return "it was stopped or started meanwhile"
    if not limits.left(before, now):
        return f"it was restarted {limits.restarts} times within {limits.seconds / 60:.0f} min"
    return ""


@dataclass(frozen=True)
class History:
    """What heal.py did with an instance since the boot."""

    times: tuple[float, ...] = ()
    causes: Mapping[str, int] = field(default_factory=dict)
    refused: int = 0
    last: str = ""
    why: str = ""

    @classmethod
    def read(cls, text: str | None) -> History:
        """From its file. One that cannot be read is none: only root writes there."""
        try:
            told = json.loads(text or "{}")
            return cls(
                tuple(float(time) for time in told.get("times", [])),
                {str(name): int(count) for name, count in told.get("causes", {}).items()},
                int(told.get("refused", 0)),
                str(told.get("last", "")),
                str(told.get("why", "")),
            )
        except (ValueError, TypeError, AttributeError):
            return cls()

    def restarted(self, request: Request, now: float, when: str, kept: int) -> History:
        """With one more restart. Of those before, the limits need as many as they allow."""
        causes = {**self.causes, request.cause: self.causes.get(request.cause, 0) + 1}
        return History((*self.times, now)[-max(kept, 1) :], causes, self.refused, when, request.why)

    def refusing(self) -> History:
        """With one more that was refused."""
        return replace(self, refused=self.refused + 1)

    def written(self) -> str:
        """The content of its file."""
        return json.dumps({**asdict(self), "times": list(self.times)}) + "\n"


# --- disks


@dataclass(frozen=True)
class Disk:
    """A file system of the host, and how full it is."""

    path: str
    # What is there.
    holds: str
    used: float
    inodes: float
    free_gib: float


def disk_findings(disks: Iterable[Disk], warn: float, critical: float) -> list[Finding]:
    """What is to be said of them. Nothing is deleted."""
    found = []
    for disk in disks:
        share, what = max((disk.used, "full"), (disk.inodes, "out of inodes"))
        level = CRITICAL if share >= critical else WARN if share >= warn else OK
        if level != OK:
            text = f"{disk.path} ({disk.holds}) is {share:.0f} % {what}, {disk.free_gib:.1f} GiB are free"
            found.append(Finding(f"disk {disk.path}", level, text, INSPECT, disk_advice(disk)))
    return found


def disk_advice(disk: Disk) -> str:
    """What to look at first."""
    advice = {
        "models": f"sudo du -xsh {disk.path}/* shows the models; remove those that no instance has any more.",
        "releases": "The role vllm keeps no more releases than its generations need: a run of site.yml removes the others.",
        "caches": f"sudo du -xsh {disk.path}/*: the caches of instances that are no more can go.",
        "logs": "sudo journalctl --vacuum-size=1G, and sudo du -xah /var/log | sort -h | tail.",
    }
    first = [advice[name] for name in disk.holds.split(", ") if name in advice]
    return " ".join(first) or f"sudo du -xh --max-depth=2 {disk.path} | sort -h | tail shows what takes the room."


# --- what is told


def worst(findings: Iterable[Finding]) -> str:
    """The level of the worst of them."""
    return max((one.level for one in findings), key=LEVELS.index, default=OK)


def sick(findings: Iterable[Finding]) -> dict[str, str]:
    """The instances that should get no requests, and why."""
    found: dict[str, list[str]] = {}
    for one in findings:
        if one.out:
            words = f"{one.gpu.words}: {one.what}" if one.gpu else one.what
            for name in one.instances:
                found.setdefault(name, []).append(words)
    return {name: one_line("; ".join(sorted(words))) for name, words in found.items()}


def health(host: str, findings: Sequence[Finding], since: Mapping[str, str], now: float, written: float) -> str:
    """The content of health.json. `since` has when each finding was there first."""
    order = sorted(findings, key=lambda one: (-LEVELS.index(one.level), one.key))
    told = {
        "host": host,
        "time": written,
        "monotonic": now,
        "level": worst(findings),
        "findings": [{**one.written(), "since": since.get(one.key, "")} for one in order],
    }
    return json.dumps(told, indent=1) + "\n"


def shown(text: str | None, now: float) -> tuple[list[str], int]:
    """health.json for a person, and the exit status: 0 all is well, 1 something is to be looked at, 2 something is wrong."""
    if text is None:
        return ["The watch says nothing: host_agent_watch is off, or vllm-fleet-watch.service does not run."], 2
    try:
        told = json.loads(text)
        age, found, level = now - float(told["monotonic"]), list(told["findings"]), str(told["level"])
        status = LEVELS.index(level)
        lines = []
        for one in found:
            lines.append(f"{one['level'].upper():<9}{where(one)}{one['what']}")
            lines += [f"{'':9}instances: {', '.join(one['instances'])}"] if one["gpu"] and one["instances"] else []
            lines += [f"{'':9}since {one['since']}"] if one["since"] else []
            lines += [f"{'':9}{one['advice']}"] if one["advice"] else []
    except (ValueError, KeyError, TypeError) as error:
        return [f"health.json cannot be read: {error}"], 2
    if age > STALE_SECONDS or age < 0:
        return [f"The watch has said nothing for {age:.0f} s: systemctl status vllm-fleet-watch", *lines], 2
    return lines or ["OK       nothing to report"], status


def where(one: Mapping[str, Any]) -> str:
    """The GPU of a finding."""
    return f"GPU {one['gpu']['index']} ({one['gpu']['address']}): " if one.get("gpu") else ""


Series = tuple[Mapping[str, object], float]


def family(name: str, kind: str, about: str, series: Iterable[Series]) -> list[str]:
    """One name of the metrics."""
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for labels, value in series:
        each = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
        number = str(int(value)) if value == int(value) else repr(float(value))
        lines.append(f"{name}{{{each}}} {number}" if each else f"{name} {number}")
    return lines if len(lines) > 2 else []


def escaped(text: object) -> str:
    """As a label has it."""
    return str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@dataclass(frozen=True)
class Told:
    """All that the metrics are made of."""

    time: float
    engines: Sequence[Engine]
    histories: Mapping[str, History]
    limits: Limits
    findings: Sequence[Finding]
    gpus: Sequence[Any]
    xids: Mapping[tuple[str, int], int]
    disks: Sequence[Disk]
    now: float


def metrics(told: Told) -> str:
    """The content of watch.prom."""
    out, restarts = sick(told.findings), []
    for name, history in sorted(told.histories.items()):
        restarts += [({"instance_name": name, "cause": cause}, float(history.causes.get(cause, 0))) for cause in ("hung", "gpu")]  # fmt: skip
    index = {one.address: one.index for one in told.gpus}
    levels = {
        one.address: worst(found for found in told.findings if found.gpu and found.gpu.address == one.address)
        for one in told.gpus
    }
    lines = [
        *family("vllm_fleet_watch_time_seconds", "gauge", "When the watch of the host last wrote this.", [({}, told.time)]),
        *family("vllm_fleet_findings", "gauge", "What the watch has found, by how bad it is.",
                [({"level": level}, sum(one.level == level for one in told.findings)) for level in (WARN, CRITICAL)]),
        *family("vllm_fleet_instance_answers", "gauge", "Whether the instance answered the watch.",
                [({"instance_name": one.name}, one.answers) for one in told.engines]),
        *family("vllm_fleet_instance_hangs", "gauge", "Whether its engine neither answers nor gets on with anything.",
                [({"instance_name": one.name}, one.hangs) for one in told.engines]),
        *family("vllm_fleet_instance_sick", "gauge", "Whether gateways are asked to send nothing to it because of its GPU.",
                [({"instance_name": one.name}, one.name in out) for one in told.engines]),
        *family("vllm_fleet_restarts_total", "counter", "Restarts by the watch since the boot.", restarts),
        *family("vllm_fleet_restarts_refused_total", "counter", "Restarts that were not allowed since the boot.",
                [({"instance_name": name}, history.refused) for name, history in sorted(told.histories.items())]),
        *family("vllm_fleet_restarts_left", "gauge", "Restarts that the watch has left now.",
                [({"instance_name": name}, told.limits.left(history.times, told.now)) for name, history in sorted(told.histories.items())]),
        *family("vllm_fleet_gpu_level", "gauge", "Health of a GPU: 0 ok, 1 warn, 2 critical.",
                [({"gpu": one.index, "pci": one.address, "uuid": one.uuid}, LEVELS.index(levels[one.address])) for one in told.gpus]),
        *family("vllm_fleet_gpu_xid_total", "counter", "XID errors of a GPU since the boot.",
                [({"gpu": index.get(address, ""), "pci": address, "xid": number}, count)
                 for (address, number), count in sorted(told.xids.items())]),
        *family("vllm_fleet_disk_used_ratio", "gauge", "How full a file system is, for programs without root's rights.",
                [({"path": one.path, "holds": one.holds}, round(one.used / 100, 4)) for one in told.disks]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
