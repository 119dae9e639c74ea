# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Which backends a gateway uses: what their answers, their operators and their hosts say, and how many of them each route needs.

Decides only. What asks them is gateway_checks_host.py, what runs on a gateway is roles/gateway/files/checks.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds import Work

# What a check heard.
GOOD = "good"
# No answer, or one that there are too many requests, from an engine that gets on with its work.
WORKING = "working"
REFUSED = "refused"
FAILED = "failed"
# Nobody takes the connection.
SILENT = "silent"
HUNG = "hung"
# 503: it has more requests than it takes. Whether it works on them is another question.
BUSY = "busy"

# What it takes to be out, and to be back. A refused connection is clear; an answer that is wrong may be one of a kind.
REFUSALS = 2
FAILURES = 3
GOODS = 2


class FleetFileError(ValueError):
    """fleet.json is none that can be used, in words for the journal."""


class OtherKeyError(FleetFileError):
    """It is made for another internal key than the one that the checks have."""


@dataclass(frozen=True)
class Backend:
    """An instance as this gateway reaches it, and the model that it is asked for."""

    id: str
    instance: str
    host: str
    address: str
    port: int
    model: str
    agent: str = ""
    # Whether it speaks TLS, as the inventory has it: until its host says by what it is asked.
    tls: bool = False


@dataclass(frozen=True)
class Route:
    """What clients ask for, by whom it is answered, and how many of them it needs at least."""

    model: str
    backends: tuple[str, ...]
    least: int


@dataclass(frozen=True)
class Fleet:
    """What fleet.json says, as far as checks need it."""

    gateway: str
    routes: tuple[Route, ...]
    backends: Mapping[str, Backend]

    @classmethod
    def read(cls, text: str, key: str) -> Fleet:
        """Raises FleetFileError where it is damaged, or made for another internal key than this one."""
        try:
            told = json.loads(text)
            if told["internal_key_sha256"] != hashlib.sha256(key.encode()).hexdigest():
                raise OtherKeyError("it is made for another internal key than the one that the checks have")
            routes = tuple(
                Route(one["model"], tuple(one["backends"]), int(one["min_available"])) for one in told["routes"]
            )
            models = {name: route.model for route in reversed(routes) for name in route.backends}
            return cls(
                str(told["gateway"]),
                routes,
                {name: backend(name, told["backends"][name], models[name]) for name in models},
            )
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FleetFileError):
                raise
            raise FleetFileError(f"it cannot be read ({type(error).__name__}: {error})") from None


def backend(name: str, told: Mapping[str, Any], model: str) -> Backend:
    """A backend of fleet.json."""
    port, agent = int(told["port"]), str(told.get("agent") or "")
    tls = told.get("tls") is True
    return Backend(name, str(told["instance"]), str(told["host"]), str(told["address"]), port, model, agent, tls)


@dataclass(frozen=True)
class Answer:
    """What a check heard, and why where it was nothing good."""

    heard: str
    reason: str = ""


@dataclass(frozen=True)
class Check:
    """What the checks of one backend have come to."""

    result: str = "new"  # or ok, or failed
    since: float = 0.0
    why: str = "it has not been asked yet"
    refused: int = 0
    failed: int = 0
    good: int = 0

    @classmethod
    def remembered(cls, told: Mapping[str, Any]) -> Check:
        """As it was written down: believed until the first check."""
        if told.get("check") not in ("ok", "failed"):
            return cls()
        return cls(str(told["check"]), float(told.get("since") or 0.0), str(told.get("why") or ""))

    def written(self) -> dict[str, Any]:
        """How it is written down."""
        return {"check": self.result, "since": self.since, "why": self.why}

    def after(self, answer: Answer, now: float) -> Check:
        """What it is with one more answer."""
        if answer.heard == WORKING:
            # A full engine answers nobody in time: that must not keep a gateway from using it that has just come, but mends nothing.
            if self.result == "new":
                return Check("ok", now, "")
            return replace(self, refused=0, failed=0)
        if answer.heard == GOOD:
            good = self.good + 1
            if self.result == "new" or (self.result == "failed" and good >= GOODS):
                return Check("ok", now, "", good=good)
            return replace(self, refused=0, failed=0, good=good)
        refused = self.refused + 1 if answer.heard == REFUSED else 0
        failed = self.failed + 1
        out = answer.heard == HUNG or refused >= REFUSALS or failed >= FAILURES
        if out and self.result != "failed":
            return Check("failed", now, answer.reason, refused, failed)
        why = answer.reason if self.result == "new" else self.why
        return replace(self, why=why, refused=refused, failed=failed, good=0)

    @property
    def undecided(self) -> bool:
        """Whether the next answer may change the result: then it is asked again soon."""
        return bool(self.good if self.result == "failed" else self.failed)


