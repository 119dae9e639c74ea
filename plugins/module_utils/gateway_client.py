# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The client as which the playbooks ask a gateway, and what it may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, gateway_fleet


def chosen(clients: Sequence[Mapping[str, Any]], wanted: str, now: float) -> fleet.Client:
    """The wanted client, or the first one with a key that is known here. Raises FleetError when there is none."""
    there = list(map(fleet.Client.of, clients))
    named = [client for client in there if not wanted or client.name == wanted]
    if not named:
        raise fleet.FleetError(
            f"verify_client is {wanted}; it must be one of gateway_clients: {', '.join(client.name for client in there) or 'there is none'}"
        )
    for client in named:
        if client.known_key(now):
            return client
    who = (
        f"verify_client is {wanted}, of which gateway_clients has no key"
        if wanted
        else "no client in gateway_clients has a key"
    )
    raise fleet.FleetError(
        f"{who} that can be shown: only SHA-256, or keys that have expired. The playbooks ask the gateway as a client: "
        "give one of them a `key`, and name it as verify_client"
    )


def view(
    hostvars: fleet.HostVars, routes: Sequence[Mapping[str, Any]], client: fleet.Client, hosts: Sequence[str], gateways: Sequence[str],
    default_paths: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """The models that a client may ask for, each once, with the aliases and the paths of all its routes."""
    found: dict[str, dict[str, Any]] = {}
    for route in map(fleet.Route.of, routes):
        if client.may(route):
            behind = fleet.backends(hostvars, route.instance, hosts, gateways)
            seen = found.setdefault(route.model, {"model": route.model, "aliases": [], "paths": []})
            for key, more in (
                ("aliases", route.aliases),
                ("paths", gateway_fleet.paths(route, behind, default_paths)),
            ):
                seen[key] += [name for name in more if name not in seen[key]]
    return list(found.values())
