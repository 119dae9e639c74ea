# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The operator's word on instances: what becomes of it when a person or a turn speaks, and for whom is waited then.

The role host_agent puts this file beside its programs, so it needs nothing but the standard library of the host's Python. What it looks at and
writes, its caller brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

UP, DRAINED, STOPPED = "up", "drained", "stopped"
FAIL, WAIT, FORCE = KEPT = ("fail", "wait", "force")
PAUSE = 0.3
# A gateway that keeps an instance may be about to let it go: so long it has another mind.
KEPT_SECONDS = 6.0
# An engine that does not tell so often in a row what it has to do does nothing for anybody.
SILENT_LOOKS = 3

Word = Mapping[str, str]


@dataclass(frozen=True)
class Wanted:
    """What somebody says of instances."""

    operator: str
    by: str
    since: str
    reason: str = ""
    # The act of the playbook that says it; empty: a person does.
    turn: str = ""
    force: bool = False
    # Of one that is up, the percentage of a route's requests that it gets at most; 100: as many as the others.
    share: int = 100

    @property
    def part(self) -> str:
        """The share as a word has it."""
        return str(self.share) if self.operator == UP and self.share < 100 else ""

    @property
    def word(self) -> dict[str, str]:
        """As a word."""
        return {
            "operator": self.operator,
            "by": self.by,
            "since": self.since,
            "reason": self.reason,
            "turn": self.turn if self.operator != UP or self.part else "",
            "force": "yes" if self.force and self.operator != UP else "",
            "share": self.part,
        }


def problem(wanted: Wanted) -> str:
    """What cannot be said; empty when it can."""
    if wanted.turn and wanted.operator == STOPPED:
        return "a turn drains and says up; stopped is a person's word (state, turn)"
    if not 1 <= wanted.share <= 100:
        return f"share is {wanted.share}; it must be a percentage from 1 to 100"
    return ""


def left(before: Word, wanted: Wanted) -> str:
    """Why a turn leaves a word as it is: it is a person's. Empty when it does not."""
    if not wanted.turn or before["turn"] or before["operator"] == UP:
        return ""
    return in_words(before)


def decided(before: Word, wanted: Wanted) -> dict[str, str]:
    """The word after `before`: the same one where nothing changes."""
    if left(before, wanted):
        return dict(before)
    new = wanted.word
    if before["operator"] != wanted.operator or before["share"] != wanted.part:
        return new
    new |= {
        "since": before["since"] or wanted.since,
        "reason": wanted.reason or before["reason"],
    }  # it is out since then
    # A person who says it again does not become another one; a turn that goes on where another run died speaks for itself.
    same = new | {"by": new["by"] if wanted.turn else before["by"]} == before
    return dict(before) if same or wanted.operator == UP else new


def in_words(word: Word) -> str:
    """A word for a person, such as `drained by ada: new fan`."""
    who = f" by {word['by']}" if word["by"] else ""
    turn = f" for a turn ({word['turn']})" if word["turn"] else ""
    share = f" with {word['share']} % of the requests" if word["share"] else ""
    return f"{word['operator']}{share}{turn}{who}" + (f": {word['reason']}" if word["reason"] else "")


# --- waiting


class Host(Protocol):
    """The host on which instances are waited for."""

    def awaited(self, instance: str, waited: float, kept_seconds: float) -> dict[str, str]:
        """The gateways that have not let an instance go, and why."""

    def unused(self, instance: str) -> dict[str, str]:
        """The gateways that do not use an instance, and why."""

    def kept(self, instance: str) -> dict[str, str]:
        """The gateways that keep an instance, and why."""

    def running(self, instance: str) -> int | None:
        """How many requests its engine has, waiting ones too; None when it does not tell."""

    def now(self) -> float:
        """A clock that goes on evenly."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""


@dataclass
class Stand:
    """Where an instance stands after waiting."""

    waiting: dict[str, str] = field(default_factory=dict)
    running: int = 0
    seconds: float = 0.0
    # Gateways that keep it, where that is refused.
    kept: dict[str, str] = field(default_factory=dict)
    silent: int = 0

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return not self.waiting and not self.running


def look(host: Host, instance: str, out: bool, waited: float, engine: bool, stand: Stand) -> None:
    """See whether there still is something to wait for."""
    # Nobody is forgotten because time passes: who keeps it is told, and refused or waited for.
    stand.waiting = host.awaited(instance, waited, math.inf) if out else host.unused(instance)
    stand.running = 0
    if out and engine and not stand.waiting:
        found = host.running(instance)
        stand.silent = 0 if found is not None else stand.silent + 1
        stand.running = found or 0
        if found is None and stand.silent < SILENT_LOOKS:
            stand.waiting = {"its engine": "does not tell what it has to do"}


def settle(
    host: Host,
    instances: Mapping[str, bool],
    timeout: float,
    kept: str,
    engine: bool,
    told: Callable[[str], None] | None = None,
) -> dict[str, Stand]:
    """Wait for all of these instances at once: each is to be out (true), or in use. Returns where they stand at the end, at the latest after `timeout`."""
    begin = host.now()
    stands = {name: Stand() for name in instances}
    open_, said = dict(instances), ""
    while True:
        waited = host.now() - begin
        for name, out in list(open_.items()):
            look(host, name, out, waited, engine, stands[name])
            stands[name].seconds = round(waited, 1)
            keepers = host.kept(name) if out and kept == FAIL and waited >= KEPT_SECONDS else {}
            stands[name].kept = keepers
            if stands[name].settled or keepers:
                del open_[name]
        if not open_ or waited >= timeout:
            return stands
        if told and (text := "; ".join(sentence(name, stands[name]) for name in open_)) != said:
            told(text)
            said = text
        host.sleep(min(PAUSE, max(0.05, timeout - waited)))


def sentence(instance: str, stand: Stand) -> str:
    """What is still waited for, in one sentence."""
    parts = [f"{gateway} {why}" for gateway, why in stand.waiting.items()]
    if stand.running:
        parts.append(f"its engine has {stand.running} request{'s' if stand.running > 1 else ''}")
    return f"{instance}: {', '.join(parts)}"


def complaint(instance: str, stand: Stand, word: Word) -> str:
    """What a person is told of an instance that did not settle."""
    if stand.kept:
        keepers = ", ".join(f"{gateway} ({why})" for gateway, why in stand.kept.items())
        return (
            f"{instance} stays in use: {keepers}. Nothing has been changed. Bring another of its backends back first, or, when clients may hear 503 "
            "meanwhile: -e turn_kept=force (for drain.yml and stop.yml: -e drain_force=true)"
        )
    how = (
        "The gateways use it when its check passes; nothing has to be said again"
        if word["operator"] == UP
        else f"It is {word['operator']} from now on, so nothing new comes: wait and run this again"
    )
    return f"{sentence(instance, stand)}, after {stand.seconds:.0f} s. {how}"
