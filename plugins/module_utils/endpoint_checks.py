# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What is looked at when an endpoint is proved: its certificate, that keys are needed, and each model by the kind that it is of."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import Answer, CheckError, Endpoint, row

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "Count to twenty: one, two,"
STREAM_TOKENS = 8
# A streamed answer takes time between its first and its last piece: 8 tokens take more than this on any hardware. One
# that a proxy held back arrives all at once.
STREAM_SPREAD = 0.005
# How a module is told of a model.
ROUTE: dict[str, Any] = {
    "model": {"type": "str", "required": True},
    "aliases": {"type": "list", "elements": "str", "default": []},
    "paths": {"type": "list", "elements": "str"},
}
# What no fleet serves.
NO_MODEL = "no-such-model.gpufleet.invalid"
NO_SUCH_MODEL = "model_not_found"


class NotServedError(Exception):
    """The model is not of the kind that it was asked as."""


@dataclass(frozen=True)
class Route:
    """A model that the client may ask for, its other names, and its paths; nothing: those that gateways let through by themselves."""

    model: str
    aliases: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Route:
        """From an entry of the module's `routes`."""
        paths = entry.get("paths")
        return cls(entry["model"], tuple(entry.get("aliases") or ()), None if paths is None else tuple(paths))

    def askable(self) -> list[tuple[model_kinds.Kind, model_kinds.Path]]:
        """How it can be asked, by kind."""
        return model_kinds.askable(model_kinds.open_paths() if self.paths is None else self.paths)


