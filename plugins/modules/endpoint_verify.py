#!/usr/bin/python
# Copyright: The vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Proves an OpenAI-compatible endpoint from the outside, as a client sees it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: endpoint_verify
short_description: Proves an OpenAI-compatible HTTPS endpoint from the outside, as a client
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
extends_documentation_fragment: [gpufleet.llm.endpoint]
description:
  - Asks an endpoint what a client would ask it and says for each check whether the answer was the right one.
  - Checks the certificate (chain, name, days left), that a request without a key or with a wrong one is refused, that
    exactly the client's models are listed, that each of them completes a prompt and streams an answer piece by piece (or returns an
    embedding, when it is a model for that) and does so by its first alias, that a model that does not exist is refused, and that
    paths which must not be public are not.
  - Never fails because of an answer; look at RV(verified) or RV(failures). Changes nothing.
options:
  api_key:
    description: The key of a client.
    type: str
    required: true
  routes:
    description: The models that the client may ask for. No others may be listed, and each of them has to answer.
    type: list
    elements: dict
    required: true
    suboptions:
      model:
        description: Its name.
        type: str
        required: true
      aliases:
        description: Its other names.
        type: list
        elements: str
        default: []
      paths:
        description:
          - Paths that the gateway lets through. What a model is for says it itself; it is asked by the first of these paths that it answers, for a
            completion, a transcription, an embedding, a rank, a class or a pooled output. A model that completes is asked for a stream, too.
          - Without any that can be asked, the model is only listed. What is left out are those that gateways let through unless they are told
            otherwise.
        type: list
        elements: str
  forbidden_paths:
    description: Paths that have to be answered with 404, key or not.
    type: list
    elements: str
    default: [/metrics, /invocations]
  minimum_days:
    description: The certificate has to be valid for at least this many days more.
    type: int
    default: 7
  timeout:
    description: Seconds that one answer may take.
    type: int
    default: 120
attributes:
  check_mode:
    description: Can run in check_mode and return changed status prediction without modifying target.
    support: full
    details: Asks nothing in check mode.
"""

EXAMPLES = r"""
- name: The endpoint answers as it should
  gpufleet.llm.endpoint_verify:
    url: https://llm.example.com
    api_key: "{{ vault_team_a_key }}"
    routes:
      - {model: qwen2.5-7b, aliases: [gpt-4o]}
  delegate_to: localhost
  register: endpoint
  failed_when: not endpoint.verified
"""

RETURN = r"""
rows:
  description: One entry for each check that was made, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{check: certificate, result: ok, detail: "TLSv1.3, valid for 89 more days"}]
failures:
  description: The rows whose result is not V(ok).
  returned: always
  type: list
  elements: dict
verified:
  description: Whether every check passed.
  returned: always
  type: bool
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import ARGUMENTS as ENDPOINT
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import RULES, Endpoint
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint_checks import ROUTE, Route, verify

ARGUMENTS: dict[str, Any] = {
    **ENDPOINT,
    "api_key": {"type": "str", "required": True, "no_log": True},
    "routes": {"type": "list", "elements": "dict", "required": True, "options": ROUTE},
    "forbidden_paths": {"type": "list", "elements": "str", "default": ["/metrics", "/invocations"]},
    "minimum_days": {"type": "int", "default": 7},
    "timeout": {"type": "int", "default": 120},
}


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        **RULES,
        supports_check_mode=True,
    )
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, rows=[], failures=[], verified=False)
    try:
        endpoint = Endpoint.of(given, given["api_key"])
    except (ValueError, OSError) as error:
        module.fail_json(msg=str(error))
    routes = [Route.of(entry) for entry in given["routes"]]
    rows = verify(endpoint, routes, given["forbidden_paths"], given["minimum_days"])
    failures = [entry for entry in rows if entry["result"] != "ok"]
    module.exit_json(changed=False, rows=rows, failures=failures, verified=not failures)


if __name__ == "__main__":
    main()
