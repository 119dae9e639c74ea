#!/usr/bin/env python3
"""Inventory of the demo fleet: the hosts that `make demo` started (.demo/fleet.json), or their names when none runs.

A file vars.json beside it has further variables of the hosts that run vLLM.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

directory = Path(os.environ.get("DEMO_DIR") or Path(__file__).resolve().parents[2] / ".demo")
try:
    fleet = json.loads((directory / "fleet.json").read_text())
except FileNotFoundError:
    fleet = {"gateway": {"demo-gateway": "192.0.2.1"}, "vllm": {"demo-gpu1": "192.0.2.2"}}  # RFC 5737: leads nowhere
inventory: dict[str, object] = {group: {"hosts": sorted(hosts)} for group, hosts in fleet.items()}
hostvars = {name: {"ansible_host": address} for hosts in fleet.values() for name, address in hosts.items()}
if (further := directory / "vars.json").exists():
    for name in fleet["vllm"]:
        hostvars[name] |= json.loads(further.read_text())  # of each host, so that they win over what the group has
inventory["_meta"] = {"hostvars": hostvars}
print(json.dumps(inventory))
