# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What has to change on this host so that a tree of files is as it is wanted."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.tree import Entry, TreeError

SHOWN_BYTES = 100_000  # what is larger is not shown in a diff


@dataclass
class Step:
    """One change, as the journal keeps it."""

    kind: str  # make or change (a directory), place or remove (a file or link), sweep (a directory)
    path: str  # as the user wrote it
    at: str  # where that is on the disk, links in parents followed
    aside: str  # beside it, for the new one (.new) and the former one (.old)
    old: list[int] | None  # mode, uid and gid of what was there
    entry: Entry | None = None  # not in the journal: contents are in no other place than their own

    def record(self) -> dict[str, Any]:
        """For the journal."""
        return {name: value for name, value in vars(self).items() if name != "entry"}

    @property
    def new(self) -> Path:
        """The wanted file, until it is in place; one that replaces nothing keeps this name until the end."""
        return Path(f"{self.aside}.new")

    @property
    def former(self) -> Path:
        """The second name of what was there."""
        return Path(f"{self.aside}.old")

    def live(self) -> bool:
        """Whether it has happened."""
        found = look(self.at)
        if self.kind == "make":
            return found is not None and stat.S_ISDIR(found.st_mode)
        if self.kind == "change":
            return found is not None and attributes(found) != self.old
        new, former = look(self.new), look(self.former)
        if self.kind == "remove":
            return former is not None and found is None
        return former is not None if new is None else found is not None and os.path.samestat(found, new)


