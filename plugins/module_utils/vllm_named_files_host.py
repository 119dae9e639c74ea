# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the configuration of an instance names, as it is on the host: whether it is there, and whether vLLM's user can read it."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import vllm_named_files
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.model_store import MODEL_CONFIGS, TOKENIZER_FILES
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_named_files import (
    ADAPTER,
    FILE,
    MODEL,
    MODULE,
    MODULES_PATH,
    PYTHON,
    TOKENIZER,
    Named,
)

# One of these makes a directory what it is named as.
MARKS = {
    MODEL: MODEL_CONFIGS,
    ADAPTER: ("adapter_config.json",),
    TOKENIZER: TOKENIZER_FILES,
}
# A user that is not there yet will have no rights of its own, as this one.
NOBODY = 65534
# A file that is larger is no template, and is not read at every look.
LARGEST_HASHED = 1024**2


def lacking(entry: Named) -> str:
    """The path that is not there; nothing when it is what it is named as."""
    path, marks = Path(entry.value), MARKS.get(entry.kind, ())
    if entry.kind in (FILE, PYTHON):
        return "" if path.is_file() else entry.value
    if entry.kind == MODEL and path.is_file():  # a model of one file
        return ""
    if not path.is_dir() or (marks and not any((path / mark).is_file() for mark in marks)):
        return f"{entry.value}/{marks[0]}" if marks else entry.value
    return ""


def read_for(entry: Named) -> list[str]:
    """What vLLM reads of it: a directory, and the files in one that is a model or the like."""
    path = Path(entry.value)
    inside = [file for file in path.iterdir() if file.is_file()] if entry.kind in MARKS and path.is_dir() else []
    return [entry.value, *(str(file) for file in sorted(inside))]


def identity(user: str, container: bool) -> tuple[int, int, list[int]]:
    """uid, gid and groups with which vLLM runs. A container gets none of the user's further groups."""
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        return NOBODY, NOBODY, []
    groups = [] if container else os.getgrouplist(user, found.pw_gid)
    return found.pw_uid, found.pw_gid, groups


def unreadable(paths: Sequence[str], user: str, container: bool) -> list[str]:
    """Those that a user cannot read: a process that becomes this user is asked, since modes are not all that counts."""
    modes = {path: os.R_OK | os.X_OK if Path(path).is_dir() else os.R_OK for path in paths}
    if os.geteuid():
        return [path for path, mode in modes.items() if not os.access(path, mode)]
    uid, gid, groups = identity(user, container)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
            with os.fdopen(writer, "w") as told:
                json.dump([path for path, mode in modes.items() if not os.access(path, mode)], told)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as told:
        answer = told.read()
    if os.waitpid(child, 0)[1]:
        raise OSError(f"what the user {user} can read cannot be tried")
    found: list[str] = json.loads(answer)
    return found


def unknown_modules(wanted: Mapping[str, Any], release: Path) -> list[dict[str, str]]:
    """Modules that are neither shipped nor in a release that is there. What an image has, only the image knows."""
    site = next(release.glob("lib/python3*/site-packages"), None)
    system = "include-system-site-packages = true" in read(release / "pyvenv.cfg")
    if "container" in wanted or site is None or system:
        return []
    places = [site, site.parent, *map(Path, str(wanted["environment"].get(MODULES_PATH) or "/nonexistent").split(":"))]
    found = []
    for entry in vllm_named_files.named(wanted["config"], wanted["environment"]):
        module = vllm_named_files.module_file(entry.value).removesuffix(".py")
        if entry.kind != MODULE or entry.literal or module in sys.stdlib_module_names:
            continue
        if not any((place / module).is_dir() or any(place.glob(f"{module}.*")) for place in places):
            found.append({"label": entry.label, "path": module, "what": "no module"})
    return found


def findings(wanted: Mapping[str, Any], user: str, release: Path) -> list[dict[str, str]]:
    """What is wrong with what an instance names: C(label), C(path), and C(what), V(missing), V(unreadable) or V(no module). Shipped files are looked at by
    themselves.
    """
    shipped = {file["path"] for file in wanted.get("files") or []}
    directories = {path.rpartition("/")[0] for path in shipped}
    found, there = unknown_modules(wanted, release), []
    for entry in vllm_named_files.paths(wanted["config"], wanted["environment"]):
        if entry.value in shipped or entry.value in directories:
            continue
        if missing := lacking(entry):
            found.append({"label": entry.label, "path": missing, "what": "missing"})
        else:
            there.append(entry)
    shut = set(unreadable([path for entry in there for path in read_for(entry)], user, "container" in wanted))
    for entry in there:
        if path := next((path for path in read_for(entry) if path in shut), ""):
            found.append({"label": entry.label, "path": path, "what": "unreadable"})
    return found


def digest(path: str) -> str:
    """The hash of a file; empty when there is none."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def arrived(files: Iterable[Mapping[str, str]]) -> list[str]:
    """Paths of the shipped files that are there as they were written."""
    return [file["path"] for file in files if digest(file["path"]) == file["sha256"]]


def fingerprint(wanted: Mapping[str, Any]) -> str:
    """A hash of the host's own files that an instance names: one that changed makes a new generation. Empty when it names none."""
    shipped = {file["path"] for file in wanted.get("files") or []}
    files = [
        Path(entry.value)
        for entry in vllm_named_files.paths(wanted["config"], wanted["environment"])
        if entry.kind in (FILE, PYTHON) and entry.value not in shipped
    ]
    hashes = [digest(str(file)) for file in files if file.is_file() and file.stat().st_size <= LARGEST_HASHED]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16] if hashes else ""
