# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The client as which the playbooks ask a gateway, and what it may ask for; and the keys of all clients, as they are told and proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, gateway_fleet
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_problems import SOON, day


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
    hostvars = fleet.read(hostvars, hosts)
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


def key_label(client: str, digest: str) -> str:
    """How a key is told: whose it is and how its SHA-256 begins."""
    return f"{client} {digest[:8]}"


def key_lines(clients: Sequence[Mapping[str, Any]], former: Mapping[str, Any], now: float) -> list[str]:
    """Which keys of which clients are taken until when, and what there is to do about them. `former` are the keys that fleet.json had before."""
    lines, notes = [], []
    wanted = {key.sha256: (client, key) for client in map(fleet.Client.of, clients) for key in client.keys}
    for digest, (client, key) in wanted.items():
        label, new = key_label(client.name, digest), "" if digest in former else ", and is new"
        if key.expired(now):
            lines.append(f"{label}  is refused since {day(key.expires)}; take it out of gateway_clients")
        else:
            lines.append(f"{label}  is taken {f'until {day(key.expires)}' if key.expires else 'without an end'}{new}")
    for digest, entry in former.items():
        if digest not in wanted:
            lines.append(f"{key_label(entry['client'], digest)}  is taken no more: it is not in gateway_clients")
    for client in map(fleet.Client.of, clients):
        ends = [key.expires for key in client.keys if not key.expired(now)]
        soon = sorted(end for end in ends if end is not None and end < now + SOON)
        if ends.count(None) > 1:
            notes.append(
                f"{client.name} has {ends.count(None)} keys without an end: give `expires` to those that are to go"
            )
        if soon and len(soon) == len(ends):
            notes.append(f"{client.name} has no key after {day(soon[-1])}: give it another one")
        elif soon:
            notes.append(f"{client.name} has to use its new key before {day(soon[0])}")
    return lines + notes


def key_checks(clients: Sequence[Mapping[str, Any]], now: float) -> list[dict[str, Any]]:
    """What a gateway has to say to each key that is known here."""
    return [
        {"name": key_label(client.name, key.sha256), "key": key.text, "accepted": not key.expired(now)}
        for client in map(fleet.Client.of, clients)
        for key in client.keys
        if key.text
    ]
