"""Filters of the role gateway. Each is described in the file that has its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, model_kinds
from ansible_collections.gpufleet.llm.plugins.module_utils import gateway_fleet as data
from ansible_collections.gpufleet.llm.plugins.module_utils.inputs import as_int

CLIENT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
# Nginx compares the keys of a map without regard to case: only lower case makes two keys that differ really different.
CLIENT_KEY = re.compile(r"[a-z0-9._-]{32,}")


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


def gateway_client_problems(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with a list of clients, in sentences that never hold a key."""
    problems = []
    names: list[str] = []
    owners: dict[str, str] = {}
    for number, client in enumerate(clients):
        name = str(client.get("name", ""))
        key = str(client.get("key", ""))
        if not CLIENT_NAME.fullmatch(name):
            problems.append(
                f"gateway_clients[{number}]: name is {name!r}; it must be 1 to 63 of a-z, 0-9 and -, and must not begin with -"
            )
            name = f"gateway_clients[{number}]"
        elif name in names:
            problems.append(f"gateway_clients: the name {name} is used twice; give each client a name of its own")
        names.append(name)
        if not CLIENT_KEY.fullmatch(key):
            problems.append(
                f"gateway_clients: the key of {name} is not at least 32 of a-z, 0-9, dot, _ and - in lower case; "
                "make one with `openssl rand -hex 32`"
            )
        elif key in owners:
            problems.append(f"gateway_clients: {owners[key]} and {name} have the same key; give each client its own")
        owners.setdefault(key, name)
        for limit, least in (("requests_per_minute", 1), ("concurrent_requests", 1), ("burst", 0)):
            # what is no number is told by the argument spec
            if (value := as_int(client.get(limit))) is not None and value < least:
                problems.append(f"gateway_clients: {limit} of {name} is {value}; it must be at least {least}")
    return problems


def gateway_route_problems(
    hostvars: fleet.HostVars,
    routes: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    gateways: Sequence[str],
    group: str,
) -> list[str]:
    """Routes that lead nowhere."""
    problems = []
    known = sorted({str(entry.get("name")) for _host, entry in fleet.entries(hostvars, hosts)})
    for number, route in enumerate(routes):
        instance = fleet.Route.of(route).instance
        try:
            found = fleet.backends(hostvars, instance, hosts, gateways)
        except fleet.FleetError as error:
            problems.append(f"gateway_routes[{number}]: {error}")
            continue
        if not found:
            problems.append(
                f"gateway_routes[{number}] names the instance {instance}, but no host of the group {group} has it in vllm_instances"
                + (
                    f"; there are {', '.join(known)}"
                    if known
                    else "; no host there has any, or gateway_vllm_group is another"
                )
            )
    return problems


def gateway_path_methods(paths: Sequence[str]) -> dict[str, str]:
    """The method of each path that is let through."""
    return {path: model_kinds.methods().get(path, "POST") for path in paths}  # the argument spec tells what is none


def gateway_path_problems(
    hostvars: fleet.HostVars, routes: Sequence[Mapping[str, Any]], hosts: Sequence[str], paths: Sequence[str]
) -> list[str]:
    """Routes to instances none of whose paths are let through, as far as their options say what they are for."""
    problems = []
    wanted = {fleet.Route.of(route).instance for route in routes}
    for host, entry in fleet.entries(hostvars, hosts):
        options = entry.get("options")
        kinds = model_kinds.wanted_kinds(options if isinstance(options, Mapping) else {})
        right = [path.path for kind in kinds for path in kind.paths]
        if entry.get("name") in wanted and not set(paths) & set(right):
            told = ", ".join(
                f"{name}: {options[name]}" for name in ("runner", "convert") if options and name in options
            )
            problems.append(
                f"gateway_paths has none of the paths of the instance {entry['name']} of {host}"
                + (f", whose options say {told}" if told else "")
                + f"; add some of {', '.join(right)}"
            )
    return problems


def gateway_outside_problems(
    hostvars: fleet.HostVars, outside: Sequence[str], hosts: Sequence[str], gateways: Sequence[str], group: str
) -> list[str]:
    """Why gateways on which a run does not act could not be told their backends."""
    problems = []
    for name in outside:
        routes = hostvars[name].get("gateway_routes") or []
        found = gateway_route_problems(hostvars, routes, hosts, gateways, group)
        if len(routes) != 1:
            found = [f"gateway_routes has {len(routes)} entries; it must have exactly one"]
        elif not hostvars[name].get("gateway_server_names"):
            found.append("gateway_server_names must list the DNS names or IP addresses that clients use")
        problems += [f"{name} (outside of --limit): {problem}" for problem in found]
    return problems


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
                gateway_outside_problems,
            )
        }
