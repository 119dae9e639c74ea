#!/usr/bin/python
"""An instance is up when it has answered: not when its unit is active, and not when /health says 200."""

from __future__ import annotations

DOCUMENTATION = r"""
module: completion_gate
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Waits until vLLM instances have answered
description:
  - Asks every instance at the same time, with its real model name, until it answers or the deadline is over.
  - What it is asked for is the smallest request of its kind. A model that generates completes one token, others embed, rerank, classify or transcribe.
    Of which kind it is says the instance itself; vLLM has the paths of what its model can do and no others.
  - Gives up at once on an instance whose unit failed or was restarted by systemd meanwhile, and on one that has no path of any kind.
  - An instance that does not answer in time because it is busy with the requests of others passes when its C(/metrics) show that it gets on with
    them.
  - C(/health) is not asked. It says 200 while the engine hangs (vLLM issue 36451).
  - An instance that answers somebody without its key does not pass.
options:
  instances:
    description: Instances to ask.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the instance.
        type: str
        required: true
      url:
        description: Where it listens, for example C(http://127.0.0.1:8000).
        type: str
        required: true
      model:
        description: Name of the model that is asked for.
        type: str
        required: true
      unit:
        description: The systemd unit, watched while waiting. Its journal is part of a failure.
        type: str
  api_key:
    description: Key that the instances ask for.
    type: str
    required: true
  timeout:
    description: Seconds until an instance must have answered.
    type: int
    default: 900
  request_timeout:
    description: Seconds that one request may take.
    type: int
    default: 60
attributes:
  check_mode:
    description: Asks nothing.
    support: full
"""

EXAMPLES = r"""
- name: The instance answers
  gpufleet.llm.completion_gate:
    instances:
      - name: chat
        url: http://127.0.0.1:8000
        model: qwen2.5-7b
        unit: vllm@chat.service
    api_key: "{{ vllm_internal_key }}"
"""

RETURN = r"""
passed:
  description:
    - Instances that answered, with C(name), C(seconds) and C(kind), one of V(generate), V(transcribe), V(embed), V(rerank), V(classify) and V(pool).
    - C(busy) is true for those that were busy with others.
  returned: always
  type: list
  elements: dict
failed_instances:
  description: Instances that did not, with C(name), C(reason) and C(journal), the lines of the journal that matter.
  returned: on failure
  type: list
  elements: dict
"""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import systemctl
from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds_host import Instance, hint

PAUSE_SECONDS = 1.0
# A busy engine takes a step at least that often.
STEP_SECONDS = 15.0
# A line that says why, not one that says where in the code.
TELLING = re.compile(
    r"\b(\w*Error|\w*Exception|error|Failed|failed|fatal|Traceback|out of memory|No space left"
    r"|[Dd]enied|refused|not found|[Nn]ot permitted|No such file|Killed|status=)\b"
)
PREFIX = re.compile(r"^(\([\w-]+ pid=\d+\)\s*)?((ERROR|INFO|WARNING) [\d-]+ [\d:.]+ \[[^\]]*\]\s*)?")
NOISE = re.compile(
    r"Failed to attach \d+ to compat systemd cgroup|^\s*(File \"|raise |return |await |\^+\s*$|~+)|Traceback \(most recent call last\)"
)


def telling_lines(journal: str, limit: int = 12) -> list[str]:
    """The lines of a journal that say what went wrong, oldest first, without repeats; the last ones when none does."""
    lines = [line.rstrip() for line in journal.splitlines() if line.strip()]
    chosen: dict[str, None] = {}
    for line in lines:
        text = PREFIX.sub("", line).strip()
        if TELLING.search(text) and not NOISE.search(text):
            chosen[text[:400]] = None
    return list(chosen)[-limit:] or [line[:400] for line in lines[-limit:]]


def is_open(state: dict[str, str]) -> bool:
    """Whether the state of a unit says nothing yet: systemd did not tell it, or a start or restart is still to come."""
    return not state or bool(int(state.get("Job") or 0))


