# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the last call of `tree` left, so that a look at the host can tell whether another call would change anything.

The memory of a tree has three files: the manifest, the journal of a change under way, and this one, which is only a help. It says what was
wanted (as one hash) and what every path then looked like to `lstat`. Content, mode or owner of a file cannot change without the time of its
last change, so when all of it still looks the same, what was wanted is what is there. When it does not, or is missing, nothing is known
and the call is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STATE_PATH = "/var/lib/vllm-fleet/tree"
JOURNAL, MANIFEST, SEEN = "journal.json", "manifest.json", "seen.json"


def digest(entries: Iterable[Any]) -> str:
    """One hash for everything that is wanted: entries of `tree`, in any order."""
    whole = hashlib.sha256()
    for entry in sorted(entries, key=lambda entry: str(entry.path)):
        fields = {**vars(entry), "content": hashlib.sha256(entry.content).hexdigest()}
        whole.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return whole.hexdigest()


def looks(path: Path) -> list[int] | None:
    """What `lstat` says of a path, as far as a change would show in it. What is in a directory may change."""
    try:
        found = path.lstat()
    except OSError:
        return None
    if stat.S_ISDIR(found.st_mode):
        return [found.st_mode, found.st_uid, found.st_gid]
    return [found.st_mode, found.st_uid, found.st_gid, found.st_ino, found.st_size, found.st_ctime_ns]


def all_looks(paths: Sequence[str], root: Path = Path("/")) -> dict[str, list[int] | None]:
    """The same for many. Links on the way are followed, so a path of another directory looks different."""
    return {path: looks(root / path[1:]) for path in paths}


def _read(file: Path) -> Mapping[str, Any]:
    """A file of the memory, empty when there is none or it is broken."""
    try:
        read = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def unchanged(state_path: Path = Path(STATE_PATH), root: Path = Path("/")) -> dict[str, str]:
    """Name of each tree that is as its last call left it, with nothing under way and no handler due -> digest of what was wanted."""
    found: dict[str, str] = {}
    try:
        directories = sorted(entry.path for entry in os.scandir(state_path) if entry.is_dir())
    except OSError:
        return found
    for directory in map(Path, directories):
        seen, manifest = _read(directory / SEEN), _read(directory / MANIFEST)
        try:
            if (
                not (directory / JOURNAL).exists()
                and seen["id"] == manifest["id"]
                and manifest["unsettled"] == []
                and seen["looks"] == all_looks(list(seen["looks"]), root)
            ):
                found[directory.name] = seen["digest"]
        except (KeyError, TypeError):
            continue
    return found
