# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters about the proxy of the fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, proxy
from jinja2 import UndefinedError

GROUPS = {"vllm_group": "vllm", "gateway_group": "gateway"}


def addresses(hostvars: fleet.HostVars) -> list[str]:
    """Where the hosts of the fleet are reached. One whose address cannot be told is reached by nobody."""
    found = []
    for host in hostvars:
        try:
            variables = hostvars[host]
            groups = {str(variables.get(name, usual)) for name, usual in GROUPS.items()}
            if groups & set(variables.get("group_names") or []):
                found.append(fleet.fleet_address(hostvars, host))
        except (fleet.FleetError, AnsibleError, UndefinedError):
            continue
    return found


def proxy_problems(asked: Any) -> list[str]:
    """What is wrong with fleet_proxy."""
    return proxy.problems(asked)


def proxy_environment(asked: Any, hostvars: fleet.HostVars, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a download: the fleet's proxy, and what a role's own variable says, which counts more."""
    return {**proxy.proxy(asked, addresses(hostvars)).environment(), **proxy.both_cases(own or {})}


def proxy_settings(asked: Any, hostvars: fleet.HostVars) -> dict[str, Any]:
    """The fleet's proxy as programs are configured with it."""
    found = proxy.proxy(asked, addresses(hostvars))
    docker = found.docker()
    return {"apt": found.apt() if docker else "", "docker": docker, "secret": found.secret()}


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {function.__name__: function for function in (proxy_problems, proxy_environment, proxy_settings)}
