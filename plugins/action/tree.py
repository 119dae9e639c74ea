# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Renders the files of a role and has the module of the same name put them in place, all in one call."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.module_utils.common.text.converters import to_bytes
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.template import generate_ansible_template_vars, trust_as_template
from ansible_collections.gpufleet.llm.plugins.module_utils.tree import NAME, REQUIREMENT, Entry, TreeError, pack
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_seen import STATE_PATH, digest
from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickCalls

IGNORED = ("*~", ".*.sw?", ".gitkeep", "*.pyc")
OWNED = {"owner": {"type": "str"}, "group": {"type": "str"}}
FILE = {
    "path": {"type": "str", "required": True},
    **{name: {"type": "str"} for name in ("template", "content", "source")},
    "vars": {"type": "dict", "default": {}},
    "mode": {"type": "raw", "default": "0644"},  # raw, so that a mode that lost its quotes is seen and not guessed
    **OWNED,
    "secret": {"type": "bool", "default": False},
    "when": {"type": "bool", "default": True},
}
DIRECTORY = {"path": {"type": "str", "required": True}, "mode": {"type": "raw", "default": "0755"}, **OWNED}
LINK = {"path": {"type": "str", "required": True}, "target": {"type": "str", "required": True}}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "settled", "absent"], "default": "present"},
    "source": {"type": "str"},
    "files": {"type": "list", "elements": "dict", "options": FILE, "default": []},
    "modes": {"type": "dict", "default": {}},
    "when": {"type": "dict", "default": {}},
    "secrets": {"type": "list", "elements": "str", "default": []},
    "exclude": {"type": "list", "elements": "str", "default": []},
    "directories": {"type": "list", "elements": "dict", "options": DIRECTORY, "default": []},
    "links": {"type": "list", "elements": "dict", "options": LINK, "default": []},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
    "requires": {"type": "list", "elements": "dict", "options": REQUIREMENT, "default": []},
    "validate": {"type": "list", "elements": "str", "default": []},
    "notify": {"type": "dict", "default": {}},
    "state_path": {"type": "path", "default": STATE_PATH},
}


@dataclass(frozen=True)
class Place:
    """What the arguments say of one path, before anything is rendered."""

    path: str
    kind: str = "file"
    mirrors: Path | None = None  # the file of the role that it mirrors
    stated: Mapping[str, Any] | None = None  # or the entry of `files`
    when: Any = True
    mode: str = "0644"
    owner: str = "root"
    group: str = "root"
    secret: bool = False
    target: str = ""  # of a link


def mirrored(source: Path | None, exclude: Sequence[str], named: Set[Path]) -> dict[str, Path]:
    """The files of a directory that mirrors the host, by their path there. `named` are those that have an entry of their own."""
    found, unused = {}, set(exclude)
    for file in sorted(source.rglob("*")) if source else []:
        relative = file.relative_to(source or "")
        excluded = {pattern for pattern in exclude if fnmatch.fnmatchcase(str(relative), pattern)}
        unused -= excluded
        ignored = file.name.startswith("_") or any(fnmatch.fnmatchcase(file.name, pattern) for pattern in IGNORED)
        if len(relative.parts) > 1 and file.is_file() and not (excluded or ignored or file.resolve() in named):
            found[f"/{relative.with_suffix('') if file.suffix == '.j2' else relative}"] = file
    if unused:
        raise TreeError(f"exclude: {', '.join(sorted(unused))} matches no file of {source}")
    return found


