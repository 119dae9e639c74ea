# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The models of a host: what is there, and putting it in place."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.model_store import (
    MANIFEST,
    Model,
    ModelError,
    contents,
)


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


def status_directory(name: str) -> Path:
    """Where the download of a model says how it goes."""
    return Path("/run") / f"model-download-{name}"


def publish(store: Path, model: Model, uid: int, gid: int) -> None:
    """Move a verified directory under its final name."""
    staged, final = store / ".partial" / model["directory"], store / ".revisions" / model["directory"]
    shutil.rmtree(staged / ".cache", ignore_errors=True)
    own(staged, uid, gid)
    if final.exists():
        shutil.rmtree(final)  # not whole, or it would not be fetched again
    staged.rename(final)
    shutil.rmtree(status_directory(model["name"]), ignore_errors=True)


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
