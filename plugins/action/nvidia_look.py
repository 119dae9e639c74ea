# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the module of the same name quickly, and decides on the controller by what it found, and by what apt has where it is to install something."""

from __future__ import annotations

from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_plan import decide, to_ask
from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Look, and decide when there are settings to decide by. They stay here: the host has no use for them."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = {name: value for name, value in self._task.args.items() if name != "settings"}
        settings = self._task.args.get("settings")
        result.update(self.quick("nvidia_look", arguments, task_vars or {}))
        if settings and not result.get("failed"):
            result["plan"] = decide(result["findings"], settings)
            if names := to_ask(result["plan"], settings):
                apt = self.quick("apt_source", {"packages": names, "available": True}, task_vars or {})
                result["findings"]["available"] = apt.get("available", {})
                result["plan"] = decide(result["findings"], settings)
            plan = result["plan"]
            result["pending"] = plan["action"] in ("install", "upgrade") or plan["activate"] != ""
        return result
