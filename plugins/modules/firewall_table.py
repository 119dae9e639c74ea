#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The nftables table of a host: this is the part that runs there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: firewall_table
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Replaces one nftables table without locking anybody out
description:
  - Owns the table C(inet vllm_fleet), and touches no other. It is replaced as a whole, in one transaction of the kernel.
  - New rules are tried first. A timer of the host, which needs neither the controller nor the network, brings those of before back unless the
    rules are kept in time. Prove in between that the way in is still open (M(gpufleet.llm.fresh_connection)).
  - The file that is loaded at boot is written only when rules are kept, so a reboot undoes rules that were only tried.
options:
  state:
    description:
      - V(looked) compares the table, the file and the unit with what is wanted, looks for what stands in the way, and changes nothing.
      - V(tried) loads the rules and sets the timer. What a run that died left behind is undone first.
      - V(kept) stops the timer, writes the file, and enables the unit that loads it at boot. It fails when the timer was faster.
      - V(undone) brings the rules of before back at once.
      - V(alone) takes away by what iptables refuses what comes in, now and from the file that is loaded at boot. Its other rules stay.
    type: str
    choices: [looked, tried, kept, undone, alone]
    default: looked
  rules:
    description: The whole file, as C(nft -f) reads it. It has to replace the table C(inet vllm_fleet) and nothing else.
    type: str
    default: ""
  rollback_seconds:
    description: How long rules are tried.
    type: int
    default: 60
  host:
    description: Name of the host, for messages.
    type: str
    default: this host
  admin_networks:
    description: Networks that the rules let in by SSH. The connection that this module came by has to come from one of them.
    type: list
    elements: str
    default: [0.0.0.0/0, "::/0"]
  ssh_ports:
    description: Ports of SSH that the rules open. The connection that this module came by has to have arrived at one of them.
    type: list
    elements: int
    default: [22]
  container_interfaces:
    description: Interfaces of containers, as names that may end in V(*). None of them may lead out of the host.
    type: list
    elements: str
    default: []
  take_over:
    description: Whether another firewall that is active is going to be switched off, and so no obstacle.
    type: bool
    default: false
  beside:
    description: What is said of another firewall that stays.
    type: str
    choices: [refuse, warn, "off"]
    default: refuse
attributes:
  check_mode:
    description: Says what would change.
    support: full
  diff_mode:
    description: Shows the file that is loaded at boot.
    support: full
"""

EXAMPLES = r"""
- name: The firewall is looked at
  gpufleet.llm.firewall_table:
    rules: "{{ rules }}"
  register: look

- name: New rules are tried, proved and kept
  when: not look.in_place
  block:
    - name: They are loaded, and a timer would undo them
      gpufleet.llm.firewall_table:
        state: tried
        rules: "{{ rules }}"

    - name: A new connection gets in
      gpufleet.llm.fresh_connection:

    - name: They are kept
      gpufleet.llm.firewall_table:
        state: kept
        rules: "{{ rules }}"
  rescue:
    - name: The rules of before are back
      gpufleet.llm.firewall_table:
        state: undone
"""

RETURN = r"""
in_place:
  description: Whether the table, the file and the unit are as wanted, and no run is unfinished.
  returned: when state is looked
  type: bool
reason:
  description: What is not as wanted, empty when all is.
  returned: when state is looked
  type: str
  sample: the table was changed by somebody else
problems:
  description: Why the rules must not be loaded on this host, one sentence each.
  returned: when state is looked
  type: list
  elements: str
others:
  description: Other firewalls that are active and are to be taken over, V(ufw), V(firewalld) or V(iptables).
  returned: when state is looked
  type: list
  elements: str
client:
  description: Address that the SSH connection of this run comes from, empty without one, and where it comes from the host itself by a tunnel.
  returned: when state is looked
  type: str
undone:
  description: Whether there was anything to undo.
  returned: when state is undone
  type: bool
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.firewall_host import Firewall, FirewallError
from ansible_collections.gpufleet.llm.plugins.module_utils.firewall_obstacles import beside, obstacles
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands

ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["looked", "tried", "kept", "undone", "alone"], "default": "looked"},
    "rules": {"type": "str", "default": ""},
    "rollback_seconds": {"type": "int", "default": 60},
    "host": {"type": "str", "default": "this host"},
    "admin_networks": {"type": "list", "elements": "str", "default": ["0.0.0.0/0", "::/0"]},
    "ssh_ports": {"type": "list", "elements": "int", "default": [22]},
    "container_interfaces": {"type": "list", "elements": "str", "default": []},
    "take_over": {"type": "bool", "default": False},
    "beside": {"type": "str", "choices": ["refuse", "warn", "off"], "default": "refuse"},
}
FLUSHES = (
    "nftables.service is in use on %s, and /etc/nftables.conf begins with `flush ruleset`: each time it is loaded, and when the unit is stopped, the "
    "tables of everybody are deleted, Docker's among them. Those of this role come right back, Docker's when it is restarted. Replace `flush ruleset` "
    "by deleting the tables of that file by name."
)


def main() -> None:
    """Do what is asked for."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    given = module.params
    firewall = Firewall(commands(module))
    state = given["state"]
    look = firewall.look(given["rules"]) if state in ("looked", "tried") else None
    try:
        if look and state == "looked":
            client = firewall.client()
            if look.flushes:
                module.warn(FLUSHES % given["host"])
            others = beside(given["host"], look, given["take_over"])
            for sentence in others if given["beside"] == "warn" else ():
                module.warn(sentence)
            module.exit_json(
                changed=False,
                in_place=look.in_place,
                reason=look.reason,
                others=look.others if given["take_over"] else [],
                client=client[0] if client else "",
                problems=obstacles(given["host"], client, firewall.uplinks(), given)
                + (others if given["beside"] == "refuse" else []),
            )
        if look:
            if not module.check_mode:
                firewall.try_out(given["rules"], given["rollback_seconds"])
            name = str(firewall.boot_file)
            diff = {"before": look.boot_text, "after": given["rules"], "before_header": name, "after_header": name}
            module.exit_json(changed=True, diff=diff)
        if module.check_mode:
            module.exit_json(changed=state in ("kept", "alone"))
        if state == "kept":
            firewall.keep(given["rules"])
            module.exit_json(changed=True)
        if state == "alone":
            firewall.take_over()
            module.exit_json(changed=True)
        undone = firewall.undo()
        module.exit_json(changed=undone, undone=undone)
    except (FirewallError, OSError) as error:
        module.fail_json(msg=f"The firewall of {given['host']}: {error}")


if __name__ == "__main__":
    main()
