"""Filters of the playbooks of an operator's verbs. Each is described in the file that has its name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, verbs
from ansible_collections.gpufleet.llm.plugins.plugin_utils import specs


def verb_problems(hostvars: fleet.HostVars, hosts: Sequence[str], asked: Mapping[str, Any]) -> list[str]:
    """What is wrong with what was asked for on the command line."""
    try:
        return verbs.asked_problems(hostvars, hosts, asked)
    except specs.UNREADABLE as error:
        return [specs.unreadable("vllm_instances", (), error)]


def verb_instances(instances: Sequence[Mapping[str, Any]], wanted: str = "") -> list[str]:
    """The names of a host's instances that are meant: the one that is wanted, or all."""
    return [name for name in verbs.names_of({"vllm_instances": instances}) if wanted in ("", name)]


def verb_backends(hostvars: fleet.HostVars, hosts: Sequence[str], wanted: str = "") -> list[str]:
    """The backends that are meant on these hosts, such as `chat@gpu-1`."""
    return [
        f"{name}@{host}"
        for host in hosts
        for name in verb_instances(hostvars[host].get("vllm_instances") or [], wanted)
    ]


def verb_minimum_problems(
    gateways: Iterable[Mapping[str, Any]], leaving: Iterable[str], at_least: int = 0
) -> list[str]:
    """The routes that would fall below min_available."""
    return verbs.minimum_problems(verbs.readable(gateways), leaving, int(at_least))


def verb_report(
    hosts: Mapping[str, Mapping[str, Any] | None], verb: str, asked: Mapping[str, Any], notes: Mapping[str, Any]
) -> list[str]:
    """What a verb did, what it left, and the next command."""
    return verbs.report(verb, hosts, asked, notes)


def verb_reboot_report(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], asked: Mapping[str, Any]
) -> list[str]:
    """What became of hosts that were to be rebooted."""
    return verbs.reboot_report(hostvars, hosts, asked)


def verify_rows(rows: Sequence[Mapping[str, str]], told: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, str]]:
    """What was found of an endpoint, where what operators stopped is no failure."""
    [*found] = verbs.readable(told).values()
    return verbs.excused(rows, found[0] if found else {})


def verb_log(
    result: Mapping[str, Any], hostvars: Mapping[str, Mapping[str, Any]], host: str, headed: bool = False
) -> str:
    """What a unit said, the oldest line first, without what the host has in variables that are secret."""
    found: set[str] = set()
    for spec in (specs.fleet(), *specs.roles().values()):
        for name, entry in spec.items():
            with contextlib.suppress(*specs.UNREADABLE):
                if name in hostvars[host]:
                    found.update(verbs.secrets(hostvars[host][name], entry))
    lines = list(reversed(result.get("stdout_lines") or [])) or [str(result.get("stderr") or "(nothing)")]
    head = [f"== {result['item']} on {host}"] if headed else []
    return verbs.masked("\n".join([*head, *lines]), found) + "\n"


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        functions = (
            verb_problems,
            verb_instances,
            verb_backends,
            verb_minimum_problems,
            verb_report,
            verb_reboot_report,
            verify_rows,
            verb_log,
        )
        return {function.__name__: function for function in functions}