def look(path: str | Path) -> os.stat_result | None:
    """What is at a path itself, if anything is."""
    try:
        return Path(path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def attributes(found: os.stat_result) -> list[int]:
    """What chmod and chown set."""
    return [stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid]


def wanted_attributes(entry: Entry, lenient: bool = False) -> list[int]:
    """Mode, uid and gid that are wanted; -1 in a check for what is not there yet."""
    uid = gid = -1
    try:
        uid = pwd.getpwnam(entry.owner).pw_uid
    except KeyError:
        if not lenient:
            raise TreeError(f"{entry.path}: owner {entry.owner!r} is unknown on this host") from None
    try:
        gid = grp.getgrnam(entry.group).gr_gid
    except KeyError:
        if not lenient:
            raise TreeError(f"{entry.path}: group {entry.group!r} is unknown on this host") from None
    return [int(entry.mode, 8), uid, gid]


class Plan:
    """
    The steps from what is on this host to what is wanted, and the manifest that is right after them. Changes nothing.

    `before` is the manifest of the last change. `lenient` is for a check: users and groups may be what an earlier task would have made.
    """

    def __init__(self, root: Path, entries: Sequence[Entry], before: Mapping[str, Any], lenient: bool) -> None:
        self.root = root
        self.before = before
        self.lenient = lenient
        self.identity = secrets.token_hex(6)
        self.steps: list[Step] = []
        self.parents: dict[str, str] = {}  # of files and links: where they are on the disk
        self.seen: dict[str, str] = {}  # places on the disk that something is wanted at, by the path that was stated
        self.leaves: dict[str, Entry] = {}  # files and links
        self.needed: dict[str, Entry | None] = {}  # directories, stated or not
        for entry in entries:
            known = self.needed if entry.kind == "directory" else self.leaves
            if entry.path in known:
                raise TreeError(f"path: {entry.path} is stated twice")
            known[entry.path] = entry
        for path in [*self.leaves, *self.needed]:
            for parent in PurePosixPath(path).parents:
                self.needed.setdefault(str(parent), None)
        self.make_directories()
        self.place_leaves()
        gone = self.remove_unwanted()
        self.after = {
            "id": before["id"],
            "paths": sorted(self.leaves),
            "secrets": sorted(path for path, entry in self.leaves.items() if entry.secret),
            "directories": self.sweep_directories(gone),
        }

    def step(self, kind: str, path: str, at: str, found: os.stat_result | None, entry: Entry | None = None) -> None:
        """One more change."""
        aside = str(Path(at).parent / f".tree-{self.identity}-{len(self.steps)}")
        self.steps.append(Step(kind, path, at, aside, found and attributes(found), entry))

    def where(self, path: str) -> str:
        """Where a file or link is on the disk: links to directories are followed, a link in its own place is not."""
        parent, _, name = path.rpartition("/")
        if parent not in self.parents:
            self.parents[parent] = os.path.realpath(self.root / parent[1:])
        return str(Path(self.parents[parent], name))

    def make_directories(self) -> None:
        """Parents before what they hold."""
        for path in sorted(self.needed):
            stated = self.needed[path]
            if path in self.leaves:
                raise TreeError(f"path: {path} is wanted as a {self.leaves[path].kind}, and as a directory")
            if path in self.before["paths"] and Path(self.where(path)).is_symlink():
                raise TreeError(f"{path} is a link that a former run made; a directory is wanted there")
            at = os.path.realpath(self.root / path[1:])
            if at in self.seen:
                continue
            self.seen[at] = path
            found = look(at)
            if found is None:
                self.step("make", path, at, None, stated)
            elif not stat.S_ISDIR(found.st_mode):
                raise TreeError(f"{path} is no directory; one is wanted there")
            elif stated and attributes(found) != wanted_attributes(stated, self.lenient):
                self.step("change", path, at, found, stated)

    def place_leaves(self) -> None:
        """Files, then links."""
        for entry in sorted(self.leaves.values(), key=lambda entry: (entry.kind == "link", entry.path)):
            at = self.where(entry.path)
            if at in self.seen:
                raise TreeError(f"path: {entry.path} is the same place as {self.seen[at]}")
            self.seen[at] = entry.path
            found = look(at)
            if found and not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
                kind = "directory" if stat.S_ISDIR(found.st_mode) else "device, socket or pipe"
                raise TreeError(f"{entry.path} is a {kind}; a {entry.kind} is wanted there")
            if not self.is_as_wanted(at, found, entry):
                self.step("place", entry.path, at, found, entry)

    def remove_unwanted(self) -> set[str]:
        """What was put there and is not wanted any more; returns where that is."""
        gone = set()
        for path in self.before["paths"]:
            at = self.where(path)
            found = look(at)
            # A directory in its place, or the same place under another name, is not what was put there.
            if path not in self.leaves and at not in self.seen and found and not stat.S_ISDIR(found.st_mode):
                self.step("remove", path, at, found)
                gone.add(at)
        return gone

    def sweep_directories(self, gone: set[str]) -> list[str]:
        """Those that were made and will be empty go; returns those that stay, and those that are made now."""
        directories = [made.path for made in self.steps if made.kind == "make"]
        for path in sorted(self.before["directories"], reverse=True):
            at = os.path.realpath(self.root / path[1:])
            found = look(at)
            if found is None or not stat.S_ISDIR(found.st_mode):
                continue
            if at not in self.seen and all(str(item) in gone for item in Path(at).iterdir()):
                self.step("sweep", path, at, found)
                gone.add(at)
            else:
                directories.append(path)
        return sorted(directories)

    def is_as_wanted(self, at: str, found: os.stat_result | None, entry: Entry) -> bool:
        """Whether a file or link is as it should be. What costs more to find out is asked last."""
        if entry.kind == "link":
            return found is not None and stat.S_ISLNK(found.st_mode) and str(Path(at).readlink()) == entry.target
        wanted = wanted_attributes(
            entry, self.lenient
        )  # also for a new file: an unknown owner is told before any change
        return (
            found is not None
            and stat.S_ISREG(found.st_mode)
            and attributes(found) == wanted
            and found.st_size == len(entry.content)
            and Path(at).read_bytes() == entry.content
        )


def difference(step: Step, secret: bool) -> dict[str, str]:
    """One file as --diff shows it: what it is, when that changes, and its content, when that may be shown."""
    before, content = described(step.at)
    after, wanted = before, content
    if step.kind in ("remove", "sweep"):
        after, wanted = "", None
    elif step.entry is None:
        after = "(directory, mode 0755)\n"
    elif step.entry.kind == "link":
        after, wanted = f"(link to {step.entry.target})\n", None
    else:
        after = f"({step.entry.kind}, mode {step.entry.mode:0>4}, {step.entry.owner}:{step.entry.group})\n"
        wanted = step.entry.content if step.entry.kind == "file" else None
    was, will_be = shown(content, secret), shown(wanted, secret)
    if was == will_be and content != wanted:
        will_be = will_be.replace("(", "(another ", 1)
    if before == after:
        before = after = ""
    header = {"before_header": step.path, "after_header": step.path}
    return {**header, "before": before + was, "after": after + will_be}


def described(at: str) -> tuple[str, bytes | None]:
    """What is at a place: in words, and its content."""
    found = look(at)
    if found is None:
        return "", None
    if stat.S_ISLNK(found.st_mode):
        return f"(link to {Path(at).readlink()})\n", None
    mode, uid, gid = attributes(found)
    owner, group = str(uid), str(gid)
    with contextlib.suppress(KeyError):
        owner = pwd.getpwuid(uid).pw_name
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(gid).gr_name
    kind = "directory" if stat.S_ISDIR(found.st_mode) else "file"
    content = Path(at).read_bytes() if kind == "file" else None
    return f"({kind}, mode {mode:04o}, {owner}:{group})\n", content


def shown(content: bytes | None, secret: bool) -> str:
    """Content as a diff may show it."""
    if content is None:
        return ""
    if secret:
        return "(secret, not shown)\n"
    if len(content) > SHOWN_BYTES:
        return f"(content of {len(content)} bytes, too large to show)\n"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return f"(binary content of {len(content)} bytes)\n"
    return f"(binary content of {len(content)} bytes)\n" if "\0" in text else text
