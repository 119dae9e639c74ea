"""Filters of the role firewall. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import firewall, fleet


def firewall_ruleset(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> str:
    """The file that nft loads."""
    try:
        return firewall.ruleset(hostvars, host, settings)
    except (fleet.FleetError, ValueError) as error:
        raise AnsibleFilterError(str(error)) from None


def firewall_problems(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the variables of the role."""
    return firewall.problems(hostvars, host, settings)


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {function.__name__: function for function in (firewall_ruleset, firewall_problems)}
