#!/usr/bin/env python3
"""Inventory of the demo fleet: the hosts that `make demo` started (.demo/fleet.json), or their names when none runs, and how to reach them.

A file vars.json beside it has further variables of the hosts that run vLLM.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

directory = Path(os.environ.get("DEMO_DIR") or Path(__file__).resolve().parents[2] / ".demo").resolve()
try:
    fleet = json.loads((directory / "fleet.json").read_text())
except FileNotFoundError:
    fleet = {"gateway": {"demo-gateway": "192.0.2.1"}, "vllm": {"demo-gpu1": "192.0.2.2"}}  # RFC 5737: leads nowhere
inventory: dict[str, object] = {group: {"hosts": sorted(hosts)} for group, hosts in fleet.items()}
hostvars = {name: {"ansible_host": address} for hosts in fleet.values() for name, address in hosts.items()}
if (further := directory / "vars.json").exists():
    for name in fleet["vllm"]:
        hostvars[name] |= json.loads(further.read_text())  # of each host, so that they win over what the group has
# Not as templates in group_vars: what says how to connect, Ansible renders for every task of every host.
inventory["all"] = {
    "vars": {
        "demo_dir": str(directory),
        "demo_cores": len(os.sched_getaffinity(0)),
        "ansible_user": "fleet",
        "ansible_ssh_private_key_file": str(directory / "id_ed25519"),
        "ansible_ssh_common_args": f"-o IdentitiesOnly=yes -o UserKnownHostsFile={directory / 'known_hosts'}",
    }
}
inventory["_meta"] = {"hostvars": hostvars}
print(json.dumps(inventory))
