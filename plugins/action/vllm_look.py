# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the module of the same name quickly, and judges on the controller by what it found."""

from __future__ import annotations

from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_fit import judge
from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Look, and judge when there are settings to judge by. They stay here: the host has no use for them."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = {name: value for name, value in self._task.args.items() if name != "settings"}
        settings = self._task.args.get("settings")
        result.update(self.quick("vllm_look", arguments, task_vars or {}))
        if settings and not result.get("failed"):
            wanted = self._task.args.get("wanted") or []
            result.update(judge(result["findings"], wanted, settings, bool(self._task.check_mode)))
        return result