class Gate:
    """Waits for instances with one deadline for all of them."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.deadline = time.monotonic() + module.params["timeout"]

    def unit_state(self, unit: str) -> dict[str, str]:
        """State and number of restarts of a unit; nothing when systemd is too busy to tell."""
        _status, output, _error = self.module.run_command(
            ["systemctl", "show", unit, "--property=ActiveState,NRestarts,Result,Job"]
        )
        return systemctl.shown(output)[0]

    def journal(self, unit: str, since: float) -> list[str]:
        """What the unit logged since then (seconds of the epoch), down to what matters."""
        # Not --lines: together with --since it counts from the beginning, and a process that stopped busily would have said all of them.
        _status, output, _error = self.module.run_command(
            ["journalctl", "--unit", unit, f"--since=@{int(since) - 5}", "--output=cat", "--no-pager", "--quiet"]
        )
        return telling_lines(output)

    def wait(self, instance: dict[str, Any]) -> dict[str, Any]:
        """Ask one instance until it answers, its unit dies, or the deadline is over."""
        begun, since = time.monotonic(), time.time()
        unit = instance.get("unit")
        asker = Instance(instance["url"], instance["model"], self.module.params["api_key"])
        restarts = ""
        while True:
            if unit and not restarts:
                state = self.unit_state(unit)
                # While a restart is queued the old process still answers, then the unit is inactive for a moment, and its
                # count of restarts begins anew: none of this says anything about what comes.
                if is_open(state) and time.monotonic() + PAUSE_SECONDS < self.deadline:
                    time.sleep(PAUSE_SECONDS)
                    continue
                restarts = state.get("NRestarts", "0")
                since = time.time()  # what the process before it said does not matter any more
            left = self.deadline - time.monotonic()
            asked = asker.ask(max(1.0, min(left, self.module.params["request_timeout"])))
            busy = asked.waiting and asker.works(STEP_SECONDS)
            if not asked.reason and asker.answers_anybody(max(1.0, left)):
                reason = "it answers without the internal key"
                break
            if busy or not asked.reason:
                passed = {"name": instance["name"], "seconds": round(time.monotonic() - begun, 1), "kind": asked.kind}
                return {**passed, "busy": True} if busy else passed
            reason = asked.reason
            if unit:
                state = self.unit_state(unit)
                if not is_open(state) and (
                    state.get("ActiveState") in ("failed", "inactive") or state.get("NRestarts", "0") != restarts
                ):
                    result = state.get("Result") or state.get("ActiveState", "")
                    # Once systemd has started it again, the result is that of the new process.
                    again = result == "success" and state.get("NRestarts", "0") != restarts
                    reason = f"{unit} died ({'systemd has started it again' if again else result})"
                    break
            if asked.hopeless:
                break
            if time.monotonic() + PAUSE_SECONDS >= self.deadline:
                reason = f"no answer after {self.module.params['timeout']} s: {reason}"
                break
            time.sleep(PAUSE_SECONDS)
        journal = self.journal(unit, since) if unit else []
        return {"name": instance["name"], "reason": reason + hint("\n".join(journal)), "journal": journal}


ARGUMENTS: dict[str, Any] = {
    "instances": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "url": {"type": "str", "required": True},
            "model": {"type": "str", "required": True},
            "unit": {"type": "str"},
        },
    },
    "api_key": {"type": "str", "required": True, "no_log": True},
    "timeout": {"type": "int", "default": 900},
    "request_timeout": {"type": "int", "default": 60},
}


def main() -> None:
    """Wait for all instances side by side."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        supports_check_mode=True,
    )
    if module.check_mode or not module.params["instances"]:
        module.exit_json(changed=False, passed=[])
    gate = Gate(module)
    with ThreadPoolExecutor(max_workers=len(module.params["instances"])) as pool:
        results = list(pool.map(gate.wait, module.params["instances"]))
    failed = [result for result in results if "reason" in result]
    passed = [result for result in results if "reason" not in result]
    if failed:
        message = "; ".join(f"{result['name']}: {result['reason']}" for result in failed)
        module.fail_json(msg=message, passed=passed, failed_instances=failed)
    module.exit_json(changed=False, passed=passed)


if __name__ == "__main__":
    main()
