"""Filters about the hosts of the fleet, for every role. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, inputs
from ansible_collections.gpufleet.llm.plugins.plugin_utils import specs


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


def backend_tls(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> bool:
    """Whether the instances of a host are to speak TLS."""
    try:
        return fleet.backend_tls(hostvars, host, gateways)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def bind_address_problems(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """Why it cannot be told where vLLM listens."""
    try:
        fleet.bind_address(hostvars, host, gateways)
    except fleet.FleetError as error:
        return [str(error)]
    return []


def fleet_variable_problems(hostvars: fleet.HostVars, hosts: Sequence[str]) -> list[str]:
    """What is wrong with the variables of hosts that are not contacted. What cannot be read without their facts is left out."""
    found: dict[str, list[str]] = {}
    for host in hosts:
        misspelt = [
            text for role, spec in specs.roles().items() for text in inputs.name_problems(role, spec, hostvars[host])
        ]
        for problem in misspelt + specs.problems(set(hostvars[host]), hostvars[host]):
            found.setdefault(problem, []).append(host)
    return [f"{', '.join(named)}: {problem}" for problem, named in sorted(found.items())]


def fleet_shared_problems(hostvars: fleet.HostVars, hosts: Sequence[str]) -> list[str]:
    """What is wrong with variables that plays read before a role has looked at its own."""
    return [
        problem if len(hosts) == 1 else f"{host}: {problem}"
        for host in hosts
        for problem in specs.shared(hostvars[host])
    ]


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function
            for function in (
                fleet_address,
                bind_address,
                backend_tls,
                bind_address_problems,
                fleet_variable_problems,
                fleet_shared_problems,
            )
        }
