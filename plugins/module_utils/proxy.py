# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The way out of hosts that reach the world by a proxy only: `fleet_proxy`, in the words of every program that downloads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.gpufleet.llm.plugins.module_utils.credentials import passwords

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SCHEMES = ("http", "https")
KEYS = (*SCHEMES, "no_proxy")
# What an address may have by RFC 3986, so that nothing has to be quoted in a file of apt or in an environment.
ADDRESS = re.compile(r"https?://(?:[\w.~!$&'()*+,;=:%-]+@)?(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?/?", re.ASCII)
DIRECT = re.compile(r"[\w.:*/\[\]-]+", re.ASCII)
# A network or the end of a name: programs compare with such, apt's configuration has no words for it.
HOST = re.compile(r"\w[\w.-]*", re.ASCII)
VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@dataclass(frozen=True)
class Proxy:
    """The proxy for addresses of each scheme, empty for none, and what is reached without one."""

    http: str = ""
    https: str = ""
    direct: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """As variables; some programs read them in small letters only, others in capitals only."""
        if not (self.http or self.https):
            return {}
        values = {"http_proxy": self.http, "https_proxy": self.https, "no_proxy": ",".join(self.direct)}
        return both_cases({name: value for name, value in values.items() if value})

    def apt(self) -> str:
        """As a file of apt's configuration."""
        # Said of both: where apt finds none for https it takes that of http.
        lines = [f'Acquire::{scheme}::Proxy "{getattr(self, scheme) or "DIRECT"}";' for scheme in SCHEMES]
        for name in filter(HOST.fullmatch, self.direct):
            lines += [f'Acquire::{scheme}::Proxy::{name} "DIRECT";' for scheme in SCHEMES]
        return "\n".join(lines) + "\n"

    def docker(self) -> dict[str, str]:
        """As `proxies` of Docker's engine."""
        values = {"http-proxy": self.http, "https-proxy": self.https, "no-proxy": ",".join(self.direct)}
        return {name: value for name, value in values.items() if value} if self.http or self.https else {}

    def secret(self) -> bool:
        """Whether an address has a password."""
        return bool(passwords(self.http, self.https))


def both_cases(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of proxies in small letters and in capitals, so that no program finds another one; others as they are."""
    found: dict[str, str] = {}
    for name, value in variables.items():
        same = [name.lower(), name.upper()] if name.lower() in VARIABLES else [name]
        found.update(dict.fromkeys(same, str(value)))
    return found


def proxy(asked: Any, fleet: Sequence[str]) -> Proxy:
    """What `fleet_proxy` asks for. An address that is left out is that of the other scheme. What is wrong with it was told before.

    `fleet` are the addresses of its hosts.
    """
    if problems(asked):
        return Proxy()
    http, https = asked.get("http"), asked.get("https")
    http, https = http if http is not None else https, https if https is not None else http
    if not (http or https):
        return Proxy()
    direct = [*LOOPBACK, *fleet, *(asked.get("no_proxy") or [])]
    return Proxy(str(http or ""), str(https or ""), tuple(dict.fromkeys(direct)))


def problems(asked: Any) -> list[str]:
    """What is wrong with `fleet_proxy`. No message shows an address, which may have a password."""
    right = "such as {http: 'http://proxy.example:3128', no_proxy: [.corp.example]}"
    if not isinstance(asked, Mapping):
        return [f"fleet_proxy must be a dictionary, {right}"]
    found = [f"fleet_proxy: key {key!r} is unknown; known are {', '.join(KEYS)}" for key in asked if key not in KEYS]
    for scheme in SCHEMES:
        address = asked.get(scheme, "")
        if address != "" and not (isinstance(address, str) and ADDRESS.fullmatch(address) and has_port(address)):
            found.append(
                f"fleet_proxy: {scheme} is no address of a proxy; it is http://NAME:PORT or https://NAME:PORT, with USER:PASSWORD@ before the name where "
                "the proxy asks for them, special characters in them as % and two digits (@ is %40)"
            )
    direct = asked.get("no_proxy", [])
    if not isinstance(direct, Sequence) or isinstance(direct, str):
        return [
            *found,
            "fleet_proxy: no_proxy must be a list of names and addresses, such as [.corp.example, 10.0.0.9]",
        ]
    found += [
        f"fleet_proxy: no_proxy has {entry!r}; an entry is a name, the end of a name (.corp.example) or an address"
        for entry in direct
        if not (isinstance(entry, str) and DIRECT.fullmatch(entry))
    ]
    return found


def has_port(address: str) -> bool:
    """Whether the port of an address is one, or none is named."""
    try:
        return urlsplit(address).port != 0
    except ValueError:
        return False
