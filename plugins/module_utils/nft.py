# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Networks and ports in the words of nftables."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

EVERYWHERE = ("0.0.0.0/0", "::/0")
PORTS = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?")


def matches(networks: Iterable[str], end: str = "saddr") -> list[str]:
    """The matches, one for each IP family, that stand for networks at one end of a connection: nothing at all when it is everybody."""
    parsed = [ipaddress.ip_network(network) for network in networks]
    # sets of nftables take no overlapping networks
    four = list(
        ipaddress.collapse_addresses(network for network in parsed if isinstance(network, ipaddress.IPv4Network))
    )
    six = list(
        ipaddress.collapse_addresses(network for network in parsed if isinstance(network, ipaddress.IPv6Network))
    )
    if [str(network) for network in (*four, *six)] == list(EVERYWHERE):
        return [""]
    texts = []
    for family, address, found in (("ipv4", "ip", four), ("ipv6", "ip6", six)):
        if found and found[0].prefixlen == 0:
            texts.append(f"meta nfproto {family} ")
        elif found:
            texts.append(f"{address} {end} {{ {', '.join(map(plain, found))} }} ")
    return texts


def plain(network: Network) -> str:
    """A network as a person writes it."""
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)


def port_set(ports: Iterable[str]) -> str:
    """Ports and ranges, those that touch or overlap joined, because sets of nftables take no overlaps."""
    spans: list[list[int]] = []
    for first, last in sorted(bounds(port) for port in ports):
        if spans and first <= spans[-1][1] + 1:
            spans[-1][1] = max(spans[-1][1], last)
        else:
            spans.append([first, last])
    return "{ " + ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans) + " }"


def bounds(port: str) -> tuple[int, int]:
    """First and last port of a port or a range."""
    first, _, last = str(port).partition("-")
    return int(first), int(last or first)


def is_ports(text: str) -> bool:
    """Whether this is a port or a range of ports."""
    if not (found := PORTS.fullmatch(text)):
        return False
    first, last = int(found[1]), int(found[2] or found[1])
    return first <= last <= 65535


def comment(name: str) -> str:
    """A name as the comment of a rule."""
    return 'comment "' + re.sub(r"[^A-Za-z0-9 ._-]", "_", name)[:63] + '"'
