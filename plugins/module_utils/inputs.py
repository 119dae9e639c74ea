"""What an inventory says, compared with what a role's argument_specs.yml says it may say.

Ansible's own check ends at the first kind of mistake and names neither the entry of a list nor what would be right.
"""

from __future__ import annotations

import difflib
import re
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
        lambda value: validation.check_type_str(_no_truth(value), allow_conversion=not isinstance(value, list | dict)),
        "text",
    ),
    "path": (lambda value: validation.check_type_str(value, allow_conversion=False), "a path"),
    "int": (lambda value: validation.check_type_int(_no_truth(value)), "a whole number"),
    "float": (lambda value: validation.check_type_float(_no_truth(value)), "a number"),
    "bool": (validation.check_type_bool, "true or false"),
    "list": (lambda value: _exactly(list, value), "a list"),
    "dict": (lambda value: _exactly(dict, value), "a dictionary"),
}


def _exactly(kind: type, value: Any) -> None:
    """Ansible would turn `a, b` into a list; in an inventory that is a mistake."""
    if not isinstance(value, kind):
        raise TypeError


def _no_truth(value: Any) -> Any:
    """Python takes true for 1, and YAML a bare `off` for false; in an inventory that is a mistake."""
    if isinstance(value, bool):
        raise TypeError
    return value


# What roles set for others; the arguments of each role say what it means.
OUTPUTS = {
    "base_uninstalled",
    "cuda_toolkit_uninstalled",
    "docker_uninstalled",
    "firewall_uninstalled",
    "fleet_authority_present",
    "fleet_authority_signed",
    "fleet_authority_uninstalled",
    "gateway_uninstalled",
    "host_agent_uninstalled",
    "host_support_facts",
    "host_support_installed",
    "host_support_offer",
    "host_support_vendors_changed",
    "model_store_uninstalled",
    "nvidia_container_toolkit_uninstalled",
    "nvidia_driver_changed",
    "nvidia_driver_look",
    "nvidia_driver_uninstalled",
    "ssh_hardening_uninstalled",
    "tls_certificate_present",
    "tls_certificate_uninstalled",
    "turn_plan",
    "turn_refused",
    "turn_report",
    "turn_seconds",
    "uv_uninstalled",
    "virtual_address_uninstalled",
    "vllm_activation",
    "vllm_changed",
    "vllm_due",
    "vllm_former_keys",
    "vllm_left_turns",
    "vllm_start_due",
    "vllm_status",
    "vllm_uninstalled",
    "vllm_uninstalled_instances",
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


def converted(value: Any, spec: Mapping[str, Any]) -> Any:
    """What checks compare: a number or a truth that came as text, as `-e name=3` brings it, and text that looks like a number."""
    kind = spec.get("type", "str")
    if kind == "str" and isinstance(value, int | float):
        return str(value)
    if isinstance(value, str) and kind in ("int", "float", "bool"):
        convert = {"int": int, "float": float, "bool": validation.check_type_bool}[kind]
        try:
            return convert(value)
        except (TypeError, ValueError):
            return value
    return value


IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def leads_to(expression: Any, variables: Mapping[str, Any]) -> set[str]:
    """The variables that an expression needs, those among them that are templates followed to what they need."""
    found: set[str] = set()
    waiting = list(_texts(expression))
    while waiting:
        for name in set(IDENTIFIER.findall(waiting.pop())) & variables.keys() - found:
            found.add(name)
            if name != "hostvars":
                waiting += [text for text in _texts(variables[name]) if "{{" in text or "{%" in text]
    return found


def _texts(value: Any) -> list[str]:
    """The texts in a value, below lists and dictionaries, too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for entry in value.values() for text in _texts(entry)]
    if isinstance(value, list | tuple):
        return [text for entry in value for text in _texts(entry)]
    return []


def value_problems(where: str, value: Any, spec: Mapping[str, Any]) -> list[str]:
    """What is wrong with a value, one sentence each. `spec` is the entry of the argument spec, `where` names the value."""
    kind = spec.get("type", "str")
    shown = "" if spec.get("no_log") else f" is {value!r}, but"
    check, words = TYPES.get(kind, (lambda value: value, "a value"))
    if value is None:
        return [f"{where} has no value; it must be {words}{'' if spec.get('required') else ', or be left out'}"]
    try:
        check(value)
    except (TypeError, ValueError):
        quoted = ", in quotes" if isinstance(value, bool) and kind == "str" else ""
        return [f"{where}{shown} must be {words}{quoted}"]
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
    elif kind == "dict" and where.endswith("environment"):
        problems += environment_problems(where, value)
    return problems


def environment_problems(where: str, environment: Mapping[Any, Any]) -> list[str]:
    """What is wrong with the environment of a program. Values may be secret, as the password of a proxy is, and are shown by kind."""
    problems = []
    for key, value in environment.items():
        if not isinstance(key, str) or not IDENTIFIER.fullmatch(key):
            problems.append(f"{where}: {key!r} is no name of a variable; it looks like HTTPS_PROXY")
        elif value is None:
            problems.append(f"{where}: {key} has no value; it must be text, or be left out")
        elif isinstance(value, list | dict):
            problems.append(
                f"{where}: {key} is a {'list' if isinstance(value, list) else 'dictionary'}, but must be text"
            )
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
