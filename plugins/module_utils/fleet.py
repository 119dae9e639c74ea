"""What the inventory says: hosts, instances, backends, routes and clients, and who reaches whom. The one place that reads `vllm_instances`,
`gateway_routes` and `gateway_clients` of the hosts.

Decided from the inventory alone, never from facts, so --limit changes nothing.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
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
# How a route chooses among its backends; the first is the default.
BALANCES = ("least", "prefix", "session")
# What tells one session from another where a request has it; then `prompt_cache_key` and `user` of its body.
SESSION_HEADER = "x-session-id"
MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d(?::\d\d)?)(?:\.\d+)?([Zz]|[+-]\d\d:\d\d)?)?")

# With these a request can name an address that the server connects to: media, and the peer that has a prompt's cache.
FETCHING_OPTIONS = ("allowed-media-domains", "kv-transfer-config", "ec-transfer-config")

# The variables of a host that say what it serves, and where.
OF_BACKENDS = ("vllm_instances", "fleet_address", "ansible_host", "host_agent_port", "fleet_backend_tls")

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
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
    """What clients may ask for: the model that they name, the instance that answers, and how."""

    model: str
    instance: str
    aliases: tuple[str, ...] = ()
    # Nothing: those of gateway_paths that the instance can have.
    paths: tuple[str, ...] | None = None
    # Nothing: all of them.
    clients: tuple[str, ...] | None = None
    weight: int = 1
    balance: str = "least"
    session_header: str | None = None
    # Nothing: all backends but one.
    min_available: int | None = None
    retry: bool = True

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Route:
        """From an entry of `gateway_routes` without mistakes."""
        balance, least = str(entry.get("balance") or BALANCES[0]), entry.get("min_available")
        header = str(entry.get("session_header") or SESSION_HEADER).lower() if balance == "session" else None
        return cls(
            str(entry.get("model")), str(entry.get("instance")), names(entry.get("aliases")) or (), names(entry.get("paths")),
            names(entry.get("clients")), int(entry.get("weight", 1)), balance, header, None if least is None else int(least),
            truth(entry.get("retry", True)),
        )  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key of a client, by its SHA-256. The key itself is in no message, no repr and no comparison, and empty where only the hash is known."""

    sha256: str
    # In Unix seconds; nothing: it does not.
    expires: int | None = None
    text: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Key:
        """From an entry of a client's `keys`, or from a client with a `key`, without mistakes."""
        text, until = str(entry.get("key") or ""), entry.get("expires")
        digest = sha256(text) if text else str(entry.get("sha256")).lower()
        return cls(digest, None if until is None else moment(until), text)

    def expired(self, now: float) -> bool:
        """Whether it is refused at this time."""
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Client:
    """Who may ask a gateway, by which keys, for what, and how much."""

    name: str
    requests_per_minute: int
    concurrent_requests: int
    burst: int
    keys: tuple[Key, ...] = ()
    # Nothing: all that there are.
    models: tuple[str, ...] | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    priority: int | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Client:
        """From an entry of `gateway_clients` without mistakes; what is missing is told by the argument spec."""
        rate, burst = int(entry.get("requests_per_minute") or 0), entry.get("burst")
        if burst is None:
            burst = max(BURST_LEAST, math.ceil(rate * BURST_SECONDS / 60))
        optional = {
            name: int(entry[name])
            for name in ("tokens_per_minute", "tokens_per_day", "tokens_per_month", "priority")
            if entry.get(name) is not None
        }
        keys = tuple(map(Key.of, entry.get("keys") or [entry]))
        return cls(
            str(entry.get("name")), rate, int(entry.get("concurrent_requests") or 0), int(burst), keys, names(entry.get("models")), **optional
        )  # fmt: skip

    def may(self, route: Route) -> bool:
        """Whether it may use a route."""
        return (route.clients is None or self.name in route.clients) and (
            self.models is None or route.model in self.models
        )

    def known_key(self, now: float) -> str:
        """A key that can be shown to a gateway: the one that lasts longest of those that are more than a hash; empty where there is none."""
        known = [key for key in self.keys if key.text and not key.expired(now)]
        return max(known, key=lambda key: math.inf if key.expires is None else key.expires).text if known else ""


def sha256(text: str) -> str:
    """How fleet.json and the gateways know a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def names(entry: Any) -> tuple[str, ...] | None:
    """A list of the inventory that may be left out, each thing once."""
    return None if entry is None else tuple(dict.fromkeys(map(str, entry)))


def truth(value: Any) -> bool:
    """A truth, which may have come as text."""
    return value if isinstance(value, bool) else str(value).lower() in ("1", "true", "yes", "on", "y", "t")


def moment(value: Any) -> int:
    """What `expires` says, in Unix seconds: a date (its first second) or a time of RFC 3339; without a zone, UTC. Raises ValueError."""
    if isinstance(value, date):  # what YAML makes of one without quotes
        value = value.isoformat()
    found = MOMENT.fullmatch(str(value).strip())
    if not found:
        raise ValueError("neither a date nor a time of RFC 3339")
    day, clock, zone = found.groups()
    zone = "+00:00" if zone in (None, "Z", "z") else zone
    return int(datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone}").timestamp())


def read(hostvars: HostVars, hosts: Sequence[str]) -> HostVars:
    """What decides about backends, each variable of a host rendered once: that is what takes long when there are many routes."""
    return {host: {name: hostvars[host].get(name) for name in OF_BACKENDS} for host in hosts if host in hostvars}


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


def backend_tls(hostvars: HostVars, host: str, gateways: Sequence[str]) -> bool:
    """Whether the instances of a host are to speak TLS: where the fleet wants it, and a network is between them and a gateway."""
    return (
        truth(hostvars[host].get("fleet_backend_tls") or False) and bind_address(hostvars, host, gateways) != LOOPBACK
    )


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
        options = entry.get("options")
        found.append(
            Instance(
                host, str(entry.get("name")), int(entry["port"]), str(entry.get("model", "")),
                options if isinstance(options, Mapping) else {},
            )
        )  # fmt: skip
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
