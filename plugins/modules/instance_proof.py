#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What instances have to show before they get traffic: that they are warm, and that their answers are right."""

from __future__ import annotations

DOCUMENTATION = r"""
module: instance_proof
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Warms vLLM instances up and judges their answers before they get traffic
description:
  - Asks instances of this host directly, side by side, as their current generations say that they are asked, with the internal key of the host.
  - The warm-up comes first. Its prompts are asked as often and as many at once as they say, so that caches, kernels and graphs are there before clients
    come. Their answers are not judged, but each has to be one.
  - Then come the questions, one after the other. An answer is compared with a text, searched with a regular expression, or compared with what the
    release before said to the same question. A release that answers nonsense passes every health check; this is what it does not pass.
  - Text is generated greedily (temperature 0).
options:
  state:
    description:
      - V(proved) warms up and asks the questions.
      - V(remembered) asks the release that serves now the questions, and keeps in V(/var/lib/vllm-fleet/turn) the numbers of its answers, for the release
        that follows, and which questions it answers wrong. It never fails. While a turn has the instance out, as after a run that died, what was kept
        before stays.
    type: str
    choices: [proved, remembered]
    default: proved
  instances:
    description: Names of the instances.
    type: list
    elements: str
    required: true
  warm_up:
    description:
      - Prompts, each a dictionary with one of C(prompt), C(messages), C(input), C(documents) (with C(query)) and C(audio), and with C(times), C(parallel),
        C(max_tokens), C(fields) and C(instances) as the role C(turn) describes them.
    type: list
    elements: dict
    default: []
  questions:
    description:
      - The same, each with a C(name) and with C(expect), C(matches) or C(max_distance).
    type: list
    elements: dict
    default: []
  questions_mode:
    description: Whether a wrong answer fails, or is only a warning.
    type: str
    choices: [fail, warn]
    default: fail
  timeout:
    description: Seconds for all prompts and questions of an instance together.
    type: int
    default: 300
  config_path:
    description: Directory of the instances. The file C(internal_key) in it has the key.
    type: path
    default: /etc/vllm
attributes:
  check_mode:
    description: Asks nothing.
    support: full
"""

EXAMPLES = r"""
- name: The instance is warm and answers as it should
  gpufleet.llm.instance_proof:
    instances: [chat]
    warm_up:
      - {prompt: "{{ 'All work and no play. ' * 400 }}", max_tokens: 64, times: 16, parallel: 8}
    questions:
      - name: capital
        messages: [{role: user, content: "What is the capital of France? Answer with one word."}]
        matches: \bParis\b
      - name: known text
        prompt: We hold these truths to be self-evident, that all men are created equal
        max_distance: 0.2
"""

RETURN = r"""
proofs:
  description: What each instance showed.
  returned: when state is proved
  type: list
  elements: dict
  contains:
    name:
      description: The instance.
      type: str
    warm_up:
      description: C(asked), how many requests; C(seconds), how long all took; C(first_seconds) and C(last_seconds), how long the first and the last one did.
      type: dict
    questions:
      description: C(name), C(passed), C(answer), shortened, and C(distance) from the release before where it was judged.
      type: list
      elements: dict
    notes:
      description: What was not asked or not judged, and why.
      type: list
      elements: str
wrong:
  description: Wrong answers, a sentence each.
  returned: when state is proved
  type: list
  elements: str
remembered:
  description:
    - For each instance C(name); C(asked), how many answers are kept; C(kept), whether those of an earlier run stay; and C(notes), what was not answered.
  returned: when state is remembered
  type: list
  elements: dict
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import instance_proof, instance_proof_host

ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["proved", "remembered"], "default": "proved"},
    "instances": {"type": "list", "elements": "str", "required": True},
    "warm_up": {"type": "list", "elements": "dict", "default": []},
    "questions": {"type": "list", "elements": "dict", "default": []},
    "questions_mode": {"type": "str", "choices": ["fail", "warn"], "default": "fail"},
    "timeout": {"type": "int", "default": 300},
    "config_path": {"type": "path", "default": "/etc/vllm"},
}


def main() -> None:
    """Ask all instances side by side."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    given = module.params
    try:
        prompts = instance_proof.prompts(given["warm_up"])
        questions = instance_proof.questions(given["questions"])
    except (TypeError, ValueError) as error:
        module.fail_json(msg=f"A prompt or question cannot be asked: {error}.")
    remembers = given["state"] == "remembered"
    nothing: dict[str, Any] = {"remembered": []} if remembers else {"proofs": [], "wrong": []}
    if module.check_mode or not given["instances"] or not (prompts or questions):
        module.exit_json(changed=False, **nothing)
    try:
        key = Path(given["config_path"], "internal_key").read_text().strip()
    except OSError as error:
        if remembers:
            module.exit_json(changed=False, **nothing)
        module.fail_json(msg=f"The internal key cannot be read: {error}")
    with ThreadPoolExecutor(max_workers=len(given["instances"])) as pool:
        if remembers:
            told = pool.map(
                lambda name: instance_proof_host.remember(name, given["config_path"], key, questions, given["timeout"]),
                given["instances"],
            )
            module.exit_json(changed=False, remembered=list(told))
        proofs = list(
            pool.map(
                lambda name: instance_proof_host.prove(
                    name, given["config_path"], key, prompts, questions, given["timeout"]
                ),
                given["instances"],
            )
        )
    finish(module, proofs)


def finish(module: AnsibleModule, proofs: list[instance_proof_host.Proof]) -> None:
    """Say what came out."""
    failures = [f"{proof.name}: {text}" for proof in proofs for text in proof.failures]
    wrong = [f"{proof.name}: {text}" for proof in proofs for text in proof.wrong]
    result = {"proofs": [proof.told() for proof in proofs], "wrong": wrong}
    tolerated = module.params["questions_mode"] == "warn"
    if failures or (wrong and not tolerated):
        module.fail_json(msg="\n".join(failures + wrong), **result)
    for text in wrong:
        module.warn(f"A wrong answer, which turn_questions_mode lets pass: {text}")
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
