# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""How models lie on disk, and which requests for models make sense.

<path>/<name>                          link to the revision that is in use
<path>/.revisions/<name>-<revision>/   a whole, verified revision with its manifest .model.json
<path>/.partial/<name>-<revision>/     one that is on its way
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MANIFEST = ".model.json"
SOURCES = ("huggingface", "path")
# Other formats of the same weights, which vLLM does not read: a third to three quarters of many a repository.
EXCLUDE = ("*.pth", "*.pt", "original/*", "*.onnx", "onnx/*", "*.gguf")
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
        name, source, revision = str(model.get("name", "")), model.get("source"), str(model.get("revision") or "")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
            found.append(
                f"`{name}` is no name for a model: small letters, digits, dot, dash and underscore, such as qwen2.5-7b"
            )
        if source not in SOURCES:
            found.append(f"{name}: source is `{source}`; known are {' and '.join(SOURCES)}")
        elif source == "huggingface":
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model.get("repository") or "")):
                found.append(
                    f"{name}: repository is `{model.get('repository', '')}`; it looks like Qwen/Qwen2.5-7B-Instruct"
                )
            if not re.fullmatch(r"[0-9a-f]{40}", revision) and not (allow_moving and revision):
                found.append(
                    f"{name}: revision is `{revision}`; it takes the 40 hexadecimal digits of a commit, as the "
                    "repository's history shows it (model_store_allow_moving_revisions lets a branch or tag pass)"
                )
        else:
            found += _path_problems(name, model, revision)
    return found


def _path_problems(name: str, model: Model, revision: str) -> list[str]:
    path = str(model.get("path") or "")
    if not path.startswith("/"):
        return [f"{name}: path is `{path}`; it takes an absolute path"]
    if revision and not re.fullmatch(r"[\w.-]+", revision):
        return [f"{name}: revision is `{revision}`; it takes letters, digits, dot, dash and underscore"]
    if model.get("copy") and not (Path(path) / "config.json").is_file():
        return [f"{name}: there is no {path}/config.json on the controller (with `copy: false`, it is one on the host)"]
    return []


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
        entry = {"copy": False, "revision": "", "exclude": list(EXCLUDE), **model, "directory": "", "size": 0}
        if model["source"] == "path" and entry["copy"]:
            source = Path(model["path"])
            entry["revision"] = str(entry["revision"] or fingerprint(source))
            entry["size"] = sum(path.stat().st_size for path in files_of(source))
        if model["source"] != "path" or entry["copy"]:
            # the name of a branch may hold a slash
            entry["directory"] = f"{model['name']}-{re.sub(r'[^A-Za-z0-9._-]', '-', str(entry['revision']))[:12]}"
        planned.append(entry)
    return planned


def manifest_of(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory when every file that it names is there in its size."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        for name, file in manifest["files"].items():
            if (directory / name).stat().st_size != file["size"]:
                return None
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def verify(directory: Path, wanted: dict[str, dict[str, Any]]) -> None:
    """Refuse a directory that is not exactly what is wanted."""
    there = contents(directory)
    for name, file in sorted(wanted.items()):
        if name not in there:
            raise ModelError(f"{name} did not arrive")
        if there[name] != file:
            raise ModelError(
                f"{name} is not what the source has: expected {file['size']} bytes, sha256 {file['sha256']}, "
                f"got {there[name]['size']} bytes, sha256 {there[name]['sha256']}"
            )
    for name in set(there) - set(wanted):
        (directory / name).unlink()  # from an earlier, interrupted copy of another content


def write_manifest(directory: Path, model: Model, files: dict[str, dict[str, Any]]) -> None:
    """Say in the directory what it is. A directory with a manifest is whole and verified."""
    known = {key: str(model.get(key) or "") for key in ("source", "repository", "revision", "path")}
    aside = directory / f"{MANIFEST}.new"
    aside.write_text(json.dumps({"name": model["name"], **known, "files": files}, indent=2) + "\n")
    aside.replace(directory / MANIFEST)


def link(target: str, path: Path) -> None:
    """Point a link somewhere in one step: whoever opens it sees the old or the new, never nothing."""
    if path.exists() and not path.is_symlink():
        raise ModelError(f"{path} is not a link that this role made; move it away")
    aside = path.with_name(f".{path.name}.link")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(path)


def own(directory: Path, uid: int, gid: int) -> None:
    """Give a tree to the store's user, readable by all."""
    for folder, folders, names in os.walk(directory):
        os.chown(folder, uid, gid)
        Path(folder).chmod(0o755)
        for name in names + [name for name in folders if (Path(folder) / name).is_symlink()]:
            os.chown(Path(folder) / name, uid, gid, follow_symlinks=False)
        for name in names:
            if not (Path(folder) / name).is_symlink():
                (Path(folder) / name).chmod(0o644)


def publish(store: Path, model: Model, uid: int, gid: int) -> None:
    """Move a verified directory under its final name."""
    staged, final = store / ".partial" / model["directory"], store / ".revisions" / model["directory"]
    shutil.rmtree(staged / ".cache", ignore_errors=True)
    own(staged, uid, gid)
    if final.exists():
        shutil.rmtree(final)  # not whole, or it would not be fetched again
    staged.rename(final)
    (store / ".partial" / f"{model['directory']}.status.json").unlink(missing_ok=True)


def prune(store: Path, name: str, keep: int) -> list[str]:
    """Remove all but the newest revisions of a model; the one in use stays in any case."""
    current = (store / name).resolve()
    found = []
    for directory in (store / ".revisions").iterdir():
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
        except (OSError, ValueError):
            continue
        if manifest.get("name") == name:
            found.append((directory.resolve() == current, (directory / MANIFEST).stat().st_mtime, directory))
    removed = []
    for _in_use, _time, directory in sorted(found, reverse=True)[max(keep, 1) :]:
        shutil.rmtree(directory)
        removed.append(directory.name)
    return removed
