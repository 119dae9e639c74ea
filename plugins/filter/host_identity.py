# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters of the roles fleet_authority and host_agent. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, host_identity


def host_certificate_names(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """What the certificate of a host is for."""
    try:
        return host_identity.names(hostvars, host, gateways)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def host_certificate_problems(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """Why a host cannot have a certificate."""
    return host_identity.problems(hostvars, host, gateways)


def host_agent_configuration(
    hostvars: fleet.HostVars, host: str, gateways: Sequence[str], monitoring: Sequence[str]
) -> dict[str, Any]:
    """What the agent of a host knows."""
    try:
        return host_identity.agent(hostvars, host, gateways, monitoring)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def host_agent_watched(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> dict[str, Any]:
    """What the watch of a host knows."""
    try:
        return host_identity.watched(hostvars, host, gateways)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def host_agent_problems(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """Why a host cannot have an agent."""
    return host_identity.agent_problems(hostvars, host, gateways)


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function
            for function in (
                host_certificate_names,
                host_certificate_problems,
                host_agent_configuration,
                host_agent_watched,
                host_agent_problems,
            )
        }
