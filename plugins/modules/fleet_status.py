#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What runs on a host of the fleet and how it is, in one call: this is the part that runs there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_status
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Says what runs on a host and how it is
description:
  - Looks at the instances of a host with their units, what they do and what gateways do with them, at its GPUs, disks, certificates and updates, at who
    changes or silences it, and on a gateway at what it uses. It needs nothing to be there, and changes nothing.
  - Every part has a limit in time. One that cannot be had is named in C(missing), with why, and takes nothing else with it.
  - The task does not fail when the host cannot be reached or asked. RV(reached) and RV(why) say so, so that one task shows the rest of the fleet.
options:
  config_path:
    description: Directory of the instances, as M(gpufleet.llm.vllm_generation) takes it.
    type: path
    default: /etc/vllm
  patience:
    description: Seconds that programs of the host, such as C(nvidia-smi), have for their answers. An engine has three of them for its metrics.
    type: float
    default: 5
  sample_seconds:
    description: Seconds between the two looks at the metrics of each instance that tell its tokens per second. 0 looks once.
    type: float
    default: 1
attributes:
  check_mode:
    description: It never changes anything.
    support: full
"""

EXAMPLES = r"""
- name: The host is looked at
  gpufleet.llm.fleet_status:
  register: status_found
"""

RETURN = r"""
reached:
  description: Whether the host answered.
  returned: always
  type: bool
why:
  description: Why it did not; empty when it did.
  returned: always
  type: str
status:
  description: What was found, in the form that docs/status.md describes for a host.
  returned: when the host answered
  type: dict
asked_at:
  description: When the answer was there, by the clock of the controller, in seconds of the epoch.
  returned: always
  type: float
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.fleet_status_host import Look

ARGUMENTS: dict[str, Any] = {
    "config_path": {"type": "path", "default": "/etc/vllm"},
    "patience": {"type": "float", "default": 5.0},
    "sample_seconds": {"type": "float", "default": 1.0},
}


def main() -> None:
    """Look, and tell."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    module.exit_json(changed=False, status=Look(module).everything())


if __name__ == "__main__":
    main()
