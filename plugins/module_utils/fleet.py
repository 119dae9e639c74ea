"""What the inventory says: hosts, instances, backends, routes and clients, and who reaches whom. The one place that reads `vllm_instances`,
`gateway_routes` and `gateway_clients` of the hosts.

Decided from the inventory alone, never from facts, so --limit changes nothing.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOOPBACK = "127.0.0.1"
# Where the agent of a host listens, unless host_agent_port says otherwise.
AGENT_PORT = 9440
DNS_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")

# What a user without rights may listen on.
PORTS = range(1024, 65536)
# When a client does not say otherwise, ten seconds' worth of its requests may come at once, at least five.
BURST_SECONDS = 10
BURST_LEAST = 5

# With these a request can name an address that the server connects to: media, and the peer that has a prompt's cache.
FETCHING_OPTIONS = ("allowed-media-domains", "kv-transfer-config", "ec-transfer-config")

HostVars = Mapping[str, Mapping[str, Any]]


class FleetError(Exception):
    """Something in the inventory that a person has to set right; the message names the host and the variable."""


@dataclass(frozen=True)
class Instance:
    """One vLLM server of one host, as an entry of its `vllm_instances` asks for it."""

    host: str
    name: str
    port: int
    model: str = ""

    @property
    def id(self) -> str:
        """How operators and state call it, such as `chat@gpu-1`."""
        return f"{self.name}@{self.host}"


@dataclass(frozen=True)
class Backend:
    """An instance as a gateway reaches it."""

    instance: Instance
    address: str

    @property
    def id(self) -> str:
        """That of its instance."""
        return self.instance.id

    @property
    def endpoint(self) -> str:
        """`address:port`, IPv6 in brackets."""
        return with_port(self.address, self.instance.port)


@dataclass(frozen=True)
class Route:
    """Which instance answers for a model that clients name."""

    model: str
    instance: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Route:
        """From an entry of `gateway_routes`."""
        return cls(str(entry.get("model")), str(entry.get("instance")))


@dataclass(frozen=True)
class Client:
    """Who may ask a gateway, and how much. Its key is in no message and no repr."""

    name: str
    requests_per_minute: int
    concurrent_requests: int
    burst: int
    key: str = field(default="", repr=False)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Client:
        """From an entry of `gateway_clients` without mistakes."""
        rate = int(entry["requests_per_minute"])
        burst = entry.get("burst")
        if burst is None:
            burst = max(BURST_LEAST, math.ceil(rate * BURST_SECONDS / 60))
        concurrent = int(entry["concurrent_requests"])
        return cls(str(entry["name"]), rate, concurrent, int(burst), str(entry.get("key", "")))


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


def agent_endpoint(hostvars: HostVars, host: str, gateways: Sequence[str]) -> str:
    """Where the gateways ask the agent of a host: at its fleet_address, or by loopback where it needs none."""
    port = int(hostvars[host].get("host_agent_port") or AGENT_PORT)
    try:
        return with_port(fleet_address(hostvars, host), port)
    except FleetError:
        if bind_address(hostvars, host, gateways) == LOOPBACK:
            return with_port(LOOPBACK, port)
        raise


def port_problem(port: Any) -> str:
    """What is wrong with the port of an instance; empty when it is fine."""
    if isinstance(port, int) and not isinstance(port, bool) and port in PORTS:
        return ""
    return f"port is {port!r}; it must be a number from {PORTS[0]} to {PORTS[-1]}"


def entries(hostvars: HostVars, hosts: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each host with each entry of its `vllm_instances`, in the order of the inventory, whatever is wrong with them."""
    for host in hosts:
        for entry in hostvars[host].get("vllm_instances") or []:
            yield host, entry


def instances(hostvars: HostVars, hosts: Sequence[str], name: str | None = None) -> list[Instance]:
    """The instances of these hosts, or those of one name."""
    found = []
    for host, entry in entries(hostvars, hosts):
        if name is not None and entry.get("name") != name:
            continue
        if problem := port_problem(entry.get("port")):
            raise FleetError(f"{host}: vllm_instances ({entry.get('name')}): {problem}")
        found.append(Instance(host, str(entry.get("name")), int(entry["port"]), str(entry.get("model", ""))))
    return found


def runtimes(hostvars: HostVars, host: str, fetching: bool = False) -> set[str]:
    """What runs the instances of a host, systemd or docker: of all, or of those that connect to where requests say."""
    return {
        str(entry.get("runtime") or hostvars[host].get("vllm_runtime") or "systemd")
        for _host, entry in entries(hostvars, [host])
        if not fetching or any((entry.get("options") or {}).get(name) for name in FETCHING_OPTIONS)
    }


def backends(hostvars: HostVars, instance: str, hosts: Sequence[str], gateways: Sequence[str]) -> list[Backend]:
    """The instances of one name on all hosts that have it, as gateways reach them, in the order of the inventory."""
    found = [Backend(one, bind_address(hostvars, one.host, gateways)) for one in instances(hostvars, hosts, instance)]
    endpoints = [backend.endpoint for backend in found]
    if repeated := sorted({endpoint for endpoint in endpoints if endpoints.count(endpoint) > 1}):
        raise FleetError(
            f"instance {instance!r} would be reached twice at {', '.join(repeated)}: "
            "vllm_instances or fleet_address is repeated"
        )
    return found
