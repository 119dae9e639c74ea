# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The status of the fleet: what its hosts said as one document, what is not well in it, and what to do about that.

Decides only, on the controller. Hosts are looked at by fleet_status_host.py, the document is shown by fleet_status_table.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "gpufleet.llm.fleet_status"
# Raised when a field changes its meaning or goes away; further fields may come without that.
VERSION = 1

DAY = 86400
# A gateway asks the agent of a host every second, the checks of a gateway write every five.
SILENT_SECONDS = 30
STALE_SECONDS = 30
WATCHER_SECONDS = 300
# Certificates are renewed long before: one that ends so soon is not renewed by itself any more.
CERTIFICATE_DAYS = 14
# The authority of the fleet is renewed years before; of one that was given, somebody has to bring another certificate.
AUTHORITY_DAYS = 90
DISK_FULL = 0.95
CLOCK_SECONDS = 10
# A restart by systemd so recently is a crash that somebody should know of.
RESTART_SECONDS = 3600
# By then an engine has its model loaded; before that it may refuse connections.
START_SECONDS = 1800

# With more of them than this, those that are named first are told.
MOST_REASONS = 4
SSH_NAMES = re.compile(
    r"Data could not be sent to remote host \S+ Make sure this host can be reached over ssh: |ssh: (connect to host \S+ port \d+: )?"
)

CERTIFICATES = {
    "tls": "certificate for clients",
    "fleet": "certificate of the fleet",
    "authority": "authority of the fleet",
}
Document = dict[str, Any]


@dataclass
class Finding:
    """Something that a person should know of some hosts: one sentence, and one command. `{hosts}` in the command stands for their names."""

    rank: int
    what: str
    do: str
    hosts: list[str] = field(default_factory=list)
    instance: str = ""

    def told(self) -> dict[str, Any]:
        """As the document has it."""
        return {
            "hosts": self.hosts,
            "instance": self.instance or None,
            "what": self.what,
            "do": self.do.replace("{hosts}", ",".join(self.hosts)),
        }


def span(seconds: float) -> str:
    """A length of time in a word or two."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * DAY:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / DAY:.0f} d"


def clock(seconds: float) -> str:
    """A moment, for people."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def listed(names: Sequence[str]) -> str:
    """Names as a part of a sentence."""
    return ", ".join(names)


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


# --- the document


def document(
    found: Mapping[str, Mapping[str, Any]],
    inventory: Mapping[str, Mapping[str, Any]],
    now: float,
    compared: Mapping[str, Mapping[str, str]] | None = None,
) -> Document:
    """What all hosts said. `inventory` has the C(roles) of each and the names of its C(instances); `compared`, how they stand to it."""
    hosts = {name: host_of(found.get(name, {}), wanted, now) for name, wanted in inventory.items()}
    for name, host in hosts.items():
        for instance in host["instances"]:
            instance["inventory"] = (compared or {}).get(name, {}).get(instance["name"])
    join(hosts)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        "hosts": hosts,
    }


