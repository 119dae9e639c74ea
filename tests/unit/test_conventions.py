"""What Ansible's users expect of a collection: every plugin is described, and as it is. tools/sanity.py looks at what modules and roles say."""

from __future__ import annotations

import importlib
import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment

from tools import sanity

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = "ansible_collections.gpufleet.llm.plugins"
FILTERS: dict[str, Callable[..., Any]] = {
    name: function
    for path in sorted((ROOT / "plugins/filter").glob("*.py"))
    for name, function in importlib.import_module(f"{PLUGINS}.filter.{path.stem}").FilterModule().filters().items()
}


def test_every_filter_is_described_in_the_file_of_its_name() -> None:
    assert FILTERS
    assert {path.stem for path in (ROOT / "plugins/filter").glob("*.yml")} == set(FILTERS)


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_is_described_as_it_is(name: str) -> None:
    described = yaml.safe_load((ROOT / f"plugins/filter/{name}.yml").read_text())
    options = described["DOCUMENTATION"]["options"]
    _given, *parameters = inspect.signature(FILTERS[name]).parameters.values()
    assert described["DOCUMENTATION"]["name"] == name
    stated = described["DOCUMENTATION"].get("positional", "").split(", ") if parameters else []
    assert stated == [parameter.name for parameter in parameters]
    assert set(options) == {"_input", *stated}
    assert options["_input"]["required"]
    for parameter in parameters:
        option = options[parameter.name]
        if parameter.default is parameter.empty:
            assert option["required"]
        else:
            assert "required" not in option
            default = parameter.default
            assert option.get("default") == (list(default) if isinstance(default, tuple) else default)
    assert described["RETURN"]["_value"]["type"]


@pytest.mark.parametrize("name", FILTERS)
def test_the_example_of_a_filter_uses_it(name: str) -> None:
    example = yaml.safe_load((ROOT / f"plugins/filter/{name}.yml").read_text())["EXAMPLES"]
    environment = Environment(autoescape=False)  # noqa: S701 -- nothing is rendered
    environment.filters = {f"gpufleet.llm.{known}": function for known, function in FILTERS.items()}
    environment.filters |= dict.fromkeys(("default", "difference", "from_json"), str)  # Ansible's
    [(_variable, template)] = yaml.safe_load(example).items()
    assert f"gpufleet.llm.{name}" in template
    environment.from_string(template)  # which knows no other filter


def as_documented(arguments: dict[str, Any]) -> dict[str, Any]:
    """An argument spec as the documentation of options has it."""
    result = {}
    for name, argument in arguments.items():
        option = {key: value for key, value in argument.items() if key in ("type", "elements", "default", "choices")}
        if argument.get("required"):
            option["required"] = True
        if "options" in argument:
            option["suboptions"] = as_documented(argument["options"])
        result[name] = option
    return result


def without_words(options: dict[str, Any]) -> dict[str, Any]:
    """Options without their descriptions."""
    result = {}
    for name, option in options.items():
        kept = {key: value for key, value in option.items() if key not in ("description", "suboptions")}
        if "suboptions" in option:
            kept["suboptions"] = without_words(option["suboptions"])
        result[name] = kept
    return result


@pytest.mark.parametrize("name", sorted(sanity.OF_THE_ACTION))
def test_a_module_with_arguments_of_its_action_plugin_describes_those(name: str) -> None:
    arguments = importlib.import_module(f"{PLUGINS}.action.{name}").ARGUMENTS
    module = importlib.import_module(f"{PLUGINS}.modules.{name}")
    assert arguments != module.ARGUMENTS, "validate-modules can compare them"
    assert without_words(yaml.safe_load(module.DOCUMENTATION)["options"]) == as_documented(arguments)


def test_no_plugin_is_a_link() -> None:
    """antsibull-docs takes one for a redirect to another plugin, and leaves out the module of its name."""
    assert [path.name for path in (ROOT / "plugins").rglob("*") if path.is_symlink()] == []


def test_what_a_program_finds_or_breaks_at_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = '{"plugins/modules/tree.py": {"errors": [{"code": "%s", "msg": "is wrong"}]}}'

    def answer(code: str, returncode: int = 3, stderr: str = "") -> None:
        done = subprocess.CompletedProcess([], returncode, found % code, stderr)
        monkeypatch.setattr(sanity, "run", lambda command, given="": done)

    answer("invalid-documentation")
    assert list(sanity.validate_modules("modules")) == ["plugins/modules/tree.py: invalid-documentation: is wrong"]
    answer("undocumented-parameter")
    assert list(sanity.validate_modules("modules")) == []
    answer("invalid-documentation", 1, "no module named voluptuous")
    assert list(sanity.validate_modules("modules")) == ["validate-modules ended with 1: no module named voluptuous"]
