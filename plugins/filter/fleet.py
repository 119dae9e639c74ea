"""Filters about the hosts of the fleet, for every role. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError, AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, inputs
from jinja2 import UndefinedError

SPECS = "roles/*/meta/argument_specs.yml"


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


def fleet_variable_problems(hostvars: fleet.HostVars, hosts: Sequence[str]) -> list[str]:
    """What is wrong with the variables of hosts that are not contacted. What cannot be read without their facts is left out."""
    found: dict[str, list[str]] = {}
    for file in sorted(Path(__file__).resolve().parents[2].glob(SPECS)) if hosts else []:
        role, loaded = file.parents[1].name, yaml.safe_load(file.read_text())
        spec = loaded["argument_specs"]["main"].get("options") or {}
        for host in hosts:
            problems = inputs.name_problems(role, spec, hostvars[host])
            for name in set(spec) & set(hostvars[host]):
                try:
                    problems += inputs.value_problems(name, hostvars[host][name], spec[name])
                except (AnsibleError, UndefinedError):  # the second inside of a list or a dictionary
                    continue
            for problem in problems:
                found.setdefault(problem, []).append(host)
    return [f"{', '.join(named)}: {problem}" for problem, named in sorted(found.items())]


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
                fleet_variable_problems,
            )
        }
