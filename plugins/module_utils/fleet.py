"""Who reaches whom in the fleet, decided from the inventory alone: never from facts, so --limit changes nothing."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

LOOPBACK = "127.0.0.1"
DNS_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")

HostVars = Mapping[str, Mapping[str, Any]]


class FleetError(Exception):
    """Something in the inventory that a person has to set right; the message names the host and the variable."""


def is_address(name: str) -> bool:
    """Whether this is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_dns_name(name: str) -> bool:
    """Whether this is a DNS name in lower case. What looks like an IP address with a mistake in it is none."""
    return len(name) <= 253 and DNS_NAME.fullmatch(name) is not None and not re.fullmatch(r"[0-9.]+", name)


def with_port(address: str, port: int) -> str:
    """Join an address and a port, IPv6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def fleet_address(hostvars: HostVars, host: str) -> str:
    """The IP address at which the other hosts of the fleet reach this one."""
    if host not in hostvars:
        raise FleetError(f"{host} is not in the inventory")
    variables = hostvars[host]
    if variables.get("fleet_address"):
        address = str(variables["fleet_address"])
        if not is_address(address):
            raise FleetError(f"{host}: fleet_address is {address!r}; it must be an IP address")
        parsed = ipaddress.ip_address(address)
        if parsed.is_loopback or parsed.is_unspecified:
            raise FleetError(f"{host}: fleet_address is {address}, which no other host can reach")
        return address
    for candidate in (variables.get("ansible_host"), host):
        if candidate and is_address(str(candidate)):
            return str(candidate)
    raise FleetError(
        f"{host}: ansible_host is {variables.get('ansible_host') or 'not set'}, which is no IP address, and "
        f"fleet_address is not set; set fleet_address to the IP address at which the other hosts reach {host}"
    )


def bind_address(hostvars: HostVars, host: str, gateways: Sequence[str]) -> str:
    """The address that vLLM on this host listens on: loopback when the only gateway is the host itself."""
    return LOOPBACK if list(gateways) == [host] else fleet_address(hostvars, host)


def backends(hostvars: HostVars, instance: str, hosts: Sequence[str], gateways: Sequence[str]) -> list[str]:
    """`address:port` of an instance on every host that has it, in the order of the inventory."""
    found = []
    for host in hosts:
        for entry in hostvars[host].get("vllm_instances") or []:
            if entry.get("name") != instance:
                continue
            try:
                port = int(entry["port"])
            except (KeyError, TypeError, ValueError):
                raise FleetError(
                    f"{host}: the entry {instance!r} of vllm_instances has no port that is a number"
                ) from None
            if not 0 < port < 65536:
                raise FleetError(
                    f"{host}: the entry {instance!r} of vllm_instances has port {port}; it must be between 1 and 65535"
                )
            found.append(with_port(bind_address(hostvars, host, gateways), port))
    if repeated := sorted({entry for entry in found if found.count(entry) > 1}):
        raise FleetError(
            f"instance {instance!r} would be reached twice at {', '.join(repeated)}: "
            "vllm_instances or fleet_address is repeated"
        )
    return found
