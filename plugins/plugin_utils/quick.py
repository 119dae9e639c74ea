# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""
Runs the modules that every run calls, in a quarter of the time.

Ansible packs a module together with a part of itself that is ten times as large, which costs the controller 0.2 s for each module, and the
host as much again for each call, to unpack and compile it. Most modules of this collection need next to nothing of it. The action plugin
below (a small file in plugins/action/ says for which modules), or one of their own, sends them as they are, with quick_host.py, through the same
connection and the same become as any module, and the arguments are checked here by Ansible's own code. Where this cannot be done, they are
run as any other module.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator, ValidationResult
from ansible.module_utils.common.parameters import remove_values
from ansible.module_utils.errors import UnsupportedError
from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.llm.plugins.plugin_utils.preload import preload

preload()

COLLECTION = "ansible_collections.gpufleet.llm.plugins"
PLUGINS = Path(__file__).parents[1]
IMPORT = re.compile(rf"^from {re.escape(COLLECTION)}\.module_utils(?:\.(\w+))? import (\([^)]*\)|.*)$", re.MULTILINE)
FOREIGN = re.compile(
    r"^(?:from|import) (?:ansible\.(?!module_utils\.basic import AnsibleModule$).*|ansible)$", re.MULTILINE
)
INTERPRETER = re.compile(r"/[\w.+/-]+")


def texts(name: str) -> dict[str, str]:
    """A module and everything of this collection that it imports: full name to text."""
    found: dict[str, str] = {}
    waiting = [f"{COLLECTION}.modules.{name}"]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        text = (PLUGINS / (module.removeprefix(f"{COLLECTION}.").replace(".", "/") + ".py")).read_text()
        if foreign := FOREIGN.search(text):
            raise ValueError(f"{module} needs Ansible itself: {foreign[0]}")
        found[module] = text
        for parent, names in IMPORT.findall(text):
            wanted = [parent] if parent else re.findall(r"\w+", names)
            waiting += [f"{COLLECTION}.module_utils.{one}" for one in wanted]
    return found


def program(name: str, arguments: Mapping[str, Any], log: str, check_mode: bool, diff: bool) -> bytes:
    """What the host's Python is given to run."""
    given = {
        "name": f"{COLLECTION}.modules.{name}",
        "texts": texts(name),
        "arguments": arguments,
        "log": log,
        "check_mode": check_mode,
        "diff": diff,
    }
    runner = (PLUGINS / "plugin_utils/quick_host.py").read_text()
    return f"{runner}\nrun(json.loads({json.dumps(given)!r}))\n".encode()


def has_host_paths(spec: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    """Whether a path has to be read on the host: ~ and $HOME are other ones there."""
    paths = [key for key, value in spec.items() if "path" in (value.get("type"), value.get("elements"))]
    return any("~" in str(arguments.get(key)) or "$" in str(arguments.get(key)) for key in paths)


def summary(values: Mapping[str, Any]) -> str:
    """The arguments for the journal. Lists and dictionaries, which may hold anything, only by their length."""
    return " ".join(
        f"{key}=({len(value)})" if isinstance(value, list | dict) else f"{key}={value}" for key, value in values.items()
    )


def understood(name: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a module: the last line that it printed."""
    lines = str(answer["stdout"]).strip().splitlines()
    with contextlib.suppress(ValueError, IndexError):
        result = json.loads(lines[-1])
        if isinstance(result, dict):
            return result
    errors = str(answer.get("stderr") or answer["stdout"]).strip()
    reason = errors.splitlines()[-1] if errors else f"it ended with {answer['rc']} and said nothing"
    return {
        "failed": True,
        "msg": f"{name} failed on the host: {reason}",
        "rc": answer["rc"],
        "module_stdout": answer["stdout"],
        "module_stderr": answer.get("stderr", ""),
    }


class QuickCalls(ActionBase):  # type: ignore[misc]
    """For actions that run modules this way. A module states its arguments as `ARGUMENTS`, and further rules as `RULES`."""

    def quick(self, name: str, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Run a module of this collection. Returns its result."""
        module = importlib.import_module(f"{COLLECTION}.modules.{name}")
        interpreter = self.interpreter(variables)
        if not interpreter or has_host_paths(module.ARGUMENTS, arguments):
            return dict(self._execute_module(f"gpufleet.llm.{name}", arguments, task_vars=variables))
        checked = self.checked(module, arguments)
        secrets = checked._no_log_values
        values = checked.validated_parameters
        log = remove_values(f"Invoked with {summary(values)}", secrets)
        self._display.vvv(f"Using module file {module.__file__} as it is", host=variables.get("inventory_hostname"))
        text = program(name, values, log, bool(self._task.check_mode), bool(self._task.diff))
        answer = self._low_level_execute_command(f"{interpreter} -I -", in_data=text)
        return dict(remove_values(understood(name, answer), secrets))

    @staticmethod
    def checked(module: ModuleType, arguments: dict[str, Any]) -> ValidationResult:
        """The arguments as the module would see them. As there, a mistake fails the task."""
        found = ArgumentSpecValidator(module.ARGUMENTS, **getattr(module, "RULES", {})).validate(arguments)
        if found.error_messages:
            unsupported = isinstance(found.errors[0], UnsupportedError)
            which = f"Unsupported parameters for ({module.__name__.rpartition('.')[2]}) module: " if unsupported else ""
            raise AnsibleActionFail(which + found.errors.msg)
        return found

    def interpreter(self, variables: dict[str, Any]) -> str:
        """The host's Python, if it is known and nothing else speaks against this way."""
        elsewhere = self._task.delegate_to and self._connection.transport != "local"
        if self._task.async_val or elsewhere or any(self._task.environment or []):
            return ""
        if not self._is_pipelining_enabled("new") or getattr(self._connection._shell, "_IS_WINDOWS", False):
            return ""
        value = str(
            self._templar.template(constants.config.get_config_value("INTERPRETER_PYTHON", variables=variables))
        )
        if value.startswith("auto"):
            value = str(variables.get("ansible_facts", {}).get("discovered_interpreter_python", ""))
        return value if INTERPRETER.fullmatch(value) else ""


class QuickAction(QuickCalls):
    """Runs the module that has the name of the task."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run it with what the task says, and nothing else."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        return {**result, **self.quick(self._task.action.rpartition(".")[2], self._task.args, task_vars or {})}
