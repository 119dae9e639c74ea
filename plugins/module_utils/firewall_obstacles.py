# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of rules on a host: what was found there against what the inventory says."""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ansible_collections.gpufleet.llm.plugins.module_utils.firewall_host import Look


def inside(address: str, networks: Iterable[str]) -> bool:
    """Whether an address is in one of the networks."""
    found = ipaddress.ip_address(address)
    return any(found in ipaddress.ip_network(network) for network in networks)


def beside(host: str, look: Look, take_over: bool) -> list[str]:
    """What other firewalls mean for connections that these rules let in, one sentence each."""
    told = []
    if look.others and not take_over:
        names = " and ".join(look.others)
        told.append(
            f"{names} {'are' if len(look.others) > 1 else 'is'} active on {host}, and each of two firewalls would have to let a connection "
            "pass; with firewall_take_over: true this role switches it off as soon as its own rules have been proved"
        )
    told += [
        f"the table {table} of {host}, which is not this role's, refuses what it does not name, and each of two firewalls would have to let a "
        "connection pass; open there what docs/firewall.md lists, and set firewall_beside: warn, or take the table out of what loads it "
        "(/etc/nftables.conf)"
        for table in look.tables
    ]
    return told


def obstacles(host: str, client: tuple[str, int] | None, uplinks: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """Why the rules must not be loaded on this host, one sentence each."""
    problems = []
    if client:
        address, port = client
        networks, ports = given["admin_networks"], given["ssh_ports"]
        if not inside(address, networks):
            problems.append(
                f"Ansible reaches {host} from {address}, which is not in firewall_admin_networks ({', '.join(networks)}): these rules would "
                f"lock it out; add {address}, or the network that it belongs to"
            )
        if port not in ports:
            problems.append(
                f"Ansible reaches {host} at port {port}, which is not in firewall_ssh_ports ({', '.join(map(str, ports))}): these rules would "
                f"lock it out; add {port}, and take it out again in a later run, when Ansible uses another one"
            )
    for name in uplinks:
        if patterns := [pattern for pattern in given["container_interfaces"] if fnmatch.fnmatchcase(name, pattern)]:
            problems.append(
                f"firewall_container_interfaces has {patterns[0]}, but {name} leads out of {host}: what comes in there would reach containers "
                "unchecked; name the interfaces of containers more exactly"
            )
    return problems
