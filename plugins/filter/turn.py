"""Filters of the role turn. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, turns


def turn_plan(hostvars: fleet.HostVars, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The batches of a rollout, what is wrong with them, and what they take."""
    try:
        return turns.plan(hostvars, asked)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def turn_host(
    instances: Sequence[Mapping[str, Any]], names: Sequence[str], memory: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a host says to the plan."""
    return turns.host_part(instances, names, memory)


def turn_moved(
    instances: Sequence[Mapping[str, Any]], names: Sequence[str], before: Mapping[str, Sequence[Any]]
) -> list[str]:
    """Those with another port or model than before."""
    return turns.moved(instances, names, before)


def turn_progress(
    host: str, batches: Sequence[Sequence[str]], seconds: Mapping[str, float | None], spent: Mapping[str, float]
) -> str:
    """How far a rollout is."""
    return turns.progress(host, batches, seconds, spent)


def turn_report(hostvars: fleet.HostVars, hosts: Sequence[str], act: str, check: bool = False) -> list[str]:
    """What a playbook did, what it left, and what comes next."""
    return turns.report_lines(hostvars, hosts, act, check)


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function for function in (turn_plan, turn_host, turn_moved, turn_progress, turn_report)
        }
