# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The argument specs of all roles, and of what the playbooks read beside them: what any variable of an inventory may be."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible_collections.gpufleet.llm.plugins.module_utils import inputs
from jinja2 import TemplateSyntaxError, UndefinedError

ROOT = Path(__file__).resolve().parents[2]
FLEET = ROOT / "meta/fleet_specs.yml"
ROLES = ROOT / "playbooks/group_vars/all/roles.yml"
UNREADABLE = (AnsibleError, UndefinedError)  # the second inside of a list or a dictionary


@functools.cache
def roles() -> dict[str, Mapping[str, Any]]:
    """The options of each role's main entry point."""
    files = sorted(ROOT.glob("roles/*/meta/argument_specs.yml"))
    loaded = {file.parents[1].name: yaml.safe_load(file.read_text())["argument_specs"]["main"] for file in files}
    return {role: spec.get("options") or {} for role, spec in loaded.items()}


@functools.cache
def fleet() -> Mapping[str, Any]:
    """What the playbooks read."""
    options: Mapping[str, Any] = yaml.safe_load(FLEET.read_text())["options"]
    return options


@functools.cache
def decisive() -> frozenset[str]:
    """What roles own and plays read before them, to decide which roles a host gets."""
    owned = {name for options in roles().values() for name in options}
    return frozenset(owned & set(inputs.IDENTIFIER.findall(ROLES.read_text())))


def reason(error: BaseException) -> str:
    """The first cause of an error, on one line."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    said = " ".join(str(getattr(cause, "message", None) or cause).split())
    return said.rstrip(".").removesuffix("Use -vvvvv to see paths searched").strip().rstrip(".")


def unreadable(name: str, sources: Collection[str], error: BaseException) -> str:
    """A value that is a template, and whose template fails."""
    said = reason(error)
    if "is undefined" in said:
        said += "; a secret of that name may be missing from the vault"
    elif not sources:
        said += "; text with braces is a template for Ansible, unless it is marked with !unsafe"
    made = f" (made of {', '.join(sorted(sources))})" if sources else ""
    return f"{name}{made} cannot be read: {said}"


def problems(
    names: Collection[str],
    variables: Mapping[str, Any],
    read: Callable[[Any], Any] = lambda value: value,
    told: bool = False,
) -> list[str]:
    """What is wrong with the shape of these variables. What cannot be read is left out, unless it is to be `told`: what needs facts never is."""
    found: list[str] = []
    for spec in (fleet(), *roles().values()):
        for name in sorted(set(spec) & set(names)):
            try:
                if name in variables:
                    found += inputs.value_problems(name, read(variables[name]), spec[name])
            except UNREADABLE as error:
                found += [unreadable(name, (), error)] if told and without_facts(error) else []
    return found


def shared(variables: Mapping[str, Any]) -> list[str]:
    """What would end a play before a role can tell it: shapes of what no role owns, and what decides about roles and cannot be read."""
    found = problems(set(fleet()), variables, told=True)
    for name in sorted(decisive() & set(variables)):
        try:
            inputs.value_problems(name, variables[name], {"type": "raw"})
        except UNREADABLE as error:
            found += [unreadable(name, (), error)] if without_facts(error) else []
    return found


def without_facts(error: BaseException) -> bool:
    """Whether a value would be as unreadable with the facts of its host: by its syntax, or by a name that nobody gives."""
    said = reason(error)
    undefined = re.fullmatch(r"'(\w+)' is undefined", said)
    return (undefined is not None and not undefined[1].startswith("ansible_")) or any(
        isinstance(cause, TemplateSyntaxError) or "syntax error" in str(cause).lower() for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
