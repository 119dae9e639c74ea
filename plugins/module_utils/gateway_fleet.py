# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What a gateway knows of the fleet: the data of fleet.json, made from the inventory alone. Nothing of it is secret: keys are there as SHA-256."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, model_kinds

VERSION = 1
# The options of vLLM that bound the requests which an instance works on, and those that wait beside them.
REQUEST_BOUNDS = ("max-num-seqs", "max-num-queued-reqs")


def document(hostvars: fleet.HostVars, gateway: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a gateway. `asked` has its routes, clients, paths and internal_key, the hosts and gateways of the fleet, and settings."""
    hostvars = fleet.read(hostvars, asked["hosts"])
    routes = list(map(fleet.Route.of, asked["routes"]))
    clients = list(map(fleet.Client.of, asked["clients"]))
    behind = {
        route.instance: fleet.backends(hostvars, route.instance, asked["hosts"], asked["gateways"]) for route in routes
    }
    return {
        "version": VERSION,
        "internal_key_sha256": fleet.sha256(str(asked["internal_key"])),
        "gateway": str(gateway),
        "settings": dict(asked["settings"]),
        "backends": backends(hostvars, behind, asked["gateways"]),
        "routes": [route_entry(route, behind[route.instance], asked["paths"]) for route in routes],
        "clients": {client.name: client_entry(client) for client in clients},
        "keys": {
            key.sha256: {"client": client.name, "expires": key.expires} for client in clients for key in client.keys
        },
    }


def with_backends(
    present: Mapping[str, Any], hostvars: fleet.HostVars, hosts: Sequence[str], gateways: Sequence[str]
) -> dict[str, Any]:
    """The data that a gateway has, with the backends of its routes as the inventory has them now. All else stays."""
    if present.get("version") != VERSION:
        raise fleet.FleetError(
            f"its fleet.json has version {present.get('version')}, this run writes version {VERSION}"
        )
    hostvars = fleet.read(hostvars, hosts)
    behind = {
        route["instance"]: fleet.backends(hostvars, route["instance"], hosts, gateways) for route in present["routes"]
    }
    routes = [
        {**route, **told_by_backends(least_wanted(route), behind[route["instance"]])} for route in present["routes"]
    ]
    return {**present, "backends": backends(hostvars, behind, gateways), "routes": routes}


def backends(
    hostvars: fleet.HostVars, behind: Mapping[str, Sequence[fleet.Backend]], gateways: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """All backends of these instances, by id."""
    return {
        backend.id: {
            "instance": backend.instance.name,
            "host": backend.instance.host,
            "address": backend.address,
            "port": backend.instance.port,
            "agent": fleet.agent_endpoint(hostvars, backend.instance.host, gateways),
            "tls": fleet.backend_tls(hostvars, backend.instance.host, gateways),
            "most_requests": most_requests(backend.instance),
        }
        for found in behind.values()
        for backend in found
    }


def route_entry(route: fleet.Route, found: Sequence[fleet.Backend], default_paths: Sequence[str]) -> dict[str, Any]:
    """A route, with everything that was left out."""
    return {
        "model": route.model,
        "aliases": list(route.aliases),
        "instance": route.instance,
        "paths": paths(route, found, default_paths),
        "clients": None if route.clients is None else list(route.clients),
        "weight": route.weight,
        "balance": route.balance,
        "session_header": route.session_header,
        "retry": route.retry,
        **told_by_backends(route.min_available, found),
    }


def client_entry(client: fleet.Client) -> dict[str, Any]:
    """A client without its keys, which lead to it."""
    return {
        "requests_per_minute": client.requests_per_minute,
        "burst": client.burst,
        "concurrent_requests": client.concurrent_requests,
        "models": None if client.models is None else list(client.models),
        "tokens_per_minute": client.tokens_per_minute,
        "tokens_per_day": client.tokens_per_day,
        "tokens_per_month": client.tokens_per_month,
        "priority": client.priority,
    }


def told_by_backends(min_available: int | None, found: Sequence[fleet.Backend]) -> dict[str, Any]:
    """What a route has from the instances behind it."""
    every = least_available(len(found))
    return {
        "backends": [backend.id for backend in found],
        "min_available": every if min_available is None else min(min_available, len(found)),
        "priority": bool(found) and all(has_priorities(backend.instance) for backend in found),
    }


def least_available(count: int) -> int:
    """How many of so many backends stay in use unless a route says otherwise: all but one."""
    return max(count - 1, 0)


def least_wanted(route: Mapping[str, Any]) -> int | None:
    """The min_available that a route of a gateway asks for; nothing where it is the default, which follows the number of backends."""
    present: int = route["min_available"]
    return None if present == least_available(len(route["backends"])) else present


def most_requests(instance: fleet.Instance) -> int | None:
    """How many requests an instance takes, those that wait included; nothing where its options leave one of the two open."""
    bounds = [str(instance.options.get(name)) for name in REQUEST_BOUNDS]
    return sum(map(int, bounds)) if all(map(str.isdecimal, bounds)) else None


def has_priorities(instance: fleet.Instance) -> bool:
    """Whether the instance heeds the priority of a request; others refuse one that has it."""
    return instance.options.get("scheduling-policy") == "priority"


def paths(route: fleet.Route, found: Sequence[fleet.Backend], default_paths: Sequence[str]) -> list[str]:
    """The paths of a route: its own, else those of the gateway that its instances can have. Models are listed by the gateway itself."""
    if route.paths is None:
        possible = possible_paths(found)
        wanted = [str(path) for path in default_paths if path in possible]
    else:
        wanted = list(route.paths)
    return [path for path in dict.fromkeys(wanted) if path != model_kinds.MODELS]


def possible_paths(found: Sequence[fleet.Backend]) -> set[str]:
    """The paths that instances can have as far as their options say."""
    return {path.path for backend in found for path in model_kinds.possible_paths(backend.instance.options)}
