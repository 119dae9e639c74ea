# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What an instance has to answer before it gets traffic: how each kind of model is asked, and whether an answer is the right one.

A release that answers nonsense passes every health check: it answers in time, with the status 200 and a text. So its answers are compared, with what
somebody wrote down or with what the release before said.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds

# What is asked -> the paths that take it, the first that the instance has.
FORMS: dict[str, tuple[str, ...]] = {
    "prompt": ("/v1/completions",),
    "messages": ("/v1/chat/completions",),
    "input": ("/v1/embeddings", "/classify", "/pooling"),
    "documents": ("/v1/rerank",),
    "audio": ("/v1/audio/transcriptions",),
}
# Those whose answer is a text that is made token by token: greedily, and always the same way.
GENERATED = ("prompt", "messages")
GREEDY = {"temperature": 0, "seed": 0}
# What a question's `fields` may not say: it is ours.
OURS = ("model", "stream", "stream_options", "n", "prompt_logprobs", *FORMS, "query", "max_tokens")
# Numbers are kept with so many digits: a difference that matters is larger.
DIGITS = 6
SHOWN = 160


class AnswerError(ValueError):
    """An answer that is none of the question, in words for a person."""


@dataclass(frozen=True)
class Answer:
    """What an instance answered, as far as it can be compared."""

    # None where the answer has no text.
    text: str | None
    # The log-probabilities of the prompt's tokens, a vector, scores or probabilities.
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is asked of an instance, and what makes an answer right."""

    name: str
    form: str
    body: Mapping[str, Any]
    # Those that have to be asked; with none every instance of the right kind.
    instances: tuple[str, ...] = ()
    # Of a warm-up: how often, and how many at once.
    times: int = 1
    parallel: int = 1
    expect: str | None = None
    matches: str | None = None
    max_distance: float | None = None
    # A file on the host with a sound.
    audio: str = ""
    paths: tuple[str, ...] = field(default=())

    @property
    def key(self) -> str:
        """Tells this question from others in a file, without its text, which may be private."""
        asked = json.dumps([self.form, self.body, self.audio], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:24]

    @property
    def judged_key(self) -> str:
        """The same, with the text that is right: another one makes it another question."""
        return hashlib.sha256(json.dumps([self.key, self.expect, self.matches]).encode()).hexdigest()[:24]

    def concerns(self, instance: str) -> bool:
        """Whether an instance is asked it."""
        return not self.instances or instance in self.instances


def form_of(entry: Mapping[str, Any]) -> str:
    """Which of the forms an entry has. Raises ValueError in words for a person."""
    found = [name for name in FORMS if entry.get(name) not in (None, "", [])]
    if len(found) != 1:
        has = f"it has {' and '.join(found)}" if found else "it has none of them"
        raise ValueError(f"it must ask one of {', '.join(FORMS)}; {has}")
    return found[0]


def question(entry: Mapping[str, Any], name: str) -> Question:
    """A question or a prompt of a warm-up, from an inventory. Raises ValueError."""
    form = form_of(entry)
    body: dict[str, Any] = {**(entry.get("fields") or {})}
    if form != "audio":
        body[form] = entry[form]
    if form == "documents":
        body["query"] = entry.get("query") or ""
    if form in GENERATED:
        body = {**GREEDY, **body, "max_tokens": int(entry.get("max_tokens") or 32)}
    distance = entry.get("max_distance")
    if distance is not None and form in GENERATED:
        # 0: the tokens of the prompt alone, and not the likeliest ones beside them
        body["prompt_logprobs"] = 0
    return Question(
        name=str(entry.get("name") or name),
        form=form,
        body=body,
        instances=tuple(entry.get("instances") or ()),
        times=int(entry.get("times") or 1),
        parallel=int(entry.get("parallel") or 1),
        expect=entry.get("expect"),
        matches=entry.get("matches"),
        max_distance=None if distance is None else float(distance),
        audio=str(entry.get("audio") or "") if form == "audio" else "",
        paths=FORMS[form],
    )


def prompts(entries: Iterable[Mapping[str, Any]]) -> list[Question]:
    """The warm-up, as it stands in an inventory."""
    return [question(entry, f"prompt {number}") for number, entry in enumerate(entries, 1)]


def questions(entries: Iterable[Mapping[str, Any]]) -> list[Question]:
    """The questions, as they stand in an inventory."""
    return [question(entry, f"question {number}") for number, entry in enumerate(entries, 1)]


# --- what came


def read(path: str, body: Mapping[str, Any], answer: Any) -> Answer:
    """The answer to a question. Raises AnswerError when it is none."""
    try:
        if path == "/v1/completions":
            choice = answer["choices"][0]
            return Answer(str(choice["text"] or ""), logprobs(choice) if "prompt_logprobs" in body else ())
        if path == "/v1/chat/completions":
            text = str(answer["choices"][0]["message"]["content"] or "")
            return Answer(text, logprobs(answer) if "prompt_logprobs" in body else ())
        if path == "/v1/embeddings":
            return Answer(None, rounded(answer["data"][0]["embedding"]))
        if path == "/classify":
            return Answer(str(answer["data"][0]["label"]), rounded(answer["data"][0]["probs"]))
        if path == "/pooling":
            return Answer(None, rounded(flat(answer["data"][0]["data"])))
        if path == "/v1/rerank":
            return ranked(body, answer["results"])
        return Answer(str(answer["text"] + ""))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise AnswerError(f"its answer cannot be read ({type(error).__name__}: {error})") from None


def logprobs(answer: Mapping[str, Any]) -> tuple[float, ...]:
    """How likely each token of the prompt was, the first one left out, before which there is nothing."""
    told = answer["prompt_logprobs"]
    # of each position the first is the token that the prompt has
    found = [next(iter(position.values()))["logprob"] for position in told if position]
    if not found:
        raise ValueError("no log-probabilities: a prompt needs two tokens")
    return rounded(found)


def ranked(body: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Answer:
    """The best document, and the scores in the order in which the documents were given."""
    scores = {int(result["index"]): float(result["relevance_score"]) for result in results}
    best = max(scores, key=lambda index: scores[index])
    return Answer(str(body["documents"][best]), rounded(scores[index] for index in sorted(scores)))


def flat(values: Any) -> list[float]:
    """The numbers of one row or of several."""
    return [number for value in values for number in (value if isinstance(value, list) else [value])]


def rounded(values: Iterable[Any]) -> tuple[float, ...]:
    """Numbers as they are kept."""
    return tuple(round(float(value), DIGITS) for value in values)


# --- whether it is right


def distance(form: str, before: Sequence[float], now: Sequence[float]) -> float:
    """How far an answer is from the one of the release before. Raises AnswerError when the two cannot be compared.

    The mean absolute difference; of vectors, whose length says nothing, one minus the cosine of the angle between them.
    """
    if len(before) != len(now):
        raise AnswerError(
            f"it told {len(now)} numbers, the release before {len(before)}: another tokenizer, template or model, whose answers cannot be compared"
        )
    if form == "input" and len(now) > 1 and not is_distribution(before):
        lengths = math.sqrt(sum(a * a for a in before) * sum(b * b for b in now))
        return 1 - sum(a * b for a, b in zip(before, now, strict=True)) / lengths if lengths else math.inf
    return sum(abs(a - b) for a, b in zip(before, now, strict=True)) / max(1, len(now))


def is_distribution(numbers: Sequence[float]) -> bool:
    """Whether these are the probabilities of classes."""
    return all(0 <= number <= 1 for number in numbers) and abs(sum(numbers) - 1) < 0.001


def shown(text: str) -> str:
    """A text on one line, in quotes, and not too long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else line[: SHOWN - 3] + "...")


