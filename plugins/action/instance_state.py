# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The module of this name is run quickly, and told who is at the controller."""

from __future__ import annotations

import getpass
import socket
from typing import Any

from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run it with what the task says, and the operator's name."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        arguments["by"] = arguments.get("by") or f"{getpass.getuser()}@{socket.gethostname()}"
        return {**result, **self.quick("instance_state", arguments, task_vars or {})}
