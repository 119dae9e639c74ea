"""Filters about the hosts of the fleet, for every role. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet


def fleet_address(hostvars: fleet.HostVars, host: str) -> str:
    """The address at which a host is reached by the others."""
    try:
        return fleet.fleet_address(hostvars, host)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def bind_address(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> str:
    """The address that vLLM listens on."""
    try:
        return fleet.bind_address(hostvars, host, gateways)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def bind_address_problems(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """Why it cannot be told where vLLM listens."""
    try:
        fleet.bind_address(hostvars, host, gateways)
    except fleet.FleetError as error:
        return [str(error)]
    return []


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function
            for function in (
                fleet_address,
                bind_address,
                bind_address_problems,
            )
        }
