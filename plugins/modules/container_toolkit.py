#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The specification of the GPUs for containers: this is the part that runs on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_toolkit
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Keeps the specification by which containers get GPUs (CDI) what the GPUs are
description:
  - Compares what C(nvidia-ctk cdi list) names with what C(nvidia-smi -L) shows, parts of divided GPUs (MIG) included, and looks whether the
    libraries that the specification names are there.
  - Has NVIDIA's own unit make it again where it is wrong, and makes it itself where that unit does nothing. Removes it when the driver is gone.
options:
  state:
    description:
      - V(looked) says what is there and what is due, and changes nothing.
      - V(refreshed) puts the specification right.
    type: str
    choices: [looked, refreshed]
    default: looked
  apt:
    description: Options of M(gpufleet.llm.apt_source), which looks in the same call, as C(apt) of the result.
    type: dict
    default: {}
  host:
    description: Name of the host, for messages.
    type: str
    default: this host
attributes:
  check_mode:
    description: Says what would be done.
    support: full
"""

EXAMPLES = r"""
- name: Containers can have the GPUs as they are divided now
  gpufleet.llm.container_toolkit:
    state: refreshed
"""

RETURN = r"""
gpus:
  description: UUIDs of what a container can be given, GPUs or the parts of divided ones, as the driver shows them.
  returned: always
  type: list
  elements: str
pci_gpus:
  description: Number of NVIDIA's GPUs on the PCI bus.
  returned: always
  type: int
driver_problem:
  description: Why the driver shows no GPU, empty when it does.
  returned: always
  type: str
devices:
  description: Names that a container can ask for, without C(nvidia.com/gpu=).
  returned: always
  type: list
  elements: str
due:
  description: What is due, V(refresh) or V(remove), empty when nothing is.
  returned: always
  type: str
reason:
  description: Why it is due.
  returned: always
  type: str
other_specs:
  description: Other specifications of the same GPUs.
  returned: always
  type: list
  elements: str
legacy_hooks:
  description: Hooks by which containers got GPUs before.
  returned: always
  type: list
  elements: str
done:
  description: What was done, as in RV(due).
  returned: when state is refreshed
  type: str
done_reason:
  description: Why it was done.
  returned: when state is refreshed
  type: str
apt:
  description: What M(gpufleet.llm.apt_source) returns.
  returned: when O(apt) is given
  type: dict
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.apt_host import Apt
from ansible_collections.gpufleet.llm.plugins.module_utils.container_toolkit_host import Toolkit, ToolkitError
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands

ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["looked", "refreshed"], "default": "looked"},
    "apt": {"type": "dict", "default": {}},
    "host": {"type": "str", "default": "this host"},
}


def main() -> None:
    """Do what is asked for."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    given = module.params
    command = commands(module, "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    toolkit = Toolkit(command)
    found: dict[str, Any] = {}
    try:
        if given["apt"]:
            found["apt"] = Apt(command).look(given["apt"])
        if given["state"] == "looked":
            found.update(toolkit.look())
        elif module.check_mode:
            look = toolkit.look()
            found.update(look, done=look["due"], done_reason=look["reason"])
        else:
            found.update(toolkit.refresh())
    except (ToolkitError, OSError) as error:
        module.fail_json(msg=f"NVIDIA's container toolkit on {given['host']}: {error}")
    module.exit_json(changed=bool(found.get("done")), **found)


if __name__ == "__main__":
    main()
