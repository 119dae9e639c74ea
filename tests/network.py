"""What one test host sees of another over the network."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from testinfra.host import Host

from tests.hosts import hosts
from tests.roles import host_name

# Runs on the host that looks.
SCAN = Path(__file__).with_name("scan_ports.py").read_text()


def address_of(host: Host, family: int = 4) -> str:
    """One of the addresses of a host."""
    return hosts.addresses(host_name(host))[0 if family == 4 else 1]


def scan(source: Host | str, target: Host | str, ports: Iterable[int], family: int = 4) -> dict[str, Any]:
    """What one host sees of another's ports: the `open` ones, and how many were `refused`. What a firewall drops says nothing.

    The source may be the name of a host, the target an address.
    """
    address = target if isinstance(target, str) else address_of(target, family)
    done = subprocess.run(
        ["docker", "exec", "--interactive", source if isinstance(source, str) else host_name(source), "python3", "-"],
        input=f"{SCAN}\n\nmain({address!r}, {list(ports)})\n", text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
