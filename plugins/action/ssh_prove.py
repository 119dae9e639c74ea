# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Logs in to a host anew, the way Ansible does, and looks whether the controller will know the host's keys."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible_collections.gpufleet.llm.plugins.module_utils import ssh_known
from ansible_collections.gpufleet.llm.plugins.modules.ssh_prove import ARGUMENTS
from ansible_collections.gpufleet.llm.plugins.plugin_utils.fresh import fresh, reason
from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls

KEY_ONLY = "-o PreferredAuthentications=publickey -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no"
# The address that the host sees, and who is there: words that every login shell understands.
QUESTION = "echo $SSH_CONNECTION; id -un"
CONNECT_SECONDS = 5


class UnprovedError(Exception):
    """Why one cannot log in, in words for the operator."""


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Log in."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, given = self.validate_argument_spec(ARGUMENTS)
        if self._connection.transport != "ssh":
            return {**result, **self.quick("ssh_prove", self._task.args, task_vars or {})}
        try:
            stage = self.before if given["stage"] == "before" else self.after
            result.update(changed=False, proved=stage(given))
        except UnprovedError as error:
            result.update(failed=True, msg=str(error))
        return result

    # ------------------------------------------------------------------------------------------------------- the stages

    def before(self, given: dict[str, Any]) -> list[str]:
        """The way in works with a key alone, and will still lead to a host that is known."""
        settings = self.settings()
        own = int(given["came_by"].get("port") or settings.port)
        if own != settings.port and set(given["ports"]) - {own}:
            others = ", ".join(str(port) for port in given["ports"] if port != own)
            raise UnprovedError(
                f"The controller reaches port {own} of the host through port {settings.port} of something in between, so nobody can prove from here "
                f"that port {others} is open. Leave ssh_hardening_ports at [{own}], or run this from where the host is reached directly"
            )
        if problem := ssh_known.problem(settings, given["offered"], self.known(settings)):
            raise UnprovedError(problem)
        return [
            self.login(
                None,
                own,
                given["seconds"],
                "No login with a key alone works now, and after the change nothing else does",
            )
        ]

    def after(self, given: dict[str, Any]) -> list[str]:
        """Each port lets one in."""
        settings = self.settings()
        own = int(given["came_by"].get("port") or settings.port)
        proved = []
        for port in given["ports"]:
            through = None if port == own else port
            proved.append(self.login(through, port, given["seconds"], "No new login works after the change"))
        return proved

    # ------------------------------------------------------------------------------------------------------- connections

    def fresh(self, port: int | None, arguments: str = "", extra: str = "") -> Any:
        """A connection of its own, never with a password."""
        return fresh(self, CONNECT_SECONDS, arguments, extra, password=None, **({"port": port} if port else {}))

    def settings(self) -> ssh_known.Settings:
        """What ssh makes of all that is configured for this host, as it tells by -G."""
        try:
            status, output, error = self.fresh(None, extra="-G").exec_command(QUESTION, sudoable=False)
        except AnsibleError as failure:
            raise UnprovedError(f"ssh -G on the controller: {reason(failure)}") from failure
        if status:
            raise UnprovedError(f"ssh -G on the controller: {error.decode(errors='replace').strip()}")
        return ssh_known.parse_settings(output.decode(errors="replace"))

    def known(self, settings: ssh_known.Settings) -> dict[str, str]:
        """The keys that the controller knows the host by, each with its file."""
        found: dict[str, str] = {}
        for file in settings.known_hosts:
            path = Path(file).expanduser()
            for name in settings.names if path.is_file() else []:
                done = subprocess.run(
                    ["ssh-keygen", "-F", name, "-f", str(path)], capture_output=True, text=True, check=False
                )
                for key in ssh_known.parse_known(done.stdout):
                    found.setdefault(key, str(path))
        return found

    def login(self, port: int | None, seen_as: int, seconds: int, complaint: str) -> str:
        """Log in, and say as whom and by which port. What may be only a moment's weakness is tried again until the time is up."""
        until = time.monotonic() + seconds
        while True:
            said = self.once(port)
            if isinstance(said, list):
                where = said[3] if len(said) > 4 else str(seen_as)
                if where != str(seen_as):
                    raise UnprovedError(
                        f"{complaint}: port {seen_as} was asked for, but it led to port {where} of the host"
                    )
                return f"a new connection logged in as {said[-1]} by port {where}"
            if ssh_known.is_final(said) or time.monotonic() > until:
                raise UnprovedError(f"{complaint} (port {seen_as}): {ssh_known.explained(said, seen_as)}")
            time.sleep(1)

    def once(self, port: int | None) -> list[str] | str:
        """The words of the host's answer, or why there was none."""
        connection = self.fresh(port, KEY_ONLY)
        try:
            status, output, error = connection.exec_command(QUESTION, sudoable=False)
        except AnsibleConnectionFailure as failure:
            return reason(failure)
        finally:
            connection.close()
        words: Sequence[str] = output.decode(errors="replace").split()
        if status or not words:
            return error.decode(errors="replace").strip() or f"the login shell ended with {status} and said nothing"
        return list(words)
