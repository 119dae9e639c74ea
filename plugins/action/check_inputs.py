# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Finds everything that is wrong with the variables of a role in one go, on the controller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.yaml import yaml_load
from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.llm.plugins.filter.fleet import fleet_variable_problems
from ansible_collections.gpufleet.llm.plugins.module_utils import inputs
from ansible_collections.gpufleet.llm.plugins.plugin_utils import specs
from ansible_collections.gpufleet.llm.plugins.plugin_utils.preload import preload

preload()


class ActionModule(ActionBase):  # type: ignore[misc]
    """See the module's documentation."""

    _requires_connection = False
    spec: Mapping[str, Any] = {}

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
        wrong: set[str] = set()
        if self._task._role is not None:
            self.spec = self._spec(Path(self._task._role._role_path))
            problems, wrong = self._variables(self._task._role.get_name(include_role_fqcn=False), variables)
        problems += self._checks(arguments.get("checks") or [], variables, wrong, tolerant=bool(problems))
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

    def _variables(self, role: str, variables: Mapping[str, Any]) -> tuple[list[str], set[str]]:
        """What is wrong with the role's variables by its argument spec, and with which. What is right is as checks compare it."""
        problems = inputs.name_problems(role, self.spec, variables)
        found: dict[str, list[str]] = {}
        changed = {}
        for name in self.spec:  # in its order: what is made of others stands behind them
            if name not in variables:
                continue
            try:
                value = self._templar.template(variables[name])
                found[name] = inputs.value_problems(name, value, self.spec[name])
                if (better := inputs.converted(value, self.spec[name])) is not value:
                    changed[name] = better
                    self._templar.available_variables = {**variables, **changed}
            except specs.UNREADABLE as error:
                sources = inputs.leads_to(variables[name], variables) & set(self.spec) - {name}
                found[name] = [specs.unreadable(name, sources, error)]
        wrong = {name for name, said in found.items() if said}
        for name in self.spec:
            # What is made of a wrong one is wrong as well, and only the other is told.
            if name in wrong and not inputs.leads_to(variables[name], variables) & wrong - {name}:
                problems += found[name]
        return problems, wrong

    def _checks(
        self, checks: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], wrong: set[str], tolerant: bool
    ) -> list[str]:
        """What the checks find. One that needs a variable with a wrong shape is not asked: that has been told."""
        problems: list[str] = []
        for check in checks:
            if unknown := set(check) - {"that", "fail_msg", "problems", "when", "warning"}:
                raise AnsibleActionFail(f"a check has the unknown keys {', '.join(sorted(unknown))}")
            asked = [check.get(key) for key in ("when", "that", "problems")]
            needed = inputs.leads_to(asked, variables) if wrong or problems else set()
            if (wrong and (wrong | {"hostvars"}) & needed) or (problems and self._misshapen(needed, variables)):
                continue
            try:
                if "when" in check and not self._holds(check["when"]):
                    continue
                found: list[str] = []
                if "problems" in check:
                    found = [str(problem) for problem in self._templar.template(check["problems"])]
                elif not self._holds(check["that"]):
                    found = [" ".join(str(self._templar.template(check["fail_msg"])).split())]
                if check.get("warning"):
                    for sentence in found:
                        self._display.warning(sentence)  # the same one of several hosts is shown once
                else:
                    problems += found
            except specs.UNREADABLE as error:
                if not tolerant and not problems:
                    problems += self._unanswered(inputs.leads_to(asked, variables), variables, error)
        return problems

    def _misshapen(self, names: set[str], variables: Mapping[str, Any]) -> list[str]:
        """What is wrong with the shape of those of these variables that are not this role's."""
        return specs.problems(names - set(self.spec), variables, self._templar.template, told=True)

    def _unanswered(self, names: set[str], variables: Mapping[str, Any], error: Exception) -> list[str]:
        """Why a check could not be asked: a variable of another role, or of another host where it looks at all, or a value."""
        if found := self._misshapen(names, variables):
            return found
        hostvars = variables.get("hostvars") if "hostvars" in names else None
        if hostvars and (found := fleet_variable_problems(hostvars, list(hostvars))):
            return found
        public = sorted(names & set(self.spec)) or sorted(
            name for name in names if not name.startswith(("_", "ansible_"))
        )
        return [f"{', '.join(public) or 'a variable'} has a value that does not fit: {specs.reason(error)}"]

    def _holds(self, conditions: Any) -> bool:
        """Whether all conditions hold."""
        wanted = conditions if isinstance(conditions, list) else [conditions]
        return all(self._templar.evaluate_conditional(condition) for condition in wanted)
