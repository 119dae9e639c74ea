#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What a role has put on a host goes again."""

from __future__ import annotations

DOCUMENTATION = r"""
module: uninstall
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Takes from a host what a role has put there
description:
  - Stops and disables units, removes packages, users and files, in this order, and says of each thing that stays why it does.
  - Does nothing where neither a manifest of M(gpufleet.llm.tree) nor a note of M(gpufleet.llm.package_record) nor one of O(paths) is there, so that
    nothing is stopped which somebody else has put on the host.
  - A call that was killed is finished by the next one.
options:
  role:
    description: Whose things these are, as in the notes of M(gpufleet.llm.package_record).
    type: str
    required: true
  units:
    description: Units to stop and disable, by patterns. A template (C(vllm@.service)) is left to its file.
    type: list
    elements: str
    default: []
  services:
    description: Units of the packages, by patterns. They are stopped and disabled where the role has brought packages, else restarted without its files.
    type: list
    elements: str
    default: []
  trees:
    description: Names under which M(gpufleet.llm.tree) has put files in place.
    type: list
    elements: str
    default: []
  paths:
    description: Files and directories that are the role's alone, by patterns. They go with all that is in them.
    type: list
    elements: str
    default: []
  links:
    description: Links, by patterns, that go where they lead into one of O(paths).
    type: list
    elements: str
    default: []
  directories:
    description: Directories that others may use too, the innermost first. They go when they are empty.
    type: list
    elements: str
    default: []
  packages:
    description:
      - Packages that are the role's own. What else it has brought are tools, which stay while O(others) are on the host.
      - Only what the role has brought is removed, by its note. What something else needs stays.
    type: list
    elements: str
    default: []
  unpurged:
    description: Why packages are removed and their configuration stays. Without a reason it goes with them.
    type: str
    default: ''
  others:
    description: Roles that stay on the host.
    type: list
    elements: str
    default: []
  users:
    description: Users to remove. One that is not as the roles make them, without a home and below 1000, stays.
    type: list
    elements: str
    default: []
  restart:
    description: Units that are restarted afterwards where they run.
    type: list
    elements: str
    default: []
  commands:
    description: Programs that are called afterwards, with their arguments, without a shell.
    type: list
    elements: str
    default: []
  kept:
    description: What stays on purpose.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where it is, as a pattern. Nothing is said where nothing is.
        type: str
        required: true
      why:
        description: Why it stays, and how it goes.
        type: str
        required: true
      always:
        description: Whether it is told also where nothing else of the role is there, since nobody but the role can have put it there.
        type: bool
        default: false
attributes:
  check_mode:
    description: Says what would go, as far as that can be seen before.
    support: full
  diff_mode:
    description: Shows what goes, a line for each thing.
    support: full
"""

EXAMPLES = r"""
- name: What the role has put on the host is gone
  gpufleet.llm.uninstall:
    role: gateway
    units: [nginx.service]
    trees: [gateway]
    paths: [/var/lib/gateway]
    packages: [nginx]
    users: [gateway]
    kept:
      - {path: /etc/ssl/gateway, why: clients trust it}
"""

RETURN = r"""
removed:
  description: What went, or would go, in words.
  returned: always
  type: list
  elements: str
kept:
  description: What stays.
  returned: always
  type: list
  elements: dict
  contains:
    what:
      description: A path, or a thing such as C(package nginx).
      type: str
    why:
      description: Why it stays.
      type: str
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.tree import TreeError
from ansible_collections.gpufleet.llm.plugins.module_utils.uninstall_host import Leaves, UninstallError

WORDS: dict[str, Any] = {"type": "list", "elements": "str", "default": []}
ARGUMENTS: dict[str, Any] = {
    "role": {"type": "str", "required": True},
    "units": WORDS,
    "services": WORDS,
    "trees": WORDS,
    "paths": WORDS,
    "links": WORDS,
    "directories": WORDS,
    "packages": WORDS,
    "unpurged": {"type": "str", "default": ""},
    "others": WORDS,
    "users": WORDS,
    "restart": WORDS,
    "commands": WORDS,
    "kept": {
        "type": "list",
        "elements": "dict",
        "options": {
            "path": {"type": "str", "required": True},
            "why": {"type": "str", "required": True},
            "always": {"type": "bool", "default": False},
        },
        "default": [],
    },
}


def main() -> None:
    """Remove it, and say what stays."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    leaves = Leaves(module.params, module.run_command, module.check_mode)
    problem = ""
    try:
        leaves.remove()
    except (UninstallError, TreeError, OSError) as error:
        problem = str(error)
    result: dict[str, Any] = {"changed": bool(leaves.removed), "removed": leaves.removed, "kept": leaves.kept}
    if problem:
        module.fail_json(msg=f"{module.params['role']}: {problem}", **result)
    if module._diff:
        lines = "".join(f"{one}\n" for one in leaves.removed)
        result["diff"] = {"before_header": f"role {module.params['role']}", "before": lines, "after": ""}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
