# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""How models lie on disk, and which requests for models make sense.

<path>/<name>                          link to the revision that is in use
<path>/.revisions/<name>-<revision>/   a whole, verified revision with its manifest .model.json
<path>/.partial/<name>-<revision>/     one that is on its way
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ansible_collections.gpufleet.llm.plugins.module_utils.model_layout import code_problem, pointer_problem

MANIFEST = ".model.json"
# A model has one of these: that of transformers, or that of Mistral's own format.
MODEL_CONFIGS = ("config.json", "params.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")
# A directory with none of them is neither a model nor an adapter nor a tokenizer, or a disk that is not mounted.
CONFIGS = (*MODEL_CONFIGS, "adapter_config.json", *TOKENIZER_FILES)
# By source, what an entry of model_store_models may say beside its name and source.
HUBS = ("huggingface", "modelscope")
KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(HUBS, ("repository", "revision", "include", "exclude", "code")),
    "url": ("files", "code"),
    "path": ("path", "copy", "revision", "code"),
}
Model = dict[str, Any]


class ModelError(Exception):
    """A reason why a model cannot be had, in words for the operator."""


def problems(models: Sequence[Model], allow_moving: bool = False) -> list[str]:
    """What is wrong with a list of models; empty when nothing is."""
    found: list[str] = []
    names = [str(model.get("name", "")) for model in models]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"the name `{name}` is given {names.count(name)} times; each model needs a name of its own")
    for model in models:
        name, source = str(model.get("name", "")), model.get("source")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
            found.append(
                f"`{name}` is no name for a model: small letters, digits, dot, dash and underscore, such as qwen2.5-7b"
            )
        if source not in KEYS:
            found.append(f"{name}: source is `{source}`; known are {listed(KEYS)}")
            continue
        # A key that no source has is told by check_inputs.
        for key in sorted(set(model) & set().union(*KEYS.values()) - set(KEYS[source])):
            found.append(f"{name}: `{key}` means nothing for source {source}; it takes {listed(KEYS[source])}")
        found += _code_problems(name, model, allow_moving)
        if source == "path":
            found += _path_problems(name, model)
        elif source == "url":
            found += _url_problems(name, model.get("files"))
        else:
            found += _hub_problems(name, model, allow_moving)
    return [f"model_store_models: {sentence}" for sentence in found]


def is_model(directory: Path) -> bool:
    """Whether a directory holds a model, a LoRA adapter or a tokenizer."""
    return any((directory / name).is_file() for name in CONFIGS)