def wrong(asked: Question, answer: Answer) -> list[str]:
    """What is wrong with the text of an answer; nothing when it is right."""
    if asked.expect is None and asked.matches is None:
        return []
    if answer.text is None:
        return ["its answer is numbers and has no text: only max_distance can judge it"]
    found = []
    if asked.expect is not None and answer.text.strip() != asked.expect.strip():
        found.append(f"it answered {shown(answer.text)}, and not {shown(asked.expect)}")
    if asked.matches is not None and not re.search(asked.matches, answer.text):
        found.append(f"it answered {shown(answer.text)}, in which {shown(asked.matches)} is not found")
    return found


def too_far(asked: Question, before: Sequence[float], now: Sequence[float]) -> tuple[float | None, str]:
    """The distance to the release before, and what is wrong with it; with an empty text it is small enough."""
    limit = asked.max_distance or 0.0
    try:
        found = distance(asked.form, before, now)
    except AnswerError as error:
        return None, str(error)
    # written so that what is no number at all is too far, too
    if not found <= limit:
        return found, f"it is {found:.3g} away from the release before, and may be {limit:g}"
    return found, ""


# --- what an inventory says


def problems(variable: str, entries: Any, instances: Iterable[str] = (), judged: bool = False) -> list[str]:
    """What is wrong with a list of prompts or questions beyond the types of their fields."""
    found: list[str] = []
    names: list[str] = []
    known = set(instances)
    for number, entry in enumerate(entries if isinstance(entries, list) else [], 1):
        if not isinstance(entry, Mapping):
            continue
        at = f"{variable}[{number - 1}]" + (f" ({entry['name']})" if entry.get("name") else "")
        names.append(str(entry.get("name") or ""))
        found += [f"{at}: {text}" for text in entry_problems(entry, known, judged)]
    for name in sorted({name for name in names if name and names.count(name) > 1}):
        found.append(f"{variable} has {names.count(name)} entries called {name}; each needs a name of its own.")
    return found


