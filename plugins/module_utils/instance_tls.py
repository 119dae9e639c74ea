# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""By what an instance of this host is asked: HTTP, or TLS where its generation says so, and then with the host's certificate of the fleet.

The role host_agent puts this file beside its programs, so it needs nothing but the standard library of the host's Python. A gateway, which reaches
instances of other hosts, hears it from their agents.
"""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path

HTTP, HTTPS = "http", "https"
# What the role fleet_authority makes: who asks an instance shows a certificate of the authority, and so does the instance.
CERTIFICATES = Path("/etc/ssl/vllm-fleet/fleet")
# With it in the configuration of a generation, vLLM speaks TLS.
OPTION = "ssl-certfile"


def scheme(config: str | Path) -> str:
    """By what an instance with this configuration, a config.yaml of a generation, is asked; empty where there is none that can be read."""
    try:
        lines = Path(config).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return HTTPS if any(line.startswith(f"{OPTION}:") for line in lines) else HTTP


def context() -> ssl.SSLContext:
    """What an instance is asked with: it has to have a certificate of the fleet for its address. Raises OSError, also for a file that is none."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.load_verify_locations(CERTIFICATES / "ca.pem")
    made.load_cert_chain(CERTIFICATES / "cert.pem", CERTIFICATES / "key.pem")
    return made


def context_of(config: str | Path) -> ssl.SSLContext | None:
    """What an instance with this configuration is asked with; nothing for one that speaks no TLS. Raises OSError."""
    return context() if scheme(config) == HTTPS else None


def connection(by: str, address: str, port: int, timeout: float) -> http.client.HTTPConnection:
    """A connection to an instance, not yet made. Never through a proxy: the instance is on this host. Raises OSError."""
    if by == HTTPS:
        return http.client.HTTPSConnection(address, port, timeout=timeout, context=context())
    return http.client.HTTPConnection(address, port, timeout=timeout)
