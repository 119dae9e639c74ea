#!/usr/bin/python
# Copyright: The vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Asks the models of an OpenAI-compatible endpoint a question, as a client."""

from __future__ import annotations

DOCUMENTATION = r"""
module: endpoint_ask
short_description: Asks the models of an OpenAI-compatible HTTPS endpoint a question, as a client
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
extends_documentation_fragment: [gpufleet.llm.endpoint]
description:
  - Asks each model by the first way that it has, a chat before a completion, and tells its answer and how long its first token took. What generates no
    text, such as a model for embeddings, is asked for the smallest answer of its kind.
  - Never fails because of an answer; look at RV(verified). Changes nothing.
options:
  api_key:
    description: The key of a client.
    type: str
    required: true
  routes:
    description: The models to ask.
    type: list
    elements: dict
    required: true
    suboptions:
      model:
        description: Its name.
        type: str
        required: true
      aliases:
        description: Its other names, which are not asked.
        type: list
        elements: str
        default: []
      paths:
        description: Paths that the gateway lets through. What is left out are those that gateways let through unless they are told otherwise.
        type: list
        elements: str
  prompt:
    description: The question.
    type: str
    required: true
  tokens:
    description: How long an answer may be.
    type: int
    default: 64
  timeout:
    description: Seconds that one answer may take.
    type: int
    default: 120
attributes:
  check_mode:
    description: Asks nothing.
    support: full
"""

EXAMPLES = r"""
- name: What do the models say
  gpufleet.llm.endpoint_ask:
    url: https://llm.example.com
    api_key: "{{ vault_team_a_key }}"
    routes:
      - {model: qwen2.5-7b}
    prompt: What is the capital of France?
  delegate_to: localhost
"""

RETURN = r"""
rows:
  description: One entry for each model, with C(check), C(result) and C(detail), which has the times and the answer.
  returned: always
  type: list
  elements: dict
  sample: [{check: ask qwen2.5-7b, result: ok, detail: "first token after 0.09 s, 7 pieces in 0.31 s: It is Paris."}]
verified:
  description: Whether every model answered.
  returned: always
  type: bool
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import endpoint_ask
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import ARGUMENTS as ENDPOINT
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import RULES, Endpoint
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint_checks import ROUTE, Route

ARGUMENTS: dict[str, Any] = {
    **ENDPOINT,
    "api_key": {"type": "str", "required": True, "no_log": True},
    "routes": {"type": "list", "elements": "dict", "required": True, "options": ROUTE},
    "prompt": {"type": "str", "required": True},
    "tokens": {"type": "int", "default": 64, "no_log": False},
    "timeout": {"type": "int", "default": 120},
}


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, **RULES, supports_check_mode=True)
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, rows=[], verified=False)
    try:
        endpoint = Endpoint.of(given, given["api_key"])
    except (ValueError, OSError) as error:
        module.fail_json(msg=str(error))
    routes = [Route.of(entry) for entry in given["routes"]]
    rows = endpoint_ask.rows(endpoint, routes, given["prompt"], given["tokens"])
    module.exit_json(changed=False, rows=rows, verified=all(row["result"] == "ok" for row in rows))


if __name__ == "__main__":
    main()
