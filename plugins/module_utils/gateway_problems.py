# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the routes, the clients and the surroundings of a gateway, in sentences: which variable, what is wrong, what is right.

No sentence has a key.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, gateway_fleet, model_kinds, vllm
from ansible_collections.gpufleet.llm.plugins.module_utils.inputs import as_int, similar

Entry = Mapping[str, Any]
CLIENT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
KEY_LEAST = 16
CLIENT_KEY = re.compile(rf"[\x21-\x7e]{{{KEY_LEAST},}}")
HASH = re.compile(r"[0-9a-fA-F]{64}")
HEADER = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
# As browsers write it: the port of the scheme itself is left out.
ORIGIN = re.compile(
    r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?"
)
MAKE_A_KEY = "`openssl rand -hex 32` makes one"
LIMITS = {
    "requests_per_minute": 1, "concurrent_requests": 1, "burst": 0, "tokens_per_minute": 1, "tokens_per_day": 1, "tokens_per_month": 1,
}  # fmt: skip
# The last key of a client is told this long before its end.
SOON = 14 * 86400


@dataclass(frozen=True)
class Fleet:
    """What the routes of a gateway can lead to."""

    hostvars: fleet.HostVars
    hosts: Sequence[str]
    gateways: Sequence[str]

    @classmethod
    def of(cls, hostvars: fleet.HostVars, hosts: Sequence[str], gateways: Sequence[str]) -> Fleet:
        """What the inventory says of it."""
        return cls(fleet.read(hostvars, hosts), hosts, gateways)

    def backends(self, instance: str) -> list[fleet.Backend]:
        """The backends of an instance; none where they cannot be told, which is a problem of its own."""
        try:
            return fleet.backends(self.hostvars, instance, self.hosts, self.gateways)
        except fleet.FleetError:
            return []


def labelled(routes: Sequence[Entry]) -> Iterator[tuple[str, Entry, fleet.Route]]:
    """Each route with the words that name it."""
    for number, entry in enumerate(routes):
        yield f"gateway_routes[{number}] ({entry.get('model')})", entry, fleet.Route.of(entry)


def instance_problems(routes: Sequence[Entry], there: Fleet, group: str) -> list[str]:
    """Routes that lead nowhere, or to an instance that does not know the model by this name."""
    problems = []
    known = sorted({str(entry.get("name")) for _host, entry in fleet.entries(there.hostvars, there.hosts)})
    for where, _entry, route in labelled(routes):
        try:
            found = fleet.backends(there.hostvars, route.instance, there.hosts, there.gateways)
        except fleet.FleetError as error:
            problems.append(f"{where}: {error}")
            continue
        if not found:
            problems.append(
                f"{where} names the instance {route.instance}, but no host of the group {group} has it in vllm_instances"
                + (
                    f"; there are {', '.join(known)}"
                    if known
                    else "; no host there has any, or gateway_vllm_group is another"
                )
            )
        for backend in found:
            served = served_names(backend.instance)
            if served and route.model not in served:
                problems.append(
                    f"{where}: model must be the name by which the instance {route.instance} of {backend.instance.host} serves its model, "
                    f"{' or '.join(served)}; other names that clients use are aliases"
                )
    return problems


def served_names(instance: fleet.Instance) -> list[str]:
    """The names by which an instance is asked, as far as the inventory says: adapters may come while it runs."""
    if not instance.model or instance.options.get("enable-lora"):
        return []
    return [str(name) for name in vllm.served_names({"model": instance.model, "options": instance.options})]


def name_problems(routes: Sequence[Entry]) -> list[str]:
    """Models and aliases of which nobody could tell which route is meant."""
    problems: list[str] = []
    models: dict[str, str] = {}
    pairs: dict[tuple[str, str], str] = {}
    for where, _entry, route in labelled(routes):
        models.setdefault(route.model, where)
        if first := pairs.get((route.model, route.instance)):
            problems.append(
                f"{where} has the model and the instance of {first}; routes of one model share its requests by `weight` and have an instance each"
            )
        pairs.setdefault((route.model, route.instance), where)
    owners: dict[str, str] = {}
    for where, _entry, route in labelled(routes):
        for name in (route.model, *route.aliases):
            if not name or not name.isprintable() or name != name.strip():
                problems.append(
                    f"{where}: {name!r} is no name of a model; write what clients put into the `model` field"
                )
        for alias in route.aliases:
            if alias == route.model:
                problems.append(f"{where}: the alias {alias} is the model itself; leave it out")
            elif alias in models:
                problems.append(f"{where}: the alias {alias} is the model of {models[alias]}; choose another one")
            elif owners.setdefault(alias, route.model) != route.model:
                problems.append(
                    f"{where}: the alias {alias} is one of {owners[alias]} as well; leave it to one of them"
                )
    return problems


