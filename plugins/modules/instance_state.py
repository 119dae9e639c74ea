#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The operator's word on instances of a host, and waiting until gateways do as it says."""

from __future__ import annotations

DOCUMENTATION = r"""
module: instance_state
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Says whether gateways may use instances of a host, and waits until they do or do not
description:
  - Writes the operator's word on instances, V(up), V(drained) or V(stopped), to C(/var/lib/vllm-fleet/INSTANCE.json) on the host. Gateways hear of it
    within a second or two, from the agent of the host (role P(gpufleet.llm.host_agent#role)). It outlives a reboot.
  - Nothing is started or stopped.
  - "With O(turn) the word is one of a playbook's act and not a person's. A turn never changes a person's word: an instance that a person drained or
    stopped stays so, and RV(instances.left) says why. The word of a turn whose run died is taken over by the next one."
options:
  instances:
    description: Names of the instances.
    type: list
    elements: str
    required: true
  state:
    description:
      - V(up) lets gateways use the instances as soon as their checks say that they answer.
      - V(drained) has gateways send nothing more to them. What runs ends by itself.
      - V(stopped) is the same, and says that they are stopped on purpose, which roles and playbooks respect.
      - Without it nothing is said, and RV(instances) tells the words that there are.
    type: str
    choices: [up, drained, stopped]
  only:
    description: Changes only instances of which this was said before. RV(instances.untouched) tells the others.
    type: list
    elements: str
    choices: [up, drained, stopped]
    default: [up, drained, stopped]
  by:
    description: Who says it. By default the user and the host name of the controller.
    type: str
  reason:
    description: Why, for whoever looks next.
    type: str
    default: ''
  turn:
    description:
      - The act of the playbook whose word this is, such as V(upgrade). Empty where a person speaks.
      - With O(state=up) only words of turns are ended.
    type: str
    default: ''
  share:
    description:
      - Of one that is V(up), the percentage of a route's requests that gateways send to it at most, 1 to 100. With V(100) it gets as many as the others.
      - Where no other backend of the route can take a request, it gets that all the same.
    type: int
    default: 100
  timeout:
    description:
      - Seconds to wait until every gateway that can be heard has let the instances go and their requests have ended, or until it uses them again.
      - V(0) does not wait.
    type: float
    default: 60
  kept:
    description:
      - What to do when a gateway keeps an instance, because a route would fall below its C(min_available).
      - V(fail) puts back the word of before, after some seconds. V(wait) waits until O(timeout). V(force) has the gateways let go all the same.
    type: str
    choices: [fail, wait, force]
    default: fail
  engine_wait:
    description: Wait also until the metrics of the instances say that no request is running or waiting, whoever sent it.
    type: bool
    default: false
attributes:
  check_mode:
    description: Says what would change, and waits for nothing.
    support: full
notes:
  - A host without the role host_agent has no gateways that ask. There V(drained) does nothing and RV(skipped_reason) says so; V(stopped) is written
    for roles and playbooks, and V(up) ends it.
"""

EXAMPLES = r"""
- name: Nothing more comes to the instance, and what ran has ended
  gpufleet.llm.instance_state:
    instances: [chat]
    state: drained
    reason: new fan
    timeout: 600
    engine_wait: true

- name: Gateways use it again
  gpufleet.llm.instance_state:
    instances: [chat]
    state: up
"""

RETURN = r"""
instances:
  description: For each instance what became of it.
  returned: always
  type: dict
  contains:
    word:
      description: The word now, with C(operator), C(by), C(since), C(reason), C(turn), C(force) and C(share).
      type: dict
    before:
      description: The word before.
      type: dict
    untouched:
      description: Whether it was left alone because of O(only).
      type: bool
    left:
      description: Why a turn left it alone; empty when it did not.
      type: str
    seconds:
      description: How long it was waited for.
      type: float
    waiting:
      description: Gateways that were not done in the end, and why.
      type: dict
    running:
      description: Requests that its engine still had in the end, where O(engine_wait) asked.
      type: int
skipped_reason:
  description: Why nothing was done.
  returned: when the host has no agent
  type: str
"""

