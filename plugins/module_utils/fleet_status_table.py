# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The status of the fleet as a person on call reads it: one table, what is not well, and a last line that says whether anything is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.fleet_status import count, listed, span

WIDTH = 160
NOTHING = "-"
COLUMNS = (
    "host", "instance", "model", "release", "gen", "unit", "traffic", "run", "wait", "KV", "tok/s", "GPU GB", "C", "busy",
    "started", "cert", "updates", "disk", "who", "inventory",
)  # fmt: skip
# Columns of numbers, which stand below each other by their ends.
NUMBERS = frozenset({"gen", "run", "wait", "KV", "tok/s", "GPU GB", "C", "busy", "cert", "disk"})
# What is cut first where the table would be too wide, and what it keeps: the list below the table has all of it.
ELASTIC = {"who": 12, "updates": 8, "model": 8, "started": 8, "release": 8, "unit": 10, "instance": 8, "host": 8}
Row = dict[str, str]


def rows(document: Mapping[str, Any], now: float) -> list[Row]:
    """A row for each instance, for each gateway, and for each host that has neither."""
    shown = short_releases(document)
    found: list[Row] = []
    for name, host in document["hosts"].items():
        machine = machine_cells(host)
        own = [{"host": name, **instance_cells(one, shown, now)} for one in host["instances"]]
        if host["gateway"]:
            own.append({"host": name, **gateway_cells(host)})
        if not own:
            own.append({"host": name, "unit": "" if host["reached"] else "no answer"})
        found += [{**machine, **row} if position == 0 else row for position, row in enumerate(own)]
    return found


def machine_cells(host: Mapping[str, Any]) -> Row:
    """What a host has once, in its first row."""
    if not host["reached"]:
        return {}
    days = [told["days_left"] for told in host["certificates"].values()]
    waiting, reboot = host["updates"].get("waiting"), host["updates"].get("reboot_required")
    held = len(host["updates"].get("held_security") or [])
    parts = [str(waiting) if waiting else "", f"{held} held" if held else "", "reboot" if reboot else ""]
    used = [1 - disk["free_bytes"] / disk["size_bytes"] for disk in host["disks"]]
    return {
        "cert": f"{min(days)}d" if days else "",
        "updates": ", ".join(filter(None, parts)),
        "disk": f"{max(used):.0%}" if used else "",
    }


def instance_cells(one: Mapping[str, Any], releases: Mapping[str, str], now: float) -> Row:
    """What an instance is and does."""
    if one.get("unknown"):
        return {"instance": one["name"], "unit": "no answer", "traffic": traffic(one["gateways"])}
    metrics, gpu = one["metrics"] or {}, one["gpu"] or {}
    generation = one["generation"]
    runs = one["running_generation"]
    number = "" if generation is None else str(generation)
    if runs not in (None, generation):
        number = f"{runs}>{number}"  # what runs, and what a restart would run
    elif generation is not None and not one["confirmed"]:
        number += "?"
    return {
        "instance": one["name"],
        "model": one["model"],
        "release": releases.get(one["runs"], one["runs"]),
        "gen": number,
        "unit": unit_cell(one),
        "traffic": traffic(one["gateways"]),
        "run": whole(metrics.get("running")),
        "wait": whole(metrics.get("waiting")),
        "KV": share(metrics.get("kv_use")),
        "tok/s": whole(metrics.get("generated_tokens_per_second")),
        "GPU GB": memory(gpu),
        "C": whole(gpu.get("temperature_c")),
        "busy": "" if gpu.get("utilization") is None else f"{gpu['utilization']:.0f}%",
        "started": f"{span(now - one['start']['at'])}, {one['start']['why']}" if one["start"] else "",
        "who": who(one),
        "inventory": one.get("inventory") or "",
    }


def gateway_cells(host: Mapping[str, Any]) -> Row:
    """What a gateway does."""
    gateway, units = host["gateway"], host["units"]
    states = {
        name: units.get(f"{unit}.service", "") for name, unit in (("nginx", "nginx"), ("checks", "vllm-gateway-checks"))
    }
    wrong = [f"{name} {state or 'absent'}" for name, state in states.items() if state != "active"]
    backends = gateway["backends"].values()
    used = sum(one["use"] for one in backends)
    return {
        "instance": "(gateway)",
        "release": gateway["configuration"],
        "unit": wrong[0] if wrong and units else "active" if units else "",
        "traffic": f"uses {used}/{len(backends)}" if backends else "",
        "run": whole(gateway["in_flight"]),
    }


def unit_cell(one: Mapping[str, Any]) -> str:
    """The state of the unit, and that of an engine that does not answer yet."""
    unit = one["unit"]
    if unit["sub"] == "auto-restart":
        return "restarting"
    if unit["active"] == "active" and (one["metrics"] or {}).get("why"):
        return "no answer"
    return str(unit["active"] or "")