def balance_problems(routes: Sequence[Entry], there: Fleet) -> list[str]:
    """Numbers of a route that cannot be, and a header that nobody reads."""
    problems = []
    for where, entry, route in labelled(routes):
        if route.weight < 1:
            problems.append(
                f"{where}: weight is {route.weight}; it must be at least 1. A route that gets no requests is left out"
            )
        found, least = there.backends(route.instance), route.min_available
        if least is not None and not 0 <= least <= max(len(found), 1):
            counted = "1 backend" if len(found) == 1 else f"{len(found)} backends"
            problems.append(
                f"{where}: min_available is {least}; it must be from 0 to {len(found)}, since the instance {route.instance} has {counted}"
            )
        header = entry.get("session_header")
        if header is not None and route.balance != "session":
            problems.append(
                f"{where}: session_header has a meaning for `balance: session` only, and balance is {route.balance}; "
                "set that, or leave session_header out"
            )
        elif header is not None and not HEADER.fullmatch(str(header)):
            problems.append(
                f"{where}: session_header is {header!r}; it must be the name of a header, such as {fleet.SESSION_HEADER}"
            )
    return problems


def path_problems(routes: Sequence[Entry], there: Fleet, default_paths: Sequence[str]) -> list[str]:
    """Paths that an instance cannot have as far as its options say what it is for, and routes that are left without any."""
    problems = []
    for where, _entry, route in labelled(routes):
        found = there.backends(route.instance)
        possible = gateway_fleet.possible_paths(found)
        right = [path for path in model_kinds.methods() if path in possible]
        if route.paths == ():
            problems.append(
                f"{where}: paths is empty, so nothing is let through; leave it out for those of gateway_paths"
            )
        elif route.paths is not None:
            problems += [
                f"{where}: {path} in paths is none that the instance {route.instance} can have{told_by(found)}; it can have {', '.join(right)}"
                for path in route.paths
                if found and path not in possible and path in model_kinds.methods() and path != model_kinds.MODELS
            ]
        elif found and not gateway_fleet.paths(route, found, default_paths):
            problems.append(
                f"{where}: gateway_paths has none of the paths of the instance {route.instance}{told_by(found)}; "
                f"give the route `paths`, some of {', '.join(right)}"
            )
    return problems


def told_by(found: Sequence[fleet.Backend]) -> str:
    """By which options instances say what they are for."""
    said = {
        f"{name}: {backend.instance.options[name]}"
        for backend in found
        for name in ("runner", "convert")
        if name in backend.instance.options
    }
    return f", whose options say {', '.join(sorted(said, reverse=True))}" if said else ""


def access_problems(routes: Sequence[Entry], clients: Sequence[Entry]) -> list[str]:
    """Routes for clients, and clients with models, that do not exist."""
    problems = []
    names = dict.fromkeys(str(client.get("name")) for client in clients)
    for where, _entry, route in labelled(routes):
        if route.clients == ():
            problems.append(f"{where}: clients is empty, so nobody may ask for the model; leave it out for all clients")
        for name in route.clients or ():
            if name not in names:
                problems.append(
                    f"{where}: {name} in clients is none of gateway_clients{similar(name, names) or f'; there are {listed([*names])}'}"
                )
    every = [fleet.Route.of(route) for route in routes]
    models = dict.fromkeys(route.model for route in every)
    for client in clients:
        for model in fleet.names(client.get("models")) or ():
            if model not in models:
                meant = [route.model for route in every if model in route.aliases]
                hint = f"; it is an alias of {meant[0]}, name that" if meant else f"; there are {listed([*models])}"
                problems.append(
                    f"gateway_clients: {model} in models of {client.get('name')} is no model of gateway_routes{hint}"
                )
    return problems


def client_problems(clients: Sequence[Entry], internal_key: str, now: float) -> list[str]:
    """Names, keys and limits of clients that cannot be."""
    problems: list[str] = []
    names: set[str] = set()
    owners = {fleet.sha256(internal_key): ""}
    for number, client in enumerate(clients):
        name = str(client.get("name", ""))
        if not CLIENT_NAME.fullmatch(name):
            problems.append(
                f"gateway_clients[{number}]: name is {name!r}; it must be 1 to 63 of a-z, 0-9 and -, and must not begin with -"
            )
            name = f"gateway_clients[{number}]"
        elif name in names:
            problems.append(f"gateway_clients: the name {name} is used twice; give each client a name of its own")
        names.add(name)
        problems += key_problems(name, client, owners, now)
        for limit, least in LIMITS.items():
            # what is no number is told by the argument spec
            if (value := as_int(client.get(limit))) is not None and value < least:
                problems.append(f"gateway_clients: {limit} of {name} is {value}; it must be at least {least}")
    return problems