def listed(words: Iterable[str]) -> str:
    """Words as a sentence has them."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _hub_problems(name: str, model: Model, allow_moving: bool) -> list[str]:
    found, revision = [], str(model.get("revision") or "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model.get("repository") or "")):
        found.append(f"{name}: repository is `{model.get('repository', '')}`; it looks like Qwen/Qwen2.5-7B-Instruct")
    if not re.fullmatch(r"[0-9a-f]{40}", revision) and not (allow_moving and revision):
        found.append(
            f"{name}: revision is `{revision}`; it takes the 40 hexadecimal digits of a commit, as the "
            "repository's history shows it (model_store_allow_moving_revisions lets a branch or tag pass)"
        )
    return found


def _code_problems(name: str, model: Model, allow_moving: bool) -> list[str]:
    """Repositories of code are pinned as the model is. What is not on a hub has its code beside it."""
    code = model.get("code") or []
    if code and model["source"] not in HUBS:
        return [
            f"{name}: code takes [] for source {model['source']}; the .py files belong beside the model's config.json"
        ]
    found = [sentence for entry in code for sentence in _hub_problems(name, entry, allow_moving)]
    return [sentence.replace(f"{name}: ", f"{name}: code: ", 1) for sentence in found]


def unfit(name: str, directory: Path, model: Model) -> str:
    """Why what is in a directory cannot be served, or nothing: a clone without git-lfs, or code that is elsewhere."""
    return pointer_problem(name, directory) or ("" if model.get("code") == [] else code_problem(name, directory))


def _path_problems(name: str, model: Model) -> list[str]:
    path, revision = str(model.get("path") or ""), str(model.get("revision") or "")
    if not path.startswith("/"):
        return [f"{name}: path is `{path}`; it takes an absolute path"]
    if revision and not re.fullmatch(r"[\w.-]+", revision):
        return [f"{name}: revision is `{revision}`; it takes letters, digits, dot, dash and underscore"]
    if model.get("copy") and not is_model(Path(path)):
        return [
            f"{name}: there is no {path}/config.json on the controller, nor what else makes a model (params.json), a LoRA adapter "
            "(adapter_config.json) or a tokenizer (with `copy: false`, it is one on the host)"
        ]
    if model.get("copy") and (problem := unfit(name, Path(path), model)):
        return [problem]
    return []


def _url_problems(name: str, files: Any) -> list[str]:
    if not isinstance(files, Sequence) or isinstance(files, str) or not files:
        return [f"{name}: files is `{files}`; it takes a list of entries with url and sha256"]
    found = []
    for number, file in enumerate(files, 1):
        if not isinstance(file, Mapping):
            found.append(f"{name}: files[{number}] is `{file}`; it takes url, sha256 and, if the name differs, path")
            continue
        # Without what follows the question mark: it may be a signature.
        url = urlsplit(str(file.get("url") or ""))
        where = f"{name}: {file.get('path') or url.path.rpartition('/')[2] or f'files[{number}]'}"
        if url.scheme not in ("https", "http", "file") or not url.path.strip("/"):
            found.append(f"{where}: url is `{bare(file)}`; it looks like https://mirror.example/model/config.json")
        elif "@" in url.netloc:
            found.append(f"{where}: url has a password in it; put an Authorization header into model_store_url_headers")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", str(file.get("sha256") or "")):
            found.append(
                f"{where}: sha256 is `{file.get('sha256') or ''}`; it takes the 64 hexadecimal digits that `sha256sum` "
                "prints for the file"
            )
        path = path_of(file)
        if not path or path.startswith(("/", ".cache/", MANIFEST)) or {"", ".", ".."} & set(path.split("/")):
            found.append(f"{where}: path is `{path}`; it takes the file's name below the model, such as config.json")
    names = [path_of(file) for file in files if isinstance(file, Mapping)]
    for path in sorted({path for path in names if names.count(path) > 1}):
        found.append(f"{name}: {path} is given {names.count(path)} times in files; `path` gives a file another name")
    return found


def header_problems(headers: Mapping[str, Any]) -> list[str]:
    """What is wrong with model_store_url_headers; the values are secret and not shown."""
    found = []
    for address, values in headers.items():
        url = urlsplit(str(address))
        if url.scheme not in ("https", "http") or not url.netloc or "@" in url.netloc:
            found.append(f"model_store_url_headers: `{address}` is no address; it looks like https://mirror.example/")
        if not isinstance(values, Mapping) or not all(
            re.fullmatch(r"[A-Za-z0-9-]+", str(key)) and isinstance(value, str) and value.isprintable()
            for key, value in values.items()
        ):
            found.append(
                f"model_store_url_headers: {address} takes headers with their values, such as "
                "`Authorization: Bearer ...`, each on one line"
            )
    return found


def bare(file: Mapping[str, Any]) -> str:
    """The address of a file without its query and without a password: either may be secret."""
    url = urlsplit(str(file.get("url") or ""))
    return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


def path_of(file: Mapping[str, Any]) -> str:
    """The name of a file below its model."""
    return str(file.get("path") or unquote(urlsplit(str(file.get("url") or "")).path).rpartition("/")[2])


def queries(models: Sequence[Model], name: str) -> dict[str, str]:
    """What follows the question mark in the addresses of a model, by file: the signature of a presigned address."""
    files = next((model.get("files") or [] for model in models if model["name"] == name), [])
    return {path_of(file): urlsplit(file["url"]).query for file in files}


def files_of(directory: Path) -> list[Path]:
    """The files of a model, in a fixed order, without the manifest and what downloads leave beside them."""
    found = []
    for folder, folders, names in os.walk(directory, followlinks=True):
        folders[:] = sorted(name for name in folders if name != ".cache")
        found += [Path(folder) / name for name in names if name != MANIFEST]
    return sorted(found)


def fingerprint(directory: Path) -> str:
    """Names a directory's content without reading it: relative path, size and time of every file."""
    digest = hashlib.sha256()
    for path in files_of(directory):
        status = path.stat()
        digest.update(f"{path.relative_to(directory)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def contents(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a directory: reads all of it."""
    found: dict[str, dict[str, Any]] = {}
    for path in files_of(directory):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found[str(path.relative_to(directory))] = {"size": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def plan(models: Sequence[Model]) -> list[Model]:
    """Add to each model the name of its revision's directory (none when only linked) and, for a copy, its size."""
    planned = []
    for model in models:
        entry = {"copy": False, "revision": "", **model, "directory": "", "size": 0}
        if model["source"] == "url":
            # Named by what it holds: the same files from another mirror, or by a newer signature, are the same revision.
            entry["files"] = [
                {"path": path_of(file), "url": bare(file), "sha256": str(file["sha256"]).lower()}
                for file in model["files"]
            ]
            held = sorted(f"{file['path']}\0{file['sha256']}\n" for file in entry["files"])
            entry["revision"] = hashlib.sha256("".join(held).encode()).hexdigest()
        if model["source"] == "path" and entry["copy"]:
            source = Path(model["path"])
            entry["revision"] = str(entry["revision"] or fingerprint(source))
            entry["size"] = sum(path.stat().st_size for path in files_of(source))
        if model["source"] != "path" or entry["copy"]:
            # the name of a branch may hold a slash
            entry["directory"] = f"{model['name']}-{re.sub(r'[^A-Za-z0-9._-]', '-', str(entry['revision']))[:12]}"
        if entry.get("code"):
            pinned = "".join(f"{item['repository']}@{item['revision']}\n" for item in entry["code"])
            entry["directory"] += f"-{hashlib.sha256(pinned.encode()).hexdigest()[:6]}"
        planned.append(entry)
    return planned


def asks_for(model: Model) -> dict[str, Any]:
    """What decides which files a model from elsewhere has. Its manifest says the same."""
    return {
        **{key: str(model.get(key) or "") for key in ("source", "repository", "revision")},
        "include": list(model.get("include") or []),
        # Unlike [], none of these means: as the layout says, and as the model itself says.
        **{key: model.get(key) for key in ("exclude", "code")},
    }