def host_of(found: Mapping[str, Any], wanted: Mapping[str, Any], now: float) -> dict[str, Any]:
    """A host as the document has it."""
    status = found.get("status")
    base = {
        "roles": list(wanted.get("roles") or []),
        "reached": bool(status),
        "why": None if status else str(found.get("why") or found.get("msg") or "it was not asked"),
        "wanted": list(wanted.get("instances") or []),
    }
    if not status:
        return {**base, "instances": [], "gateway": None}
    host = {key: value for key, value in status.items() if key != "certificates"}
    ends = {**(status.get("certificates") or {}), **((status.get("gateway") or {}).get("certificates") or {})}
    gateway = status.get("gateway")
    return {
        **base,
        **host,
        "gateway": {key: value for key, value in gateway.items() if key != "certificates"} if gateway else None,
        "clock_ahead_seconds": round(status["time"] - float(found.get("asked_at") or now), 1),
        "certificates": {
            name: {"not_after": int(end), "days_left": int((end - now) // DAY)} for name, end in ends.items() if end
        },
        "instances": [instance_of(one) for one in status["instances"]],
    }


def instance_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """An instance as the document has it. What a gateway said that has fallen silent since says nothing of now."""
    heard = {name: said["silent_seconds"] for name, said in found["gateways"].items()}
    told = {
        name: {
            "use": "unknown" if said["silent_seconds"] > SILENT_SECONDS else said["use"],
            "why": said["why"],
            "in_flight": said["in_flight"],
        }
        for name, said in found["gateways"].items()
    }
    return {**found, "gateways": told, "heard_seconds": heard}


def gateways(hosts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The gateways that said something, by the name of their host."""
    return {name: host["gateway"] for name, host in hosts.items() if host["gateway"]}


def join(hosts: Mapping[str, dict[str, Any]]) -> None:
    """What gateways say themselves counts for more than what hosts heard of them, and is all that there is of a host that does not answer."""
    for name, gateway in gateways(hosts).items():
        for backend, said in gateway["backends"].items():
            instance, _, host = backend.partition("@")
            if host not in hosts:
                continue
            use = "kept" if said["use"] and said["kept"] else "in" if said["use"] else "out"
            told = {"use": use, "why": said["why"], "in_flight": said["in_flight"]}
            there = [one for one in hosts[host]["instances"] if one["name"] == instance]
            if not there and not hosts[host]["reached"]:
                there = [{"name": instance, "gateways": {}, "unknown": True}]
                hosts[host]["instances"].append(there[0])
            for one in there:
                one["gateways"] = {**one["gateways"], name: told}


# --- what is not well


class Judge:
    """Finds what is not well. `command` makes the command line of a playbook: (name, arguments) -> text."""

    def __init__(self, told: Document, now: float, command: Callable[[str, str], str]) -> None:
        self.hosts: dict[str, dict[str, Any]] = told["hosts"]
        self.now = now
        self.command = command
        self.reached = {name: host for name, host in self.hosts.items() if host["reached"]}
        self.gateways = gateways(self.hosts)

    def problems(self) -> list[Finding]:
        """What is not well, the worst first."""
        return merged([*self.unreachable(), *self.routes(), *self.instances(), *self.services(), *self.machines()])

    def notes(self) -> list[Finding]:
        """What is as somebody wants it, and may surprise somebody else."""
        return merged(self.on_purpose())

    def instance_command(self, playbook: str, instance: str, more: str = "") -> str:
        """A command on one instance of some hosts."""
        return self.command(playbook, f"--limit {{hosts}} -e fleet_instance={instance}{more}")

    # Hosts

    def unreachable(self) -> Iterator[Finding]:
        """All of them in one sentence: on a bad night half of the fleet is in it."""
        down = [name for name, host in self.hosts.items() if not host["reached"]]
        if not down:
            return
        whys: dict[str, list[str]] = {}
        for name in down:
            whys.setdefault(short(self.hosts[name]["why"]), []).append(name)
        why = "; ".join(f"{listed(names)}: {reason}" for reason, names in list(whys.items())[:MOST_REASONS])
        why = next(iter(whys)) if len(whys) == 1 else why
        what = f"cannot be reached: {len(down)} of {count(len(self.hosts), 'host')} ({why})"
        yield Finding(0, what, "ansible {hosts} -m ansible.builtin.ping" + self.command("", ""), down)

    # Routes and gateways

    def routes(self) -> Iterator[Finding]:
        """A route without a backend is an outage, whatever its cause."""
        for name, gateway in self.gateways.items():
            for route in gateway["routes"]:
                if route["backends"] and not route["used"] and gateway["backends"]:
                    yield Finding(
                        1,
                        f"the route {route['model']} has no backend in use: its clients get 503",
                        self.command("verify", "--limit {hosts}"),
                        [name],
                    )

    def services(self) -> Iterator[Finding]:
        """What runs beside the instances."""
        for name, host in self.reached.items():
            units = host["units"]
            expected = ["vllm-fleet-agent.service"] if host["agent"] else []
            if host["gateway"]:
                expected += ["nginx.service", "vllm-gateway-checks.service"]
            wrong = {unit: units.get(unit, "not there") for unit in expected if units and units.get(unit) != "active"}
            wrong.update({unit: state for unit, state in units.items() if state == "failed"})
            for unit, state in wrong.items():
                short_name = unit.removesuffix(".service")
                yield Finding(3, f"{short_name} is {state}", remote(f"journalctl -u {short_name} -n 50"), [name])
            if host["gateway"]:
                yield from self.gateway(name, host["gateway"], wrong)
            elif "gateway" in host["roles"]:
                yield Finding(
                    3,
                    "is a gateway of the inventory, and has no configuration of one",
                    self.command("site", "--limit {hosts}"),
                    [name],
                )
        common = {gateway["configuration_common"] for gateway in self.gateways.values()}
        if len(common) > 1:
            yield Finding(
                3,
                "these gateways were told different routes, clients or backends",
                self.command("site", "--limit {hosts} --tags gateway"),
                list(self.gateways),
            )

    def gateway(self, name: str, gateway: Mapping[str, Any], wrong: Mapping[str, str]) -> Iterator[Finding]:
        """How a gateway does its work."""
        age = gateway["state_age_seconds"]
        if age is None:
            yield Finding(
                3,
                "its checks have said nothing yet: every backend is used",
                remote("journalctl -u vllm-gateway-checks -n 50"),
                [name],
            )
        elif age > STALE_SECONDS and "vllm-gateway-checks.service" not in wrong:
            yield Finding(
                3,
                f"its checks have written nothing for {span(age)}: backends are used as they said last",
                remote("journalctl -u vllm-gateway-checks -n 50"),
                [name],
            )
        if not gateway["answers"] and "nginx.service" not in wrong:
            yield Finding(3, "Nginx does not answer on its socket", remote("journalctl -u nginx -n 50"), [name])
        used = gateway["configuration_used"]
        if used and used != gateway["configuration"]:
            yield Finding(
                3,
                f"Nginx works with the configuration {used}, the file has {gateway['configuration']}",
                remote("nginx -t"),
                [name],
            )

    # Instances

    def instances(self) -> Iterator[Finding]:
        """Each instance: the first of its own problems that explains the others, and what gateways say where it has none."""
        for name, host in self.hosts.items():
            there = {one["name"] for one in host["instances"]}
            if host["reached"] and "instances" not in host["missing"]:
                for wanted in host["wanted"]:
                    if wanted not in there:
                        yield Finding(
                            2,
                            "is in the inventory and not on the host",
                            self.command("site", "--limit {hosts}"),
                            [name],
                            wanted,
                        )
            for one in host["instances"]:
                if not one.get("unknown"):
                    yield from self.instance(name, host, one)

    def instance(self, name: str, host: Mapping[str, Any], one: Mapping[str, Any]) -> Iterator[Finding]:
        """What is not well with an instance."""
        called, busy = one["name"], bool(host["lease"])
        # what the watch of the host found in a running engine explains the rest, and has a line of its own
        watched = one["unit"]["active"] == "active" and any(
            called in found["instances"] and found["key"].endswith(f" {called}") for found in host["health"]
        )
        own = None if watched else self.first_problem(host, one)
        if own:
            yield Finding(2, *own, [name], called)
        word = one["word"]
        if word["turn"] and not busy:
            yield Finding(
                2,
                f"was left {word['operator']}{limited(word)} by a turn ({word['turn']}) that is over",
                self.turn_command(word["turn"], called),
                [name],
                called,
            )
        kept = [gateway for gateway, said in one["gateways"].items() if said["use"] == "kept"]
        if kept:
            yield Finding(
                2,
                f"wants out and is kept in use by {listed(kept)}: {one['gateways'][kept[0]]['why'] or 'no reason given'}",
                self.instance_command("undrain", called),
                [name],
                called,
            )
        if own or watched or word["operator"] != "up" or one["leaving"]:
            return
        out = [gateway for gateway, said in one["gateways"].items() if said["use"] == "out"]
        if out:
            why = one["gateways"][out[0]]["why"]
            yield Finding(
                4,
                f"is not used by {listed(out)}{f': {why}' if why else ''}",
                self.instance_command("logs", called),
                [name],
                called,
            )

    def turn_command(self, turn: str, instance: str) -> str:
        """How a turn that died is gone on with."""
        if turn in ("upgrade", "site"):
            return self.command(turn, "--limit {hosts}")
        return self.instance_command(turn, instance)

    def first_problem(self, host: Mapping[str, Any], one: Mapping[str, Any]) -> tuple[str, str] | None:
        """The problem of an instance itself, and the command."""
        called, unit, start = one["name"], one["unit"], one["start"]
        logs = self.instance_command("logs", called)
        age = self.now - start["at"] if start else None
        if unit["active"] is None:
            return None if "units" in host["missing"] else ("has no unit", self.command("site", "--limit {hosts}"))
        if one["generation"] is None:
            return None if host["lease"] else ("has no generation to run", self.command("site", "--limit {hosts}"))
        if one["word"]["operator"] == "stopped":
            return None
        if unit["active"] == "failed":
            return f"has failed ({unit['result'] or 'no result'})", logs
        if unit["active"] == "inactive":
            return (
                None
                if host["lease"]
                else ("does not run, and nobody said that it should be stopped", self.instance_command("start", called))
            )
        if unit["active"] == "activating" and unit["sub"] == "auto-restart":
            return f"ends as soon as it starts ({unit['result']}, restart {unit['restarts']})", logs
        metrics = one["metrics"]
        if metrics and metrics.get("why"):
            # it does not listen before it has loaded its model; one that listens and says nothing is another matter
            if age is not None and age < START_SECONDS and not metrics["listens"]:
                return f"was started {span(age)} ago and does not answer yet: {metrics['why']}", logs
            return f"runs and does not tell its metrics: {metrics['why']}", self.instance_command("restart", called)
        if start and start["kind"] == "restart" and age is not None and age < RESTART_SECONDS:
            return (
                f"ended by itself and was started again by systemd {span(age)} ago (restart {unit['restarts']})",
                logs,
            )
        current, runs = one["generation"], one["running_generation"]
        if host["lease"]:
            return None  # it is being changed
        if runs is not None and runs != current:
            return f"runs generation {runs} while {current} is the current one", self.command("site", "--limit {hosts}")
        if not one["confirmed"]:
            return f"has generation {current}, which never answered", self.command("site", "--limit {hosts}")
        if one.get("inventory") == "differs" and not one["held"]:
            return "differs from the inventory", self.command("site", "--limit {hosts} --check --diff")
        return None

    # Machines

    def machines(self) -> Iterator[Finding]:
        """What the host itself has."""
        for name, host in self.reached.items():
            for one in host["health"]:
                rank = 2 if one["level"] == "critical" else 4
                about = one["instances"][0] if len(one["instances"]) == 1 else ""
                yield Finding(rank, one["what"], one["do"] or remote("vllm-fleet health"), [name], about)
            age = host["health_age_seconds"]
            if age is not None and age > WATCHER_SECONDS:
                yield Finding(
                    4,
                    f"its watch has written nothing for {span(age)}",
                    remote("journalctl -u vllm-fleet-watch -n 50"),
                    [name],
                )
            yield from self.machine_gpus(name, host)
            yield from self.silent_gateways(name, host)
            for certificate, told in host["certificates"].items():
                if told["days_left"] < (AUTHORITY_DAYS if certificate == "authority" else CERTIFICATE_DAYS):
                    days = told["days_left"]
                    ends = "has expired" if days < 0 else f"ends in {count(days, 'day')}"
                    yield Finding(
                        4,
                        f"its {CERTIFICATES.get(certificate, certificate)} {ends}",
                        self.command("site", "--limit {hosts}"),
                        [name],
                    )
            known = {one["key"] for one in host["health"]}
            for disk in host["disks"]:
                if f"disk {disk['path']}" in known:
                    continue
                used = 1 - disk["free_bytes"] / disk["size_bytes"]
                if used >= DISK_FULL:
                    yield Finding(
                        4,
                        f"the disk of {disk['path']} is {used:.0%} full ({disk['free_bytes'] / 1e9:.1f} GB free)",
                        remote(f"du -xh --max-depth=2 {disk['path']} | sort -h | tail"),
                        [name],
                    )
            if abs(host["clock_ahead_seconds"]) > CLOCK_SECONDS:
                ahead = host["clock_ahead_seconds"]
                yield Finding(
                    4,
                    f"its clock is {span(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the controller's",
                    remote("timedatectl timesync-status"),
                    [name],
                )
            for part, why in host["missing"].items():
                if part != "gpus":
                    yield Finding(5, f"{part} could not be looked at: {why}", remote("systemctl --failed"), [name])

    def machine_gpus(self, name: str, host: Mapping[str, Any]) -> Iterator[Finding]:
        """GPUs that do not answer, or that an instance has and the driver has not."""
        if "gpus" in host["missing"]:
            if any(one["key"] == "smi" for one in host["health"]):
                return
            yield Finding(
                2, f"its GPUs do not answer: {host['missing']['gpus']}", remote("dmesg | grep -i xid"), [name]
            )
            return
        seen = {gpu["index"] for gpu in host["gpus"]}
        for one in host["instances"]:
            lost = [str(gpu) for gpu in one["gpus"] if gpu not in seen]
            if lost and one["word"]["operator"] != "stopped":
                yield Finding(
                    2,
                    f"uses GPU {listed(lost)}, which nvidia-smi does not list",
                    remote("nvidia-smi -L"),
                    [name],
                    one["name"],
                )

    def silent_gateways(self, name: str, host: Mapping[str, Any]) -> Iterator[Finding]:
        """Gateways that do not ask this host: those that are down have a line of their own."""
        known = (host["agent"] or {}).get("gateways") or []
        there = [gateway for gateway in known if gateway in self.reached]
        if not host["instances"]:
            return
        heard: dict[str, float] = {}
        for one in host["instances"]:
            for gateway, age in one["heard_seconds"].items():
                heard[gateway] = min(age, heard.get(gateway, age))
        silent = [gateway for gateway in there if heard.get(gateway, SILENT_SECONDS + 1) > SILENT_SECONDS]
        if silent and self.reached[name]["units"].get("vllm-fleet-agent.service") == "active":
            yield Finding(
                3,
                f"is not asked by {listed(silent)}: what is said of its instances does not arrive there",
                remote("journalctl -u vllm-gateway-checks -n 50", silent[0]),
                [name],
            )

    # On purpose

    def on_purpose(self) -> Iterator[Finding]:
        """Words, holds, silences, leases, and what waits for a good moment."""
        for name, host in self.reached.items():
            lease = host["lease"]
            if lease:
                yield Finding(
                    0,
                    f"is being changed by {holder(lease)}",
                    self.command("site", "-e fleet_break_lease=true") + "  (only if that run is over)",
                    [name],
                )
            for one in host["instances"]:
                word, called = one["word"], one["name"]
                if word["operator"] != "up" and not (word["turn"] and not lease):
                    yield Finding(
                        1,
                        f"is {spoken(word)}",
                        self.instance_command("undrain" if word["operator"] == "drained" else "start", called),
                        [name],
                        called,
                    )
                if one["held"]:
                    yield Finding(2, f"is held: {one['held']}", self.instance_command("unhold", called), [name], called)
            if host["silence"]:
                told = host["silence"]
                by = f" by {told['by']}" if told["by"] else ""
                by += f" ({told['turn']})" if told["turn"] else ""
                yield Finding(
                    3,
                    f"is silenced until {clock(told['until'])}{by}{': ' + told['reason'] if told['reason'] else ''}",
                    "",
                    [name],
                )
            if host["updates"].get("reboot_required"):
                yield Finding(
                    4,
                    "needs a reboot for updates that are installed",
                    self.command("reboot", "--limit {hosts}"),
                    [name],
                )
            if host["internal_keys"] > 1:
                yield Finding(5, "takes a former internal key as well", self.command("site", ""), [name])


def short(why: str) -> str:
    """Why a host is not reached, as far as one wants to read it at night: what differs from host to host goes."""
    text = why.removeprefix("Task failed: ").removeprefix("Failed to connect to the host via ssh: ")
    text = SSH_NAMES.sub("", text.removeprefix("fleet_status failed on the host: "))
    return text if len(text) <= 120 else f"{text[:120]}..."


def remote(command: str, host: str = "") -> str:
    """A command on the hosts of a finding; on several of them the first is the one to begin with."""
    return f"ssh {host or '{host}'} sudo {command}"


def holder(lease: Mapping[str, Any]) -> str:
    """Who has a lease."""
    if not lease["controller"]:
        return str(lease["who"])
    return f"{lease['who']} on {lease['controller']} (process {lease['pid']}), since {lease['since']} UTC"


def limited(word: Mapping[str, str]) -> str:
    """How few requests an instance gets that is up, as a part of a sentence."""
    return f" with {word['share']} % of the requests" if word["share"] else ""


def spoken(word: Mapping[str, str]) -> str:
    """The operator's word as a part of a sentence."""
    by = f" by {word['by']}" if word["by"] else ""
    turn = f" for a turn ({word['turn']})" if word["turn"] else ""
    since = f" since {word['since']}" if word["since"] else ""
    return f"{word['operator']}{by}{turn}{since}{': ' + word['reason'] if word['reason'] else ''}"


def merged(found: Iterable[Finding]) -> list[Finding]:
    """The same sentence about several hosts once, in the order of their rank."""
    together: dict[tuple[int, str, str, str], Finding] = {}
    for one in found:
        key = (one.rank, one.instance, one.what, one.do)
        if key in together:
            together[key].hosts += [name for name in one.hosts if name not in together[key].hosts]
        else:
            together[key] = one
    return sorted(
        (
            Finding(
                one.rank, one.what, one.do.replace("{host}", one.hosts[0] if one.hosts else ""), one.hosts, one.instance
            )
            for one in together.values()
        ),
        key=lambda one: one.rank,
    )


def judged(told: Document, now: float, command: Callable[[str, str], str]) -> Document:
    """The document with its problems and notes, and whether all is well."""
    judge = Judge(told, now, command)
    problems = [one.told() for one in judge.problems()]
    return {
        **{key: told[key] for key in ("schema", "version", "time")},
        "well": not problems,
        "problems": problems,
        "notes": [one.told() for one in judge.notes()],
        "hosts": told["hosts"],
    }