def places(arguments: Mapping[str, Any], files: Mapping[str, Path]) -> Iterator[Place]:
    """All paths that the arguments name, and those of the mirrored files. tools/docs.py reads them too, of arguments that are not rendered."""
    for parameter in ("modes", "when", "secrets"):
        for path in arguments[parameter]:
            if path not in files:
                raise TreeError(f"{parameter}: {path} is not the path of a mirrored file")
    owned = {name: arguments[name] for name in OWNED}
    for path, file in files.items():
        said = {"when": arguments["when"].get(path, True), "mode": arguments["modes"].get(path, "0644")}
        yield Place(path, mirrors=file, secret=path in arguments["secrets"], **said, **owned)
    for kind, entries in (("file", arguments["files"]), ("directory", arguments["directories"])):
        for entry in entries:
            common = {"mode": entry["mode"], **{name: entry[name] or default for name, default in owned.items()}}
            more = {"stated": entry, "when": entry["when"], "secret": entry["secret"]} if kind == "file" else {}
            yield Place(entry["path"], kind, **common, **more)
    for entry in arguments["links"]:
        yield Place(entry["path"], "link", target=entry["target"])


class ActionModule(QuickCalls):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Render, call, notify."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(ARGUMENTS)
        if not NAME.fullmatch(arguments["name"]):
            raise AnsibleActionFail(f"name: {arguments['name']!r} must be of lower case letters, digits, '_' and '-'")
        for name in ("modes", "when", "notify"):
            # Ansible renders the values of a dictionary, but not its keys, which here are paths.
            arguments[name] = {self._templar.template(key): value for key, value in arguments[name].items()}
        passed = {name: arguments[name] for name in ("name", "state", "state_path", "requires", "validate")}
        passed["notify"] = self.patterns(arguments["notify"])
        if arguments["state"] == "present":
            try:
                entries = list(Wanted(self, arguments, task_vars or {}).entries())
                passed["payload"] = pack(entries)
            except TreeError as error:
                raise AnsibleActionFail(str(error)) from error
            if entries and self.seen(arguments, task_vars or {}) == digest(entries):
                self.tell([])
                return {**result, "changed": False, "paths": [], "unsettled": [], "handlers": [], "interrupted": ""}
        result.update(self.quick("tree", passed, task_vars or {}))
        self.tell(result.get("handlers", []))
        if result.get("changed") or result.get("failed"):
            self.forget(result, arguments, task_vars or {})
        return result

    def seen(self, arguments: dict[str, Any], variables: dict[str, Any]) -> str:
        """What was there when the role host_support looked at the host in this very run; nothing is known otherwise."""
        if "host_support_facts" not in variables or arguments["state_path"] != STATE_PATH:
            return ""
        facts = variables.get("ansible_facts", {}).get("gpufleet") or {}
        return str((facts.get("trees") or {}).get(arguments["name"], ""))

    def forget(self, result: dict[str, Any], arguments: dict[str, Any], variables: dict[str, Any]) -> None:
        """What was seen is no longer so."""
        if self.seen(arguments, variables):
            facts = variables["ansible_facts"]["gpufleet"]
            trees = {name: seen for name, seen in facts["trees"].items() if name != arguments["name"]}
            result["ansible_facts"] = {"gpufleet": {**facts, "trees": trees}}

    def patterns(self, stated: dict[str, Any]) -> dict[str, list[str]]:
        """Which handlers a changed path notifies. The keyword of the task goes for every path."""
        patterns = {pattern: names if isinstance(names, list) else [names] for pattern, names in stated.items()}
        if self._task.notify:
            patterns["*"] = [*patterns.get("*", []), *self._task.notify]
        return patterns

    def tell(self, handlers: list[str]) -> None:
        """Notify these handlers, when the task changed something.

        There is no key of the result for that: the executor overwrites it with the task's own `notify`, which it reads after the action
        ran (core 2.19 to 2.21: TaskExecutor._execute). Each host and each item of a loop has a task object of its own.
        """
        self._task.notify = handlers