def key_problems(name: str, client: Entry, owners: dict[str, str], now: float) -> list[str]:
    """What is wrong with the keys of a client. `owners` has whose each hash is, and gets those of this one."""
    single, several = client.get("key"), client.get("keys")
    if single is None and not several:
        return [f"gateway_clients: {name} has neither `key` nor `keys`; give it a key, {MAKE_A_KEY}"]
    if single is not None and several is not None:
        return [f"gateway_clients: {name} has both `key` and `keys`; put the key into `keys`, as `- key: ...`"]
    problems: list[str] = []
    keys: list[fleet.Key] = []
    for number, entry in enumerate([client] if several is None else several):
        where = f"the key of {name}" if several is None else f"keys[{number}] of {name}"
        if found := entry_problems(where, entry):
            problems += found
            continue
        key = fleet.Key.of(entry)
        owner = owners.setdefault(key.sha256, name)
        if owner == "":
            problems.append(
                f"gateway_clients: {where} is the internal key (gateway_internal_key, by default vllm_internal_key); give the client another one"
            )
        elif owner != name:
            problems.append(f"gateway_clients: {owner} and {name} have the same key; give each client its own")
        elif key.sha256 in {other.sha256 for other in keys}:
            problems.append(f"gateway_clients: {where} is there twice; leave one of them out")
        keys.append(key)
    if keys and not problems and all(key.expired(now) for key in keys):
        problems.append(
            f"gateway_clients: every key of {name} has expired; give it one that has not, or leave the client out"
        )
    return problems


def entry_problems(where: str, entry: Entry) -> list[str]:
    """What is wrong with one key."""
    text, digest = entry.get("key"), entry.get("sha256")
    if (text is None) == (digest is None):
        said = "neither `key` nor `sha256`" if text is None else "both `key` and `sha256`"
        return [f"gateway_clients: {where} has {said}; it must have one of them"]
    problems = []
    if text is not None and not CLIENT_KEY.fullmatch(str(text)):
        problems.append(
            f"gateway_clients: {where} is not at least {KEY_LEAST} printable characters of ASCII without spaces; {MAKE_A_KEY}"
        )
    if digest is not None and not HASH.fullmatch(str(digest)):
        problems.append(
            f"gateway_clients: sha256 of {where} is not 64 hexadecimal digits, as `printf %s KEY | sha256sum` prints them"
        )
    if (until := entry.get("expires")) is not None:
        try:
            fleet.moment(until)
        except ValueError:
            problems.append(
                f"gateway_clients: expires of {where} is {until!r}; it must be a date such as 2027-01-31, from which on the key is refused, "
                "or a time such as 2027-01-31T12:00:00Z"
            )
    return problems


def proxy_problems(networks: Sequence[str]) -> list[str]:
    """What is no network, and networks that would let anybody say who the client is."""
    problems = []
    for text in networks:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            problems.append(
                f"gateway_trusted_proxies: {text} is neither an address nor a network; write it as 10.0.0.5, 10.0.8.0/24 or fd00:8::/64"
            )
            continue
        if network.prefixlen == 0:
            problems.append(
                f"gateway_trusted_proxies: {text} is everybody, so every client could choose its address; name the addresses of the balancers"
            )
        elif ipaddress.ip_interface(text).ip != network.network_address:
            problems.append(
                f"gateway_trusted_proxies: {text} is an address within a network; write {text.partition('/')[0]} for the one or {network} for the other"
            )
    return problems


def origin_problems(origins: Sequence[str]) -> list[str]:
    """What no browser would send as the origin of a page."""
    return [
        f"gateway_cors_origins: {origin} is no exact origin; write scheme, name and port if it is another than the scheme's own, in small letters "
        "and without a / at the end, for example https://chat.example.com or http://localhost:3000"
        for origin in origins
        if not ORIGIN.fullmatch(origin)
    ]


def warnings(routes: Sequence[Entry], clients: Sequence[Entry], there: Fleet, now: float) -> list[str]:
    """What is allowed and may not be meant: keys that are at their end, and wishes without effect. For routes and clients without mistakes."""
    every = [fleet.Route.of(route) for route in routes]
    heeded = {
        route.instance
        for route in every
        if any(gateway_fleet.has_priorities(backend.instance) for backend in there.backends(route.instance))
    }
    of_model: dict[str, list[fleet.Route]] = {}
    for route in every:
        of_model.setdefault(route.model, []).append(route)
    said = []
    for client in map(fleet.Client.of, clients):
        said += key_warnings(client, now)
        named = (
            every if client.models is None else [route for model in client.models for route in of_model.get(model, [])]
        )
        if not any(client.may(route) for route in named):
            said.append(
                f"{client.name} may ask for no model: its `models` and the `clients` of gateway_routes exclude each other"
            )
        elif client.priority is not None and not any(client.may(route) and route.instance in heeded for route in named):
            said.append(
                f"priority of {client.name} has no effect: none of the instances that it may ask has the option scheduling-policy: priority"
            )
    return said


def key_warnings(client: fleet.Client, now: float) -> list[str]:
    """Keys that have ended, and a last one that is about to."""
    said = [
        f"a key of {client.name} expired on {day(key.expires)}; take it out of gateway_clients"
        for key in client.keys
        if key.expired(now)
    ]
    left = [key.expires for key in client.keys if not key.expired(now)]
    ends = [end for end in left if end is not None]
    if left and len(ends) == len(left) and max(ends) < now + SOON:
        said.append(f"the last key of {client.name} expires on {day(max(ends))}; give it another one in `keys`")
    return said


def day(moment: float | None) -> str:
    """A date, for a person."""
    return datetime.fromtimestamp(moment or 0, timezone.utc).strftime("%Y-%m-%d")


def listed(names: Sequence[str]) -> str:
    """The first of them, for a person."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "none"
