# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Puts a set of files in place as one: all of them, or, whatever happens on the way, those that were there before.

What a change is made of, and why a run may die after any of it:

1. The journal says what is going to happen. It and the manifest are written aside, synced and renamed.
2. Directories are made. New files are written beside their places, and what stands there gets a second name (a hard link).
   So undoing needs no space on a full disk, and gives back the very file with all that it had.
3. The new files take their places by rename, the unwanted ones step aside, and the commands that validate run.
4. The manifest with the journal's id is written. Before this moment everything is undone, after it everything is kept.
5. The second names, the directories that nobody needs any more, and the journal are removed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import fnmatch
import grp
import json
import os
import pwd
import re
import secrets
import shlex
import stat
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.tree_seen import JOURNAL, MANIFEST, SEEN, all_looks, digest

NOTHING: dict[str, Any] = {"id": "", "paths": [], "secrets": [], "directories": [], "unsettled": []}
SHOWN_BYTES = 100_000  # what is larger is not shown in a diff
NAME = re.compile(r"[a-z0-9_-]+")
MODE = re.compile(r"[0-7]{3,4}")
# the argument spec of what a change requires
REQUIREMENT = {"path": {"type": "str", "required": True}, "fail_msg": {"type": "str", "required": True}}


class TreeError(Exception):
    """A reason why the files are not in place, in words for the operator."""


@dataclass(frozen=True)
class Entry:
    """What is wanted at one path. What the controller can see to be wrong is refused there, when the entry is made."""

    path: str
    kind: str = "file"  # or directory, or link
    content: bytes = field(default=b"", repr=False)
    target: str = ""  # of a link
    mode: str = "0644"
    owner: str = "root"
    group: str = "root"
    secret: bool = False

    def __post_init__(self) -> None:
        if (
            not isinstance(self.path, str)
            or not re.match("/[^/]", self.path)
            or os.path.normpath(self.path) != self.path
            or "\0" in self.path
        ):
            raise TreeError(f"path: {self.path!r} must be absolute and plain, without '..', '//' or a slash at its end")
        if not isinstance(self.mode, str) or not MODE.fullmatch(self.mode):
            raise TreeError(f'{self.path}: mode must be a quoted octal string such as "0644", not {self.mode!r}')
        if self.kind == "link" and not self.target:
            raise TreeError(f"{self.path}: target of the link must not be empty")


def pack(entries: Iterable[Entry]) -> str:
    """All entries in one word, which Ansible can take for one secret without blackening anything else that it shows."""
    plain = [{**vars(entry), "content": entry.content.decode("utf-8", "surrogateescape")} for entry in entries]
    return base64.b64encode(zlib.compress(json.dumps(plain).encode())).decode()


def unpack(packed: str) -> list[Entry]:
    """The entries again, byte for byte."""
    plain = json.loads(zlib.decompress(base64.b64decode(packed))) if packed else []
    return [Entry(**{**entry, "content": entry["content"].encode("utf-8", "surrogateescape")}) for entry in plain]


