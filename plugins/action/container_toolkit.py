# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the module that has the name of the task quickly. Each module that is run so has a link to this file beside it."""

from __future__ import annotations

from typing import Any

from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module that has the name of the action."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        return {**result, **self.quick(self._task.action.rpartition(".")[2], self._task.args, task_vars or {})}
