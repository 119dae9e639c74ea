# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Proves that a host can still be reached: opens a connection that shares nothing with those that are open."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.llm.plugins.module_utils import ssh_known
from ansible_collections.gpufleet.llm.plugins.plugin_utils.fresh import fresh, reason

ARGUMENTS: dict[str, dict[str, Any]] = {"timeout": {"type": "int", "default": 15}}
ECHO = "gpufleet-fresh-connection"
ATTEMPT_SECONDS = 5
# Connection plugins that no firewall and no SSH server can shut out.
INSIDE = ("chroot", "docker", "docker_api", "local", "lxc", "lxd", "machinectl", "nsenter", "podman")


class ActionModule(ActionBase):  # type: ignore[misc]
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Log in once more, the same way."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(ARGUMENTS)
        transport = self._connection.transport
        if self._task.check_mode:
            return {**result, "changed": False, "skipped": True, "transport": transport}
        host = (task_vars or {}).get("inventory_hostname")
        began = time.monotonic()
        until = began + arguments["timeout"]
        while problem := self.problem(max(1, min(ATTEMPT_SECONDS, round(until - time.monotonic())))):
            if time.monotonic() + 1 > until or ssh_known.is_final(problem):
                break
            time.sleep(1)
        result.update(changed=False, transport=transport, seconds=round(time.monotonic() - began, 2))
        if problem:
            return {
                **result,
                "failed": True,
                "msg": f"A new {transport} connection to {host} does not get in: {problem}",
            }
        if transport.rpartition(".")[2] in INSIDE:
            result["msg"] = (
                f"{transport} does not go over the network: this proves nothing about the way by SSH, and Ansible cannot be shut out."
            )
        return result

    def problem(self, timeout: int) -> str:
        """Why a new connection does not get in, or nothing."""
        connection = fresh(self, timeout)
        try:
            connection._connect()
            status, output, error = connection.exec_command(f"echo {ECHO}", sudoable=False)
        except AnsibleError as failure:
            return reason(failure)
        finally:
            connection.close()
        if status or ECHO.encode() not in output:
            return f"it ended with {status}: {error.decode(errors='replace').strip()}"
        return ""
