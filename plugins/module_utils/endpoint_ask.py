# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""A real question to each model of an endpoint, as a client asks it: the answer, and how long its first piece took."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import CheckError, Endpoint, StatusError, row
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint_checks import (
    CHAT,
    COMPLETIONS,
    NotServedError,
    Route,
    check_answer,
    lacks,
    prompt,
)

# A model can be asked in more ways than one: as people do, where it can be.
PREFERRED = (CHAT, COMPLETIONS)
SHOWN = 600


def piece(event: str) -> str:
    """The text in one event of a stream; what a model thinks before it answers is text, too."""
    try:
        said = json.loads(event)
    except ValueError:
        raise CheckError(f"a piece is no JSON: {event[:100]}") from None
    if "error" in said:
        raise CheckError(f"the stream ends with an error: {said['error']}")
    choices = said.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    words = (delta.get("reasoning_content"), delta.get("reasoning"), delta.get("content"), choices[0].get("text"))
    return "".join(word for word in words if isinstance(word, str))


def ask_streamed(endpoint: Endpoint, path: model_kinds.Path, model: str, words: str, tokens: int) -> str:
    """Ask for a stream, and tell what came. Raises NotServedError when the model does not have the path."""
    body, _type = path.body(model, **prompt(path, words, tokens), stream=True)
    began, first, came, done = time.monotonic(), 0.0, [], False
    try:
        for moment, event in endpoint.events(path.path, body):
            if done := event == "[DONE]":
                break
            if text := piece(event):
                first = first or moment - began
                came.append(text)
    except StatusError as error:
        answer = error.answer
        # vLLM refuses a chat with a model that has no template for it
        if lacks(answer) or (path.path == CHAT and answer.status == 400 and b"chat template" in answer.body):
            raise NotServedError from None
        raise CheckError(f"{path.path}: {error}") from None
    if not done:
        raise CheckError(f"{path.path}: the stream ended after {len(came)} pieces without [DONE]")
    if not came:
        raise CheckError(f"{path.path}: the answer is empty")
    said = " ".join("".join(came).split())
    return f"first token after {first:.2f} s, {len(came)} pieces in {time.monotonic() - began:.2f} s: {said[:SHOWN]}"


def ways(route: Route) -> list[tuple[model_kinds.Kind, model_kinds.Path]]:
    """How a model can be asked: a chat as people do, then a completion, then what is no text."""
    allowed = model_kinds.open_paths() if route.paths is None else route.paths
    talks = [
        (kind, path)
        for name in PREFERRED
        for kind in model_kinds.KINDS
        for path in kind.paths
        if kind.streams and path.path == name and name in allowed
    ]
    return talks + [(kind, path) for kind, path in route.askable() if not kind.streams]


def ask(endpoint: Endpoint, route: Route, words: str, tokens: int) -> str:
    """Ask a model by the first way that it has."""
    known = ways(route)
    for kind, path in known:
        with suppress(NotServedError):
            if kind.streams:
                return ask_streamed(endpoint, path, route.model, words, tokens)
            return f"{path.path}: {check_answer(endpoint, kind, path, route.model)}"
    if not known:
        raise CheckError("its route has no path that can be asked")
    raise CheckError(f"it answers none of {', '.join(path.path for _kind, path in known)}")


def rows(endpoint: Endpoint, routes: Sequence[Route], words: str, tokens: int) -> list[dict[str, str]]:
    """Ask all of them, one after the other: how long an answer takes is not to depend on the others."""
    return [row(f"ask {route.model}", partial(ask, endpoint, route, words, tokens)) for route in routes]
