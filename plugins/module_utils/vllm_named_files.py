# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Options and environment variables of vLLM that name files, directories, models or Python modules: one table of them, and what follows from it.

What the inventory writes is resolved once, when an instance is rendered: the name of a model in the model store, MODEL/FILE for a file of it, the
name of a file of `vllm_files`, or an absolute path. After that all of them are absolute paths, which mounts and the look at the host go by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}", re.IGNORECASE)
# What the unit hides from vLLM: ProtectHome=, PrivateTmp=, InaccessiblePaths=.
UNSEEN_PATHS = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/", "/run/lock/")  # noqa: S108
# Templates that vLLM brings: vllm/transformers_utils/chat_templates of 0.32 and 0.33.
OWN_TEMPLATE = re.compile(r"template_[a-z0-9_]+\.jinja")
# A template itself and not its name, as vLLM tells them apart (vllm/renderers/chat_utils/chat_template.py).
TEMPLATE_CHARACTERS = re.compile(r"[{}\n]")

# Kinds: a directory with a config.json or params.json; one with an adapter_config.json; one with a tokenizer; any directory; one that clients name
# files of; a file; a Python file, or the name of a module; a module and an object of it; what vLLM writes.
MODEL, ADAPTER, TOKENIZER, DIRECTORY, MEDIA, FILE, PYTHON, MODULE, WRITTEN = (
    "model", "adapter", "tokenizer", "directory", "media", "file", "python", "module", "written",
)  # fmt: skip
# Where the unit and the container let vLLM write; a relative path begins at its cache.
WRITABLE_PATHS = ("/var/cache/vllm/", "/tmp/")  # noqa: S108
OF_THE_STORE = (MODEL, ADAPTER, TOKENIZER, DIRECTORY)

# Where in the options, `*` for each entry of a list or mapping -> kind. Read from the sources of vLLM 0.32 and 0.33.
OPTIONS: dict[tuple[str, ...], str] = {
    ("lora-modules", "*", "path"): ADAPTER,
    ("default-mm-loras", "*"): ADAPTER,
    ("speculative-config", "model"): MODEL,
    ("spec-model",): MODEL,
    ("hf-config-path",): MODEL,
    ("tokenizer",): TOKENIZER,
    ("generation-config",): DIRECTORY,
    ("allowed-local-media-path",): MEDIA,
    ("chat-template",): FILE,
    ("log-config-file",): FILE,
    ("logging-config", "pylogging_config_file"): FILE,
    ("mm-encoder-fp8-scale-path",): FILE,
    ("tool-parser-plugin",): PYTHON,
    ("reasoning-parser-plugin",): PYTHON,
    ("structured-outputs-config", "reasoning_parser_plugin"): PYTHON,
    ("middleware", "*"): MODULE,
    ("logits-processors", "*"): MODULE,
    ("worker-cls",): MODULE,
    ("worker-extension-cls",): MODULE,
    ("scheduler-cls",): MODULE,
    ("kv-transfer-config", "kv_connector_module_path"): MODULE,
    ("ec-transfer-config", "ec_connector_module_path"): MODULE,
    ("profiler-config", "torch_profiler_dir"): WRITTEN,
    ("profiler-config", "proton_profiler_dir"): WRITTEN,
    ("compilation-config", "cache_dir"): WRITTEN,
    ("compilation-config", "debug_dump_path"): WRITTEN,
    ("mm-encoder-fp8-scale-save-path",): WRITTEN,
}
ENVIRONMENT = {
    "VLLM_LOGGING_CONFIG_PATH": FILE,
    "VLLM_TUNED_CONFIG_FOLDER": DIRECTORY,
    "VLLM_LORA_RESOLVER_CACHE_DIR": DIRECTORY,
    "LMCACHE_CONFIG_FILE": FILE,
    "SSL_CERT_FILE": FILE,
    "REQUESTS_CA_BUNDLE": FILE,
    "TIKTOKEN_ENCODINGS_BASE": DIRECTORY,
}
# Values that name nothing on the disk.
NO_PATHS = {
    ("generation-config",): ("auto", "vllm"),
    ("speculative-config", "model"): ("ngram", "[ngram]"),
    ("worker-cls",): ("auto",),
}
# Where vLLM finds the modules that are shipped.
MODULES_PATH = "PYTHONPATH"


