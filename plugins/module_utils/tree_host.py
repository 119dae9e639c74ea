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

import contextlib
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.tree import Entry, TreeError, handlers
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_disk import Disk, call
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_plan import (
    Plan,
    Step,
    difference,
    look,
    wanted_attributes,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_seen import JOURNAL, MANIFEST, SEEN, all_looks, digest

NOTHING: dict[str, Any] = {"id": "", "paths": [], "secrets": [], "directories": [], "unsettled": []}


class Tree(Disk):
    """The files of one name on this host. `state` is the directory that remembers them."""

    def __init__(self, state: Path, root: Path = Path("/"), do: Callable[..., Any] = call) -> None:
        super().__init__(state, do)
        self.root = root

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
        create = bool(entries) and not check
        if create and not self.state.is_dir():  # what is refused, or needs no memory, leaves none
            plan = Plan(self.root, entries, NOTHING, check)
            create = bool(plan.steps or plan.after["paths"])
        with self.locked(create, check):
            interrupted = self.recover() if not check else "left" if (self.state / JOURNAL).exists() else ""
            before = self.read(MANIFEST) or NOTHING
            plan = Plan(self.root, entries, before, check)
            steps, after = plan.steps, plan.after
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
                result["diff"] = [difference(step, step.path in concealed) for step in steps]
            if steps and not check:
                for required in requires:
                    if not (self.root / required["path"].lstrip("/")).exists():
                        raise TreeError(required["fail_msg"])
                self.transact(plan.identity, steps, after, validate)
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
                mode, uid, gid = wanted_attributes(step.entry) if step.entry else (0o755, -1, -1)
                self.do(os.chown, step.at, uid, gid)
                self.do(os.chmod, step.at, mode)
            elif step.kind == "place" and step.entry:
                if step.entry.kind == "link":
                    self.do(os.symlink, step.entry.target, step.new)
                else:
                    self.write(step.new, step.entry.content, *wanted_attributes(step.entry))
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
