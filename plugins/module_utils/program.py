# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Programs of a host: run by a module, or while something else is read and not waited for when they hang."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

Command = Callable[[list[str]], tuple[int, str, str]]

# Where root has its programs, for a login that does not look there; the last one is where a machine mounts those of its driver into a container.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/nvidia/bin"


def commands(module: AnsibleModule, path: str = "/usr/sbin:/usr/bin:/sbin:/bin") -> Command:
    """Runs commands for a module, in the words that are looked for: exit status, output, errors. One that is not there is an error like any other."""

    def run(command: list[str]) -> tuple[int, str, str]:
        status, output, error = module.run_command(["/usr/bin/env", "LC_ALL=C.UTF-8", f"PATH={path}", *command])
        return int(status), str(output), str(error)

    return run


class Program:
    """A program that runs while something else is read."""

    def __init__(self, command: list[str]) -> None:
        self.name = command[0]
        path = ":".join(filter(None, [os.environ.get("PATH"), SYSTEM_PATH]))
        try:
            self.process: subprocess.Popen[str] | None = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"},
            )
        except OSError:
            self.process = None

    def output(self, timeout: float) -> tuple[bool, str]:
        """Whether it went well, and what it printed: its output or what it complained of."""
        if self.process is None:
            return False, f"{self.name} cannot be run"
        try:
            output, error = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()  # not waited for: in the kernel's hands it may never end
            return False, f"{self.name} did not answer within {timeout:g} s"
        if self.process.returncode:
            return False, (error.strip() or output.strip() or f"{self.name} ended with {self.process.returncode}")
        return True, output
