#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Whether sshd answers on the host itself. The action plugin of the same name logs in from the controller, where Ansible uses SSH."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ssh_prove
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Proves that one can log in by SSH
description:
  - Opens a new SSH connection from the controller, with the user, key, host keys, jump hosts and other settings of Ansible's own connection, but
    not through that connection, and with a key only.
  - V(before) tries that on the way that Ansible came in by, and looks whether the controller will know the host by the keys that it is to
    show. V(after) tries each port.
  - Where Ansible does not use SSH, nobody can log in from here. Then V(after) has the host connect to itself, as far as the offer to log in
    with a key.
options:
  stage:
    description: Whether the change is still to come.
    type: str
    choices: [before, after]
    required: true
  ports:
    description: Ports of the host that have to let one in.
    type: list
    elements: int
    required: true
  came_by:
    description: What M(gpufleet.llm.ssh_look) says of the present connection.
    type: dict
    default: {}
  offered:
    description: Public host keys that the host shows after the change, as type and base64.
    type: list
    elements: str
    default: []
  seconds:
    description: How long to try for each port.
    type: int
    default: 20
attributes:
  check_mode:
    description: Changes nothing.
    support: full
"""

EXAMPLES = r"""
- name: Ansible can log in anew
  gpufleet.llm.ssh_prove:
    stage: after
    ports: [22]
"""

RETURN = r"""
proved:
  description: What was tried, one sentence each.
  returned: success
  type: list
  elements: str
"""

import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

ARGUMENTS: dict[str, Any] = {
    "stage": {"type": "str", "choices": ["before", "after"], "required": True},
    "ports": {"type": "list", "elements": "int", "required": True},
    "came_by": {"type": "dict", "default": {}},
    "offered": {"type": "list", "elements": "str", "default": []},
    "seconds": {"type": "int", "default": 20},
}
# A login that offers nothing: what it is refused with tells what would be accepted.
CONNECT = [
    "ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "PreferredAuthentications=none", "-o", "StrictHostKeyChecking=no",
    "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5",
]  # fmt: skip
ACCEPTED = "Permission denied (publickey)"


def main() -> None:
    """Connect from the host to itself."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    proved = []
    for port in module.params["ports"] if module.params["stage"] == "after" else []:
        until = time.monotonic() + module.params["seconds"]
        while True:
            said = " ".join(module.run_command([*CONNECT, "-p", str(port), "nobody@127.0.0.1"])[2].split())
            if ACCEPTED in said:
                break
            if time.monotonic() > until:
                module.fail_json(msg=f"sshd does not offer a login by key on port {port}: {said}")
            time.sleep(1)
        proved.append(f"sshd offers a login by key, and nothing else, on port {port}")
    module.exit_json(changed=False, proved=proved)


if __name__ == "__main__":
    main()
