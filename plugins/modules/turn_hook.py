#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The documentation of an action plugin, which does all the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: turn_hook
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Calls the user's own commands when a rollout begins, gets on, fails or ends
description:
  - Runs on the controller, one command after the other, as who runs the playbook. Each gets the event as one line of JSON on its standard input.
  - A command that fails, or takes too long and is killed, is a warning. One that is C(required) fails the task.
options:
  event:
    description: What happened.
    type: str
    choices: [started, host_done, failed, finished]
    required: true
  hooks:
    description: Commands by event. Those of other events are left alone.
    type: dict
    default: {}
  details:
    description: What the JSON says beside C(event), C(host), C(by) and C(at). Nothing secret belongs there.
    type: dict
    default: {}
attributes:
  check_mode:
    description: Calls nothing, and returns what would be called.
    support: full
"""

EXAMPLES = r"""
- name: The chat hears of it
  gpufleet.llm.turn_hook:
    event: started
    hooks:
      started:
        - {command: [/usr/local/bin/announce, --channel, ops], seconds: 10}
    details: {act: upgrade, hosts: [gpu-1, gpu-2]}
"""

RETURN = r"""
called:
  description: For each command C(command), C(required), and C(problem), which is empty when it did its work.
  returned: always
  type: list
  elements: dict
told:
  description: What the commands read.
  returned: always
  type: str
"""
