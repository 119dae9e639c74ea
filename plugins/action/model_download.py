# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Starts a download by the module of the same name and shows how it goes until it ended."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.gpufleet.llm.plugins.module_utils.credentials import hidden
from ansible_collections.gpufleet.llm.plugins.module_utils.model_progress import Progress

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start, watch, return."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        interval = float(arguments.get("interval", 10))
        name = f"{(task_vars or {}).get('inventory_hostname', '?')}: {arguments.get('model', {}).get('name', '?')}"
        started = self._execute_module(module_args={**arguments, "action": "start"}, task_vars=task_vars)
        if started.get("failed") or self._task.check_mode:
            result.update(started)
            return result
        if started.get("attached"):
            display.display(f"{name} is already on its way; watching it")
        progress = Progress()
        environment = [str(value) for value in arguments.get("environment", {}).values()]
        # The module that only looks needs nothing that is secret.
        secret = ("token", "headers", "queries", "environment")
        quiet = {key: value for key, value in arguments.items() if key not in secret}
        shown = time.monotonic()
        pause, selection = 0.5, ""
        while True:
            time.sleep(pause)
            pause = min(pause * 1.5, 5.0, interval)
            state = self._execute_module(module_args={**quiet, "action": "status"}, task_vars=task_vars)
            if state.get("failed") or state.get("unreachable"):
                result.update(state)
                return result
            state["message"] = hidden(state.get("message", ""), *environment)
            if selection != state.get("selection", ""):
                selection = state["selection"]
                display.display(f"{name} {selection}")
            if state["state"] in ("done", "failed"):
                break
            progress.add(time.monotonic(), state["done"])
            if time.monotonic() - shown >= interval:
                shown = time.monotonic()
                display.display(
                    f"{name} {progress.line(state['state'], state['done'], state['total'], state['message'])}"
                )
        result.update(changed=True, state=state["state"], done=state["done"], total=state["total"], selection=selection)
        if state["state"] == "failed" and arguments.get("peer"):
            # A warning: it can still come from where it came from first, which goes on with what has arrived.
            result["warnings"] = [f"{name} is not copied from another host: {state['message']}"]
        elif state["state"] == "failed":
            result.update(failed=True, msg=f"{arguments['model']['name']}: {state['message']}")
        return result
