#!/usr/bin/python
# Copyright: The vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Proves which keys an OpenAI-compatible endpoint takes and which it refuses."""

from __future__ import annotations

DOCUMENTATION = r"""
module: endpoint_keys
short_description: Proves which keys an OpenAI-compatible HTTPS endpoint takes and which it refuses
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
extends_documentation_fragment: [gpufleet.llm.endpoint]
description:
  - Asks an endpoint for its models with each key and says whether the answer was the right one, 200 or 401.
  - Never fails because of an answer; look at RV(verified) or RV(rows). Changes nothing.
options:
  keys:
    description: The keys.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: What the rows call it.
        type: str
        required: true
      key:
        description: The key.
        type: str
        required: true
      accepted:
        description: Whether it has to be taken; otherwise it has to be refused.
        type: bool
        default: true
  timeout:
    description: Seconds that one answer may take.
    type: int
    default: 30
attributes:
  check_mode:
    description: Can run in check_mode and return changed status prediction without modifying target.
    support: full
    details: Asks nothing in check mode.
"""

EXAMPLES = r"""
- name: The new key is taken
  gpufleet.llm.endpoint_keys:
    url: https://llm.example.com
    keys:
      - {name: team-a, key: "{{ vault_team_a_key }}"}
      - {name: team-a before, key: "{{ vault_team_a_former_key }}", accepted: false}
  delegate_to: localhost
  register: keys
  failed_when: not keys.verified
"""

RETURN = r"""
rows:
  description: One entry for each key.
  returned: always
  type: list
  elements: dict
  sample: [{check: key team-a, result: ok, detail: "200, taken"}]
verified:
  description: Whether every answer was the right one.
  returned: always
  type: bool
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import ARGUMENTS as ENDPOINT
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import RULES, Endpoint
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint_keys import Shown, check_keys

KEY: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "key": {"type": "str", "required": True, "no_log": True},
    "accepted": {"type": "bool", "default": True},
}
ARGUMENTS: dict[str, Any] = {
    **ENDPOINT,
    "keys": {"type": "list", "elements": "dict", "required": True, "no_log": False, "options": KEY},
    "timeout": {"type": "int", "default": 30},
}


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, **RULES, supports_check_mode=True)
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, rows=[], verified=False)
    try:
        endpoint = Endpoint.of(given, "")
    except (ValueError, OSError) as error:
        module.fail_json(msg=str(error))
    rows = check_keys(endpoint, [Shown.of(entry) for entry in given["keys"]])
    module.exit_json(changed=False, rows=rows, verified=all(entry["result"] == "ok" for entry in rows))


if __name__ == "__main__":
    main()
