# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the vLLM instances of a host may connect to, in the words of nftables.

A request may name an address that its server then asks, from inside the network. So those that may fetch what requests name reach the fleet,
name servers and what the inventory adds, and of everything else nothing that is private.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet
from ansible_collections.gpufleet.llm.plugins.module_utils.nft import comment, matches, port_set

# Refused rather than dropped: who asked is told at once and does not wait.
REFUSE = "reject with icmpx admin-prohibited"
LOG = 'limit rate 5/second burst 20 packets log prefix "vllm-fleet egress: "'

OUTPUT = """
	# what instances connect to that run as a user of this host
	chain output {{
		type filter hook output priority filter; policy accept;
		oif "lo" accept
		ct state established,related accept
		meta skuid {user} jump egress
	}}
"""
LEAVING = """
	# what instances connect to that run in containers, and with them all other containers
	chain leaving {{
{inside}		jump egress
		accept
	}}
"""
EGRESS = """
	chain egress {{
{fleet}		meta l4proto {{ tcp, udp }} th dport 53 accept comment "names"
{allowed}{closed}	}}
"""


def runtimes(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> set[str]:
    """What runs the instances of a host that are held back; none where nobody is."""
    # YAML reads a bare off as false
    mode = "off" if settings["egress"] is False else settings["egress"]
    if mode == "off" or host not in settings["vllm_hosts"]:
        return set()
    return fleet.runtimes(hostvars, host, fetching=mode == "media")


def addresses(hostvars: fleet.HostVars, settings: Mapping[str, Any]) -> list[str]:
    """Those of the fleet's hosts. One that is only known by a name is reached by nobody, as far as the inventory says."""
    found = []
    for name in dict.fromkeys([*settings["gateways"], *settings["vllm_hosts"]]):
        try:
            found.append(fleet.fleet_address(hostvars, name))
        except fleet.FleetError:
            continue
    return found


def with_translations(networks: Iterable[str]) -> list[str]:
    """Networks, and under which addresses of IPv6 those of IPv4 are reached as well: NAT64 (RFC 6052) and 6to4 (RFC 3056)."""
    found = []
    for text in networks:
        network = ipaddress.ip_network(text)
        found.append(text)
        if isinstance(network, ipaddress.IPv4Network):
            address, length = int(network.network_address), network.prefixlen
            found.append(str(ipaddress.IPv6Network((0x64FF9B << 96 | address, 96 + length))))
            found.append(str(ipaddress.IPv6Network((0x2002 << 112 | address << 80, 16 + length))))
    return found


def chains(hostvars: fleet.HostVars, held_back: set[str], settings: Mapping[str, Any]) -> str:
    """The chains of the table, nothing at all where nobody is held back."""
    if not held_back:
        return ""
    text = ""
    if "systemd" in held_back:
        text += OUTPUT.format(user=settings["vllm_user"])
    if "docker" in held_back:
        inside = [f'\t\toifname "{name}" accept\n' for name in settings["container_interfaces"]]
        text += LEAVING.format(inside="".join(inside))
    allowed = [
        f"\t\t{target}{entry.get('protocol') or 'tcp'} dport {port_set(map(str, entry['ports']))} accept {comment(entry['name'])}\n"
        for entry in settings["egress_allow"]
        for target in matches(entry["networks"], "daddr")
    ]
    return text + EGRESS.format(
        fleet="".join(
            f'\t\t{target}accept comment "fleet"\n' for target in matches(addresses(hostvars, settings), "daddr")
        ),
        allowed="".join(allowed),
        closed="".join(
            f"\t\t{target}{verdict}\n"
            for target in matches(with_translations(settings["egress_closed"]), "daddr")
            for verdict in ([LOG, REFUSE] if settings["log_drops"] else [REFUSE])
        ),
    )