@dataclass
class Progress:
    """Tells an engine that hangs from one that is busy, while a question to it has no answer.

    While vLLM computes a long prompt by itself, its KV cache fills, and nothing else moves: it counts an iteration when that made a token,
    and the question waits for its turn behind the prompt.
    """

    asked: float
    # Without an answer and without a movement for as long as this, it hangs.
    timeout: float
    # It did something, other than taking a request in.
    worked: bool = False
    moved: float = field(init=False)
    seen: Work | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.moved = self.asked

    def see(self, work: Work, now: float) -> None:
        """Its metrics."""
        if self.seen is not None and work != self.seen:
            self.moved = now
            self.worked = self.worked or (work.done, work.kv) != (self.seen.done, self.seen.kv)
        self.seen = work

    def hangs(self, now: float) -> bool:
        """Whether it hangs."""
        return now - self.moved >= self.timeout

    def left(self, now: float) -> float:
        """Seconds until it would."""
        return max(0.0, self.moved + self.timeout - now)


@dataclass(frozen=True)
class Wish:
    """What its host says of a backend."""

    operator: str = "up"  # or drained, or stopped
    leaving: bool = False
    by: str = ""
    reason: str = ""
    # Since when it wants to leave.
    asked: float = 0.0
    # What its host has found about the GPU that it uses; the operator's word says more, where there is one.
    sick: str = ""
    # Whether an operator lets it go below the minimum of a route.
    force: bool = False
    # Of a route's requests, how much it gets at most; 1: as many as the others.
    share: float = 1.0
    # By what its current generation is asked: a fact of the host, and no wish. Empty until the host has said it.
    scheme: str = ""

    @classmethod
    def of(cls, told: Mapping[str, Any], before: Wish, now: float) -> Wish:
        """From an answer of the host's agent. Since when, it says itself, so that all gateways let the same one go first."""
        operator = str(told.get("operator") or "up")
        by, reason, sick = (str(told.get(name) or "") for name in ("by", "reason", "sick"))
        force = operator != "up" and bool(told.get("force"))
        scheme = str(told.get("scheme") or before.scheme)
        wish = cls(
            operator, bool(told.get("leaving")), by, reason, sick=sick, force=force, share=share(told), scheme=scheme
        )
        if not wish.wants_out:
            return wish
        asked = [
            told.get("asked") if wish.leaving or sick else None,
            moment(told.get("since")) if operator != "up" else None,
        ]
        times = [float(time) for time in asked if isinstance(time, int | float)]
        return replace(wish, asked=min(times, default=before.asked if before.wants_out else now))

    @classmethod
    def remembered(cls, told: Mapping[str, Any]) -> Wish:
        """As it was written down."""
        return cls(**{name: told[name] for name in cls.__dataclass_fields__ if name in told})

    def written(self) -> dict[str, Any]:
        """How it is written down."""
        return asdict(self)

    @property
    def wants_out(self) -> bool:
        """Whether it is to get no more requests, if that can be."""
        return self.leaving or self.operator != "up" or bool(self.sick)

    @property
    def says_something(self) -> bool:
        """Whether it is worth remembering."""
        return self.wants_out or self.share < 1 or bool(self.scheme)

    @property
    def words(self) -> str:
        """For a person."""
        if not self.wants_out:
            return f"gets {self.share:.0%} of the requests at most" if self.share < 1 else ""
        if self.operator == "up":
            return "its host is about to stop it" if self.leaving else one_line(f"its host wants it out: {self.sick}")
        who = f"{self.operator} by {self.by}" if self.by else f"{self.operator} by an operator"
        return one_line(f"{who}: {self.reason}" if self.reason else who)


def share(told: Mapping[str, Any]) -> float:
    """The share of a route's requests that a host wants for one that is up; what is none means all."""
    text = str(told.get("share") or "")
    percent = int(text) if text.isascii() and text.isdigit() else 100
    return percent / 100 if 1 <= percent <= 100 and told.get("operator") in (None, "", "up") else 1.0


def moment(text: object) -> float | None:
    """A time as operators' programs write it, in seconds of the epoch; nothing where it is none."""
    try:
        found = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return found.timestamp() if found.tzinfo else None


@dataclass(frozen=True)
class Use:
    """Whether a gateway uses a backend, and why not; as state.json tells it."""

    use: bool
    why: str
    check: str
    operator: str = "up"
    leaving: bool = False
    kept: bool = False
    since: float = 0.0
    share: float = 1.0
    # By what Nginx asks it.
    tls: bool = False

    @classmethod
    def remembered(cls, told: Mapping[str, Any]) -> Use:
        """As state.json has it, also one that a former version wrote."""
        return cls(**{name: told[name] for name in cls.__dataclass_fields__ if name in told})

    def written(self) -> dict[str, Any]:
        """As state.json has it."""
        return asdict(self)