class Wanted:
    """What the arguments of a task ask for."""

    def __init__(self, action: ActionModule, arguments: dict[str, Any], variables: dict[str, Any]) -> None:
        self.action = action
        self.arguments = arguments
        self.variables = variables
        role = action._task._role
        base = Path(role._role_path, "templates") if role else Path(action._loader.get_basedir())
        self.base = base.resolve()  # the one name of a directory that is reached by links, so that files compare
        self.source = self.mirrored_directory(bool(role))
        self.texts: dict[Path, str] = {}
        self.found: dict[tuple[str, str], Path] = {}
        search = [
            *variables.get("ansible_search_path", []),
            action._loader.get_basedir(),
            self.base,
            *filter(None, [self.source]),
        ]
        self.search = [str(path) for parent in search for path in (Path(parent, "templates"), parent)]

    def mirrored_directory(self, in_role: bool) -> Path | None:
        """The directory that mirrors the host, if there is one."""
        source = self.arguments["source"]
        if source is None and not in_role:
            raise AnsibleActionFail("source: outside of a role there is no default; name a directory, or '' for none")
        if source == "":
            return None
        directory = self.base / (source or ".")
        if source and not directory.is_dir():
            raise AnsibleActionFail(f"source: there is no directory {directory}")
        return directory

    def entries(self) -> Iterator[Entry]:
        """Everything that is wanted."""
        named = [file["template"] for file in self.arguments["files"] if file["template"] is not None]
        files = mirrored(self.source, self.arguments["exclude"], {self.find("template", name) for name in named})
        for place in places(self.arguments, files):
            if boolean(place.when):
                attributes = {name: getattr(place, name) for name in ("kind", "target", "mode", *OWNED, "secret")}
                yield Entry(place.path, content=self.content(place), **attributes)

    def content(self, place: Place) -> bytes:
        """The content of a file."""
        if place.mirrors:
            return self.render(place.mirrors, place.path) if place.mirrors.suffix == ".j2" else self.read(place.mirrors)
        if not place.stated:
            return b""
        entry = place.stated
        kinds = [kind for kind in ("template", "content", "source") if entry[kind] is not None]
        if len(kinds) != 1:
            raise TreeError(
                f"files: {entry['path']} needs exactly one of template, content and source, and has {kinds or 'none'}"
            )
        (kind,) = kinds
        if kind == "content":
            return bytes(to_bytes(entry["content"]))
        file = self.find(kind, entry[kind])
        return self.render(file, entry["path"], entry["vars"]) if kind == "template" else self.read(file)

    def find(self, kind: str, name: str) -> Path:
        """A template or a file of the role, or of the play when there is no role."""
        if (kind, name) not in self.found:
            try:
                found = self.action._find_needle("templates" if kind == "template" else "files", name)
            except AnsibleError as error:
                raise AnsibleActionFail(f"files: there is no {kind} {name}") from error
            self.found[kind, name] = Path(found).resolve()
        return self.found[kind, name]

    def read(self, file: Path) -> bytes:
        """A file as it is; one that Ansible Vault encrypted is decrypted, as ansible.builtin.copy does."""
        loader = self.action._loader
        real = loader.get_real_file(str(file))
        try:
            return Path(real).read_bytes()
        finally:
            loader.cleanup_tmp_file(real)

    def render(self, file: Path, path: str, more: dict[str, Any] | None = None) -> bytes:
        """A template as ansible.builtin.template would render it with its defaults."""
        loader = self.action._loader
        try:
            if file not in self.texts:
                self.texts[file] = trust_as_template(loader.get_text_file_contents(str(file)))
            name = str(file.relative_to(self.base)) if file.is_relative_to(self.base) else file.name
            of_file = generate_ansible_template_vars(name, str(file), path)
            if "ansible_managed" in self.variables:
                del of_file["ansible_managed"]  # who sets it himself keeps it
            templar = self.action._templar.copy_with_new_env(
                searchpath=[*self.search, str(file.parent)],
                available_variables={**self.variables, **of_file, **(more or {})},
            )
            overrides = {"trim_blocks": True, "lstrip_blocks": False, "newline_sequence": "\n"}
            rendered = templar.template(self.texts[file], escape_backslashes=False, overrides=overrides)
        except (AnsibleError, OSError) as error:
            raise AnsibleActionFail(f"{path}: the template {file} cannot be rendered") from error
        return bytes(to_bytes("" if rendered is None else rendered, errors="surrogate_or_strict"))
