# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Asks an instance of vLLM what it is for, for an answer, and whether it works."""

from __future__ import annotations

import http.client
import json
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.gpufleet.llm.plugins.module_utils import instance_tls, model_kinds

# How vLLM says that it has more requests than it takes (max-num-queued-reqs).
TOO_MANY = 503
REFUSED = range(400, 500)
LOOK_SECONDS = 5.0
EXTRA = re.compile(r"vllm\[([a-z0-9-]+)\]")


@dataclass(frozen=True)
class Asked:
    """What became of a question: the kind of the instance where it told, and what was wrong where something was."""

    kind: str = ""
    reason: str = ""
    # No answer in time, or one that there are too many requests: it may be busy.
    waiting: bool = False
    # It has none of the paths that are known, or it refuses the question: asking again does not help.
    hopeless: bool = False


class Instance:
    """An instance on this host."""

    def __init__(self, url: str, model: str, key: str) -> None:
        self.address = urlsplit(url)
        self.model = model
        self.key = key

    def request(
        self, path: str, timeout: float, body: bytes | None = None, kind: str = "", with_key: bool = True
    ) -> tuple[int, bytes]:
        """Status and body of one answer."""
        port = self.address.port or 0
        connection = instance_tls.connection(self.address.scheme, self.address.hostname or "", port, timeout)
        headers = {"Authorization": f"Bearer {self.key}"} if with_key else {}
        headers |= {"Content-Type": kind} if kind else {}
        try:
            connection.request("GET" if body is None else "POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, timeout: float) -> Asked:
        """Ask once, by each kind's path until the instance has one."""
        for kind, path in model_kinds.askable():
            try:
                status, body = self.request(path.path, timeout, *path.body(self.model))
            except TimeoutError:
                return Asked(kind.name, f"{path.path}: no answer (timed out)", waiting=True)
            except (OSError, http.client.HTTPException) as error:
                return Asked(kind.name, f"{path.path}: no answer ({error or type(error).__name__})")
            if model_kinds.lacks(status, body):
                continue
            return judged(kind, path, status, body)
        return Asked(reason=f"it serves no kind of model that can be asked ({self.others()})", hopeless=True)

    def answers_anybody(self, timeout: float) -> bool:
        """Whether it answers somebody who shows no key."""
        try:
            return self.request(model_kinds.MODELS, timeout, with_key=False)[0] == http.client.OK
        except (OSError, http.client.HTTPException):
            return False

    def others(self) -> str:
        """What it says that it has, for a person."""
        try:
            told = json.loads(self.request("/openapi.json", LOOK_SECONDS)[1])["paths"]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            return "none of " + ", ".join(path.path for _kind, path in model_kinds.askable())
        return "its paths are " + ", ".join(sorted(told))

    def works(self, seconds: float) -> bool:
        """Whether its engine is busy with the requests of others and gets on with them: what it counts moves within so many seconds."""
        begun, before = time.monotonic(), self.work()
        while before.load and time.monotonic() - begun < seconds:
            time.sleep(1.0)
            if (after := self.work()).load and (after.done, after.kv) != (before.done, before.kv):
                return True
        return False

    def work(self) -> model_kinds.Work:
        """What its engine has to do, and has done so far; nothing when it does not tell."""
        try:
            status, body = self.request("/metrics", LOOK_SECONDS)
            return model_kinds.work(body.decode(errors="replace") if status == http.client.OK else "")
        except (OSError, http.client.HTTPException, ValueError):
            return model_kinds.work("")


def judged(kind: model_kinds.Kind, path: model_kinds.Path, status: int, body: bytes) -> Asked:
    """What an answer says."""
    text = body.decode(errors="replace")
    said = f"asked to {kind.name} ({path.path}), it answered"
    if status != http.client.OK:
        advice = hint(f"vllm[{kind.extra}]" if kind.extra and status == http.client.BAD_REQUEST else text)
        reason = f"{said} HTTP {status}: {text[:300]}{advice}"
        return Asked(kind.name, reason, waiting=status == TOO_MANY, hopeless=status in REFUSED)
    try:
        answer: Any = json.loads(body)
        path.content(answer)
    except model_kinds.AnswerError as error:
        return Asked(kind.name, f"{said} without content ({error}): {text[:300]}")
    except ValueError:
        return Asked(kind.name, f"{said} no JSON: {text[:300]}")
    return Asked(kind.name)


def hint(text: str) -> str:
    """What to do where vLLM says that a package is missing: it names the extra that has it, as in `vllm[audio]`."""
    found = EXTRA.search(text)
    return f" (vllm_extras: [{found[1]}] brings what that needs)" if found else ""
