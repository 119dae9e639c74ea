#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""A silence for monitoring: this is the part that runs on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_silence
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Opens and ends a silence of a host for monitoring
description:
  - Writes who changes the host, why and until when, in V(/var/lib/vllm-fleet/turn/silence.json). The agent of the host tells the end as a metric,
    C(vllm_fleet_silenced_until_timestamp_seconds), by which alerts are held back.
  - A silence ends by itself when its time is over, whatever happens to the run that opened it.
options:
  state:
    description:
      - V(open) begins one, or gives the one that there is a new end.
      - V(ended) removes it.
    type: str
    choices: [open, ended]
    default: open
  minutes:
    description: Minutes until it ends by itself.
    type: int
    default: 60
  instances:
    description: The instances that are changed.
    type: list
    elements: str
    default: []
  turn:
    description: What is done to them.
    type: str
    default: ""
  reason:
    description: Why.
    type: str
    default: ""
attributes:
  check_mode:
    description: Changes nothing.
    support: full
notes:
  - The task never counts as a change, so that a run that changes nothing says so.
"""

EXAMPLES = r"""
- name: Nobody is woken for this host
  gpufleet.llm.host_silence:
    minutes: 90
    instances: [chat]
    turn: upgrade

- name: Alerts of this host count again
  gpufleet.llm.host_silence:
    state: ended
"""

RETURN = r"""
silence:
  description: The silence that holds now, with C(until), C(since), C(by), C(turn), C(reason) and C(instances); empty when there is none.
  returned: always
  type: dict
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import silence
from ansible_collections.gpufleet.llm.plugins.module_utils.files import write

ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["open", "ended"], "default": "open"},
    "minutes": {"type": "int", "default": 60},
    "instances": {"type": "list", "elements": "str", "default": []},
    "turn": {"type": "str", "default": ""},
    "reason": {"type": "str", "default": ""},
    "by": {"type": "str", "required": True},
}


def main() -> None:
    """Do what the action plugin asks: it knows who runs it."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    given = module.params
    path = Path(silence.PATH)
    told = ""
    if given["state"] == "open":
        told = silence.opened(
            time.time(), given["minutes"], given["by"], given["turn"], given["reason"], given["instances"]
        )
    try:
        if module.check_mode:
            pass
        elif told:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write(path, told, 0o644)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        module.fail_json(msg=f"{path}: {error.strerror}")
    module.exit_json(changed=False, silence=json.loads(told or "{}"))


if __name__ == "__main__":
    main()
