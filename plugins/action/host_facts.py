# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The module of this name is run quickly. It is the first that a host is asked, so this is where one is told what would go wrong with all others."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickAction

# Releases that are supported as far as data go, and that nobody has run this on.
UNTRIED = {("Ubuntu", "26.04")}


class ActionModule(QuickAction):
    """Looks at the host, unless no answer could come."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask, and tell what is special about this host."""
        host = (task_vars or {}).get("inventory_hostname")
        if problem := self.sudo_problem():
            raise AnsibleActionFail(f"{host}: {problem}")
        result = super().run(tmp, task_vars)
        facts = (result.get("ansible_facts") or {}).get("gpufleet") or {}
        found = (facts.get("distribution"), facts.get("release"))
        if found in UNTRIED:
            result.setdefault("warnings", []).append(
                f"{host} runs {' '.join(found)}, on which nobody has tried these roles yet: try them on a host that you can do without"
            )
        return result

    def sudo_problem(self) -> str:
        """Why sudo would never get its password, or nothing. Asked only where it is to get one."""
        become = getattr(self._connection, "become", None)
        if not become or become.name.rpartition(".")[2] != "sudo" or not become.get_option("become_pass"):
            return ""
        program = become.get_option("become_exe") or "sudo"
        answer = self._low_level_execute_command(f"{program} --version 2>&1", sudoable=False)
        if not answer.get("stdout", "").startswith("sudo-rs"):
            return ""
        become.build_become_command("true", self._connection._shell)
        if become.check_password_prompt(f"[sudo: {become.prompt}] ".encode()):
            return ""  # a newer Ansible
        return (
            f"{program} is sudo-rs there, and this Ansible does not understand how it asks for a password: it would wait in vain. Set "
            "ansible_become_exe: sudo.ws, as Ubuntu calls the other sudo, or the path of that; or let the user become root without a password"
        )
