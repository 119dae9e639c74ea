# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Turns of hosts that serve: which of them go together, whether routes keep enough backends meanwhile, how long it takes, and how far it is.

Decided from the inventory and from what the hosts said; who is outside of --limit counts as serving, since nobody asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, gateway_fleet

# Turns of the same host that are looked at for the time of the next one.
REMEMBERED = 3
# What a turn takes beside the start of what changes: gateways let go, and take back.
AROUND_SECONDS = 10.0


def batches(hosts: Sequence[str], serial: Any) -> list[list[str]]:
    """The batches in which Ansible takes hosts, by what `serial` of their play says."""
    sizes = list(serial) if isinstance(serial, list | tuple) else [serial]
    found: list[list[str]] = []
    rest = list(hosts)
    while rest:
        size = share(sizes[min(len(found), len(sizes) - 1)], len(hosts))
        found.append(rest[:size])
        rest = rest[size:]
    return found


def share(size: Any, count: int) -> int:
    """A number of hosts, or a share of all of them; as Ansible takes it, nothing means all."""
    text = str(size)
    number = int(int(text.rstrip("%")) / 100 * count) or 1 if text.endswith("%") else int(text)
    return number if number > 0 else count


# --- whether a route keeps what it needs


def problems(
    hostvars: fleet.HostVars,
    hosts: Sequence[str],
    gateways: Sequence[str],
    taken: Sequence[Sequence[str]],
    leaving: Mapping[str, Iterable[str]],
    out: Mapping[str, str],
) -> list[str]:
    """The routes that would fall below min_available, one sentence each.

    `hosts` are all that serve, `taken` the batches, `leaving` has the instances that leave on each host, `out` the backends that are out of use
    already and why; those that leave are back after their own batch. The batch that says it first is told.
    """
    known = fleet.read(hostvars, hosts)
    found: list[str] = []
    for route in routes(hostvars, gateways):
        behind = fleet.backends(known, route.instance, hosts, gateways)
        least = gateway_fleet.told_by_backends(route.min_available, behind)["min_available"]
        ids = {backend.id for backend in behind}
        back: set[str] = set()
        for batch in taken:
            leave = {f"{route.instance}@{host}" for host in batch if route.instance in leaving.get(host, ())} & ids
            gone = {name: why for name, why in out.items() if name in ids and name not in leave | back}
            remain = len(ids) - len(leave) - len(gone)
            if leave and remain < least:
                found.append(below(route, sorted(leave), remain, len(ids), least, gone))
                break
            back |= leave
    return list(dict.fromkeys(found))


def routes(hostvars: fleet.HostVars, gateways: Sequence[str]) -> list[fleet.Route]:
    """The routes of all gateways, each once."""
    asked = [
        fleet.Route.of(entry)
        for gateway in gateways
        if gateway in hostvars
        for entry in hostvars[gateway].get("gateway_routes") or []
    ]
    return list({(route.model, route.instance, route.min_available): route for route in asked}.values())


def below(
    route: fleet.Route, leave: Sequence[str], remain: int, count: int, least: int, gone: Mapping[str, str]
) -> str:
    """What is wrong with a batch, and what would be right."""
    also = f", with {', '.join(f'{name} ({why})' for name, why in sorted(gone.items()))} out already" if gone else ""
    said = (
        f"route {route.model} would have {remain} of its {count} backend{'s' if count > 1 else ''} in use while {', '.join(leave)} "
        f"{'are' if len(leave) > 1 else 'is'} out{also}; it needs {least} (min_available)"
    )
    return f"{said}. {'Smaller batches: -e fleet_batch=1' if len(leave) > 1 else 'Put back what is out, or lower min_available of the route'}"


# --- how long


