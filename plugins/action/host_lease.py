# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Takes and releases the lease of a host, and knows which runs of this controller are still there."""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.lease import Holder, holder
from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls

ARGUMENTS: dict[str, dict[str, Any]] = {
    "state": {"type": "str", "choices": ["held", "released"], "default": "held"},
    "take_over": {"type": "bool", "default": False},
}


def place() -> str:
    """What a process number belongs to: this boot of this kernel, and this process namespace. Empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """When a process began, in ticks since the boot; empty when there is none. A number is used again, but not with this one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def run_name(pid: int, where: str) -> str:
    """The same for all tasks of a run, and for no other run."""
    return hashlib.sha256(f"{socket.gethostname()} {where} {pid} {started(pid)}".encode()).hexdigest()[:24]


def this_run() -> Holder:
    """The run that this task belongs to. Each task has a process of its own, whose parent is the run's."""
    pid, where = os.getppid(), place()
    return Holder(run_name(pid, where), getpass.getuser(), socket.gethostname(), pid, where)


def is_over(other: Holder) -> bool:
    """Whether a run is known to be over: it was one of this very place, and its process is gone."""
    return bool(other.place) and other.place == place() and run_name(other.pid, other.place) != other.run


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Take the lease; when somebody else has it, see whether that run can be over."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(ARGUMENTS)
        if self._task.check_mode:
            return {**result, "changed": False, "skipped": True}
        wanted = {"state": arguments["state"], "holder": vars(this_run())}
        answer = self.quick("host_lease", wanted, task_vars or {})
        taken_over = ""
        if not answer.get("failed") and not answer.get("held", True):
            other = holder(answer["holder"])
            if arguments["take_over"] or is_over(other):
                taken_over = str(other)
                answer = self.quick("host_lease", {**wanted, "instead_of": other.run}, task_vars or {})
        result.update(answer)
        if not result.get("failed") and not result.pop("held", True):
            result.update(
                failed=True,
                msg=f"{self._task.delegate_to or (task_vars or {}).get('inventory_hostname')} is being changed by {holder(result['holder'])}. "
                "Wait until that run is over. When it is certain that it died: -e fleet_break_lease=true",
            )
        elif arguments["state"] == "held" and not result.get("failed"):
            result["taken_over"] = taken_over
        return result
