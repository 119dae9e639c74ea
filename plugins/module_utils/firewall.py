# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Who may reach what on a host, derived from the inventory alone, and the nftables table that says so."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import firewall_egress, fleet
from ansible_collections.gpufleet.llm.plugins.module_utils.nft import comment, is_ports, matches, port_set

LISTS = (
    "ssh_ports", "admin_networks", "gateway_ports", "agent_ports", "client_networks", "metrics_ports", "monitoring_networks", "allow", "container_interfaces",
    "egress_allow", "egress_closed",
)  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}")
INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,13}[A-Za-z0-9*._-]?")

# What is open whatever the inventory says. A host without these loses its address, its neighbours or its path MTU.
ESSENTIALS = """\
		iif "lo" accept
		ct state established,related accept
		ip6 hoplimit 255 icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } accept
		ip6 saddr fe80::/10 icmpv6 type { mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept
		ct state invalid drop
		icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem, echo-request } accept
		icmp type { destination-unreachable, time-exceeded, parameter-problem, echo-request } accept
		udp sport 67 udp dport 68 accept comment "DHCP"
		ip6 saddr fe80::/10 udp sport 547 udp dport 546 accept comment "DHCPv6"
"""
LOG = '\t\tlimit rate 5/second burst 20 packets log prefix "vllm-fleet drop: "\n'

RULESET = """\
# Made by the role gpufleet.llm.firewall: change the inventory, not this file. It replaces one table at once, and touches no other.
table inet vllm_fleet
delete table inet vllm_fleet
table inet vllm_fleet {{
	# what is for this host itself
	chain input {{
		type filter hook input priority filter; policy drop;
{essentials}{input}{log}\t}}

	# what is for containers: before Docker's own chains, whose accept does not undo a drop here
	chain forward {{
		type filter hook forward priority filter - 10; policy accept;
		ct state established,related accept
{containers}		ct status dnat jump published
{routed}	}}
{egress}
	# ports that containers publish, by the port that was asked for: Docker has rewritten address and port by now
	chain published {{
{published}{log}		drop
	}}
}}
"""


# A protocol without ports, by its number: not every host knows its name.
VRRP = "112"


@dataclass(frozen=True)
class Rule:
    """Networks that may reach ports, or speak a protocol that has none."""

    name: str
    ports: Sequence[str]
    networks: Sequence[str]
    protocol: str = "tcp"


