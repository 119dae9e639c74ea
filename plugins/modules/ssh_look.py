#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What sshd of a host does, what it would do, and what speaks against changing it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ssh_look
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Compares what sshd does with what is wanted of it
description:
  - Asks C(sshd -T), C(ssh -Q) and systemd in one call, and changes nothing.
  - Where something differs, the new configuration is tried out as a whole, with the files of everybody else, before it is written
    anywhere that counts.
  - Says what would lock somebody out. Who Ansible logs in as, and by which port, it sees on the host itself.
options:
  settings:
    description: Directives and their values, in the order of the file. A directive that this sshd does not know is left out.
    type: dict
    required: true
  algorithms:
    description: Directives that take lists of algorithms, and the wanted ones. What the host does not offer is left out.
    type: dict
    required: true
  ports:
    description: Ports that sshd listens on. The one that Ansible comes in by stays open beside them.
    type: list
    elements: int
    required: true
  host_keys:
    description: V(strict) shows the ed25519 key and an RSA key of 4096 bits, V(compatible) also the other ones that are there.
    type: str
    choices: [strict, compatible]
    default: strict
  login_users:
    description: Users who have to be able to log in afterwards, beside the one that Ansible logs in as.
    type: list
    elements: str
    default: []
  authorized_keys:
    description: Keys of users, as dictionaries with C(user), C(keys) and C(exclusive).
    type: list
    elements: dict
    default: []
attributes:
  check_mode:
    description: Changes nothing.
    support: full
notes:
  - A directory V(/run/sshd) that is missing is there while the module runs, because sshd wants it.
"""

EXAMPLES = r"""
- name: The SSH server is looked at
  gpufleet.llm.ssh_look:
    settings: {PasswordAuthentication: "no"}
    algorithms: {Ciphers: [chacha20-poly1305@openssh.com, aes256-gcm@openssh.com]}
    ports: [22]
  register: __ssh_look
"""

RETURN = r"""
installed:
  description: Whether there is an sshd. Nothing else is returned if there is none.
  returned: always
  type: bool
good:
  description: Whether everything is as wanted.
  returned: always
  type: bool
differences:
  description: What is not as wanted.
  returned: always
  type: list
  elements: str
problems:
  description: What speaks against the change.
  returned: always
  type: list
  elements: str
softened:
  description: Lines in Match blocks of other files that take back what the role sets, for whom they match.
  returned: always
  type: list
  elements: str
lines:
  description: The lines of the drop-in.
  returned: always
  type: list
  elements: str
socket:
  description:
    - C(in_use) says whether systemd listens for sshd, C(moves) whether it has to listen elsewhere, and C(lines) are those of the drop-in of its
      unit, empty when it listens rightly without.
  returned: always
  type: dict
came_by:
  description: C(user), C(address), C(server) and C(port) of the SSH session that the module was run through, empty without one.
  returned: always
  type: dict
ports:
  description: The ports that sshd listens on after the change.
  returned: always
  type: list
  elements: int
host_keys:
  description: The host keys, each with C(path), C(type), C(bits), C(fingerprint), C(key), and whether it is C(offered) afterwards.
  returned: always
  type: list
  elements: dict
make_keys:
  description: The host keys that are missing, with C(path), C(type) and C(bits).
  returned: always
  type: list
  elements: dict
make_moduli:
  description: Whether the file of long moduli is missing or out of date.
  returned: always
  type: bool
include:
  description: Whether sshd_config reads the drop-ins.
  returned: always
  type: bool
add_keys:
  description: Entries of O(authorized_keys) that are not on the host as they should be.
  returned: always
  type: list
  elements: dict
save:
  description: Files that the change touches.
  returned: always
  type: list
  elements: str
pending:
  description: Whether a former change is neither proved nor undone.
  returned: always
  type: bool
"""

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.ssh_look_host import SSHD, Look, run_directory

ARGUMENTS: dict[str, Any] = {
    "settings": {"type": "dict", "required": True},
    "algorithms": {"type": "dict", "required": True},
    "ports": {"type": "list", "elements": "int", "required": True},
    "host_keys": {"type": "str", "choices": ["strict", "compatible"], "default": "strict"},
    "login_users": {"type": "list", "elements": "str", "default": []},
    "authorized_keys": {"type": "list", "elements": "dict", "default": [], "no_log": False},
}


def main() -> None:
    """Look, and tell."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    if not Path(SSHD).exists():
        module.exit_json(changed=False, installed=False, good=False)
    with run_directory():
        found = Look(module.params).run()
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
