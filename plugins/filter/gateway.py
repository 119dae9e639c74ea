"""Filters of the role gateway. Each is described in the file that has its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, model_kinds
from ansible_collections.gpufleet.llm.plugins.module_utils import gateway_fleet as data
from ansible_collections.gpufleet.llm.plugins.module_utils import gateway_problems as problems


def gateway_fleet(hostvars: fleet.HostVars, gateway: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What fleet.json of a gateway has."""
    try:
        return data.document(hostvars, gateway, asked)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def gateway_fleet_with_backends(
    present: Mapping[str, Any], hostvars: fleet.HostVars, hosts: Sequence[str], gateways: Sequence[str]
) -> dict[str, Any]:
    """What fleet.json of a gateway has, with the backends as the inventory has them now."""
    try:
        return data.with_backends(present, hostvars, hosts, gateways)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


def gateway_backends(
    hostvars: fleet.HostVars, instance: str, hosts: Sequence[str], gateways: Sequence[str]
) -> list[dict[str, str]]:
    """The backends of an instance, by id and endpoint."""
    try:
        found = fleet.backends(hostvars, instance, hosts, gateways)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None
    return [{"id": backend.id, "endpoint": backend.endpoint} for backend in found]


def gateway_rate_groups(clients: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct pairs of rate and burst, each with the names of its clients: Nginx wants one zone for each."""
    groups: dict[tuple[int, int], list[str]] = {}
    for client in map(fleet.Client.of, clients):
        groups.setdefault((client.requests_per_minute, client.burst), []).append(client.name)
    return [
        {"requests_per_minute": rate, "burst": most, "names": names} for (rate, most), names in sorted(groups.items())
    ]


def gateway_concurrency_groups(clients: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct concurrency limits, each with the names of its clients."""
    groups: dict[int, list[str]] = {}
    for client in map(fleet.Client.of, clients):
        groups.setdefault(client.concurrent_requests, []).append(client.name)
    return [{"concurrent_requests": most, "names": names} for most, names in sorted(groups.items())]


def gateway_client_problems(
    clients: Sequence[Mapping[str, Any]], routes: Sequence[Mapping[str, Any]], internal_key: str
) -> list[str]:
    """What is wrong with clients and who may what, in sentences that never hold a key."""
    return problems.client_problems(clients, internal_key, time.time()) + problems.access_problems(routes, clients)


def gateway_route_problems(
    hostvars: fleet.HostVars,
    routes: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    gateways: Sequence[str],
    group: str,
) -> list[str]:
    """Routes that lead nowhere, or of which nobody could tell which is meant."""
    there = problems.Fleet(hostvars, hosts, gateways)
    return [
        *problems.instance_problems(routes, there, group),
        *problems.name_problems(routes),
        *problems.balance_problems(routes, there),
    ]


def gateway_path_problems(
    hostvars: fleet.HostVars,
    routes: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    gateways: Sequence[str],
    paths: Sequence[str],
) -> list[str]:
    """Routes whose instances cannot have the paths, as far as their options say what they are for."""
    return problems.path_problems(routes, problems.Fleet(hostvars, hosts, gateways), paths)


def gateway_warnings(
    hostvars: fleet.HostVars,
    routes: Sequence[Mapping[str, Any]],
    clients: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    gateways: Sequence[str],
) -> list[str]:
    """What is allowed and may not be meant."""
    return problems.warnings(routes, clients, problems.Fleet(hostvars, hosts, gateways), time.time())


def gateway_path_methods(paths: Sequence[str]) -> dict[str, str]:
    """The method of each path that is let through."""
    return {path: model_kinds.methods().get(path, "POST") for path in paths}  # the argument spec tells what is none


def gateway_outside_problems(
    hostvars: fleet.HostVars, outside: Sequence[str], hosts: Sequence[str], gateways: Sequence[str], group: str
) -> list[str]:
    """Why gateways on which a run does not act could not be told their backends."""
    found = []
    for name in outside:
        routes = hostvars[name].get("gateway_routes") or []
        said = problems.instance_problems(routes, problems.Fleet(hostvars, hosts, gateways), group)
        if not routes:
            said = ["gateway_routes has no entry; a gateway has at least one"]
        elif not hostvars[name].get("gateway_server_names"):
            said.append("gateway_server_names must list the DNS names or IP addresses that clients use")
        found += [f"{name} (outside of --limit): {problem}" for problem in said]
    return found


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function
            for function in (
                gateway_fleet,
                gateway_fleet_with_backends,
                gateway_backends,
                gateway_rate_groups,
                gateway_concurrency_groups,
                gateway_client_problems,
                gateway_route_problems,
                gateway_path_methods,
                gateway_path_problems,
                gateway_warnings,
                gateway_outside_problems,
            )
        }