def ssh(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """The way in for administrators."""
    return [Rule("SSH", [str(port) for port in settings["ssh_ports"]], settings["admin_networks"])]


def other_gateways(host: str, settings: Mapping[str, Any]) -> list[str]:
    """The gateways beside this one; none where the host is no gateway."""
    gateways = settings["gateways"]
    return [name for name in gateways if name != host] if host in gateways else []


def gateway(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """What clients talk to, on gateways."""
    if host not in settings["gateways"]:
        return []
    return [Rule("gateway", [str(port) for port in settings["gateway_ports"]], settings["client_networks"])]


def challenges(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """Where gateways ask each other for the challenges of a certificate authority (ACME), when they have their certificates from one."""
    others = (
        [fleet.fleet_address(hostvars, name) for name in other_gateways(host, settings)]
        if settings["challenge_ports"]
        else []
    )
    return [Rule("challenges", [str(port) for port in settings["challenge_ports"]], others)]


def virtual_address(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """What gateways that share an address tell each other (VRRP)."""
    others = (
        [fleet.fleet_address(hostvars, name) for name in other_gateways(host, settings)]
        if settings["virtual_address"]
        else []
    )
    return [Rule("virtual address", [], others, VRRP)]


def instances(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """Each vLLM instance for the gateways, and for nobody else. Not when it listens on loopback only."""
    gateways = settings["gateways"]
    if host not in settings["vllm_hosts"] or list(gateways) == [host]:
        return []
    found = fleet.instances(hostvars, [host])
    addresses = [fleet.fleet_address(hostvars, name) for name in gateways] if found else []
    return [Rule(f"vLLM {instance.name}", [str(instance.port)], addresses) for instance in found]


def agent(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """What tells the state and the metrics of instances, for the gateways and for those who collect metrics."""
    if host not in settings["vllm_hosts"] or not fleet.instances(hostvars, [host]):
        return []
    gateways = [fleet.fleet_address(hostvars, name) for name in settings["gateways"] if name != host]
    ports = [str(port) for port in settings["agent_ports"]]
    return [Rule("agent", ports, [*gateways, *settings["monitoring_networks"]])]


def models(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """What inference hosts copy models from each other by, where they do."""
    if host not in settings["vllm_hosts"] or not settings["model_ports"]:
        return []
    others = [fleet.fleet_address(hostvars, name) for name in settings["vllm_hosts"] if name != host]
    return [Rule("models", [str(port) for port in settings["model_ports"]], others)]


def metrics(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """What exporters of metrics listen on, for those who collect them."""
    return [Rule("metrics", [str(port) for port in settings["metrics_ports"]], settings["monitoring_networks"])]


def extra(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """What the inventory opens beside that."""
    return [
        Rule(entry["name"], [str(port) for port in entry["ports"]], entry["networks"], entry.get("protocol") or "tcp")
        for entry in settings["allow"]
    ]


# Ports between the hosts of an instance that spans several will be one more of these.
SOURCES: tuple[Callable[[fleet.HostVars, str, Mapping[str, Any]], list[Rule]], ...] = (
    ssh, gateway, challenges, virtual_address, instances, agent, models, metrics, extra,
)  # fmt: skip


def rules(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[Rule]:
    """Everything that is open on a host, in a fixed order. What no network may reach or has no port is left out."""
    found = [rule for source in SOURCES for rule in source(hostvars, host, settings)]
    return [rule for rule in found if (rule.ports or rule.protocol == VRRP) and rule.networks]


def lines(found: Sequence[Rule], published: bool) -> str:
    """Rules as nftables reads them, for ports of the host or for those that containers publish."""
    told = []
    for rule in found:
        if rule.protocol == VRRP:
            told += (
                []
                if published
                else [
                    f"\t\t{source}ip protocol {VRRP} accept {comment(rule.name)}\n" for source in matches(rule.networks)
                ]
            )
            continue
        port = f"meta l4proto {rule.protocol} ct original proto-dst" if published else f"{rule.protocol} dport"
        told += [
            f"\t\t{source}{port} {port_set(rule.ports)} accept {comment(rule.name)}\n"
            for source in matches(rule.networks)
        ]
    return "".join(told)


def ruleset(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> str:
    """The whole file, as `nft -f` reads it."""
    found = rules(hostvars, host, settings)
    interfaces = settings["container_interfaces"]
    runtimes = firewall_egress.runtimes(hostvars, host, settings)
    leaving = "jump leaving" if "docker" in runtimes else "accept"
    return RULESET.format(
        essentials=ESSENTIALS,
        input=lines(found, published=False),
        published=lines(found, published=True),
        # a container's own connections are no business of a firewall for what comes in
        containers="".join(f'\t\tiifname "{name}" {leaving}\n' for name in interfaces),
        # nobody but the host itself and other containers reaches a container past its published ports
        routed="".join(f'\t\toifname "{name}" drop\n' for name in interfaces),
        log=LOG if settings["log_drops"] else "",
        egress=firewall_egress.chains(hostvars, runtimes, settings),
    )


# --- mistakes in the inventory


def entries_of(value: Any) -> list[Any]:
    """A list; what is none is told by the argument spec."""
    return list(value) if isinstance(value, list) else []


def network_problems(variable: str, networks: Iterable[Any]) -> list[str]:
    """What is wrong with a list of networks."""
    problems = []
    for text in map(str, networks):
        try:
            ipaddress.ip_network(text)
        except ValueError:
            try:
                found = ipaddress.ip_interface(text)
            except ValueError:
                problems.append(
                    f"{variable} has {text!r}, which is no network; it takes networks and addresses such as 10.0.0.0/8, 192.0.2.7 and 2001:db8::/32"
                )
            else:
                problems.append(
                    f"{variable} has {text}, which is neither a network nor one address; write {found.network} or {found.ip}"
                )
    return problems


def port_problems(variable: str, ports: Iterable[Any], ranges: bool = False) -> list[str]:
    """What is wrong with a list of ports."""
    right = "a number from 1 to 65535" + (", or a range such as 30000-30100" if ranges else "")
    return [
        f"{variable} has {str(port)!r}; a port is {right}"
        for port in ports
        if not is_ports(str(port)) or ("-" in str(port) and not ranges)
    ]


def allow_problems(variable: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the rules that the inventory adds. Missing keys are told by the argument spec."""
    problems = []
    names: list[str] = []
    for number, entry in enumerate(entries):
        name = str(entry.get("name", ""))
        where = f"{variable}[{number}] ({name})"
        if not NAME.fullmatch(name):
            problems.append(
                f"{variable}[{number}]: name is {name!r}; it must be 1 to 63 letters, digits, blanks, dots, - and _"
            )
        elif name in names:
            problems.append(f"{variable}: the name {name} is used twice; give each rule a name of its own")
        names.append(name)
        for key in ("ports", "networks"):
            if entry.get(key) == []:
                problems.append(f"{where}: {key} is empty, so it would open nothing; say which, or leave the rule out")
        problems += port_problems(f"{where}: ports", entries_of(entry.get("ports")), ranges=True)
        problems += network_problems(f"{where}: networks", entries_of(entry.get("networks")))
    return problems


def interface_problems(names: Iterable[Any]) -> list[str]:
    """What is wrong with the names of the containers' interfaces."""
    return [
        f"firewall_container_interfaces has {name!r}; it takes names of interfaces, of at most 15 characters, that may end in *, such as docker0 and br-*"
        for name in map(str, names)
        if not INTERFACE.fullmatch(name) or "*" in name[:-1]
    ]


def problems(hostvars: fleet.HostVars, host: str, settings: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with what the inventory says, one sentence each."""
    found = []
    for name in ("ssh_ports", "admin_networks"):
        if not settings[name]:
            found.append(
                f"firewall_{name} is empty, so nobody could log in any more; say {'which' if 'ports' in name else 'who may'}"
            )
    for name in ("ssh_ports", "gateway_ports", "metrics_ports"):
        found += port_problems(f"firewall_{name}", entries_of(settings[name]))
    for name in ("admin_networks", "client_networks", "monitoring_networks", "egress_closed"):
        found += network_problems(f"firewall_{name}", entries_of(settings[name]))
    for name in ("allow", "egress_allow"):
        entries = [entry for entry in entries_of(settings[name]) if isinstance(entry, Mapping)]
        found += allow_problems(f"firewall_{name}", entries)
    found += interface_problems(entries_of(settings["container_interfaces"]))
    if not found and all(isinstance(settings[name], list) for name in LISTS):
        try:
            rules(hostvars, host, settings)
        except fleet.FleetError as error:
            found.append(str(error))
        except (KeyError, TypeError):
            pass  # what is missing or of a wrong type is told by the argument spec
    return found
