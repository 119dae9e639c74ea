# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What playbooks/uninstall.yml takes away on which host, what it refuses, and what it says at its end."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import verbs

# Without these a host is open, out of date or without its GPUs: they go only when somebody names them.
ONLY_BY_NAME = ("base", "firewall", "ssh_hardening", "nvidia_driver")
# Roles that cannot do without another one on the same host.
NEEDED_BY = {
    "fleet_authority": ("host_agent", "gateway"),
    "tls_certificate": ("gateway",),
    "gateway": ("virtual_address",),
    "host_agent": ("vllm",),
    "uv": ("model_store", "vllm"),
    "model_store": ("vllm",),
    "docker": ("nvidia_container_toolkit",),
}
# Packages that stay whoever brought them, with the reason.
ADMINISTERED = "the host is administered by it"
NEVER_REMOVED = {
    "chrony": "it keeps the clock, and may have taken the place of what did before; apt-get purge chrony removes it",
    **dict.fromkeys(
        ("dbus", "openssh-server", "python3", "python3-apt", "python3-minimal", "sudo", "systemd"), ADMINISTERED
    ),
}
# What no role has put on a host, and what a run leaves all the same.
EVERYWHERE = {
    "/var/log": "what the system and apt have logged; the journal ends by its own limits",
    "/var/lib/apt, /var/lib/ucf, /var/cache/apt and /var/cache/debconf": "package lists and what apt remembers",
    "~/.ansible": "Ansible's directory for what runs at the moment",
}
HELP = (
    "Nothing was named, and nothing has been changed. -e fleet_instance=chat removes an instance, -e uninstall_roles=gateway,tls_certificate roles, and "
    "-e uninstall_all=true all roles but "
    f"{', '.join(ONLY_BY_NAME[:-1])} and {ONLY_BY_NAME[-1]}, which go only by their names. --limit says on which hosts. Models stay unless "
    "-e uninstall_models=true, and the key of the fleet's authority unless -e uninstall_authority=true. --check --diff shows all that would go"
)


# --- before anything changes


def as_names(given: Any) -> list[str]:
    """The names of a list, which `-e` brings as one word with commas."""
    listed = given.replace(",", " ").split() if isinstance(given, str) else list(given or [])
    return [str(name) for name in listed]


def plan(table: Mapping[str, Any], asked: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """What goes from a host, and what follows.

    `gone` are the roles that go, the last one that came first, and `stay` those that stay; `others` has for each role that goes those among them that may
    use its tools, and `back` are those that the inventory brings back. `instances` says whether instances go before, and `ends` whether the service ends
    with that, so that there is no route that they could be missed by.

    `table` says in the order of the roles whether the inventory gives each to the host, `hosts` are those of the run; `asked` has the `instance`, the
    `roles` that were named, whether `all` go, and the `gateways` of the inventory. A role that is asked for goes, whatever the inventory says by now:
    what was never there is not found.
    """
    named = as_names(asked.get("roles"))
    order = list(table)
    gone = [role for role in order if role in named or (asked.get("all") and role not in ONLY_BY_NAME)]
    stay = [role for role in order if table[role] and role not in gone]
    return {
        "gone": gone[::-1],
        "stay": stay,
        "others": {role: [other for other in later(order, role) if other in stay] for role in gone},
        "back": [role for role, wanted in table.items() if wanted and role in gone],
        "instances": bool(asked.get("instance")) or "vllm" in gone,
        "ends": "gateway" in gone and all(gateway in hosts for gateway in asked["gateways"]),
    }


def later(order: Sequence[str], role: str) -> list[str]:
    """The roles that may use what a role has brought: those before it have brought their tools themselves."""
    return [other for other in order[order.index(role) + 1 :] if other not in ONLY_BY_NAME]


def problems(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], roles: Iterable[str], asked: Mapping[str, Any]
) -> list[str]:
    """What is wrong with what was asked for.

    `hosts` are those of the run, `roles` all that there are; `asked` has the `instance`, the `roles`, `all`, `models`, the `authority`, whether it is
    `forced`, the `limit`, and the hosts of the inventory that `serve` and that are `gateways`.
    """
    known, named = list(roles), as_names(asked.get("roles"))
    found = []
    for name in named:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            found.append(
                f"uninstall_roles has {name!r}, which is no role{f'; did you mean {close[0]}?' if close else ''}. There are {', '.join(known)}"
            )
    if asked.get("instance") and (named or asked.get("all")):
        found.append(
            "fleet_instance removes one instance, uninstall_roles and uninstall_all whole roles; say one or the other"
        )
    if not (asked.get("instance") or named or asked.get("all")):
        found.append(HELP)
    if asked.get("instance") and asked.get("models"):
        found.append(
            "uninstall_models goes with the role model_store; the models of an instance go when model_store_models has them no more"
        )
    here = [host for host in hosts if host in {*asked["serve"], *asked["gateways"]}]
    if asked.get("authority") and (
        others := [host for host in dict.fromkeys((*asked["gateways"], *asked["serve"])) if host not in hosts]
    ):
        found.append(
            f"uninstall_authority would take the authority from under {', '.join(others)}, which this run leaves. Take all hosts off, or leave it out"
        )
    if asked.get("instance"):
        here = [host for host in here if host in asked["serve"]]
    if not here:
        limit = f" (--limit {asked['limit']})" if asked.get("limit") else ""
        found.append(f"no host of the fleet that this is about is left in this run{limit}")
    return found or last_gateway(hostvars, hosts, named, asked)


