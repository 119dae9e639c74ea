# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the kernel's messages and nvidia-smi say of the health of GPUs: how bad it is, whom it concerns, and what is to be done.

Decides only; roles/host_agent's watch.py reads the journal and runs nvidia-smi. The actions are those of NVIDIA's catalogue of XID errors
(docs.nvidia.com/deploy/xid-errors) for Ampere and newer, and of its note on memory errors (docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from xml.etree import ElementTree

from ansible_collections.gpufleet.llm.plugins.module_utils import gpu as smi

OK, WARN, CRITICAL = LEVELS = ("ok", "warn", "critical")
NOTHING, RESTART_APP, RESET_GPU, REBOOT, INSPECT = ACTIONS = (
    "nothing",
    "restart_app",
    "reset_gpu",
    "reboot",
    "inspect",
)

# What the driver has decided since counts more than a message that is older than this, where the driver tells (R570 and newer).
FRESH_SECONDS = 120.0
# A message of an application's fault is told for so long; as many of them on one GPU within the day are the GPU's.
TOLD_SECONDS = 3600.0
REPEATED, REPEATED_SECONDS = 3, 86400.0
# A temperature that slows a GPU down is worth a word when it lasts for so many looks.
HOT_LOOKS = 2
CONTAINED = 94

XIDS: dict[int, tuple[str, str]] = {
    **dict.fromkeys((13, 31, 32, 39, 40, 41, 68, 69, 80), (RESTART_APP, "an application did something wrong on it")),
    CONTAINED: (RESTART_APP, "a memory error was contained: what used that memory was ended"),
    **dict.fromkeys((46, 62, 64, 109, 110, 136, 140, 143, 155, 156, 158), (RESET_GPU, "it does not go on by itself")),
    95: (RESET_GPU, "a memory error was not contained: what it computes now may be wrong"),
    119: (RESET_GPU, "its GSP does not answer"),
    120: (RESET_GPU, "its GSP failed"),
    79: (REBOOT, "it has fallen off the bus"),
    151: (REBOOT, "its virtual machine has to be restarted"),
    48: (INSPECT, "a double bit error; another XID says whether it was contained"),
    74: (INSPECT, "an NVLink failed"),
    **dict.fromkeys(range(144, 151), (INSPECT, "an NVLink failed")),
    # follow another one, or say that all is well
    **dict.fromkeys((37, 38, 43, 44, 45, 63, 92, 121, 137, 154, 160), (NOTHING, "")),
}
UNKNOWN_XID = (INSPECT, "an error that is not in the table")
# 154: the driver has decided what is to be done.
DECIDED = 154

ADVICE = {
    NOTHING: "Nothing is to be done.",
    RESTART_APP: "Restart what uses it: ansible-playbook playbooks/restart.yml -e fleet_instance=NAME --limit HOST.",
    RESET_GPU: "Stop what uses it (vllm-fleet state NAME stopped, systemctl stop vllm@NAME), then: sudo nvidia-smi --gpu-reset --id INDEX. "
    "Where GPUs are joined by NVSwitch, reset all of them; when that fails, reboot.",
    REBOOT: "Reboot the host: ansible-playbook playbooks/reboot.yml --limit HOST. When the GPU is not back then, switch the power off and on, "
    "and look at its seat, cables and cooling.",
    INSPECT: "Look at it: nvidia-smi -q, and dcgmi diag -r 3 while nothing runs there; return it to its vendor when that fails.",
}  # fmt: skip

XID = re.compile(
    r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})(?:\.[0-9])?\): ([0-9]{1,4})(?:, (.*))?"
)
SXID = re.compile(r"SXid \(PCI:([0-9a-fA-F:.]+)\): ([0-9]+), (Fatal|Non-fatal)(?:, (.*))?")
LOADED = re.compile(r"NVRM: loading NVIDIA UNIX\b")
LOST_WORDS = re.compile(r"GPU is lost|fallen off the bus|Unknown Error|ERR!")
NAMED = re.compile(r"device handle for GPU ?(?:[0-9]+: ?)?([0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-9])")
HOT = {
    "hw_slowdown": CRITICAL,
    "hw_thermal_slowdown": CRITICAL,
    "hw_power_brake_slowdown": CRITICAL,
    "sw_thermal_slowdown": WARN,
}
HOT_WORDS = {
    "hw_slowdown": "its hardware slows it down",
    "hw_thermal_slowdown": "it is so hot that its hardware slows it down",
    "hw_power_brake_slowdown": "the power supply has it slow down",
    "sw_thermal_slowdown": "it is so hot that the driver slows it down",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU, as operators find it: by its number in nvidia-smi, and where it sits."""

    index: int
    address: str
    uuid: str = ""

    @property
    def words(self) -> str:
        """For a person."""
        return f"GPU {self.index} ({self.address})"


@dataclass(frozen=True)
class Finding:
    """Something that a person should know, and do."""

    # What tells it from others, the same as long as it lasts.
    key: str
    level: str
    what: str
    action: str = NOTHING
    advice: str = ""
    gpu: Gpu | None = None
    instances: tuple[str, ...] = ()
    # Gateways are asked to send nothing more to these instances.
    out: bool = False

    def written(self) -> dict[str, Any]:
        """As health.json has it."""
        return {**asdict(self), "instances": list(self.instances)}


@dataclass(frozen=True)
class Xid:
    """A message of the kernel about a GPU."""

    address: str
    number: int
    # Seconds since the boot.
    time: float
    text: str = ""


@dataclass
class Messages:
    """The messages of this boot that count."""

    xids: list[Xid] = field(default_factory=list)
    switches: list[tuple[float, str]] = field(default_factory=list)
    # How many there were, by GPU and number; the driver may have been loaded again since.
    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    # The last one: behind it a journal is read on.
    cursor: str = ""
    # More of one kind are counted, and not kept.
    most: int = 200

    def read(self, line: str) -> Xid | None:
        """One line of `journalctl -k -o json`. Returns the error of a GPU, if it is one."""
        entry = journal_entry(line)
        if entry is None:
            return None
        self.cursor, time, text = entry
        if LOADED.search(text):  # it starts anew, with GPUs that were reset
            self.xids, self.switches = [], []
        elif found := SXID.search(text):
            if found[3] == "Fatal":
                self.switches = [*self.switches, (time, f"SXid {found[2]} of {found[1]}")][-self.most :]
        elif (xid := message(text, time)) is not None:
            self.counts[xid.address, xid.number] = self.counts.get((xid.address, xid.number), 0) + 1
            self.xids = [*self.xids, xid][-self.most :]
            return xid
        return None

    def forget(self, before: float) -> None:
        """What a person has dealt with."""
        self.xids = [xid for xid in self.xids if xid.time > before]
        self.switches = [one for one in self.switches if one[0] > before]


def journal_entry(line: str) -> tuple[str, float, str] | None:
    """Its cursor, its time in seconds since the boot, and its message."""
    try:
        entry = json.loads(line)
        text = entry["MESSAGE"]
        if isinstance(text, list):  # not all of it was text
            text = bytes(text).decode("utf-8", "replace")
        return str(entry["__CURSOR"]), int(entry["__MONOTONIC_TIMESTAMP"]) / 1e6, str(text)
    except (ValueError, KeyError, TypeError):
        return None


def message(text: str, time: float) -> Xid | None:
    """What the kernel says of a GPU, where it does. It leaves the last part of the address out: a GPU is the first."""
    found = XID.search(text)
    if not found:
        return None
    domain, bus, device, number, more = found.groups()
    return Xid(f"{domain[-4:]}:{bus}:{device}.0".lower(), int(number), time, (more or "").strip()[:200])


@dataclass(frozen=True)
class Look:
    """What nvidia-smi said: the GPUs by their addresses, and what was wrong where something was."""

    gpus: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    problem: str = ""
    time: float = 0.0


def look(status: int | None, output: str, time: float) -> Look:
    """From the answer to `nvidia-smi -q -x`; without a status there was none in time."""
    if status is None:
        return Look(problem="nvidia-smi does not answer", time=time)
    named = {smi.pci_address(address) for address in NAMED.findall(output)} - {""}
    start = output.find("<?xml")
    try:
        root = ElementTree.fromstring(output[start:]) if start >= 0 else None  # noqa: S314 - of root's own program
    except ElementTree.ParseError:
        root = None
    if root is None:
        said = " ".join(output.split())[:200] or f"nothing, with status {status}"
        return Look(lost=frozenset(named), problem=f"nvidia-smi cannot tell: {said}", time=time)
    gpus, lost = {}, set(named)
    for element in root.findall("gpu"):
        address = smi.pci_address(element.get("id", ""))
        if not address:
            continue
        if is_lost(element):
            lost.add(address)
        else:
            gpus[address] = details(element)
    return Look(gpus, frozenset(lost), "", time)


def is_lost(element: ElementTree.Element) -> bool:
    """Whether nvidia-smi lists a GPU that it cannot ask."""
    told = [(element.findtext(name) or "").strip() for name in ("uuid", "product_name", "temperature/gpu_temp")]
    return any(LOST_WORDS.search(text) for text in told)


def details(element: ElementTree.Element) -> dict[str, Any]:
    """What counts for its health. Drivers before R535 speak of throttling where newer ones speak of events."""
    told = smi.details(element)
    active = set()
    for group in ("clocks_event_reasons", "clocks_throttle_reasons"):
        for reason in element.iterfind(f"{group}/*"):
            if (reason.text or "").strip() == "Active":
                active.add(re.sub(r"^clocks_(event|throttle)_reason_", "", reason.tag))
    return {
        **told,
        # Whether this driver tells at all what is to be done.
        "tells_action": element.find("gpu_recovery_action") is not None
        and (element.findtext("gpu_recovery_action") or "").strip() not in ("N/A", ""),
        "slowed": sorted(active & set(HOT)),
        "temperature": degrees(element, "temperature/gpu_temp"),
        "sram_threshold": smi.flag(element, "ecc_errors/aggregate/sram_threshold_exceeded"),
    }


def degrees(element: ElementTree.Element, path: str) -> int | None:
    """A temperature."""
    found = re.match(r"-?[0-9]+(?= C)", smi.text(element, path))
    return int(found[0]) if found else None


def recovery(text: str) -> tuple[str, str]:
    """Level and action of what the driver says is to be done (nvidia-smi's `GPU Recovery Action`, and XID 154)."""
    said = text.lower()
    if not said or said == "none":
        return OK, NOTHING
    if "drain and reset" in said or "drain_and_reset" in said:
        return WARN, RESET_GPU  # what runs goes on and is right; it has lost a part of what it had
    if "reboot" in said:
        return CRITICAL, REBOOT
    if "reset" in said:
        return CRITICAL, RESET_GPU
    if "p2p" in said:
        return WARN, RESTART_APP
    return WARN, INSPECT


def known(before: Iterable[Gpu], addresses: Iterable[str], seen: Look) -> list[Gpu]:
    """The GPUs of this host: those that were ever seen since the boot. Their numbers are in the order of the bus, as vLLM's are."""
    uuids = {one.address: one.uuid for one in before}
    for address in (*addresses, *seen.gpus, *seen.lost):
        uuids.setdefault(address, "")
    for address, told in seen.gpus.items():
        uuids[address] = told["uuid"] or uuids[address]
    return [Gpu(number, address, uuids[address]) for number, address in enumerate(sorted(uuids))]


def users(gpu: Gpu, instances: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """The instances that use a GPU, by its number or by its UUID."""
    return tuple(
        name
        for name, uses in sorted(instances.items())
        if any(str(one) == str(gpu.index) or (gpu.uuid and str(one) == gpu.uuid) for one in uses)
    )


def findings(
    gpus: Sequence[Gpu],
    seen: Look,
    messages: Messages,
    instances: Mapping[str, Sequence[Any]],
    now: float,
    hot: Mapping[str, int],
) -> list[Finding]:
    """All that is to be said of the GPUs. `hot` has for how many looks each of them has been slowed down."""
    found: list[Finding] = []
    for one in gpus:
        of_it = [*of_reading(one, seen, hot.get(one.address, 0)), *of_messages(one, seen, messages.xids, now)]
        found += [replace(finding, gpu=one, instances=users(one, instances)) for finding in distinct(of_it)]
    if seen.problem:
        found.append(of_problem(seen.problem))
    for _time, text in messages.switches[-1:]:
        advice = "Stop what uses several GPUs, then reset all GPUs together: sudo nvidia-smi --gpu-reset; else reboot."
        found.append(Finding("nvswitch", CRITICAL, f"an NVSwitch has a fatal error ({text})", RESET_GPU, advice))
    return found


def of_problem(problem: str) -> Finding:
    """What it means that nvidia-smi says nothing of the GPUs."""
    if "version mismatch" in problem:
        advice = (
            "The driver's programs are newer than what is loaded; what runs goes on, and what starts fails. "
            + ADVICE[REBOOT]
        )
        return Finding("smi", CRITICAL, problem, REBOOT, advice)
    level = CRITICAL if "does not answer" in problem else WARN
    advice = "Look at journalctl -k | grep NVRM, and try nvidia-smi; a driver that hangs needs a reboot."
    return Finding("smi", level, problem, INSPECT, advice)


def of_reading(one: Gpu, seen: Look, hot: int) -> Iterator[Finding]:
    """What nvidia-smi says of a GPU."""
    told = seen.gpus.get(one.address)
    if told is None:
        if one.address in seen.lost or not seen.problem:
            yield finding(
                one, "lost", CRITICAL, "it has fallen off the bus: nvidia-smi does not reach it", REBOOT, out=True
            )
        return
    level, action = recovery(told["recovery_action"])
    if level != OK:
        what = f"the driver says what it needs: {told['recovery_action']}"
        yield finding(one, "recovery", level, what, action, out=level == CRITICAL)
    rows = told["remapped_rows"]
    if rows["failure"]:
        yield finding(one, "rows", CRITICAL, "a row of its memory could not be replaced", INSPECT, out=True)
    elif rows["pending"]:
        yield finding(
            one, "rows", WARN, "a row of its memory is replaced with the next reset; until then what runs is right", RESET_GPU
        )  # fmt: skip
    if told["sram_threshold"]:
        yield finding(one, "sram", CRITICAL, "its SRAM has more errors than NVIDIA allows", INSPECT, out=True)
    elif told["ecc_uncorrected"]:
        yield finding(
            one, "ecc", WARN, f"{told['ecc_uncorrected']} memory errors since the driver was loaded could not be corrected", INSPECT
        )  # fmt: skip
    if hot >= HOT_LOOKS:
        for reason in told["slowed"]:
            at = "" if told["temperature"] is None else f" (at {told['temperature']} C)"
            advice = "Look at the fans, the air around it and the power supplies; it answers more slowly, and goes on."
            yield Finding(f"{reason} {one.address}", HOT[reason], HOT_WORDS[reason] + at, INSPECT, advice, one)


def of_messages(one: Gpu, seen: Look, xids: Iterable[Xid], now: float) -> Iterator[Finding]:
    """What the kernel said of a GPU."""
    mine = [xid for xid in xids if xid.address == one.address]
    told = seen.gpus.get(one.address)
    for number in sorted({xid.number for xid in mine}):
        same = [xid for xid in mine if xid.number == number]
        last, age = same[-1], now - same[-1].time
        action, meaning = XIDS.get(number, UNKNOWN_XID)
        if number == DECIDED:
            if told is None or not told["tells_action"]:
                level, action = recovery(decided(last.text))
                if level != OK:
                    yield finding(one, "recovery", level, f"the driver says what it needs: {last.text}", action, out=level == CRITICAL)  # fmt: skip
            continue
        if action == NOTHING:
            continue
        words = f"XID {number}, {ago(age)}: {meaning}"
        if action in (RESET_GPU, REBOOT):
            judged = told is not None and told["tells_action"] and seen.time - last.time >= FRESH_SECONDS
            if not judged:
                yield finding(one, f"xid {number}", CRITICAL, words, action, out=True)
            elif age <= TOLD_SECONDS:
                yield finding(
                    one, f"xid {number}", WARN, f"{words}; its driver says that nothing is left to do", NOTHING
                )
            continue
        repeated = len([xid for xid in same if now - xid.time <= REPEATED_SECONDS])
        if action == RESTART_APP and repeated >= REPEATED:
            yield finding(one, f"xid {number}", WARN, f"{words}, {repeated} times within a day", INSPECT)
        elif age <= (TOLD_SECONDS if action == RESTART_APP else REPEATED_SECONDS):
            yield finding(one, f"xid {number}", WARN, words, action)


def decided(text: str) -> str:
    """What XID 154 says: `GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)`."""
    found = re.findall(r"\(([^()]*)\)", text)
    return found[-1] if found else text


def finding(one: Gpu, key: str, level: str, what: str, action: str, out: bool = False) -> Finding:
    """One of a GPU, with the advice of its action."""
    advice = ADVICE[action].replace("INDEX", str(one.index))
    return Finding(f"{key} {one.address}", level, what, action, advice, one, out=out)


def distinct(found: Iterable[Finding]) -> list[Finding]:
    """Each once. A GPU that is gone has nothing else to say that would help."""
    each = {one.key: one for one in reversed(list(found))}
    kept = list(reversed(each.values()))
    lost = [one for one in kept if one.key.startswith("lost ")]
    return lost or kept


def harmed(xids: Iterable[Xid], one: Gpu, since: float) -> Xid | None:
    """The last message since then after which what uses a GPU has to be restarted, if it was hit."""
    mine = [xid for xid in xids if xid.address == one.address and xid.time > since]
    return next((xid for xid in reversed(mine) if XIDS.get(xid.number, UNKNOWN_XID)[0] == RESTART_APP), None)


def ago(seconds: float) -> str:
    """How long ago something was."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
