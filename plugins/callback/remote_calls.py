# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Counts what Ansible's speed depends on: how often it goes to a host."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: remote_calls
type: aggregate
short_description: Count the remote calls of each host
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
description:
  - Counts the round trips to each host, whatever task they come from. Every module that is executed on a host is one call, one for each
    item of a loop, and so is every other command that an action runs there and every file that it sends.
  - Tasks that run on the controller only or are skipped make no call. Connections of the kind C(local) are left out.
  - At the end it prints one line for each host, C(remote calls HOST N), with the share of each role.
  - A call counts for the host that it goes to, which is the one of C(delegate_to) where there is one.
notes:
  - A file that P(ansible.builtin.fetch#module) brings back is not counted; what the action runs on the host for it is.
  - It replaces two methods of Ansible's own class of all actions, so it belongs into tests and measurements.
requirements:
  - It is enabled by C(ANSIBLE_CALLBACKS_ENABLED=gpufleet.llm.remote_calls).
options:
  file:
    description: Where to write the counts as JSON, C({HOST:{total:N,roles:{ROLE:N},tasks:[{task:...,role:...,action:...,calls:N}]}}).
    type: path
    env:
      - name: REMOTE_CALLS_FILE
  count_local:
    description: Count connections of the kind C(local) too.
    type: bool
    default: false
    env:
      - name: REMOTE_CALLS_COUNT_LOCAL
"""

import fcntl
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.plugins.callback import CallbackBase

NO_ROLE = "no role"


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """See the documentation above."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "gpufleet.llm.remote_calls"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.count_local = False
        # Tasks run in processes that are forked later: they inherit this file, without a name, and the methods below. Each call is one
        # write at its end, which the kernel does not mix with another one.
        self.log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the program
        flags = fcntl.fcntl(self.log, fcntl.F_GETFL)
        fcntl.fcntl(self.log, fcntl.F_SETFL, flags | os.O_APPEND)
        for method in ("_low_level_execute_command", "_transfer_file"):
            setattr(ActionBase, method, self.counted(getattr(ActionBase, method)))

    def set_options(self, *arguments: Any, **options: Any) -> None:
        """Take over the options."""
        super().set_options(*arguments, **options)
        self.count_local = self.get_option("count_local")

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method of ActionBase, counting."""

        @functools.wraps(method)
        def wrapper(action: Any, *arguments: Any, **options: Any) -> Any:
            self.count(action)
            return method(action, *arguments, **options)

        return wrapper

    def count(self, action: Any) -> None:
        """Write one call down."""
        if action._connection.transport == "local" and not self.count_local:
            return
        task = action._task
        call = {
            "host": task.delegate_to or action._templar.available_variables["inventory_hostname"],
            "role": task._role.get_name() if task._role else NO_ROLE,
            "task": task.get_name(),
            "action": task.action,
            "id": task._uuid,
        }
        os.write(self.log.fileno(), json.dumps(call).encode() + b"\n")

    def counts(self) -> dict[str, dict[str, Any]]:
        """The calls by host."""
        found: dict[str, dict[str, Any]] = {}
        tasks: dict[tuple[str, str], dict[str, Any]] = {}
        self.log.seek(0)
        for line in self.log.read().splitlines():
            call = json.loads(line)
            host, role = call["host"], call["role"]
            entry = found.setdefault(host, {"total": 0, "roles": {}, "tasks": []})
            entry["total"] += 1
            entry["roles"][role] = entry["roles"].get(role, 0) + 1
            key = (host, call["id"])
            if key not in tasks:
                tasks[key] = {"task": call["task"], "role": role, "action": call["action"], "calls": 0}
                entry["tasks"].append(tasks[key])
            tasks[key]["calls"] += 1
        return found

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print the counts and write them down."""
        found = self.counts()
        for host in stats.processed:
            found.setdefault(host, {"total": 0, "roles": {}, "tasks": []})
        for host in sorted(found):
            roles = ", ".join(f"{role} {calls}" for role, calls in found[host]["roles"].items())
            self._display.display(f"remote calls: {host} {found[host]['total']}" + (f" ({roles})" if roles else ""))
        if file := self.get_option("file"):
            Path(file).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
