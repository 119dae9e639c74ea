# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Proves that a host can still be reached: opens a connection that shares nothing with those that are open."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import connection_loader

# The first value of an option wins with ssh, so these stand before whatever ansible.cfg or the inventory say.
ALONE = "-o ControlMaster=no -o ControlPath=none"
ARGUMENTS: dict[str, dict[str, Any]] = {"timeout": {"type": "int", "default": 15}}
ECHO = "gpufleet-fresh-connection"
ATTEMPT_SECONDS = 5
# Connection plugins that no firewall and no SSH server can shut out.
INSIDE = ("chroot", "docker", "docker_api", "local", "lxc", "lxd", "machinectl", "nsenter", "podman")
# What another attempt does not mend.
FINAL = ("Permission denied", "Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED")


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
            if time.monotonic() + 1 > until or any(words in problem for words in FINAL):
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
        present = self._connection
        fresh = connection_loader.get(present.ansible_name, self._play_context.copy())
        fresh.set_options(direct=present.get_options())
        if present.transport == "ssh":
            own = {"ssh_args": f"{ALONE} {present.get_option('ssh_args') or ''}", "timeout": timeout}
            for name, value in {**own, "reconnection_retries": 0, "verbosity": 0}.items():
                fresh.set_option(name, value)
        try:
            fresh._connect()
            status, output, error = fresh.exec_command(f"echo {ECHO}", sudoable=False)
        except AnsibleError as failure:
            return " ".join(str(failure).split()).removeprefix("Failed to connect to the host via ssh: ")
        finally:
            fresh.close()
        if status or ECHO.encode() not in output:
            return f"it ended with {status}: {error.decode(errors='replace').strip()}"
        return ""