def expected(turns: Sequence[Mapping[str, Any]], starts: Iterable[float | None]) -> float | None:
    """The seconds that the turn of a host should take: as its last ones did, else as its instances took to start; nothing where nobody knows."""
    done = [float(turn["seconds"]) for turn in turns if turn.get("result") == "done"][-REMEMBERED:]
    if done:
        return sorted(done)[len(done) // 2]
    known = [seconds for seconds in starts if seconds is not None]
    return max(known) + AROUND_SECONDS if known else None


def filled(seconds: Mapping[str, float | None]) -> dict[str, float | None]:
    """The same, where a host that knows nothing is taken for the slowest of those that do."""
    known = [value for value in seconds.values() if value is not None]
    guess = max(known) if known else None
    return {host: guess if value is None else value for host, value in seconds.items()}


def left(
    taken: Sequence[Sequence[str]], host: str, seconds: Mapping[str, float | None], spent: Mapping[str, float]
) -> float | None:
    """The seconds that the batches after that of a host should take. What hosts took in this run counts for more than what was expected."""
    hosts = [one for batch in taken for one in batch]
    if spent:
        mean = sum(spent.values()) / len(spent)
        seconds = dict.fromkeys(hosts, mean)
    after = [batch for number, batch in enumerate(taken) if number > number_of(taken, host)]
    each = [[seconds.get(one) for one in batch] for batch in after]
    if any(value is None for values in each for value in values):
        return None
    return float(sum(max(value or 0.0 for value in values) for values in each))


def number_of(taken: Sequence[Sequence[str]], host: str) -> int:
    """Which batch a host is in."""
    return next((number for number, batch in enumerate(taken) if host in batch), len(taken))


def minutes(seconds: float | None) -> str:
    """A time in words."""
    if seconds is None:
        return "an unknown time"
    return f"{math.ceil(seconds)} s" if seconds < 90 else f"{math.ceil(seconds / 60)} min"


# --- the whole plan


def plan(hostvars: Mapping[str, Mapping[str, Any]], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The batches, what is wrong with them, the seconds to expect on each host, and all of it in lines.

    `asked` has the act, the order of the hosts, what `serial` says, the hosts that serve, those of them that are dead, and the gateways. Each host
    has said as `__turn_planned` which instances leave, which are out already, and the seconds.
    """
    order = list(asked["order"])
    said = {host: hostvars[host]["__turn_planned"] for host in order}
    taken = batches(order, asked["serial"])
    leaving = {host: list(one["leaving"]) for host, one in said.items()}
    seconds = {host: one["seconds"] for host, one in said.items()}
    out = {f"{name}@{host}": why for host, one in said.items() for name, why in one["out"].items()}
    serving = list(asked["hosts"])
    out |= {
        one.id: "its host cannot be reached"
        for one in fleet.instances(hostvars, [h for h in asked["dead"] if h in serving])
    }
    return {
        "batches": taken,
        "problems": problems(hostvars, serving, asked["gateways"], taken, leaving, out),
        "seconds": seconds,
        "lines": plan_lines(asked["act"], taken, leaving, seconds),
    }


def host_part(
    instances: Sequence[Mapping[str, Any]], names: Sequence[str], turns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a host says to the plan: by the findings of vllm_look, the instances that are meant, and what it remembers.

    Those on which a person spoke stay as that person wants it: they are out already, and no turn puts them back.
    """
    found = {one["name"]: one for one in instances}
    out = {
        name: f"{one['word']['operator']} by {one['word']['by'] or 'somebody'}"
        for name, one in found.items()
        if one["word"]["operator"] != "up"
    }
    leaving = [name for name in names if name in found and (name not in out or found[name]["word"]["turn"])]
    starts = [found[name].get("start_seconds") for name in leaving]
    as_asked = {name: asked_as(found[name]) for name in leaving}
    return {"leaving": leaving, "out": out, "seconds": expected(turns, starts), "as_asked": as_asked}


def asked_as(instance: Mapping[str, Any]) -> list[Any]:
    """What a gateway has to know of an instance: its port, and the name of its model."""
    return [instance.get("port"), (instance.get("gate") or {}).get("model")]


def moved(
    instances: Sequence[Mapping[str, Any]], names: Sequence[str], before: Mapping[str, Sequence[Any]]
) -> list[str]:
    """Those with another port or model than when the turn was planned: no gateway finds them before it has heard of it, later in the run."""
    return [
        one["name"]
        for one in instances
        if one["name"] in names and list(before.get(one["name"], asked_as(one))) != asked_as(one)
    ]


# --- in words


def plan_lines(
    act: str, taken: Sequence[Sequence[str]], leaving: Mapping[str, Sequence[str]], seconds: Mapping[str, float | None]
) -> list[str]:
    """The plan, a line for each host."""
    hosts = [host for batch in taken for host in batch]
    guessed = filled(seconds)
    width = max(map(len, hosts), default=0)
    lines = [
        f"{act}: {len(hosts)} host{'s' if len(hosts) != 1 else ''} in {len(taken)} batch{'es' if len(taken) != 1 else ''}"
    ]
    for number, batch in enumerate(taken, 1):
        for host in batch:
            names = ", ".join(leaving.get(host, [])) or "nothing that serves"
            about = guessed.get(host)
            time = "time unknown: no turn was made there yet" if about is None else f"about {minutes(about)} out of use"
            lines.append(f"  batch {number}  {host.ljust(width)}  {names}: {time}")
    each = [[guessed.get(host) for host in batch] for batch in taken]
    if hosts and not any(value is None for values in each for value in values):
        total = sum(max(value or 0.0 for value in values) for values in each)
        lines.append(f"  {minutes(total)} in all, requests that run longest not counted")
    return lines


def progress(
    host: str, taken: Sequence[Sequence[str]], seconds: Mapping[str, float | None], spent: Mapping[str, float]
) -> str:
    """How far it is, once the turn of a host is over; `spent` has the seconds of those that are done, this one among them."""
    hosts = [one for batch in taken for one in batch]
    number = hosts.index(host) + 1 if host in hosts else len(spent)
    said = f"host {number} of {len(hosts) or number} is back: {host}, {math.ceil(spent.get(host, 0))} s out of traffic"
    after = [one for batch in taken[number_of(taken, host) + 1 :] for one in batch]
    if not after:
        return said
    rest = left(taken, host, seconds, spent)
    return f"{said}; {len(after)} host{'s' if len(after) > 1 else ''} to come, about {minutes(rest)}"


def report_lines(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], act: str, check: bool = False
) -> list[str]:
    """What a playbook did, what it left, and what comes next."""
    done = {
        host: float(hostvars[host]["turn_seconds"]) for host in hosts if hostvars[host].get("turn_seconds") is not None
    }
    if check:
        return [
            "Nothing has been changed (--check). The plan above says what would be; where there is none, nothing that serves would be restarted."
        ]
    if not done:
        return [f"{act}: no host had a turn, since nothing that serves differs from what is wanted."]
    slowest = max(done, key=lambda host: done[host])
    lines = [
        f"{act}: {len(done)} host{'s' if len(done) > 1 else ''} changed, each out of traffic for {minutes(done[slowest])} at most ({slowest})",
        *(f"  {host}: {math.ceil(seconds)} s" for host, seconds in done.items()),
    ]
    if act == "rollback":
        lines.append(
            "What went back is held: site.yml and upgrade.yml leave it. Next: mend the inventory, then playbooks/unhold.yml -e fleet_instance=NAME"
        )
    else:
        lines.append(
            "Next: playbooks/status.yml shows what runs; playbooks/rollback.yml -e fleet_instance=NAME goes back"
        )
    return lines
