# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Opens and ends the silence of a host, in the name of who runs the playbook."""

from __future__ import annotations

import getpass
import socket
from typing import Any

from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls

ARGUMENTS: dict[str, dict[str, Any]] = {
    "state": {"type": "str", "choices": ["open", "ended"], "default": "open"},
    "minutes": {"type": "int", "default": 60},
    "instances": {"type": "list", "elements": "str", "default": []},
    "turn": {"type": "str", "default": ""},
    "reason": {"type": "str", "default": ""},
}


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Add who it is."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(ARGUMENTS)
        by = f"{getpass.getuser()}@{socket.gethostname()}"
        return {**result, **self.quick("host_silence", {**arguments, "by": by}, task_vars or {})}
