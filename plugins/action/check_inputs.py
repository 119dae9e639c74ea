# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Finds everything that is wrong with the variables of a role in one go, on the controller."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.module_utils.common.yaml import yaml_load
from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.llm.plugins.module_utils import inputs
from ansible_collections.gpufleet.llm.plugins.plugin_utils.preload import preload

preload()


class ActionModule(ActionBase):  # type: ignore[misc]
    """See the module's documentation."""

    _requires_connection = False

    @classmethod
    def finalize_task_arg(cls, name: str, value: Any, templar: Any, context: Any) -> Any:
        """Leave the checks as they are written: each is evaluated by itself, and its message only when it is needed."""
        return value if name == "checks" else super().finalize_task_arg(name, value, templar, context)

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Look at the variables, then at the checks; fail with all that is wrong, or only tell it."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        arguments = self._task.args
        problems: list[str] = []
        if self._task._role is not None:
            spec = self._spec(Path(self._task._role._role_path))
            found = self._variables(self._task._role.get_name(include_role_fqcn=False), spec, variables)
            # What has the wrong type or is undefined breaks checks too; it has been told already.
            problems = found
        problems += self._checks(arguments.get("checks") or [], tolerant=bool(problems))
        problems = list(dict.fromkeys(problems))
        collected = bool(self._templar.template(variables.get("check_inputs_collect", False)))
        if problems and not collected:
            host = variables.get("inventory_hostname")
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            lines = [
                f"{count} with the variables of {host}; nothing has been changed.",
                *(f"- {text}" for text in problems),
            ]
            result.update(failed=True, msg="\n".join(lines))
        else:
            result.update(changed=False, problems=problems)
        return result

    @staticmethod
    def _spec(role: Path) -> Mapping[str, Any]:
        """The options of the role's main entry point. Ansible's own loader takes ten times as long: it notes where each value stands."""
        loaded = yaml_load((role / "meta" / "argument_specs.yml").read_text())
        options: Mapping[str, Any] = loaded["argument_specs"]["main"].get("options") or {}
        return options

    def _variables(self, role: str, spec: Mapping[str, Any], variables: Mapping[str, Any]) -> list[str]:
        """What is wrong with the role's variables by its argument spec."""
        problems = inputs.name_problems(role, spec, variables)
        for name, option in spec.items():
            if name not in variables:
                continue
            try:
                value = self._templar.template(variables[name])
            except AnsibleError as error:
                problems.append(
                    f"{name} cannot be read: {reason(error)}; a secret of that name may be missing from the vault"
                )
                continue
            problems += inputs.value_problems(name, value, option)
        return problems

    def _checks(self, checks: list[Mapping[str, Any]], tolerant: bool) -> list[str]:
        """What the checks find."""
        problems: list[str] = []
        for check in checks:
            if unknown := set(check) - {"that", "fail_msg", "problems", "when"}:
                raise AnsibleActionFail(f"a check has the unknown keys {', '.join(sorted(unknown))}")
            try:
                if "when" in check and not self._holds(check["when"]):
                    continue
                if "problems" in check:
                    problems += [str(problem) for problem in self._templar.template(check["problems"])]
                elif not self._holds(check["that"]):
                    problems.append(" ".join(str(self._templar.template(check["fail_msg"])).split()))
            except AnsibleError as error:
                if not tolerant:
                    problems.append(f"this cannot be checked: {reason(error)}")
        return problems

    def _holds(self, conditions: Any) -> bool:
        """Whether all conditions hold."""
        wanted = conditions if isinstance(conditions, list) else [conditions]
        return all(self._templar.evaluate_conditional(condition) for condition in wanted)


def reason(error: AnsibleError) -> str:
    """The first cause of an error, on one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return " ".join(str(getattr(cause, "message", None) or cause).split()).rstrip(".")