def check_certificate(endpoint: Endpoint, minimum_days: int) -> str:
    """The chain and the name are verified by connecting; the days left are read."""
    connection = endpoint.open()
    try:
        connection.connect()
        tls = connection.sock
        if not isinstance(tls, ssl.SSLSocket):
            raise CheckError("no TLS")
        certificate = tls.getpeercert() or {}
        version = tls.version()
    finally:
        connection.close()
    days = int((ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) // 86400)
    if days < minimum_days:
        raise CheckError(f"valid for {days} more days only")
    return f"{version}, valid for {days} more days"


def check_refusal(endpoint: Endpoint) -> str:
    """A stranger and somebody with a wrong key get 401."""
    for who, key in (("no key", None), ("a wrong key", "wrong-" + "0" * 32)):
        answer = endpoint.ask("GET", "/v1/models", key=key)
        if answer.status != 401:
            raise CheckError(f"{who}: {answer.status} instead of 401")
    return "401 without a key and with a wrong one"


def check_models(endpoint: Endpoint, routes: Sequence[Route]) -> str:
    """Every model of the client is listed, and none that is not; and no entry tells where its files are."""
    answer = endpoint.ask("GET", model_kinds.MODELS, key=endpoint.key)
    if answer.status != 200:
        raise CheckError(f"{answer.status}: {answer.text()}")
    try:
        entries = [{str(key): value for key, value in entry.items()} for entry in answer.json()["data"]]
        listed = [str(entry["id"]) for entry in entries]
    except (AttributeError, KeyError, TypeError):
        raise CheckError(f"not a list of models: {answer.text()}") from None
    if missing := [route.model for route in routes if route.model not in listed]:
        raise CheckError(f"not listed: {', '.join(missing)} (listed: {', '.join(listed) or 'none'})")
    names = {name for route in routes for name in (route.model, *route.aliases)}
    if beyond := [name for name in listed if name not in names]:
        raise CheckError(f"listed and not of this client: {', '.join(beyond)}")
    if told := [entry["id"] for entry in entries if any(str(value).startswith("/") for value in entry.values())]:
        raise CheckError(f"the entry of {', '.join(told)} tells a path of the server")
    return ", ".join(listed)


def check_unknown(endpoint: Endpoint, path: model_kinds.Path, routes: Sequence[Route]) -> str:
    """A model that does not exist is 404, in the shape of OpenAI's errors and without the names of those that do."""
    body, content_type = path.body(NO_MODEL)
    answer = endpoint.ask("POST", path.path, body, endpoint.key, content_type)
    if answer.status != 404:
        raise CheckError(f"{path.path}: {answer.status} instead of 404: {answer.text()}")
    if code(answer) != NO_SUCH_MODEL:
        raise CheckError(f"{path.path}: not the error {NO_SUCH_MODEL}: {answer.text()}")
    said = answer.body.decode(errors="replace").replace(NO_MODEL, "")
    if told := [route.model for route in routes if re.search(rf"(?<![\w./-]){re.escape(route.model)}(?![\w/-])", said)]:
        raise CheckError(f"the error tells {', '.join(told)}")
    return f"404 {NO_SUCH_MODEL}"


def code(answer: Answer) -> str:
    """The code of an error in OpenAI's shape, or nothing."""
    try:
        error = answer.json()["error"]
        return str(error["code"]) if error["message"] and error["type"] else ""
    except (CheckError, KeyError, TypeError):
        return ""


def prompt(path: model_kinds.Path, words: str = PROMPT, tokens: int = STREAM_TOKENS) -> dict[str, Any]:
    """What a completion or a chat is asked for here, instead of the one token that the table says."""
    text = {"messages": [{"role": "user", "content": words}]} if path.path == CHAT else {"prompt": words}
    return {**text, "max_tokens": tokens}


def check_answer(
    endpoint: Endpoint, kind: model_kinds.Kind, path: model_kinds.Path, model: str, alias: str | None = None
) -> str:
    """The model answers a question of its kind, by its own name or another one. Raises NotServedError when it is not of that kind."""
    began = time.monotonic()
    more = prompt(path) if kind.streams else {}
    body, content_type = path.body(alias or model, **more)
    answer = endpoint.ask("POST", path.path, body, endpoint.key, content_type)
    if lacks(answer):
        raise NotServedError
    if answer.status != 200:
        raise CheckError(f"{path.path}: {answer.status}: {answer.text()}")
    try:
        content = path.content(answer.json())
    except model_kinds.AnswerError as error:
        raise CheckError(f"{path.path}: no {kind.noun} ({error}): {answer.text()}") from None
    if (name := answer.json().get("model", model)) != model:
        raise CheckError(f"{path.path}: the answer is of {name} and not of {model}")
    return f"{content} in {time.monotonic() - began:.2f} s"


def check_alias(endpoint: Endpoint, kind: model_kinds.Kind, path: model_kinds.Path, model: str, alias: str) -> str:
    """The model answers by another name where it answers by its own."""
    try:
        return check_answer(endpoint, kind, path, model, alias)
    except NotServedError:
        raise CheckError(f"{path.path}: 404, which {model} answers") from None


def lacks(answer: Answer) -> bool:
    """Whether this says that the model does not have the path: in vLLM's words, or in those of a gateway, which tells unknown models apart."""
    return model_kinds.lacks(answer.status, answer.body) or (
        answer.status == 404 and code(answer) not in ("", NO_SUCH_MODEL)
    )


def check_streaming(endpoint: Endpoint, path: model_kinds.Path, model: str) -> str:
    """The answer comes in pieces, while it is made."""
    began = time.monotonic()
    times: list[float] = []
    done = False
    # ignore_eos is vLLM's own: the answer is as long as asked for, whatever the model wants to say.
    body, _type = path.body(model, **prompt(path), ignore_eos=True, stream=True)
    for moment, data in endpoint.events(path.path, body):
        if data == "[DONE]":
            done = True
            break
        times.append(moment - began)
    if not done:
        raise CheckError(f"the stream ended after {len(times)} pieces without [DONE]")
    if len(times) < 3:
        raise CheckError(f"{len(times)} pieces only")
    if times[-1] - times[0] < STREAM_SPREAD:
        raise CheckError(
            f"{len(times)} pieces came all at once after {times[0]:.2f} s: something holds the stream back"
        )
    return f"{len(times)} pieces, first after {times[0]:.2f} s, last after {times[-1]:.2f} s"


def check_forbidden(endpoint: Endpoint, path: str) -> str:
    """The path does not exist for a client, whatever the verb."""
    for method, body in (("GET", None), ("POST", b"{}")):
        answer = endpoint.ask(method, path, body, endpoint.key)
        if answer.status != 404:
            raise CheckError(f"{method} is answered by {answer.status} instead of 404")
    return "404"


def model_rows(endpoint: Endpoint, route: Route) -> list[dict[str, str]]:
    """Ask one model by the first kind that it is of."""
    asked = route.askable()
    for kind, path in asked:
        with suppress(NotServedError):
            return kind_rows(endpoint, kind, path, route)
    if not asked:
        return []
    kinds = "; ".join(f"{kind.noun} {' '.join(path.path for path in kind.paths)}" for kind in model_kinds.KINDS)
    detail = f"it answers none of {', '.join(path.path for _kind, path in asked)}; `paths` of its route has to name those of what it is for: {kinds}"
    return [{"check": f"model {route.model}", "result": "FAILED", "detail": detail}]


def kind_rows(endpoint: Endpoint, kind: model_kinds.Kind, path: model_kinds.Path, route: Route) -> list[dict[str, str]]:
    """Ask a model for an answer, and for a stream at the same time where there is one: it is the model that takes its time. Then by another name."""
    model = route.model
    with ThreadPoolExecutor(1) as pool:
        streaming = (
            pool.submit(row, f"streaming {model}", partial(check_streaming, endpoint, path, model))
            if kind.streams
            else None
        )
        rows = [row(f"{kind.noun} {model}", partial(check_answer, endpoint, kind, path, model))]
    rows += [streaming.result()] if streaming else []
    for alias in route.aliases[:1]:
        rows.append(row(f"alias {alias}", partial(check_alias, endpoint, kind, path, model, alias)))
    return rows


def verify(
    endpoint: Endpoint, routes: Sequence[Route], forbidden_paths: Sequence[str], minimum_days: int
) -> list[dict[str, str]]:
    """Make all checks. When there is no trusted connection, the rest would only say the same again."""
    rows = [row("certificate", partial(check_certificate, endpoint, minimum_days))]
    if rows[0]["result"] != "ok" and "more days only" not in rows[0]["detail"]:
        return rows
    rows.append(row("key needed", partial(check_refusal, endpoint)))
    rows.append(row("models", partial(check_models, endpoint, routes)))
    for route in routes:
        rows += model_rows(endpoint, route)
    if asked := [path for route in routes for _kind, path in route.askable()]:
        rows.append(row("unknown model", partial(check_unknown, endpoint, asked[0], routes)))
    for path in forbidden_paths:
        rows.append(row(f"closed {path}", partial(check_forbidden, endpoint, path)))
    return rows
