#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What a host remembers of its turns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: turn_memory
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Reads and writes what a host remembers of its turns
description:
  - The last turns of a host, each with its act, its instances, how it ended and its seconds out of traffic, are in one small file on the host,
    C(/var/lib/vllm-fleet/turn/turns.json). The plan of the next one expects what they took.
  - A file that cannot be read counts as empty.
options:
  path:
    description: The file.
    type: path
    default: /var/lib/vllm-fleet/turn/turns.json
  add:
    description: A turn to remember. C(act), C(instances), C(result) and C(seconds).
    type: dict
attributes:
  check_mode:
    description: Remembers nothing.
    support: full
notes:
  - The task never counts as a change.
"""

EXAMPLES = r"""
- name: The turn is remembered
  gpufleet.llm.turn_memory:
    add: {act: upgrade, instances: [chat], result: done, seconds: 41.5}
"""

RETURN = r"""
turns:
  description: The turns that are remembered, the newest last.
  returned: always
  type: list
  elements: dict
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write

KEPT = 20
ARGUMENTS: dict[str, Any] = {
    "path": {"type": "path", "default": "/var/lib/vllm-fleet/turn/turns.json"},
    "add": {"type": "dict"},
}


def remembered(path: Path) -> list[dict[str, Any]]:
    """The turns in the file."""
    try:
        found = json.loads(read(path))
        return [{**turn, "seconds": float(turn["seconds"])} for turn in found]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def main() -> None:
    """Read, and add what is to be added."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    path, added = Path(module.params["path"]), module.params["add"]
    turns = remembered(path)
    if added and not module.check_mode:
        ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        turns = [*turns, {"ended": ended, **added, "seconds": round(float(added["seconds"]), 1)}][-KEPT:]
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write(path, "[\n" + ",\n".join(json.dumps(turn) for turn in turns) + "\n]\n", 0o644)
    module.exit_json(changed=False, turns=turns)


if __name__ == "__main__":
    main()
