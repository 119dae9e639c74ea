# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters about the packages and the settings of a Docker engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import docker


def docker_plan(
    asked: Mapping[str, Any], installed: Mapping[str, str], available: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is to be installed, what stands in the way, and what is worth a word."""
    return docker.plan(asked, installed, available)


def docker_problems(asked: Mapping[str, Any], addresses: Sequence[Any]) -> list[str]:
    """What is wrong with the variables of the role docker."""
    return docker.problems(asked, [str(address) for address in addresses if address])


def docker_route_conflicts(look: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Networks that containers would get and the host reaches something else by."""
    return docker.route_conflicts(asked["address_pools"], asked["daemon_options"], look["routes"])


def docker_host_problems(look: Mapping[str, Any], host: str, take_over: bool, live_restore: bool) -> list[str]:
    """What stands in the way on the host."""
    found = []
    if look["flags"]:
        found.append(
            f"dockerd of {host} is started with {', '.join(look['flags'])} ({', '.join(look['flags_from']) or 'docker.service'}), which daemon.json says "
            "as well: it does not start with both. Take that out there, `systemctl daemon-reload`, and put what is needed into docker_daemon_options"
        )
    if look["foreign_keys"] and not take_over:
        keys = ", ".join(look["foreign_keys"])
        found.append(
            f"/etc/docker/daemon.json of {host} has {keys}, which this role would take out: it writes that file as a whole. Put what is needed into "
            "docker_daemon_options; docker_take_over: true drops the rest"
        )
    if look["swarm"] and live_restore:
        found.append(
            f"{host} is in a Docker swarm, which excludes live-restore; leave the swarm (`docker swarm leave`), or set docker_live_restore: false"
        )
    found += [
        f"{path} of {host} names the repository that this role writes a file for; take its entry out, other entries may stay"
        for path in look.get("apt", {}).get("mixed", [])
    ]
    return found


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function
            for function in (docker_plan, docker_problems, docker_host_problems, docker_route_conflicts)
        }