def decide(
    routes: Sequence[Route],
    checks: Mapping[str, Check],
    wishes: Mapping[str, Wish],
    before: Mapping[str, Use],
    now: float,
    secured: Set[str] = frozenset(),
) -> dict[str, Use]:
    """Which backends are used now; `secured` are those that speak TLS.

    The minimum of a route keeps who is used and answers from leaving, unless an operator forces it. It brings nobody in: who was let go may be gone
    in the next moment.
    """
    wish = {name: wishes.get(name, Wish()) for name in checks}
    answers = {name for name, check in checks.items() if check.result == "ok"}
    asked = [
        name
        for name in answers
        if wish[name].wants_out and not wish[name].force and name in before and before[name].use
    ]
    available = {name for name in answers if not wish[name].wants_out} | set(asked)
    keeps: dict[str, Route] = {}
    for name in sorted(asked, key=lambda name: (wish[name].asked, name)):
        needs = (route for route in routes if name in route.backends and have(route, available) <= route.least)
        if (route := next(needs, None)) is not None:
            keeps[name] = route
        else:
            available.discard(name)
    found = {}
    for name, check in checks.items():
        kept, one = keeps.get(name), wish[name]
        why = one.words if one.wants_out or check.result == "ok" else check.why
        if kept is not None:
            why = f"{why}; kept, because the route {kept.model} needs at least {kept.least} of its backends"
        use = Use(
            name in available,
            why,
            check.result,
            one.operator,
            one.leaving,
            kept is not None,
            now,
            one.share,
            name in secured,
        )
        last = before.get(name)
        found[name] = (
            replace(use, since=last.since) if last and replace(use, since=last.since, why=last.why) == last else use
        )
    return found


def have(route: Route, available: set[str]) -> int:
    """How many backends a route has."""
    return len(available.intersection(route.backends))


def lines(routes: Sequence[Route], before: Mapping[str, Use], after: Mapping[str, Use]) -> Iterator[tuple[bool, str]]:
    """What has changed, for the journal, one line for each backend; and whether it is a warning."""
    available = {name for name, use in after.items() if use.use}
    for name, use in after.items():
        last = before.get(name, Use(False, "", "new"))
        if not (what := change(last, use)):
            continue
        counts = [
            f"route {route.model}: "
            + (
                f"{have(route, available)} of {len(route.backends)} backends in use"
                if have(route, available)
                else "NO BACKEND LEFT, clients get 503"
            )
            for route in routes
            if name in route.backends
        ]
        yield use.kept or (not use.use and use.check == "failed"), f"{name} {what} [{'; '.join(counts)}]"


def change(last: Use, use: Use) -> str:
    """What happened to a backend, in words; empty when it is nothing that a person would want to know."""
    if use.kept and not last.kept:
        return f"stays in use although it wants to leave: {use.why}"
    if use.use and not last.use:
        reason = "it answers" if last.check != "ok" else "nobody wants it out any more"
        return f"is used: {reason}" + (f"; it {use.why}" if use.share < 1 else "")
    if last.use and not use.use:
        return f"is out of use: {use.why}"
    if use.use and use.share != last.share:
        return use.why or "gets as many requests as the others"
    if use.use:
        return "no longer wants to leave" if last.kept and not use.kept else ""
    if use.check != last.check:
        return (
            "answers, and is not used: " + use.why
            if use.check == "ok"
            else f"is not used, and fails its check: {use.why}"
        )
    if (use.operator, use.leaving) != (last.operator, last.leaving):
        return f"is not used: {use.why}"
    return ""


def told(
    fleet: Fleet,
    host: str,
    uses: Mapping[str, Use],
    gone: Set[str],
    in_flight: Mapping[str, int],
    theirs: Sequence[str],
    tls: bool = False,
) -> dict[str, Any]:
    """What the agent of a host is told. `gone` are the backends that Nginx sends nothing to any more; `theirs` are all instances of the host; `tls` says
    whether this gateway could ask them by TLS.
    """
    here = {one.instance: one.id for one in fleet.backends.values() if one.host == host}
    return {
        "gateway": fleet.gateway,
        # what no route names is out as well: somebody may wait for that
        "out": sorted({name for name, id_ in here.items() if id_ in gone} | (set(theirs) - set(here))),
        "kept": {name: uses[id_].why for name, id_ in here.items() if id_ in uses and uses[id_].kept},
        # what this gateway has no backend for any more may still have requests in old workers of Nginx
        "in_flight": {name: in_flight.get(f"{name}@{host}", 0) for name in sorted({*here, *theirs})},
        "unrouted": sorted(set(theirs) - set(here)),
        "tls": tls,
    }


def one_line(text: object, length: int = 200) -> str:
    """Words of others as one line."""
    line = " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())
    return line if len(line) <= length else f"{line[:length]}..."
