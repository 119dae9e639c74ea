#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Which packages a role brings to a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: package_record
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Notes which packages a role brings to a host
description:
  - Adds to C(/var/lib/vllm-fleet/packages/ROLE), one name a line, the packages that are installed and were not before.
  - Called before and after an installation. A run that dies on the way has noted what it asked for.
  - M(gpufleet.llm.uninstall) removes packages by these files, and no others.
options:
  role:
    description: The role that brings them.
    type: str
    required: true
  before:
    description: Names of the packages that were there before the installation.
    type: list
    elements: str
    required: true
  asked:
    description: Names of the packages that are about to be installed. Empty after the installation.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Notes nothing.
    support: full
"""

EXAMPLES = r"""
- name: What is brought is noted
  gpufleet.llm.package_record:
    role: gateway
    before: "{{ ansible_facts['gpufleet'].packages | list }}"
    asked: [nginx]
"""

RETURN = r"""
packages:
  description: The packages that the role has brought, as they are noted now.
  returned: always
  type: list
  elements: str
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import host, package_record

ARGUMENTS: dict[str, Any] = {
    "role": {"type": "str", "required": True},
    "before": {"type": "list", "elements": "str", "required": True},
    "asked": {"type": "list", "elements": "str", "default": []},
}


def main() -> None:
    """Note what came."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    given = module.params
    noted = package_record.recorded(given["role"])
    # apt takes a version behind the name: nginx=1.26.3-3
    asked = [name.partition("=")[0] for name in given["asked"]]
    brought = set(asked or host.packages()) - set(given["before"])
    names = sorted(brought.union(noted))
    if names != noted and not module.check_mode:
        try:
            package_record.record(given["role"], names)
        except OSError as error:
            module.fail_json(msg=f"The packages of the role {given['role']} cannot be noted: {error}")
    # A note on the way is no change of the host that anybody asked for.
    module.exit_json(changed=False, packages=names)


if __name__ == "__main__":
    main()
