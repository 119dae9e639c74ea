"""What a role puts on a host: files, units, users and ports, read from the role itself.

Files of `tree` come from the action plugin's own reading of a task and of the mirrored templates. Those of other modules are the paths that
their tasks name. A path that depends on the host has a `*` where it does.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from ansible.plugins.filter.core import FilterModule
from ansible.plugins.filter.urlsplit import FilterModule as UrlFilters
from ansible_collections.gpufleet.llm.plugins.action import tree
from ansible_collections.gpufleet.llm.plugins.module_utils import (
    container_toolkit_host,
    docker_host,
    firewall_host,
    ssh_guard_host,
    uv_host,
)
from ansible_collections.gpufleet.llm.plugins.modules import model_share
from jinja2 import Environment, StrictUndefined, TemplateError, meta

PLUGINS = "ansible_collections.gpufleet.llm.plugins"
# Module -> the parameter that names what it writes.
WRITES = {
    "ansible.builtin.copy": "dest",
    "ansible.builtin.file": "path",
    "ansible.builtin.get_url": "dest",
    "ansible.builtin.lineinfile": "path",
    "ansible.builtin.template": "dest",
    "community.crypto.openssl_privatekey": "path",
    "community.crypto.x509_certificate": "path",
    "gpufleet.llm.apt_source": "key_path",
    "gpufleet.llm.container_image": "record",
    "gpufleet.llm.managed_python": "directory",
    "gpufleet.llm.model_store": "path",
    "gpufleet.llm.vllm_generation": "config_path",
    "gpufleet.llm.vllm_release": "path",
    "gpufleet.llm.vllm_start_proof": "proofs_path",
    "gpufleet.llm.python_environment": "path",
}
# What modules write at places that no parameter names.
FIXED = {
    "gpufleet.llm.firewall_table": {
        firewall_host.BOOT_FILE: "the rules, once they are proved",
        firewall_host.RECORD: "what was proved",
    },
    "gpufleet.llm.ssh_change": {
        str(ssh_guard_host.DIRECTORY): "what was before, while a change is tried",
        str(ssh_guard_host.UNIT_FILE): "undoes it at a boot, while a change is tried",
    },
    "gpufleet.llm.uv_release": {
        str(uv_host.RELEASES): "virtual environments of uv",
        **{str(uv_host.LINKS / name): "link into the one that is used" for name in uv_host.PROGRAMS},
    },
}
# Units that they start, or restart.
UNITS = {
    "gpufleet.llm.container_toolkit": [container_toolkit_host.REFRESH, container_toolkit_host.REFRESH_PATH],
    "gpufleet.llm.docker_engine": [docker_host.UNIT],
    "gpufleet.llm.firewall_table": [f"{firewall_host.TIMER}.timer"],
    "gpufleet.llm.model_share": [f"{model_share.UNIT}.service"],
    "gpufleet.llm.ssh_change": [f"{ssh_guard_host.UNIT}.timer"],
}
KINDS = {"directory": "directory"}
UNIT = re.compile(r"/etc/systemd/system/([^/]+\.(?:service|socket|timer|mount|path|target))(?:\.d/|$)")
EXPRESSION = re.compile(r"{{(.*?)}}", re.DOTALL)


class HostDecidesError(Exception):
    """A value that only a host, or a run, has."""


@dataclass(frozen=True)
class Landing:
    """A path that a role writes."""

    path: str
    what: str
    mode: str = ""
    owner: str = "root"
    group: str = "root"
    when: str = ""


class Role:
    """A role as its files say it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.templates = (path / "templates").resolve()
        self.variables: dict[str, Any] = {}
        for kind in ("defaults", "vars"):
            file = path / kind / "main.yml"
            self.variables |= (yaml.safe_load(file.read_text()) if file.exists() else None) or {}
        self.environment = Environment(autoescape=False, undefined=StrictUndefined)  # noqa: S701 -- no HTML
        self.environment.filters |= {**FilterModule().filters(), **UrlFilters().filters()}

    # ------------------------------------------------------------------------------------------------------------ values

    def rendered(self, text: Any) -> str:
        """A text with its expressions evaluated, and a `*` for what the host decides."""
        if not isinstance(text, str):
            return str(text)
        return re.sub(r"\*+", "*", EXPRESSION.sub(lambda found: self.piece(found[1]), text)).strip()

    def piece(self, expression: str) -> str:
        """An expression as text. A name whose value is a text with expressions of its own is taken apart, so that only a part becomes a `*`."""
        name = expression.strip()
        if isinstance(self.variables.get(name), str):
            return self.rendered(self.variables[name])
        try:
            return str(self.value(expression))
        except HostDecidesError:
            return "*"

    def value(self, expression: str) -> Any:
        """The value of an expression, by the defaults and variables of the role alone."""
        try:
            names = meta.find_undeclared_variables(self.environment.parse("{{" + expression + "}}"))
            known = {name: self.variable(name) for name in names}
            return self.environment.compile_expression(expression, undefined_to_none=False)(**known)
        except (TemplateError, LookupError, TypeError, ValueError) as error:
            raise HostDecidesError(expression) from error

    def variable(self, name: str) -> Any:
        """The value of a variable."""
        if name not in self.variables:
            raise HostDecidesError(name)
        return self.resolved(self.variables[name])

    def resolved(self, value: Any) -> Any:
        """A value with all that is in it evaluated."""
        if isinstance(value, Mapping):
            return {key: self.resolved(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.resolved(one) for one in value]
        if not isinstance(value, str) or "{{" not in value:
            return value
        if whole := re.fullmatch(r"\s*{{((?:(?!}}).)*)}}\s*", value, re.DOTALL):
            return self.value(whole[1])
        return EXPRESSION.sub(lambda found: str(self.value(found[1])), value)

    # ------------------------------------------------------------------------------------------------------------- tasks

    @functools.cached_property
    def tasks(self) -> list[dict[str, Any]]:
        """Every task that runs on the host, and every handler."""

        def inside(listed: Any, conditions: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
            for task in listed or []:
                if task.get("delegate_to") == "localhost":
                    continue
                here = (*conditions, *conditions_of(task))
                yield {**task, "when": here}
                for part in ("block", "rescue", "always"):
                    yield from inside(task.get(part), here)

        files = [file for directory in ("tasks", "handlers") for file in sorted((self.path / directory).rglob("*.yml"))]
        return [task for file in files for task in inside(yaml.safe_load(file.read_text()))]

    def calls(self, module: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The arguments of each task with a module, and the task."""
        for task in self.tasks:
            if isinstance(task.get(module), dict):
                for item in self.items(task):
                    yield item, task

    def items(self, task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The arguments of a task, for each item of its loop where the items are written down."""
        [arguments] = [value for name, value in task.items() if "." in name and isinstance(value, dict)]
        loop = task.get("loop")
        for item in loop if isinstance(loop, list) else [None]:
            yield {name: with_item(value, item) for name, value in arguments.items()}

    # ------------------------------------------------------------------------------------------------------ what it has

    @functools.cached_property
    def landings(self) -> list[Landing]:
        """The paths that the role writes, each once."""
        found: dict[str, Landing] = {}
        for landing in sorted([*self.of_tree(), *self.of_modules(), *self.of_vendor()], key=lambda one: one.path):
            if found.setdefault(landing.path, landing).what == "directory" and landing.what != "directory":
                found[landing.path] = landing
        return list(found.values())

    def of_tree(self) -> Iterator[Landing]:
        """The files that `tree` puts in place."""
        for given, _task in self.calls("gpufleet.llm.tree"):
            if given.get("state", "present") in ("settled", "absent"):
                continue
            arguments = filled(tree.ARGUMENTS, given)
            for name in ("modes", "when"):
                arguments[name] = {self.rendered(path): value for path, value in arguments[name].items()}
            files = self.mirrored(arguments)
            secrets = arguments["secrets"]
            if isinstance(secrets, str):
                arguments["secrets"] = [path for path in files if f"'{path}'" in secrets]
            for place in tree.places(arguments, files):
                what = "secret" if place.secret else place.kind
                if place.kind == "link":
                    what = f"link to `{self.rendered(place.target)}`"
                landing = Landing(
                    self.rendered(place.path), what, bare(place.mode) if place.kind != "link" else "",
                    self.rendered(place.owner), self.rendered(place.group), bare(place.when) if place.when is not True else "",
                )  # fmt: skip
                sometimes = place.secret and place.mirrors and isinstance(secrets, str)
                yield replace(landing, what="file or secret") if sometimes else landing

    def mirrored(self, arguments: Mapping[str, Any]) -> dict[str, Path]:
        """The files of `templates/` that a task mirrors."""
        if arguments["source"] == "":
            return {}
        named = {self.templates / file["template"] for file in arguments["files"] if file["template"]}
        return tree.mirrored(self.templates / (arguments["source"] or ""), arguments["exclude"], named)

    def of_modules(self) -> Iterator[Landing]:
        """What tasks with other modules write. What the role takes away again is not among it."""
        gone = {
            self.rendered(given["path"])
            for given, _task in self.calls("ansible.builtin.file")
            if given.get("state") == "absent"
        }
        for module, parameter in WRITES.items():
            for given, task in self.calls(module):
                arguments = {**defaults_of(module), **given}
                path = self.rendered(arguments.get(parameter) or arguments.get("dest") or "").rstrip("/")
                if parameter == "directory" and "name" in given:
                    path = f"{path}/{given['name']}"
                if not path.startswith("/") or path in gone:
                    continue
                ours, state = module.startswith("gpufleet."), str(given.get("state"))
                what = KINDS.get(state) or ("a line" if module.endswith("lineinfile") else "file")
                if ours:
                    what = f"what `{module[13:]}` keeps"
                elif state == "link":
                    what = f"link to `{self.rendered(given['src'])}`"
                elif task.get("no_log"):
                    what = "secret"
                yield Landing(
                    path, what, bare(given.get("mode", "")),
                    self.rendered(given.get("owner", "root")), self.rendered(given.get("group", "root")),
                    "" if ours else " and ".join(task["when"]),
                )  # fmt: skip

        for module, paths in FIXED.items():
            if any(self.calls(module)):
                yield from (Landing(path, what) for path, what in paths.items())

    def of_vendor(self) -> Iterator[Landing]:
        """What host_support (`vendor_packages`) puts in place for the role, whose `__<role>_vendor` says for whom."""
        vendor = self.variables.get(f"__{self.path.name}_vendor")
        if vendor:
            yield Landing(f"/etc/apt/keyrings/{vendor['name']}.asc", "the vendor's key", "0644")
            yield Landing(f"/etc/apt/sources.list.d/{vendor['name']}.sources", "file", "0644")
            yield Landing(f"/etc/apt/preferences.d/vllm-fleet-{vendor['name']}", "file", "0644")

    def units(self) -> list[str]:
        """The units that the role brings, changes, starts or reloads."""
        found = {match[1] for landing in self.landings if (match := UNIT.match(landing.path))}
        for given, _task in self.calls("ansible.builtin.systemd_service"):
            name = self.rendered(given.get("name", ""))
            found |= {name} if name.strip("*") not in ("", ".service") else set()
        for module, units in UNITS.items():
            found |= set(units) if any(self.calls(module)) else set()
        return sorted(found)

    def users(self) -> list[str]:
        """The users and groups that the role makes, and the variables that name them."""
        found = set()
        for kind in ("user", "group"):
            for given, _task in self.calls(f"ansible.builtin.{kind}"):
                named = EXPRESSION.fullmatch(str(given["name"]))
                variable, default = named[1].strip() if named else "", self.rendered(given["name"]).strip("*")
                if not variable:
                    found.add(f"{kind} `{default}`")
                elif variable in self.variables:
                    found.add(
                        f"{kind} `{default}` (`{variable}`)" if default else f"the {kind} that `{variable}` names"
                    )
        return sorted(found)


def conditions_of(task: Mapping[str, Any]) -> tuple[str, ...]:
    """The conditions of a task; those about a simulation say nothing of the host."""
    stated = task.get("when", ())
    listed = [str(one) for one in (stated if isinstance(stated, list | tuple) else [stated])]
    return tuple(one for one in listed if "ansible_check_mode" not in one and "_simulated" not in one)


def with_item(value: Any, item: Any) -> Any:
    """A value with `item` replaced by the item of a loop, where that is a text or has the key that is asked for."""
    if not isinstance(value, str) or item is None:
        return value
    if isinstance(item, dict):
        return re.sub(r"{{ *item\.(\w+) *}}", lambda found: str(item.get(found[1], found[0])), value)
    return re.sub(r"{{ *item *}}", lambda _: str(item), value)


def filled(spec: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the defaults of their spec, as Ansible fills them in."""
    result = {name: given.get(name, option.get("default")) for name, option in spec.items()}
    for name, option in spec.items():
        if "options" in option:
            result[name] = [filled(option["options"], entry) for entry in result[name]]
    return result


def defaults_of(module: str) -> dict[str, Any]:
    """The defaults of a module of this collection, as it documents them."""
    if not module.startswith("gpufleet.") or importlib.util.find_spec(f"{PLUGINS}.modules.{module[13:]}") is None:
        return {}
    documented = yaml.safe_load(importlib.import_module(f"{PLUGINS}.modules.{module[13:]}").DOCUMENTATION)
    return {name: option["default"] for name, option in documented["options"].items() if "default" in option}


def bare(value: Any) -> str:
    """A value as the reader would say it: an expression without its braces, and modes without quotes."""
    text = " ".join(str(value).split())
    whole = re.fullmatch(r"{{ *(.*?) *}}", text)
    return re.sub(r"'(\d{3,4})'", r"\1", whole[1]) if whole else text
