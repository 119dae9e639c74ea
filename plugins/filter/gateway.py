"""Filters of the roles gateway, tls_certificate and vllm. Each is described in the file that has its name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet

CLIENT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
# Nginx compares the keys of a map without regard to case: only lower case makes two keys that differ really different.
CLIENT_KEY = re.compile(r"[a-z0-9._-]{32,}")
# When a client does not say otherwise, ten seconds' worth of its requests may come at once, at least five.
BURST_SECONDS = 10
BURST_LEAST = 5


def gateway_backends(
    hostvars: fleet.HostVars, instance: str, hosts: Sequence[str], gateways: Sequence[str]
) -> list[str]:
    """Addresses of an instance's backends."""
    try:
        return fleet.backends(hostvars, instance, hosts, gateways)
    except fleet.FleetError as error:
        raise AnsibleFilterError(str(error)) from None


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


def burst(client: Mapping[str, Any]) -> int:
    """How many requests a client may send at once beyond its rate."""
    if client.get("burst") is not None:
        return int(client["burst"])
    return max(BURST_LEAST, math.ceil(int(client["requests_per_minute"]) * BURST_SECONDS / 60))


def gateway_rate_groups(clients: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct pairs of rate and burst, each with the names of its clients: Nginx wants one zone for each."""
    groups: dict[tuple[int, int], list[str]] = {}
    for client in clients:
        groups.setdefault((int(client["requests_per_minute"]), burst(client)), []).append(str(client["name"]))
    return [
        {"requests_per_minute": rate, "burst": most, "names": names} for (rate, most), names in sorted(groups.items())
    ]


def gateway_concurrency_groups(clients: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct concurrency limits, each with the names of its clients."""
    groups: dict[int, list[str]] = {}
    for client in clients:
        groups.setdefault(int(client["concurrent_requests"]), []).append(str(client["name"]))
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


def as_int(value: Any) -> int | None:
    """A number as Ansible would take it, or nothing."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def number_problems(numbers: Mapping[str, Any], least: int) -> list[str]:
    """Variables whose number is below the least."""
    return [
        f"{name} is {value}; it must be at least {least}"
        for name, value in numbers.items()
        if (number := as_int(value)) is not None and number < least
    ]


def bind_address_problems(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """Why it cannot be told where vLLM listens."""
    try:
        fleet.bind_address(hostvars, host, gateways)
    except fleet.FleetError as error:
        return [str(error)]
    return []


def gateway_route_problems(
    hostvars: fleet.HostVars,
    routes: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    gateways: Sequence[str],
    group: str,
) -> list[str]:
    """Routes that lead nowhere."""
    problems = []
    known = sorted({str(entry.get("name")) for host in hosts for entry in hostvars[host].get("vllm_instances") or []})
    for number, route in enumerate(routes):
        instance = str(route.get("instance"))
        try:
            found = fleet.backends(hostvars, instance, hosts, gateways)
        except fleet.FleetError as error:
            problems.append(f"gateway_routes[{number}]: {error}")
            continue
        if not found:
            problems.append(
                f"gateway_routes[{number}] names the instance {instance}, but no host of the group {group} has it in vllm_instances"
                + (f"; there are {', '.join(known)}" if known else "; no host there has any")
            )
    return problems


def host_name_problems(names: Sequence[str], variable: str) -> list[str]:
    """What is wrong with a list of names that clients use for a server; `variable` is where they stand."""
    problems = [
        f"{variable} has {name!r}, which is neither a DNS name in lower case nor an IP address"
        for name in names
        if not fleet.is_dns_name(name) and not fleet.is_address(name)
    ]
    return problems + [
        f"{variable} lists {name} twice; name it once"
        for name in sorted({name for name in names if list(names).count(name) > 1})
    ]


def subject_alt_names(names: Sequence[str]) -> list[str]:
    """Names as a certificate request wants them."""
    return [f"IP:{name}" if fleet.is_address(name) else f"DNS:{name}" for name in names]


def uncovered_names(names: Sequence[str], alternatives: Sequence[str]) -> list[str]:
    """Those of the names that a certificate with these subject alternative names does not cover."""
    covered = {
        entry.partition(":")[2].lower() for entry in alternatives if entry.startswith(("DNS:", "IP:", "IP Address:"))
    }
    return [
        name
        for name in names
        if name not in covered and (fleet.is_address(name) or f"*.{name.partition('.')[2]}" not in covered)
    ]


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function
            for function in (
                gateway_backends,
                fleet_address,
                bind_address,
                gateway_rate_groups,
                gateway_concurrency_groups,
                gateway_client_problems,
                gateway_route_problems,
                bind_address_problems,
                host_name_problems,
                number_problems,
                subject_alt_names,
                uncovered_names,
            )
        }