def last_gateway(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], named: Sequence[str], asked: Mapping[str, Any]
) -> list[str]:
    """Whether inference hosts would be left without any gateway."""
    if not (asked.get("all") or "gateway" in named) or asked.get("forced"):
        return []
    gateways = [host for host in asked["gateways"] if host not in hosts]
    serving = [host for host in asked["serve"] if verbs.names_of(hostvars[host])]
    if asked.get("all") or "vllm" in named:
        serving = [host for host in serving if host not in hosts]
    leaving = [host for host in asked["gateways"] if host in hosts]
    if gateways or not serving or not leaving:
        return []
    return [
        f"{', '.join(leaving)} {'is' if len(leaving) == 1 else 'are'} the last of the gateways, and {', '.join(serving)} would serve nobody any more. Nothing "
        "has been changed. When that is what you want: -e drain_force=true"
    ]


def host_problems(host: str, planned: Mapping[str, Any]) -> list[str]:
    """Roles that stay on a host and cannot do without one that would go."""
    found = []
    for role in planned["gone"]:
        if role not in planned["back"]:
            continue
        if users := [user for user in NEEDED_BY.get(role, ()) if user in planned["stay"]]:
            found.append(
                f"{' and '.join(users)} on {host} cannot do without {role}. Name {'it' if len(users) == 1 else 'them'} as well, or leave {role} out"
            )
    return found


# --- packages


def simulated(output: str) -> list[str]:
    """The packages that apt-get would remove, from what it says with --simulate."""
    return re.findall(r"^(?:Remv|Purg) (\S+)", output, re.MULTILINE)


def packages(
    brought: Sequence[str],
    there: Iterable[str],
    own: Sequence[str],
    shared: bool,
    removal: Callable[[Sequence[str], bool], list[str]],
) -> tuple[list[str], dict[str, str]]:
    """The packages that go, and those that stay with the reason.

    `brought` are those that the role installed, and `there` all that are installed. Of what a role brought, its `own` packages go, with what came along
    and nobody else needs; the tools that other roles use as well only when no role is left that could (`shared`). `removal` says what apt would
    remove with some packages: what cannot do without them, and on request what was installed for them alone.
    """
    installed = set(there)
    mine = {name for name in brought if name in installed}
    stays = {name: NEVER_REMOVED[name] for name in sorted(mine & NEVER_REMOVED.keys())}
    going = {name for name in mine if name in own or not shared} - stays.keys()
    going |= (set(removal(sorted(going), True)) & mine) - stays.keys() if going else set()
    if going and set(removal(sorted(going), False)) - going:
        needs = {name: set(removal([name], False)) for name in sorted(going)}
        while blocked := {name: needs[name] - going for name in going if needs[name] - going}:
            going -= blocked.keys()
            stays |= {name: f"{', '.join(sorted(others))} cannot do without it" for name, others in blocked.items()}
    for name in sorted(mine - going):
        stays.setdefault(name, "other roles on the host may use it; it goes with the last of them")
    for name in own:
        if name in installed and name not in brought:
            stays[name] = (
                "it was there before the role, or the role came before the fleet noted what it brings; apt-get purge removes it"
            )
    return sorted(going), stays


# --- at the end


def report(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], asked: Mapping[str, Any]) -> list[str]:
    """What went, what is left and why, and what comes next.

    Each host has the results of M(gpufleet.llm.uninstall) by role, and the instances that went. `asked` has the `instance`, the hosts of the
    inventory that `serve`, and whether the run only looked (`check`).
    """
    lines, went = [], "would be removed (--check)" if asked.get("check") else "removed"
    for host in hosts:
        told = hostvars[host]
        if asked.get("instance") and host not in asked["serve"]:
            continue
        if not told.get("uninstall_done"):
            lines.append(f"{host}: not done, see above. Once that is settled, run it again: it goes on where it was")
            continue
        results: Mapping[str, Mapping[str, Any]] = told.get("uninstall_results") or {}
        gone = [f"instance {name}" for name in told.get("vllm_uninstalled_instances") or []]
        gone += [role for role, result in results.items() if result.get("removed")]
        lines.append(f"{host}: {went}: {', '.join(gone)}" if gone else f"{host}: nothing of it was there")
        left: dict[str, str] = {}
        for result in results.values():
            for one in result.get("kept") or []:
                left[one["what"]] = "; ".join(filter(None, (left.get(one["what"]), one["why"])))
        lines += [f"{host}: left: {what} ({why})" for what, why in left.items()]
        if back := [role for role in told["uninstall_planned"]["back"] if role in results]:
            lines.append(f"{host}: site.yml brings back {', '.join(back)} while the inventory says so")
        if asked.get("instance") in verbs.names_of(told):
            lines.append(f"{host}: site.yml brings back instance {asked['instance']} while vllm_instances has it")
    if any(
        hostvars[host].get("uninstall_results") or hostvars[host].get("vllm_uninstalled_instances") for host in hosts
    ):
        lines.append(
            "next: take what is gone out of the inventory, and run site.yml: gateways and firewalls of the other hosts forget it then"
        )
    if any(hostvars[host].get("uninstall_results") for host in hosts):
        lines += [f"every host: left: {what} ({why})" for what, why in EVERYWHERE.items()]
    return lines
