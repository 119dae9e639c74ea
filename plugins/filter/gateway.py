"""Filters of the role gateway. Each is described in the file that has its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, gateway_client, model_kinds
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


def gateway_client_problems(
    clients: Sequence[Mapping[str, Any]], routes: Sequence[Mapping[str, Any]], internal_key: str
) -> list[str]:
    """What is wrong with clients and who may what, in sentences that never hold a key."""
    return problems.client_problems(clients, internal_key, time.time()) + problems.access_problems(routes, clients)


def gateway_proxy_problems(networks: Sequence[str]) -> list[str]:
    """Proxies that cannot be trusted, or are none."""
    return problems.proxy_problems(networks)


def gateway_origin_problems(origins: Sequence[str]) -> list[str]:
    """What no browser would send as the origin of a page."""
    return problems.origin_problems(origins)


def gateway_route_problems(
    hostvars: fleet.HostVars,
    routes: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    gateways: Sequence[str],
    group: str,
) -> list[str]:
    """Routes that lead nowhere, or of which nobody could tell which is meant."""
    there = problems.Fleet.of(hostvars, hosts, gateways)
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
    return problems.path_problems(routes, problems.Fleet.of(hostvars, hosts, gateways), paths)


def gateway_warnings(
    hostvars: fleet.HostVars,
    routes: Sequence[Mapping[str, Any]],
    clients: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    gateways: Sequence[str],
) -> list[str]:
    """What is allowed and may not be meant."""
    return problems.warnings(routes, clients, problems.Fleet.of(hostvars, hosts, gateways), time.time())


def gateway_asker(
    hostvars: fleet.HostVars,
    routes: Sequence[Mapping[str, Any]],
    clients: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    gateways: Sequence[str],
    wanted: str = "",
    paths: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The client as which the playbooks ask a gateway, with a key, and what it may ask for."""
    default_paths = model_kinds.open_paths() if paths is None else paths
    try:
        client = gateway_client.chosen(clients, wanted, time.time())
        seen = gateway_client.view(hostvars, routes, client, hosts, gateways, default_paths)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None
    models = dict.fromkeys(fleet.Route.of(route).model for route in routes)
    others = [model for model in models if model not in [entry["model"] for entry in seen]]
    return {"name": client.name, "key": client.known_key(time.time()), "routes": seen, "others": others}


def gateway_asker_problems(clients: Sequence[Mapping[str, Any]], wanted: str = "") -> list[str]:
    """Why the playbooks could not ask a gateway as a client."""
    try:
        gateway_client.chosen(clients, wanted, time.time())
    except fleet.FleetError as error:
        return [str(error)]
    return []


def gateway_key_lines(clients: Sequence[Mapping[str, Any]], former: Mapping[str, Any]) -> list[str]:
    """Which keys are taken until when, for a person."""
    return gateway_client.key_lines(clients, former, time.time())


def gateway_key_checks(clients: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The keys that can be shown, and whether each has to be taken."""
    return gateway_client.key_checks(clients, time.time())


def gateway_outside_problems(
    hostvars: fleet.HostVars, outside: Sequence[str], hosts: Sequence[str], gateways: Sequence[str], group: str
) -> list[str]:
    """Why gateways on which a run does not act could not be told their backends."""
    found = []
    for name in outside:
        routes = hostvars[name].get("gateway_routes") or []
        said = problems.instance_problems(routes, problems.Fleet.of(hostvars, hosts, gateways), group)
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
                gateway_client_problems,
                gateway_origin_problems,
                gateway_proxy_problems,
                gateway_route_problems,
                gateway_path_problems,
                gateway_warnings,
                gateway_asker,
                gateway_asker_problems,
                gateway_key_lines,
                gateway_key_checks,
                gateway_outside_problems,
            )
        }
