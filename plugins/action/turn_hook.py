# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Calls the user's commands on the controller when something happens in a rollout."""

from __future__ import annotations

import getpass
import socket
import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.llm.plugins.module_utils import turn_hooks

ARGUMENTS: dict[str, dict[str, Any]] = {
    "event": {"type": "str", "choices": list(turn_hooks.EVENTS), "required": True},
    "hooks": {"type": "dict", "default": {}},
    "details": {"type": "dict", "default": {}},
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """See the module's documentation."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call the commands of the event, one after the other."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(ARGUMENTS)
        event, hooks = arguments["event"], arguments["hooks"].get(arguments["event"]) or []
        details = {
            "host": (task_vars or {}).get("inventory_hostname"),
            "by": f"{getpass.getuser()}@{socket.gethostname()}",
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **arguments["details"],
        }
        text = turn_hooks.told(event, details)
        if self._task.check_mode:
            planned = [
                {"command": hook["command"], "required": bool(hook.get("required")), "problem": ""} for hook in hooks
            ]
            return {**result, "changed": False, "called": planned, "told": text}
        called = [turn_hooks.call(hook, text) for hook in hooks]
        fatal, others = turn_hooks.split(event, called)
        for sentence in others:
            self._display.warning(sentence)
        result.update(changed=False, called=called, told=text)
        if fatal:
            result.update(failed=True, msg="\n".join(fatal))
        return result