@dataclass(frozen=True)
class Named:
    """A value that names something: where it stands in words, of which kind it is, and what is written there."""

    label: str
    kind: str
    value: str
    # instead of a name on the disk, something that vLLM knows by itself
    literal: bool = False


@dataclass(frozen=True)
class Place:
    """Where a value leads: a path (`absolute`), a file of the `store`, one that is `shipped`, `itself` for what names no file, or `nowhere`."""

    what: str
    name: str = ""


def adapters(options: Mapping[str, Any]) -> list[Any]:
    """The LoRA adapters of `lora-modules`, each as {name, path}: vLLM takes `name=path` as well. What is neither stays as it is."""
    given = options.get("lora-modules") or []
    found: list[Any] = []
    for entry in given if isinstance(given, list) else [given]:
        if isinstance(entry, str) and "=" in entry:
            name, _equals, path = entry.partition("=")
            entry = {"name": name, "path": path}
        found.append(entry)
    return found


def normal(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with one form for what vLLM takes in several: adapters as mappings, and JSON texts of the table's options as what they say."""
    found = dict(options)
    for option in {way[0] for way in OPTIONS if len(way) > 1}:
        text = found.get(option)
        if isinstance(text, str) and text.lstrip().startswith(("{", "[")):
            try:
                found[option] = json.loads(text)
            except ValueError:
                continue  # vLLM's own parser says what is wrong with it
    if found.get("lora-modules"):
        found["lora-modules"] = adapters(found)
    return found


def kind_of(way: tuple[str, ...], options: Mapping[str, Any]) -> str:
    """The kind of what a place in the options names."""
    speculative = options.get("speculative-config")
    custom = isinstance(speculative, Mapping) and speculative.get("method") == "custom_class"
    return MODULE if custom and way == ("speculative-config", "model") else OPTIONS[way]


def changed(options: Mapping[str, Any], change: Callable[[Named], str]) -> dict[str, Any]:
    """Normal options with every value of the table replaced by what `change` makes of it."""

    def below(node: Any, way: tuple[str, ...], label: str, leaf: Callable[[str, str], str]) -> Any:
        if not way:
            return leaf(node, label) if isinstance(node, str) and node else node
        key, rest = way[0], way[1:]
        if key != "*":
            if not isinstance(node, Mapping) or key not in node:
                return node
            return {**node, key: below(node[key], rest, f"{label}.{key}", leaf)}
        if isinstance(node, list):
            return [below(entry, rest, f"{label}[{number}]", leaf) for number, entry in enumerate(node)]
        if isinstance(node, Mapping):
            return {name: below(entry, rest, f"{label}.{name}", leaf) for name, entry in node.items()}
        return below(node, rest, label, leaf)

    found = dict(options)
    for way in OPTIONS:
        if way[0] not in found:
            continue
        kind, literals = kind_of(way, found), NO_PATHS.get(way, ())

        def leaf(value: str, label: str, kind: str = kind, literals: tuple[str, ...] = literals) -> str:
            return change(Named(label, kind, value, value in literals))

        found[way[0]] = below(found[way[0]], way[1:], f"option {way[0]!r}", leaf)
    return found


def named(options: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Named]:
    """Everything that normal options and an environment name."""
    found: list[Named] = []

    def note(entry: Named) -> str:
        found.append(entry)
        return entry.value

    changed(options, note)
    found += [
        Named(f"environment variable {name}", kind, environment[name])
        for name, kind in ENVIRONMENT.items()
        if isinstance(environment.get(name), str) and environment[name]
    ]
    return found


def module_file(value: str) -> str:
    """The file that the outermost module of `package.module.Object` or `module:Object` is in, when it is a single one."""
    return re.split(r"[.:]", value, maxsplit=1)[0] + ".py"


def place(entry: Named, shipped: Mapping[str, Any]) -> Place:
    """Where a value leads; `shipped` has the names of `vllm_files`."""
    value, kind = entry.value, entry.kind
    if entry.literal or kind == WRITTEN:
        return Place("itself")
    if kind == MODULE:
        file = module_file(value)
        return Place("shipped", file) if file in shipped else Place("itself")
    if value.startswith("/"):
        return Place("absolute", value)
    if kind in OF_THE_STORE:
        return Place("store", value) if MODEL_NAME.fullmatch(value) else Place("nowhere")
    if value in shipped:
        return Place("shipped", value)
    if kind == FILE and (TEMPLATE_CHARACTERS.search(value) or OWN_TEMPLATE.fullmatch(value)):
        return Place("itself")
    if kind == PYTHON and "/" not in value and not value.endswith(".py"):
        return Place("itself")
    model, slash, file = value.partition("/")
    inside = MODEL_NAME.fullmatch(model) and slash and file and ".." not in file.split("/")
    return Place("store", value) if kind in (FILE, PYTHON) and inside else Place("nowhere")


def right(kind: str, shipped: Mapping[str, Any]) -> str:
    """What a value of this kind has to be."""
    if kind == MEDIA:
        return "an absolute path"
    if kind in OF_THE_STORE:
        return "the name of a model in the model store, or an absolute path"
    known = f" ({', '.join(shipped)})" if shipped else ""
    return f"the name of a file of vllm_files{known}, MODEL/FILE for a file of a model in the model store, or an absolute path"


def problems(options: Mapping[str, Any], environment: Mapping[str, Any], shipped: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names themselves, one sentence each. What they lead to, only the host knows."""
    found = []
    for entry in named(normal(options), environment):
        there = place(entry, shipped)
        if there.what == "nowhere":
            found.append(f"{entry.label} is {entry.value!r}; it must be {right(entry.kind, shipped)}")
        elif entry.kind == WRITTEN and entry.value.startswith("/") and not entry.value.startswith(WRITABLE_PATHS):
            found.append(
                f"{entry.label} is {entry.value!r}, where vLLM may not write; it must be below {WRITABLE_PATHS[0]}NAME"
            )
        elif there.what == "absolute" and f"{entry.value}/".startswith(UNSEEN_PATHS):
            found.append(
                f"{entry.label} is {entry.value!r}, which the unit of vLLM does not see; "
                + ("put it elsewhere" if entry.kind == MEDIA else "put it into the model store, or into vllm_files")
            )
    return found


def of_the_store(
    options: Mapping[str, Any], environment: Mapping[str, Any], shipped: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Models in the store that are named beside the model itself: by what, and their names."""
    for entry in named(normal(options), environment):
        there = place(entry, shipped)
        if there.what == "store":
            yield entry.label, there.name.partition("/")[0]


def resolved(
    options: Mapping[str, Any], environment: Mapping[str, Any], models_path: str, shipped: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, str]]]:
    """Options and environment in which every name is an absolute path, and the shipped files among them. `shipped` has the `path` of each name."""
    used: dict[str, dict[str, str]] = {}
    modules: dict[str, None] = {}

    def path(entry: Named) -> str:
        there = place(entry, shipped)
        if there.what == "store":
            return f"{models_path}/{there.name}"
        if there.what != "shipped":
            return entry.value
        file = str(shipped[there.name]["path"])
        used[file] = {"path": file, "sha256": str(shipped[there.name]["sha256"])}
        if entry.kind == MODULE:
            modules[file.rpartition("/")[0]] = None
            return entry.value
        return file

    found = changed(normal(options), path)
    variables = {
        name: path(Named(name, kind, str(environment[name])))
        for name, kind in ENVIRONMENT.items()
        if environment.get(name)
    }
    if modules:
        variables[MODULES_PATH] = ":".join(modules)
    files = list(used.values())
    return found, {**environment, **variables}, files


def paths(config: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Named]:
    """What a rendered configuration and environment name by an absolute path, the model first, and the directories of modules that are shipped."""
    found = [Named("the model", MODEL, str(config["model"])), *named(config, environment)]
    found += [
        Named(f"environment variable {MODULES_PATH}", DIRECTORY, directory)
        for directory in str(environment.get(MODULES_PATH) or "").split(":")
    ]
    return [entry for entry in found if entry.value.startswith("/") and entry.kind not in (MODULE, WRITTEN)]


def with_revisions(config: Mapping[str, Any], real: Callable[[str], str]) -> dict[str, Any]:
    """A rendered configuration in which links are followed: going back goes back to those revisions. What clients name files of stays as it is."""

    def follow(entry: Named) -> str:
        as_it_is = entry.kind in (MEDIA, MODULE, WRITTEN) or not entry.value.startswith("/")
        return entry.value if as_it_is else real(entry.value)

    return {**changed(config, follow), "model": real(str(config["model"]))}
