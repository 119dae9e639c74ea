"""What an inventory says, compared with what a role's argument_specs.yml says it may say.

Ansible's own check ends at the first kind of mistake and names neither the entry of a list nor what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ansible.module_utils.common import validation

# Former name of a variable -> its name today. Whoever renames a variable adds a line, so that a stale inventory is answered.
RENAMED_VARIABLES: dict[str, str] = {}

# How close an unknown variable must be to a known one to be taken for a misspelling: other roles and the user's own plays
# may have variables with the same prefix.
SIMILAR = 0.84

# Type of an argument spec -> what Ansible accepts for it, and the words for it.
TYPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (
        lambda value: validation.check_type_str(value, allow_conversion=not isinstance(value, list | dict)),
        "text",
    ),
    "path": (lambda value: validation.check_type_str(value, allow_conversion=False), "a path"),
    "int": (validation.check_type_int, "a whole number"),
    "float": (validation.check_type_float, "a number"),
    "bool": (validation.check_type_bool, "true or false"),
    "list": (lambda value: _exactly(list, value), "a list"),
    "dict": (lambda value: _exactly(dict, value), "a dictionary"),
}


def _exactly(kind: type, value: Any) -> None:
    """Ansible would turn `a, b` into a list; in an inventory that is a mistake."""
    if not isinstance(value, kind):
        raise TypeError


# What roles set for others; the arguments of each role say what it means.
OUTPUTS = {
    "host_support_facts",
    "host_support_installed",
    "host_support_offer",
    "host_support_vendors_changed",
    "nvidia_driver_changed",
    "nvidia_driver_look",
    "tls_certificate_present",
    "vllm_activation",
    "vllm_former_keys",
    "vllm_status",
}


def as_int(value: Any) -> int | None:
    """A number as Ansible would take it, or nothing."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def similar(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint at the name that was probably meant, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def name_problems(role: str, spec: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Variables that have a new name, or that look like a misspelt variable of the role."""
    problems = []
    for name in sorted(set(names) - set(spec) - OUTPUTS):
        if name in RENAMED_VARIABLES:
            problems.append(f"{name} is called {RENAMED_VARIABLES[name]} now; write that")
        elif name.startswith(f"{role}_") and (hint := similar(name, spec, SIMILAR)):
            problems.append(f"{name} is not a variable of the role {role}{hint}")
    return problems


def value_problems(where: str, value: Any, spec: Mapping[str, Any]) -> list[str]:
    """What is wrong with a value, one sentence each. `spec` is the entry of the argument spec, `where` names the value."""
    kind = spec.get("type", "str")
    shown = "" if spec.get("no_log") else f" is {value!r}, but"
    if value is None:
        return [f"{where} has no value; it must be {TYPES[kind][1]}"] if spec.get("required") else []
    check, words = TYPES[kind]
    try:
        check(value)
    except (TypeError, ValueError):
        return [f"{where}{shown} must be {words}"]
    choices = spec.get("choices")
    if choices and kind != "list" and value not in choices:
        return [f"{where}{shown} must be one of {', '.join(map(str, choices))}"]
    problems: list[str] = []
    if kind == "list":
        element = {"type": spec.get("elements", "raw"), "options": spec.get("options"), "choices": choices}
        element["no_log"] = spec.get("no_log")
        if element["type"] in TYPES:
            for number, entry in enumerate(value):
                label = entry.get("name") if isinstance(entry, dict) else None
                problems += value_problems(f"{where}[{number}]" + (f" ({label})" if label else ""), entry, element)
    elif kind == "dict" and spec.get("options"):
        problems += entry_problems(where, value, spec["options"])
    return problems


def entry_problems(where: str, entry: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys of a dictionary and with their values."""
    problems = []
    for key in entry:
        if key not in options:
            hint = similar(str(key), options) or f"; known are {', '.join(options)}"
            problems.append(f"{where}: key {key!r} is unknown{hint}")
    for key, spec in options.items():
        if key in entry:
            problems += value_problems(f"{where}: {key}", entry[key], spec)
        elif spec.get("required"):
            said = spec.get("description")
            meant = f"; it is: {said.rstrip('.')}" if isinstance(said, str) else ""
            problems.append(f"{where}: {key} is missing{meant}")
    return problems