import json
import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import instance_state
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_state_host import InstanceHost

NO_AGENT = "no gateway asks this host: it has no agent (role host_agent)"
ARGUMENTS: dict[str, Any] = {
    "instances": {"type": "list", "elements": "str", "required": True},
    "state": {"type": "str", "choices": ["up", "drained", "stopped"]},
    "only": {
        "type": "list",
        "elements": "str",
        "choices": ["up", "drained", "stopped"],
        "default": ["up", "drained", "stopped"],
    },
    "by": {"type": "str"},
    "reason": {"type": "str", "default": ""},
    "turn": {"type": "str", "default": ""},
    "share": {"type": "int", "default": 100},
    "timeout": {"type": "float", "default": 60},
    "kept": {"type": "str", "choices": ["fail", "wait", "force"], "default": "fail"},
    "engine_wait": {"type": "bool", "default": False},
}


def main() -> None:
    """Speak, and wait for those who hear it."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    given = module.params
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    force = given["kept"] == instance_state.FORCE
    wanted = instance_state.Wanted(
        given["state"], given["by"] or "", since, given["reason"], given["turn"], force, given["share"]
    )
    if problem := instance_state.problem(wanted):
        module.fail_json(msg=problem)
    try:
        host = InstanceHost()
        found = speak(host, wanted, given, module.check_mode)
        if given["timeout"] > 0 and given["state"] and not module.check_mode and host.configuration is not None:
            wait(host, found, given)
    except (OSError, json.JSONDecodeError) as error:
        module.fail_json(msg=f"The operator's word cannot be read or written: {error}")
    changed = any(one["word"] != one["before"] for one in found.values())
    result = {"changed": changed, "instances": found}
    if host.configuration is None:
        result["skipped_reason"] = NO_AGENT
    if complaints := [one.pop("complaint") for one in found.values() if "complaint" in one]:
        module.fail_json(msg="; ".join(complaints) + ".", **result)
    module.exit_json(**result)


def speak(host: InstanceHost, wanted: instance_state.Wanted, given: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Write the words, and say what became of them."""
    found = {}
    for name in dict.fromkeys(given["instances"]):
        before = host.word(name)
        untouched = not wanted.operator or before["operator"] not in given["only"]
        word = before if untouched else instance_state.decided(before, wanted)
        if host.configuration is None and word["operator"] == instance_state.DRAINED:
            word = before  # nobody would hear it
        if word != before and not check_mode:
            host.say(name, word)
        found[name] = {
            "word": word, "before": before, "untouched": untouched, "left": instance_state.left(before, wanted),
            "seconds": 0.0, "waiting": {}, "running": 0,
        }  # fmt: skip
    return found


def wait(host: InstanceHost, found: dict[str, Any], given: dict[str, Any]) -> None:
    """Wait until gateways do what the words say. A word that gateways refuse goes back to the one before."""
    out = {name: one["word"]["operator"] != instance_state.UP for name, one in found.items()}
    # What a person drained is not waited for by a turn that would put it back.
    asked = {
        name: is_out
        for name, is_out in out.items()
        if is_out == (given["state"] != instance_state.UP) and not found[name]["untouched"]
    }
    stands = instance_state.settle(host, asked, given["timeout"], given["kept"], given["engine_wait"])
    for name, stand in stands.items():
        one = found[name]
        one.update(seconds=stand.seconds, waiting=stand.waiting, running=stand.running)
        if stand.settled:
            continue
        one["complaint"] = instance_state.complaint(name, stand, one["word"])
        if stand.kept and one["word"] != one["before"]:
            host.say(name, one["before"])
            one["word"] = one["before"]


if __name__ == "__main__":
    main()
