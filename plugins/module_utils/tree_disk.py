# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Calls that change a disk so that a crash leaves the old or the new, and the directory that remembers a tree of files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.tree import TreeError
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_plan import Step, look
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_seen import JOURNAL, MANIFEST, SEEN


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Every call that changes the disk goes through here, or through what a test puts in its place."""
    return function(*arguments, **options)


class Disk:
    """The disk of this host, and `state`, the directory that remembers the files of one name."""

    def __init__(self, state: Path, do: Callable[..., Any] = call) -> None:
        self.state = state
        self.do = do
        self.busy = str(state)  # the path that an error is about

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
