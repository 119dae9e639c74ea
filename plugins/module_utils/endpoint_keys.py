# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Which keys an endpoint takes and which it refuses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import CheckError, Endpoint, row
from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds import MODELS

# A key that is over its rate is asked about again when the endpoint says, but not for long.
TRIES = 4
LONGEST_PAUSE = 10.0


@dataclass(frozen=True)
class Shown:
    """A key that is shown to the endpoint, under a name for people, and what is right."""

    name: str
    accepted: bool
    key: str = field(repr=False)

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Shown:
        """From an entry of the module's `keys`."""
        return cls(entry["name"], entry["accepted"], entry["key"])


def check_key(endpoint: Endpoint, shown: Shown, pause: Callable[[float], None] = time.sleep) -> str:
    """The key is taken or refused, as it should be."""
    answer = endpoint.ask("GET", MODELS, key=shown.key)
    for _again in range(TRIES - 1):
        if answer.status != 429:
            break
        pause(min(max(answer.retry_after, 1), LONGEST_PAUSE))
        answer = endpoint.ask("GET", MODELS, key=shown.key)
    if answer.status == 429:
        raise CheckError("429 again and again: too many requests come with it, so it cannot be told")
    right = 200 if shown.accepted else 401
    if answer.status != right:
        raise CheckError(f"{answer.status} instead of {right}: {answer.text()}")
    return f"{right}, {'taken' if shown.accepted else 'refused'}"


def check_keys(endpoint: Endpoint, keys: Sequence[Shown]) -> list[dict[str, str]]:
    """All of them; those that are refused last, because each of them brings the limit for wrong keys nearer."""
    ordered = sorted(keys, key=lambda shown: not shown.accepted)
    return [row(f"key {shown.name}", partial(check_key, endpoint, shown)) for shown in ordered]
