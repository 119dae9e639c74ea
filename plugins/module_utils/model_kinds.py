# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The kinds of model that vLLM serves, in one table: how each is asked, what a right answer has, which paths clients may get, and where the answers
tell what was used.

Nobody has to say of which kind a model is: vLLM has the paths of what its model can do and no others, so an instance tells by them. Read from the
routers of vLLM 0.26, 0.32 and 0.33 (entrypoints/launchers/api_server/routers.py, entrypoints/pooling/factories.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.sound_form import form, half_a_second

GREETING = "Hi"


class AnswerError(ValueError):
    """The answer is not one of this kind."""


@dataclass(frozen=True)
class Path:
    """A path that an instance has when it serves a kind of model."""

    path: str
    # The numbers of an answer that tell what was used, by their keys from the outside in; none where the answers do not tell.
    usage: tuple[str, ...]
    # Whether gateways let it through unless gateway_paths says otherwise.
    open: bool = True
    # The smallest question, without the name of the model; none where another path of the kind is asked instead.
    question: Mapping[str, Any] | None = None
    # Reads the answer: returns what came in a few words, raises AnswerError when it is none.
    read: Callable[[Any], str] | None = None
    # The question is a form with a sound in it, not JSON.
    sound: bool = False

    def body(self, model: str, **more: Any) -> tuple[bytes, str]:
        """The question to a model, and its content type."""
        fields = {"model": model, **(self.question or {}), **more}
        if self.sound:
            return form(fields, half_a_second())
        return json.dumps(fields).encode(), "application/json"

    def content(self, answer: Any) -> str:
        """What came, in a few words. Raises AnswerError."""
        try:
            return self.read(answer) if self.read else ""
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise AnswerError(str(error)) from None

    def used(self, answer: Any) -> dict[str, float]:
        """What the answer says that it used. Raises AnswerError when it says less than it should."""
        found = {}
        for name in self.usage:
            value = answer
            for key in name.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if not isinstance(value, int | float):
                raise AnswerError(f"it does not tell its {name}")
            found[name] = value
        return found


@dataclass(frozen=True)
class Kind:
    """What a model can be for."""

    name: str
    # What clients get of it.
    noun: str
    # In the order in which they are asked.
    paths: tuple[Path, ...]
    # Whether its answers come in pieces when a client wants them so.
    streams: bool = False
    # The extra of vLLM's package that it needs; without it an instance starts, and refuses every question.
    extra: str = ""


def texts(answer: Any) -> str:
    """The beginning of the text of a completion or a chat."""
    choice = answer["choices"][0]
    return short(choice["message"]["content"] if "message" in choice else choice["text"])


def transcript(answer: Any) -> str:
    """The text that was heard: of a sound without words it may be empty."""
    return short(str(answer["text"] + ""))


def vector(answer: Any) -> str:
    """An embedding."""
    return f"{numbers(answer['data'][0]['embedding'])} numbers"


def scores(answer: Any) -> str:
    """What a reranker made of one document."""
    return f"score {float(answer['results'][0]['relevance_score']):.3g}"


def score(answer: Any) -> str:
    """What a pair of texts got."""
    return f"score {float(answer['data'][0]['score']):.3g}"


def classes(answer: Any) -> str:
    """How sure a classifier is of each class."""
    return f"{numbers(answer['data'][0]['probs'])} classes"


def pooled(answer: Any) -> str:
    """What came for the text or for each of its tokens."""
    rows = answer["data"][0]["data"]
    return f"{len(rows)} x {numbers(rows[0])} numbers" if isinstance(rows[0], list) else f"{numbers(rows)} numbers"


def numbers(values: Any) -> int:
    """How many numbers these are, at least one."""
    if not isinstance(values, list) or not values:
        raise TypeError("no numbers")
    return len([float(value) for value in values])


def short(text: Any) -> str:
    """The beginning of a text on one line, in quotes."""
    return repr(" ".join(str(text or "").split())[:40])


TOKENS = ("usage.prompt_tokens", "usage.completion_tokens")
PROMPT = ("usage.prompt_tokens",)
PARTS = ("usage.input_tokens", "usage.output_tokens")
SECONDS = ("usage.seconds",)
ONE_TOKEN = {"max_tokens": 1, "temperature": 0}
SAID = {"messages": [{"role": "user", "content": GREETING}]}
PAIR = {"query": GREETING, "documents": [GREETING]}
# With its language: to find that out is another question, which not every model understands.
HEARD = {"language": "en", "response_format": "json", "temperature": 0}

# In this order: a model that is of several kinds is the first of them. One that embeds can also compare two texts, one that ranks can also classify.
KINDS: tuple[Kind, ...] = (
    Kind(
        "generate",
        "completion",
        (
            Path("/v1/completions", TOKENS, question={"prompt": GREETING, **ONE_TOKEN}, read=texts),
            Path("/v1/chat/completions", TOKENS, question={**SAID, **ONE_TOKEN}, read=texts),
            Path("/v1/responses", PARTS),
            Path("/v1/messages", PARTS, open=False),
            Path("/v1/messages/count_tokens", ("input_tokens",), open=False),
        ),
        streams=True,
    ),
    Kind(
        "transcribe",
        "transcription",
        (
            Path("/v1/audio/transcriptions", SECONDS, question=HEARD, read=transcript, sound=True),
            Path("/v1/audio/translations", (), question=HEARD, read=transcript, sound=True),
        ),
        extra="audio",
    ),
    Kind(
        "embed",
        "embedding",
        (
            Path("/v1/embeddings", PROMPT, question={"input": GREETING}, read=vector),
            Path("/v2/embed", ("meta.billed_units.input_tokens",), open=False),
        ),
    ),
    Kind(
        "rerank",
        "rank",
        (
            Path("/v1/rerank", PROMPT, question=PAIR, read=scores),
            Path("/v1/score", PROMPT, question={"text_1": GREETING, "text_2": GREETING}, read=score),
            Path("/v2/rerank", PROMPT, open=False, question=PAIR, read=scores),
            Path("/rerank", PROMPT, open=False, question=PAIR, read=scores),
            Path("/score", PROMPT, open=False, question={"text_1": GREETING, "text_2": GREETING}, read=score),
        ),
    ),
    Kind(
        "classify",
        "class",
        (Path("/classify", PROMPT, question={"input": GREETING}, read=classes),),
    ),
    Kind(
        "pool",
        "pooled output",
        (Path("/pooling", PROMPT, open=False, question={"input": GREETING}, read=pooled),),
    ),
)
# What an instance has whatever its kind. Their answers count nothing that is paid for.
EVERY_KIND = (Path("/tokenize", (), open=False), Path("/detokenize", (), open=False))
# Every instance has it, too; a gateway answers it itself.
MODELS = "/v1/models"

# How vLLM answers for a path that it does not have; when it does not know the model, 404 comes with an `error`.
NO_SUCH_PATH = {"detail": "Not Found"}
# How it answers for one that it has, but not for this model.
NOT_THIS_MODEL = 501

# What moves in /metrics while an engine works, whatever its kind; and what it still has to do.
DONE = (
    "vllm:iteration_tokens_total_count", "vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:request_success_total",
)  # fmt: skip
LOAD = ("vllm:num_requests_running", "vllm:num_requests_waiting")
# All that moves while the engine computes one long prompt and nothing else: an iteration counts when it made a token (vllm/v1/engine/async_llm.py).
KV = "vllm:kv_cache_usage_perc"
# Requests that ended without an answer are counted as well.
UNANSWERED = ('finished_reason="abort"', 'finished_reason="error"')


@dataclass(frozen=True)
class Work:
    """What an engine has done, which is another value later when it gets on, and how many requests it has."""

    done: tuple[float, ...]
    load: float
    # How much of its KV cache is in use.
    kv: float = 0.0


def paths() -> Iterator[Path]:
    """All paths of all kinds."""
    for kind in KINDS:
        yield from kind.paths


def methods() -> dict[str, str]:
    """Every path that a gateway may let through, with its method."""
    return {**{path.path: "POST" for path in (*paths(), *EVERY_KIND)}, MODELS: "GET"}


def open_paths() -> list[str]:
    """Those that it lets through unless told otherwise."""
    return [*(path.path for path in paths() if path.open), MODELS]


def kind_of(path: str) -> Kind:
    """The kind that a path belongs to."""
    return next(kind for kind in KINDS if any(one.path == path for one in kind.paths))


def askable(allowed: Collection[str] | None = None) -> list[tuple[Kind, Path]]:
    """How to ask each kind: by its first path with a question, of those that are allowed. Kinds without one are left out."""
    found = []
    for kind in KINDS:
        usable = (path for path in kind.paths if path.question and (allowed is None or path.path in allowed))
        if path := next(usable, None):
            found.append((kind, path))
    return found


def lacks(status: int, body: bytes) -> bool:
    """Whether this is how vLLM says that it does not serve a path, or not for its model."""
    if status == NOT_THIS_MODEL:
        return True
    try:
        return status == 404 and json.loads(body) == NO_SUCH_PATH
    except ValueError:
        return False


def wanted_kinds(options: Mapping[str, Any]) -> list[Kind]:
    """The kinds that an instance can be of by its options; all of them when they do not say. What it is says the instance itself, later."""
    if options.get("runner") == "generate":
        return [kind for kind in KINDS if kind.name in ("generate", "transcribe")]
    convert = options.get("convert")
    if options.get("runner") == "pooling" or convert in ("embed", "classify"):
        names = {"embed": ("embed", "rerank", "pool"), "classify": ("rerank", "classify", "pool")}
        return [kind for kind in KINDS if kind.name in names.get(str(convert), ("embed", "rerank", "classify", "pool"))]
    return list(KINDS)


def possible_paths(options: Mapping[str, Any]) -> list[Path]:
    """The paths that an instance can have by its options."""
    return [path for kind in wanted_kinds(options) for path in kind.paths] + list(EVERY_KIND)


def work(metrics: str) -> Work:
    """What the metrics of an instance say of its engine."""
    found = dict.fromkeys((*DONE, *LOAD, KV), 0.0)
    for line in metrics.splitlines():
        name = line.split("{")[0].split(" ")[0]
        if name in found and not any(reason in line for reason in UNANSWERED):
            found[name] += float(line.rsplit(" ", 1)[1])
    return Work(tuple(found[name] for name in DONE), sum(found[name] for name in LOAD), found[KV])
