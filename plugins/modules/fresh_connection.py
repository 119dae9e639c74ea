#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fresh_connection
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Proves that a host can still be reached by a new connection
description:
  - Opens a second connection to the host with the connection plugin, address, port, user, key and jump hosts of the task, and logs in. An SSH
    connection that is kept open (ControlPersist) is not used and not touched, so what went wrong can still be put right through it.
  - Use it after a change of a firewall or of the SSH server, before what would undo the change is switched off.
options:
  timeout:
    description: Seconds until a connection has to have got in. One that is dropped or refused is tried again until then.
    type: int
    default: 15
attributes:
  check_mode:
    description: Connects to nothing.
    support: full
notes:
  - It proves as much as the way by which Ansible comes. Connection plugins that do not go over the network (C(local),
    C(community.docker.docker)) always get in, and need no proof, because neither a firewall nor an SSH server can shut them out.
  - C(become) is not used.
"""

EXAMPLES = r"""
- name: A new connection gets in
  gpufleet.llm.fresh_connection:
    timeout: 10
"""

RETURN = r"""
transport:
  description: Name of the connection plugin.
  returned: always
  type: str
  sample: ssh
seconds:
  description: How long it took.
  returned: always
  type: float
"""
