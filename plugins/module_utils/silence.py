# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""A silence of a host: until when monitoring is not to wake anybody, because somebody changes it. A small file that ends by itself."""

from __future__ import annotations

import calendar
import json
import time
from collections.abc import Iterable
from typing import Any

PATH = "/var/lib/vllm-fleet/turn/silence.json"
FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def text(moment: float) -> str:
    """A moment as people read it, in UTC."""
    return time.strftime(FORMAT, time.gmtime(moment))


def opened(now: float, minutes: int, by: str, turn: str, reason: str, instances: Iterable[str]) -> str:
    """The file of a silence that begins now."""
    said = {
        "until": text(now + 60 * minutes),
        "since": text(now),
        "by": by,
        "turn": turn,
        "reason": reason,
        "instances": sorted(instances),
    }
    return json.dumps(said) + "\n"


def read(content: str | None, now: float) -> dict[str, Any] | None:
    """The silence that a file tells; nothing where there is none, it is over, or cannot be read."""
    try:
        said = json.loads(content or "")
        ends = calendar.timegm(time.strptime(said["until"], FORMAT))
    except (ValueError, KeyError, TypeError):
        return None
    return {**said, "ends": ends} if ends > now else None
