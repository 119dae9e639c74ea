# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What runs a module on the host without Ansible's part of it. quick.py sends this as text, with the module's; nothing imports it there.

It has to say something sensible on any Python, so it is written for very old ones.
"""

import sys

OLDEST = (3, 10)
if sys.version_info[:2] < OLDEST:
    print('{"failed": true, "msg": "%s is Python %s, but these roles need %s or newer; set ansible_python_interpreter"}' % (  # noqa: UP031
        sys.executable, ".".join(map(str, sys.version_info[:2])), ".".join(map(str, OLDEST))))  # fmt: skip
    sys.exit(1)

import importlib.machinery
import json
import os
import subprocess
import syslog
from types import ModuleType
from typing import Any


class AnsibleModule:
    """The part of ansible.module_utils.basic.AnsibleModule that these modules use. The arguments were checked on the controller."""

    def __init__(self, argument_spec: Any, supports_check_mode: bool = False, **_options: Any) -> None:
        self.params = GIVEN["arguments"]
        self.check_mode = GIVEN["check_mode"]
        self._diff = GIVEN["diff"]
        self.warnings: list[str] = []
        if self.check_mode and not supports_check_mode:
            self.exit_json(skipped=True, msg="this module does not support check mode")

    def warn(self, warning: str) -> None:
        """Show a warning on the controller."""
        self.warnings.append(warning)

    def exit_json(self, **result: Any) -> None:
        """Return the result and end."""
        if self.warnings:
            result["warnings"] = self.warnings
        print("\n" + json.dumps(result))
        sys.exit(1 if result.get("failed") else 0)

    def fail_json(self, msg: str, **result: Any) -> None:
        """Fail and end."""
        self.exit_json(failed=True, msg=msg, **result)

    @staticmethod
    def from_json(text: str) -> Any:
        """Data from text."""
        return json.loads(text)

    def run_command(
        self,
        command: list[str],
        check_rc: bool = False,
        environ_update: "dict[str, str] | None" = None,
        cwd: "str | None" = None,
    ) -> tuple[int, str, str]:
        """Run a command. Returns its exit status, its output and its errors; with `check_rc` a command that fails ends the module."""
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, **(environ_update or {})},
                cwd=cwd,
            )
        except OSError as error:
            self.fail_json(rc=error.errno, msg=str(error), cmd=command)
            raise
        if check_rc and done.returncode:
            said = done.stderr.rstrip() or done.stdout.rstrip()
            self.fail_json(rc=done.returncode, msg=said, cmd=command, stdout=done.stdout, stderr=done.stderr)
        return done.returncode, done.stdout, done.stderr


class Texts:
    """Imports modules from text."""

    @classmethod
    def find_spec(cls, name: str, _path: Any = None, _target: Any = None) -> Any:
        """What Python asks for each import: a module that came along, or a package that holds one."""
        package = any(other.startswith(name + ".") for other in GIVEN["texts"])
        if package or name in GIVEN["texts"]:
            loader: Any = cls
            return importlib.machinery.ModuleSpec(name, loader, is_package=package)
        return None

    @staticmethod
    def create_module(_spec: Any) -> None:
        """An ordinary one."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Run its text."""
        text = GIVEN["texts"].get(module.__name__, "")
        exec(compile(text, module.__name__, "exec"), module.__dict__)  # noqa: S102


BASIC = "ansible.module_utils.basic"
GIVEN: dict[str, Any] = {}


def run(given: dict[str, Any]) -> None:
    """Run the module `name` of `texts` with `arguments`."""
    os.umask(0o022)
    GIVEN.update(given)
    GIVEN["texts"][BASIC] = ""
    sys.meta_path.insert(0, Texts)
    vars(importlib.import_module(BASIC))["AnsibleModule"] = AnsibleModule
    # As every module of Ansible leaves it in the journal.
    syslog.openlog("ansible-" + given["name"], 0, syslog.LOG_USER)
    syslog.syslog(syslog.LOG_INFO, given["log"])
    importlib.import_module(given["name"]).main()
