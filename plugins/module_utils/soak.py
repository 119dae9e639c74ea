# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What gateways counted of a backend that came back, compared with the others and with before: whether it fails or lingers more than they do.

Read are the gateways' own counts, because they know what clients got. A difference counts when chance does not explain it, and few requests say nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REQUESTS = "vllm_gateway_backend_requests_total"
BEGINNINGS = "vllm_gateway_backend_first_token_seconds"
# What became of a request at a backend: answered; an error, whether or not another backend answered then; or begun and not brought to its end.
OUTCOMES = OK, ERROR, CUT = ("ok", "error", "cut")
# A share of bad ends is too high when the reference would bring so many in fewer than one of a hundred soaks.
CHANCE = 0.01
# What the median of the first token may be above the reference's, beside the factor: on an idle fleet it is milliseconds, and their double nothing.
SLACK_SECONDS = 0.1

SAMPLE = re.compile(r"(\w+)\{(.*)\} (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Counts:
    """What was counted of one backend or of several."""

    outcomes: Mapping[str, float] = field(default_factory=dict)
    # Upper limit of a bucket -> how many first tokens came within it; the last limit is infinite.
    first_token: Mapping[float, float] = field(default_factory=dict)

    @property
    def requests(self) -> float:
        return sum(self.outcomes.values())

    @property
    def streams(self) -> float:
        return max(self.first_token.values(), default=0.0)

    def bad(self, outcome: str) -> float:
        return self.outcomes.get(outcome, 0.0)

    def __add__(self, other: Counts) -> Counts:
        return Counts(added(self.outcomes, other.outcomes), added(self.first_token, other.first_token))

    def since(self, before: Counts) -> Counts:
        """What was counted in between. A gateway that started anew in between counts from zero, and so does the difference."""
        if any(self.outcomes.get(name, 0.0) < count for name, count in before.outcomes.items()):
            return self
        return Counts(
            {name: count - before.outcomes.get(name, 0.0) for name, count in self.outcomes.items()},
            {limit: count - before.first_token.get(limit, 0.0) for limit, count in self.first_token.items()},
        )

    def median(self) -> float:
        """The first token of the middle stream, in between the limits of its bucket."""
        half, below, under = self.streams / 2, 0.0, 0.0
        for limit, count in sorted(self.first_token.items()):
            if count >= half:
                if math.isinf(limit):
                    return below
                return below + (limit - below) * (half - under) / max(count - under, 1e-9)
            below, under = limit, count
        return below


def added(one: Mapping[Any, float], other: Mapping[Any, float]) -> dict[Any, float]:
    """Numbers of the same name together."""
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


# --- from a gateway's metrics to the controller


def read(metrics: str) -> dict[str, dict[str, dict[str, float]]]:
    """What a gateway's metrics say of each backend, as JSON can carry it."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for line in metrics.splitlines():
        sample = SAMPLE.fullmatch(line)
        if not sample or sample[1] not in (REQUESTS, f"{BEGINNINGS}_bucket"):
            continue
        labels = dict(LABEL.findall(sample[2]))
        backend = found.setdefault(labels.get("backend", ""), {"outcomes": {}, "first_token": {}})
        kind, name = ("outcomes", "outcome") if sample[1] == REQUESTS else ("first_token", "le")
        backend[kind][labels[name]] = float(sample[3])
    return found


def counts(told: Mapping[str, Any]) -> Counts:
    """The same of one backend, as it is counted with."""
    first_token = {float(limit): float(count) for limit, count in (told.get("first_token") or {}).items()}
    return Counts({name: float(count) for name, count in (told.get("outcomes") or {}).items()}, first_token)


def total(told: Iterable[Mapping[str, Any]], backends: Collection[str]) -> Counts:
    """Of these backends, at all gateways."""
    found = Counts()
    for gateway in told:
        for name, one in gateway.items():
            if name in backends:
                found += counts(one)
    return found


def between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Counts]:
    """What one gateway counted of each backend between two looks."""
    return {name: counts(one).since(counts(before.get(name) or {})) for name, one in after.items()}


# --- the verdict


@dataclass(frozen=True)
class Rules:
    """From when on a difference is too large."""

    # With fewer requests nothing good is concluded.
    least: int = 20
    # What the share of bad ends may be above the reference's.
    share: float = 0.01
    # How many times the median first token may be the reference's.
    factor: float = 2.0


@dataclass(frozen=True)
class Reference:
    """What a backend is compared with, and how that is called."""

    name: str
    counts: Counts


def by_chance(bad: float, requests: float, share: float) -> float:
    """How probable at least so many bad ends are, when each request ends badly with this probability."""
    if bad <= 0:
        return 1.0
    if share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    sum_below = 0.0
    for number in range(round(bad)):
        logarithm = math.lgamma(requests + 1) - math.lgamma(number + 1) - math.lgamma(requests - number + 1)
        sum_below += math.exp(logarithm + number * math.log(share) + (requests - number) * math.log1p(-share))
    return max(0.0, 1.0 - sum_below)


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def share_of(counted: Counts, outcome: str) -> float:
    return counted.bad(outcome) / counted.requests if counted.requests else 0.0


def bad_ends(mine: Counts, reference: Reference, rules: Rules) -> list[str]:
    """Whether it ends more requests badly than the reference does."""
    found = []
    for outcome, words in ((ERROR, "ended with an error"), (CUT, "were cut or given up by their client")):
        usual = share_of(reference.counts, outcome)
        allowed = usual + rules.share
        if by_chance(mine.bad(outcome), mine.requests, allowed) < CHANCE:
            found.append(
                f"{mine.bad(outcome):.0f} of {mine.requests:.0f} requests {words} ({percent(share_of(mine, outcome))}); "
                f"{reference.name} it is {percent(usual)}, and {percent(allowed)} are allowed"
            )
    return found


def slow(mine: Counts, reference: Reference, rules: Rules) -> list[str]:
    """Whether its answers begin later than the reference's."""
    if mine.streams < rules.least or reference.counts.streams < rules.least:
        return []
    median, usual = mine.median(), reference.counts.median()
    if median <= usual * rules.factor + SLACK_SECONDS:
        return []
    allowed = usual * rules.factor + SLACK_SECONDS
    return [
        f"half of its streams began after {median:.2f} s or later; {reference.name} it is {usual:.2f} s, and {allowed:.2f} s are allowed"
    ]


def references(backend: str, others: Mapping[str, Counts], before: Mapping[str, Counts]) -> list[Reference]:
    """What to compare with, best first: the others meanwhile, which had the same clients; before it, all of them."""
    name = backend.partition("@")[0]

    def together(found: Mapping[str, Counts]) -> Counts:
        return sum((one for id, one in found.items() if id.partition("@")[0] == name), Counts())

    return [Reference("at the others meanwhile", together(others)), Reference("before", together(before))]


def verdict(
    backend: str, during: Mapping[str, Counts], before: Mapping[str, Counts], new: Collection[str], rules: Rules
) -> dict[str, Any]:
    """What the soak of one backend says. `new` are those that came back with it, which are no reference."""
    mine = during.get(backend, Counts())
    others = {name: one for name, one in during.items() if name not in new}
    found = references(backend, others, before)
    for_errors = next(
        (one for one in found if one.counts.requests >= rules.least), Reference("without others", Counts())
    )
    for_streams = next((one for one in found if one.counts.streams >= rules.least), for_errors)
    # Gateways avoid who fails, so that few requests come there; those are judged all the same.
    reasons = bad_ends(mine, for_errors, rules) + slow(mine, for_streams, rules)
    if mine.requests < rules.least and not reasons:
        why = f"{mine.requests:.0f} requests came, and {rules.least} are needed to say anything"
        return {"backend": backend, "verdict": "none", "reasons": [], "line": f"{backend}: no verdict: {why}"}
    line = f"{backend}: {mine.requests:.0f} requests, {mine.bad(ERROR):.0f} errors, {mine.bad(CUT):.0f} cut"
    if mine.streams:
        line += f", first token {mine.median():.2f} s"
    if for_streams.counts.streams:
        line += f" ({for_streams.name} {for_streams.counts.median():.2f} s)"
    return {"backend": backend, "verdict": "bad" if reasons else "good", "reasons": reasons, "line": line}


def judged(
    looks: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    backends: Sequence[str],
    new: Collection[str],
    rules: Rules,
) -> list[dict[str, Any]]:
    """The verdicts on backends, from two looks at each gateway."""
    during: dict[str, Counts] = {}
    before: dict[str, Counts] = {}
    for first, second in looks:
        for name, one in between(first, second).items():
            during[name] = during.get(name, Counts()) + one
        for name, told in first.items():
            before[name] = before.get(name, Counts()) + counts(told)
    return [verdict(backend, during, before, new, rules) for backend in backends]


def told_by(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """What each gateway counted, and why others said nothing."""
    found: dict[str, Mapping[str, Any]] = {}
    silent: dict[str, str] = {}
    for result in results:
        name = str(result.get("item"))
        if result.get("unreachable"):
            silent[name] = "it cannot be reached"
        elif result.get("failed") or result.get("problem") or "backends" not in result:
            silent[name] = str(result.get("problem") or result.get("msg") or "it said nothing")
        else:
            found[name] = result["backends"]
    return found, silent


def idle(results: Sequence[Mapping[str, Any]], backends: Collection[str]) -> list[str]:
    """Why there is nothing to watch; nothing when there is: a gateway had requests for one of the instances that these backends are."""
    found, silent = told_by(results)
    names = {backend.partition("@")[0] for backend in backends}
    if any(
        counts(one).requests for told in found.values() for id, one in told.items() if id.partition("@")[0] in names
    ):
        return []
    lines = [f"{name}: {why}" for name, why in sorted(silent.items())]
    why = (
        f"no gateway has ever had a request for {', '.join(sorted(names))}"
        if found
        else "no gateway says what it counts"
    )
    return [*lines, f"{why}: nothing is watched"]


def summary(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    backends: Sequence[str],
    new: Collection[str],
    rules: Rules,
) -> dict[str, Any]:
    """From the results of two tasks that looked at the gateways: a line for each backend, what is wrong, and which gateways said nothing."""
    (before, silent), (after, silent_after) = told_by(first), told_by(second)
    both = [name for name in after if name in before]
    verdicts = judged([(before[name], after[name]) for name in both], backends, new, rules)
    return {
        "verdicts": verdicts,
        "lines": [one["line"] for one in verdicts],
        "wrong": [f"{one['backend']}: {reason}" for one in verdicts for reason in one["reasons"]],
        "silent": [f"{name}: {why}" for name, why in sorted({**silent, **silent_after}.items())],
    }