def handlers(notify: Mapping[str, Sequence[str]], paths: Iterable[str]) -> list[str]:
    """The handlers whose patterns match one of the paths, each once."""
    changed = list(paths)
    return list(
        dict.fromkeys(
            name
            for pattern, listed in notify.items()
            if any(fnmatch.fnmatchcase(path, pattern) for path in changed)
            for name in listed
        )
    )


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


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Every call that changes the disk goes through here, or through what a test puts in its place."""
    return function(*arguments, **options)


class Tree:
    """The files of one name on this host. `state` is the directory that remembers them."""

    def __init__(self, state: Path, root: Path = Path("/"), do: Callable[..., Any] = call) -> None:
        self.state = state
        self.root = root
        self.do = do
        self.busy = str(state)  # the path that an error is about
        self.parents: dict[str, str] = {}
        self.trying = False  # a check: users and groups may be what an earlier task would have made

    # ------------------------------------------------------------------------------------------------- what a caller does

    def present(
        self,
        entries: Sequence[Entry],
        notify: Mapping[str, Sequence[str]] | None = None,
        validate: Sequence[str] = (),
        check: bool = False,
        diff: bool = False,
        requires: Sequence[Mapping[str, str]] = (),
    ) -> dict[str, Any]:
        """Make what is wanted so, and nothing but that of what was wanted before."""
        self.trying = check
        create = bool(entries) and not check
        if create and not self.state.is_dir():  # what is refused, or needs no memory, leaves none
            _, steps, after = self.plan(entries, NOTHING)
            create = bool(steps or after["paths"])
        with self.locked(create, check):
            interrupted = self.recover() if not check else "left" if (self.state / JOURNAL).exists() else ""
            before = self.read(MANIFEST) or NOTHING
            identity, steps, after = self.plan(entries, before)
            paths = [step.path for step in steps]
            due = dict.fromkeys([*before["unsettled"], *paths])
            after["unsettled"] = [path for path in due if handlers(notify or {}, [path])]
            result: dict[str, Any] = {
                "changed": bool(paths or after["unsettled"]),
                "paths": paths,
                "unsettled": after["unsettled"],
                "handlers": handlers(notify or {}, after["unsettled"]),
                "interrupted": interrupted,
            }
            if diff:
                concealed = {*before["secrets"], *after["secrets"]}
                result["diff"] = [self.difference(step, step.path in concealed) for step in steps]
            if steps and not check:
                for required in requires:
                    if not (self.root / required["path"].lstrip("/")).exists():
                        raise TreeError(required["fail_msg"])
                self.transact(identity, steps, after, validate)
            elif after != before and not check:  # the files are as wanted already: only the book is not
                self.save(MANIFEST, after)
            if entries and not check:
                self.remember(entries)
        return result

    def settle(self, check: bool = False) -> dict[str, Any]:
        """The handlers have run. Those of a change that is undone only now have not."""
        with self.locked(False, check):
            interrupted = "" if check else self.recover()
            manifest = self.read(MANIFEST)
            if manifest and manifest["unsettled"] and not check and not interrupted:
                self.save(MANIFEST, {**manifest, "unsettled": []})
        return {"changed": False, "interrupted": interrupted}

    def remember(self, entries: Sequence[Entry]) -> None:
        """Leave word for those who only look whether a call is needed (see tree_seen). Without it, one is."""
        manifest = self.read(MANIFEST)
        if manifest:
            paths = sorted({entry.path for entry in entries})
            seen = {"id": manifest["id"], "digest": digest(entries), "looks": all_looks(paths, self.root)}
            with contextlib.suppress(TreeError):  # a broken one is replaced
                if self.read(SEEN) == seen:
                    return
            with contextlib.suppress(OSError):  # only a help: a full disk is no reason to fail now
                self.save(SEEN, seen)

    # ------------------------------------------------------------------------------------------------- what has to change

    def where(self, path: str) -> str:
        """Where a file or link is on the disk: links to directories are followed, a link in its own place is not."""
        parent, _, name = path.rpartition("/")
        if parent not in self.parents:
            self.parents[parent] = os.path.realpath(self.root / parent[1:])
        return str(Path(self.parents[parent], name))

    def plan(self, entries: Sequence[Entry], before: Mapping[str, Any]) -> tuple[str, list[Step], dict[str, Any]]:
        """The steps from what is to what is wanted, and the manifest that is right after them. Changes nothing."""
        identity = secrets.token_hex(6)
        steps: list[Step] = []
        seen: dict[str, str] = {}
        leaves: dict[str, Entry] = {}
        needed: dict[str, Entry | None] = {}

        def step(kind: str, path: str, at: str, found: os.stat_result | None, entry: Entry | None = None) -> None:
            aside = str(Path(at).parent / f".tree-{identity}-{len(steps)}")
            steps.append(Step(kind, path, at, aside, found and attributes(found), entry))

        for entry in entries:
            known = needed if entry.kind == "directory" else leaves
            if entry.path in known:
                raise TreeError(f"path: {entry.path} is stated twice")
            known[entry.path] = entry
        for path in [*leaves, *needed]:
            for parent in PurePosixPath(path).parents:
                needed.setdefault(str(parent), None)

        for path in sorted(needed):  # parents before what they hold
            stated = needed[path]
            if path in leaves:
                raise TreeError(f"path: {path} is wanted as a {leaves[path].kind}, and as a directory")
            if path in before["paths"] and Path(self.where(path)).is_symlink():
                raise TreeError(f"{path} is a link that a former run made; a directory is wanted there")
            at = os.path.realpath(self.root / path[1:])
            if at in seen:
                continue
            seen[at] = path
            found = look(at)
            if found is None:
                step("make", path, at, None, stated)
            elif not stat.S_ISDIR(found.st_mode):
                raise TreeError(f"{path} is no directory; one is wanted there")
            elif stated and attributes(found) != self.attributes(stated):
                step("change", path, at, found, stated)
        for entry in sorted(leaves.values(), key=lambda entry: (entry.kind == "link", entry.path)):
            at = self.where(entry.path)
            if at in seen:
                raise TreeError(f"path: {entry.path} is the same place as {seen[at]}")
            seen[at] = entry.path
            found = look(at)
            if found and not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
                kind = "directory" if stat.S_ISDIR(found.st_mode) else "device, socket or pipe"
                raise TreeError(f"{entry.path} is a {kind}; a {entry.kind} is wanted there")
            if not self.is_as_wanted(at, found, entry):
                step("place", entry.path, at, found, entry)

        gone = set()
        for path in before["paths"]:
            at = self.where(path)
            found = look(at)
            # A directory in its place, or the same place under another name, is not what was put there.
            if path not in leaves and at not in seen and found and not stat.S_ISDIR(found.st_mode):
                step("remove", path, at, found)
                gone.add(at)
        directories = [made.path for made in steps if made.kind == "make"]
        for path in sorted(before["directories"], reverse=True):
            at = os.path.realpath(self.root / path[1:])
            found = look(at)
            if found is None or not stat.S_ISDIR(found.st_mode):
                continue
            if at not in seen and all(str(item) in gone for item in Path(at).iterdir()):
                step("sweep", path, at, found)
                gone.add(at)
            else:
                directories.append(path)
        after = {
            "id": before["id"],
            "paths": sorted(leaves),
            "secrets": sorted(path for path, entry in leaves.items() if entry.secret),
            "directories": sorted(directories),
        }
        return identity, steps, after

    def attributes(self, entry: Entry) -> list[int]:
        """Mode, uid and gid that are wanted; -1 in a check for what is not there yet."""
        uid = gid = -1
        try:
            uid = pwd.getpwnam(entry.owner).pw_uid
        except KeyError:
            if not self.trying:
                raise TreeError(f"{entry.path}: owner {entry.owner!r} is unknown on this host") from None
        try:
            gid = grp.getgrnam(entry.group).gr_gid
        except KeyError:
            if not self.trying:
                raise TreeError(f"{entry.path}: group {entry.group!r} is unknown on this host") from None
        return [int(entry.mode, 8), uid, gid]

    def is_as_wanted(self, at: str, found: os.stat_result | None, entry: Entry) -> bool:
        """Whether a file or link is as it should be. What costs more to find out is asked last."""
        if entry.kind == "link":
            return found is not None and stat.S_ISLNK(found.st_mode) and str(Path(at).readlink()) == entry.target
        wanted = self.attributes(entry)  # also for a new file: an unknown owner is told before any change
        return (
            found is not None
            and stat.S_ISREG(found.st_mode)
            and attributes(found) == wanted
            and found.st_size == len(entry.content)
            and Path(at).read_bytes() == entry.content
        )

    def difference(self, step: Step, secret: bool) -> dict[str, str]:
        """One file as --diff shows it: what it is, when that changes, and its content, when that may be shown."""
        before, content = self.described(step.at)
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

    def described(self, at: str) -> tuple[str, bytes | None]:
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

    # ------------------------------------------------------------------------------------------------------- the change

    def transact(self, identity: str, steps: list[Step], after: dict[str, Any], validate: Sequence[str]) -> None:
        """All steps, or none of them."""
        journal = {"id": identity, "steps": [step.record() for step in steps]}
        try:
            self.save(JOURNAL, journal)
            self.apply(steps)
            for command in validate:
                self.validate(command, steps)
            self.save(MANIFEST, {**after, "id": identity})  # from here on it is done
        except Exception as error:
            reason = f"{self.busy}: {error.strerror}" if isinstance(error, OSError) else str(error)
            try:
                self.recover(crashed=False)
            except OSError as second:
                raise TreeError(f"{reason}; undoing it failed too, the next run tries again: {second}") from error
            raise TreeError(f"{reason}; every file is as it was") from error
        self.finish(journal)

    def apply(self, steps: list[Step]) -> None:
        """Stage everything, then let it take its place."""
        for step in steps:
            self.busy = step.path
            if step.kind in ("make", "change"):
                if step.kind == "make":
                    self.do(os.mkdir, step.at, 0o700)
                mode, uid, gid = self.attributes(step.entry) if step.entry else (0o755, -1, -1)
                self.do(os.chown, step.at, uid, gid)
                self.do(os.chmod, step.at, mode)
            elif step.kind == "place" and step.entry:
                if step.entry.kind == "link":
                    self.do(os.symlink, step.entry.target, step.new)
                else:
                    self.write(step.new, step.entry.content, *self.attributes(step.entry))
                if step.old:
                    self.do(os.link, step.at, step.former, follow_symlinks=False)
        self.sync(steps)
        for step in steps:
            self.busy = step.path
            if step.kind == "remove":
                self.do(os.rename, step.at, step.former)
            elif step.kind == "place" and step.old:
                self.do(os.rename, step.new, step.at)
            elif step.kind == "place":
                # A link fails where a rename would overwrite what somebody put there meanwhile.
                self.do(os.link, step.new, step.at, follow_symlinks=False)
        self.sync(steps)

    def validate(self, command: str, steps: Sequence[Step]) -> None:
        """Run a command that has to accept the new files. What it prints may quote them, so secrets are taken out."""
        try:
            done = subprocess.run(
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except (OSError, ValueError) as error:
            raise TreeError(f"validate: {command!r} cannot be run: {error}") from error
        if done.returncode == 0:
            return
        output = done.stdout.decode("utf-8", "replace").strip()
        for step in steps:
            if step.entry and step.entry.secret:
                words = re.split(r"[\s\"'`;,=:(){}<>\[\]]+", step.entry.content.decode("utf-8", "replace"))
                for word in sorted({word for word in words if len(word) >= 8}, key=len, reverse=True):
                    output = output.replace(word, "********")
        raise TreeError(f"validate: {command!r} ended with {done.returncode}: {output}")

    def recover(self, crashed: bool = True) -> str:
        """Bring a change to its end, or to its beginning, if one is under way: `finished`, `undone`, or nothing."""
        for leftover in self.state.glob("*.new"):
            self.do(os.unlink, leftover)
        journal = self.read(JOURNAL)
        if journal is None:
            return ""
        manifest = self.read(MANIFEST) or NOTHING
        if journal["id"] == manifest["id"]:
            self.finish(journal)
            return "finished"
        steps = [Step(**step) for step in journal["steps"]]
        live = [step.path for step in steps if step.live()]
        if crashed and live:
            # Who knows what has read these files since: their handlers are due, whatever comes next.
            unsettled = [*dict.fromkeys([*manifest["unsettled"], *live])]
            self.save(MANIFEST, {**manifest, "unsettled": unsettled})
        for step in reversed(steps):
            self.revert(step)
        self.sync(steps)
        self.do(os.unlink, self.state / JOURNAL)
        self.sync_directory(self.state)
        return "undone"

    def revert(self, step: Step) -> None:
        """Undo a step, wherever it stopped. Each call leaves a state from which this works once more."""
        self.busy = step.path
        if step.kind == "make":
            self.remove_directory(step.at)
        elif step.kind == "change" and step.old and step.live():
            self.do(os.chown, step.at, *step.old[1:])
            self.do(os.chmod, step.at, step.old[0])
        elif step.kind in ("place", "remove"):
            if step.live():
                if look(step.former):
                    self.do(os.rename, step.former, step.at)
                else:
                    self.do(os.unlink, step.at)
            self.remove(step.former)
            self.remove(step.new)

    def finish(self, journal: Mapping[str, Any]) -> None:
        """Remove what only undoing would have needed."""
        steps = [Step(**step) for step in journal["steps"]]
        for step in steps:
            self.busy = step.path
            if step.kind in ("place", "remove"):
                self.remove(step.former)
                self.remove(step.new)
            elif step.kind == "sweep":
                self.remove_directory(step.at)
        self.sync(steps)
        self.do(os.unlink, self.state / JOURNAL)
        self.sync_directory(self.state)

    # --------------------------------------------------------------------------------------------------------- the disk

    @contextlib.contextmanager
    def locked(self, create: bool, check: bool) -> Iterator[None]:
        """Hold the state directory, so that two runs never interleave. Where there is none, there is nothing to hold."""
        while True:
            if create and not self.state.is_dir():
                self.do(os.makedirs, self.state, 0o700, exist_ok=True)
                self.sync_directory(self.state.parent)
            try:
                descriptor = os.open(self.state, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                if create:
                    continue  # who removed it was quicker
                yield
                return
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                found = look(self.state)
                if found is None or not os.path.samestat(found, os.fstat(descriptor)):
                    continue  # who held it before removed it
                try:
                    yield
                finally:
                    if not check:
                        self.forget()
                return
            finally:
                os.close(descriptor)

    def forget(self) -> None:
        """Leave no trace of a tree that has nothing, except for the journal of an undoing that failed."""
        manifest = self.read(MANIFEST)
        empty = manifest and not any(manifest[name] for name in ("paths", "directories", "unsettled"))
        if empty and not (self.state / JOURNAL).exists():
            self.remove(self.state / SEEN)
            self.do(os.unlink, self.state / MANIFEST)
        if not any(self.state.iterdir()):
            for directory in (self.state, self.state.parent):
                self.remove_directory(directory)

    def read(self, name: str) -> dict[str, Any] | None:
        """The journal or the manifest, if there is one."""
        try:
            read: dict[str, Any] = json.loads((self.state / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise TreeError(f"{self.state / name} cannot be read: {error}") from error
        return read

    def save(self, name: str, data: Mapping[str, Any]) -> None:
        """Write the journal or the manifest: it is there as a whole or as it was."""
        self.busy = str(self.state / name)
        self.write(self.state / f"{name}.new", json.dumps(data).encode(), 0o600, -1, -1)
        self.do(os.rename, self.state / f"{name}.new", self.state / name)
        self.sync_directory(self.state)

    def write(self, path: Path, content: bytes, mode: int, uid: int, gid: int) -> None:
        """A new file that nobody else can read before it has its owner and mode."""
        descriptor = self.do(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self.do(os.write, descriptor, rest) :]
            self.do(os.fchown, descriptor, uid, gid)
            self.do(os.fchmod, descriptor, mode)
            self.do(os.fsync, descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """A file that may be gone already."""
        if look(path):
            self.do(os.unlink, path)

    def remove_directory(self, path: str | Path) -> None:
        """A directory that may be gone already, or have something of somebody else in it by now."""
        if look(path) and not any(Path(path).iterdir()):
            self.do(os.rmdir, path)

    def sync(self, steps: Sequence[Step]) -> None:
        """Have the names in all directories of the steps on the disk."""
        for directory in sorted({str(Path(step.at).parent) for step in steps}):
            if Path(directory).is_dir():
                self.sync_directory(Path(directory))

    def sync_directory(self, path: Path) -> None:
        """Have the names in a directory on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.do(os.fsync, descriptor)
        finally:
            os.close(descriptor)


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
