# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""One address for several gateways: who has it when, and what an inventory may not ask for."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet

# The first gateway of the inventory has the first priority, the next one less. One that does not answer is behind all that do, and one that
# was asked to leave is between them.
FIRST = 200
LEAVING = -50
SILENT = -100


def priority(host: str, gateways: Sequence[str]) -> int:
    """Of a gateway that is well."""
    return FIRST - list(gateways).index(host)


def router_id(address: str, asked: int) -> int:
    """The number by which the gateways know each other's messages in their network: by default the last one of the address."""
    return asked or int(address.rpartition(".")[2])


def problems(
    hostvars: fleet.HostVars, host: str, gateways: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with the variables, one sentence each."""
    address = settings["ip"]
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        yield f"virtual_address_ip is {address!r}; it takes an IPv4 address that no host has, in a network of the gateways, such as 192.0.2.10"
        return
    if host not in gateways or len(gateways) < 2:
        yield f"virtual_address_ip is for two or more gateways, but the inventory has {', '.join(gateways) or 'none'}: add one, or leave it out"
        return
    if not 1 <= router_id(address, settings["router_id"]) <= 255:
        yield f"virtual_address_router_id is {router_id(address, settings['router_id'])}; it must be between 1 and 255"
    if len(gateways) > abs(LEAVING):
        yield f"virtual_address_ip is for at most {abs(LEAVING)} gateways; the inventory has {len(gateways)}"
    for name in gateways:
        try:
            own = fleet.fleet_address(hostvars, name)
        except fleet.FleetError as error:
            yield str(error)
            continue
        if own == address:
            yield f"virtual_address_ip is {address}, which is fleet_address of {name}; it must be an address that no host has"
        if ":" in own:
            yield f"fleet_address of {name} is {own}; virtual_address_ip needs gateways that reach each other by IPv4"
        for variable in ("virtual_address_ip", "virtual_address_router_id"):
            mine, other = (hostvars[each].get(variable) for each in (host, name))
            if mine != other:
                yield f"{variable} is {mine!r} on {host} and {other!r} on {name}; it must be the same on all gateways"
    names = settings["server_names"]
    if names and address not in names and not any(fleet.is_dns_name(name) for name in names):
        yield f"gateway_server_names has neither {address} (virtual_address_ip) nor a DNS name, so no client could use it; add what clients use"


def interface(address: str, interfaces: Sequence[Mapping[str, Any]], asked: str = "") -> str:
    """The interface in whose network an address is, of those that `ip -json address` tells; the one that is asked for, where it is there."""
    if asked:
        return asked if asked in (one.get("ifname") for one in interfaces) else ""
    for one in interfaces:
        for own in one.get("addr_info", []):
            if own.get("family") != "inet" or own["prefixlen"] == 32 or one["ifname"] == "lo":
                continue
            if ipaddress.IPv4Address(address) in ipaddress.ip_interface(f"{own['local']}/{own['prefixlen']}").network:
                return str(one["ifname"])
    return ""


def host_problems(address: str, interfaces: Sequence[Mapping[str, Any]], asked: str) -> list[str]:
    """What of it the host says no to."""
    if interface(address, interfaces, asked):
        return []
    if asked:
        return [f"virtual_address_interface is {asked}, which the host does not have"]
    networks = [
        f"{own['local']}/{own['prefixlen']} ({one['ifname']})"
        for one in interfaces
        for own in one.get("addr_info", [])
        if own.get("family") == "inet" and one["ifname"] != "lo"
    ]
    return [
        f"virtual_address_ip is {address}, which is in no network of the host ({', '.join(networks)}); take an address of one of them, or name "
        "virtual_address_interface"
    ]