def entry_problems(entry: Mapping[str, Any], known: set[str], judged: bool) -> list[str]:
    """The same of one entry."""
    try:
        form = form_of(entry)
    except ValueError as error:
        return [f"{error}."]
    found = []
    if form == "documents" and not entry.get("query"):
        found.append("documents are ranked by a query, which is missing.")
    if ours := sorted(set(entry.get("fields") or {}) & set(OURS)):
        found.append(f"fields has {', '.join(ours)}, which the entry itself says or which is fixed.")
    if unknown := sorted(set(entry.get("instances") or []) - known) if known else []:
        found.append(f"no host has an instance {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
    for name in ("max_tokens", "times", "parallel"):
        if name in entry and not _at_least_one(entry[name]):
            found.append(f"{name} is {entry[name]}; it must be 1 or more.")
    if judged:
        found += judgement_problems(entry, form)
    return found


def judgement_problems(entry: Mapping[str, Any], form: str) -> list[str]:
    """What is wrong with how an answer is judged."""
    if all(entry.get(name) is None for name in ("expect", "matches", "max_distance")):
        return ["nothing says which answer is right: it needs expect, matches or max_distance."]
    found = []
    if entry.get("matches") is not None:
        try:
            re.compile(str(entry["matches"]))
        except re.error as error:
            found.append(f"matches is no regular expression: {error}.")
    if entry.get("expect") is not None and not str(entry["expect"]).strip():
        found.append("expect is empty, which no good answer is.")
    if (most := entry.get("max_distance")) is not None:
        if form == "audio":
            found.append("max_distance needs numbers, and what is heard has none; use expect or matches.")
        try:
            positive = float(most) > 0
        except (TypeError, ValueError):
            positive = False
        if not positive:
            found.append(f"max_distance is {most}; it must be a number above 0.")
    return found


def _at_least_one(value: Any) -> bool:
    try:
        return int(value) >= 1
    except (TypeError, ValueError):
        return False


def answers_path(status: int, body: bytes) -> bool:
    """Whether an instance has the path that was asked."""
    return not model_kinds.lacks(status, body)
