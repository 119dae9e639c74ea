# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the module of the same name quickly, and turns a host that cannot be reached or asked into a finding."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleError
from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask. The fleet is shown with the hosts that answer, and half of them may not."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        try:
            said = self.quick("fleet_status", self._task.args, task_vars or {})
        except AnsibleError as error:  # also when no connection comes about
            said = {"msg": str(error)}
        told = {"status": said["status"]} if "status" in said else {}
        why = "" if told else " ".join(str(said.get("msg") or "it said nothing").split())
        return {**result, **told, "changed": False, "reached": bool(told), "why": why, "asked_at": time.time()}