def traffic(gateways: Mapping[str, Mapping[str, Any]]) -> str:
    """What the gateways do with an instance; the names of those that differ from the others."""
    if not gateways:
        return ""
    uses = {name: said["use"] for name, said in gateways.items()}
    if len(set(uses.values())) == 1:
        return str(next(iter(uses.values())))
    inside = sum(use in ("in", "kept") for use in uses.values())
    return f"in {inside}/{len(uses)}"


def who(one: Mapping[str, Any]) -> str:
    """Who wants an instance as it is."""
    word = one["word"]
    parts = []
    if word["operator"] != "up":
        parts.append(
            " ".join(filter(None, [word["operator"], f"({word['turn']})" if word["turn"] else "", word["by"]]))
        )
    elif word["share"]:
        parts.append(f"{word['share']} % ({word['turn']})" if word["turn"] else f"{word['share']} %")
    elif one["leaving"]:
        parts.append("leaving")
    if one["held"]:
        parts.append(f"held {one['held']}")
    return ", ".join(parts)


def whole(value: float | None) -> str:
    """A number without its fraction."""
    return "" if value is None else f"{value:.0f}"


def share(value: float | None) -> str:
    """A part of one."""
    return "" if value is None else f"{value:.0%}"


def memory(gpu: Mapping[str, Any]) -> str:
    """Memory in use and in all."""
    if gpu.get("memory_used_mib") is None or not gpu.get("memory_total_mib"):
        return ""
    return f"{gpu['memory_used_mib'] / 1024:.0f}/{gpu['memory_total_mib'] / 1024:.0f}"


def short_releases(document: Mapping[str, Any]) -> dict[str, str]:
    """Each release or image by a name that is short, and still its own."""
    runs = {
        one["runs"]
        for host in document["hosts"].values()
        for one in host["instances"]
        if not one.get("unknown") and one["runs"]
    }
    found = {}
    for name in runs:
        last = name.rpartition("/")[2]
        image, _, digest = last.partition("@sha256:")
        base, tail = (
            (image, digest) if digest else last.rpartition("-")[::2] if "-" in last and "/" in name else (last, "")
        )
        found[name] = (base or last, tail)
    bases = [base for base, _tail in found.values()]
    return {
        name: f"{base}-{tail[:6]}" if tail and bases.count(base) > 1 else base for name, (base, tail) in found.items()
    }


# --- the text


def table(found: Sequence[Row], width: int = WIDTH) -> list[str]:
    """The rows below the names of their columns, without columns that are empty everywhere, and not wider than this where that can be."""
    columns = [name for name in COLUMNS if any(row.get(name) for row in found)]
    widths = {name: max(len(name), *(len(row.get(name) or NOTHING) for row in found)) for name in columns}
    for name, least in ELASTIC.items():
        over = sum(widths.values()) + 2 * (len(columns) - 1) - width
        if over > 0 and name in widths:
            widths[name] = max(min(least, widths[name]), widths[name] - over, len(name))

    def line(cells: Mapping[str, str]) -> str:
        return "  ".join(
            cut(cells.get(name) or NOTHING, widths[name]).rjust(widths[name])
            if name in NUMBERS
            else cut(cells.get(name) or NOTHING, widths[name]).ljust(widths[name])
            for name in columns
        ).rstrip()

    return [line({name: name for name in columns}), *map(line, found)]


def cut(text: str, width: int) -> str:
    """A text that fits."""
    return text if len(text) <= width else f"{text[: width - 2]}.."


def about(one: Mapping[str, Any]) -> str:
    """Of what a finding is."""
    names = [f"{one['instance']}@{host}" if one["instance"] else host for host in one["hosts"]]
    return listed(names)


def findings(title: str, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A list of findings: a sentence, and the command."""
    if not found:
        return
    yield ""
    yield title
    for one in found:
        yield f"- {about(one)}: {one['what']}"
        if one["do"]:
            yield f"    {one['do']}"


def last_line(document: Mapping[str, Any]) -> str:
    """Whether all is well."""
    hosts = document["hosts"].values()
    if document["well"]:
        instances = sum(len(host["instances"]) for host in hosts)
        return f"all is well ({count(len(hosts), 'host')}, {count(instances, 'instance')})"
    return count(len(document["problems"]), "problem")


def lines(document: Mapping[str, Any], now: float, width: int = WIDTH) -> list[str]:
    """Everything."""
    found = rows(document, now)
    return [
        *(table(found, width) if found else ["There is no host."]),
        *findings("What is not well:", document["problems"]),
        *findings("As somebody wants it:", document["notes"]),
        "",
        last_line(document),
    ]
