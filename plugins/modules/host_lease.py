#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""One run at a time changes a host: this is the part that runs there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_lease
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Makes sure that one run at a time changes a host
description:
  - A run takes the lease of its hosts before it changes them, and lets go of them at its end. Another run is refused meanwhile, and told who
    holds the host, from where and since when.
  - The lease is the file V(/run/vllm-fleet/lease.json) on the host. It is gone after a reboot.
  - A run that died keeps its leases. The next one from the same controller sees that the process is gone and takes them over. From another
    controller nobody can see that, and O(take_over) says so.
options:
  state:
    description:
      - V(held) takes the lease, or keeps the one that this run has.
      - V(released) lets go of it. A lease of another run is left alone.
    type: str
    choices: [held, released]
    default: held
  take_over:
    description: Take the lease from whoever holds it. Only when it is certain that that run is over.
    type: bool
    default: false
attributes:
  check_mode:
    description: Changes nothing and refuses nobody.
    support: full
notes:
  - The task never counts as a change, so that a run that changes nothing says so.
  - Tasks of one run have the process of C(ansible-playbook) in common; that, the boot of the controller and its process namespace tell
    whether a run is still there.
"""

EXAMPLES = r"""
- name: Nobody else changes these hosts
  gpufleet.llm.host_lease:
    take_over: "{{ fleet_break_lease | default(false) }}"

- name: Others may
  gpufleet.llm.host_lease:
    state: released
"""

RETURN = r"""
holder:
  description: Who holds the host now.
  returned: when state is held
  type: dict
  contains:
    who:
      description: User on the controller.
      type: str
    controller:
      description: Host name of the controller.
      type: str
    pid:
      description: Process of the run there.
      type: int
    since:
      description: When it took the lease, by the clock of the host, in UTC.
      type: str
taken_over:
  description: Whose lease was taken over, empty when there was none.
  returned: when state is held
  type: str
released:
  description: Whether this run held the lease.
  returned: when state is released
  type: bool
"""

import os
from dataclasses import asdict
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.lease import Lease, LeaseError, holder

ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["held", "released"], "default": "held"},
    "holder": {"type": "dict", "required": True},
    "instead_of": {"type": "str", "default": ""},
}


def main() -> None:
    """Do what the action plugin asks: it knows the controller."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
    )
    lease = Lease()
    try:
        wanted = holder(module.params["holder"])
        if module.params["state"] == "released":
            module.exit_json(changed=False, released=lease.release(wanted.run))
        present = lease.take(wanted, module.params["instead_of"])
    except (LeaseError, OSError) as error:
        module.fail_json(msg=f"The lease of this host: {error}")
    module.exit_json(changed=False, holder=asdict(present), held=present.run == wanted.run)


if __name__ == "__main__":
    main()
