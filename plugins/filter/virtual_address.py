"""Filters of the role virtual_address. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, virtual_address


def virtual_address_problems(
    hostvars: fleet.HostVars, host: str, gateways: Sequence[str], settings: Mapping[str, Any]
) -> list[str]:
    """What is wrong with the variables of the role."""
    return list(virtual_address.problems(hostvars, host, gateways, settings))


def virtual_address_host_problems(address: str, interfaces: Sequence[Mapping[str, Any]], asked: str) -> list[str]:
    """What of them the host says no to."""
    return virtual_address.host_problems(address, interfaces, asked)


def virtual_address_plan(
    hostvars: fleet.HostVars, host: str, gateways: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What keepalived is configured with."""
    others = [name for name in gateways if name != host]
    return {
        "router_id": virtual_address.router_id(settings["ip"], settings["router_id"]),
        "priority": virtual_address.priority(host, gateways),
        "own": fleet.fleet_address(hostvars, host),
        "others": [fleet.fleet_address(hostvars, name) for name in others],
        "interface": virtual_address.interface(settings["ip"], settings["interfaces"], settings["interface"]),
        "leaving": virtual_address.LEAVING,
        "silent": virtual_address.SILENT,
    }


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        functions = (virtual_address_problems, virtual_address_host_problems, virtual_address_plan)
        return {function.__name__: function for function in functions}
