# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The internal keys that the instances of a host take: the wanted one, and former ones until every gateway shows the wanted one."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping

# A line of the file that roles/vllm/files/fleet_internal_key.py reads: a hash, and the second of the epoch at which it ends, if it does.
LINE = re.compile(r"([0-9a-f]{64})(?: ([0-9]+))?")


def digest(key: str) -> str:
    """What is kept of a key on the host."""
    return hashlib.sha256(key.encode()).hexdigest()


def parsed(text: str) -> dict[str, int | None]:
    """The hashes in a file, each with the second at which it ends; None when it does not."""
    lines = [LINE.fullmatch(line.strip()) for line in text.splitlines()]
    return {line[1]: int(line[2]) if line[2] else None for line in lines if line}


def rendered(keys: Mapping[str, int | None]) -> str:
    """The file."""
    return "".join(f"{key}\n" if end is None else f"{key} {end}\n" for key, end in keys.items())


def accepted(text: str, wanted: str, now: int) -> str:
    """The file with the hash `wanted` among those that are taken; as it is when it has it already."""
    keys = parsed(text)
    if wanted in keys and keys[wanted] is None:
        return text
    left = {key: end for key, end in keys.items() if key != wanted and (end is None or end > now)}
    return rendered({wanted: None, **left})


def ending(text: str, wanted: str, end: int) -> str:
    """The file in which every hash but `wanted` ends at a second of the epoch, or before."""
    others = {key: end if before is None else min(before, end) for key, before in parsed(text).items() if key != wanted}
    return rendered({wanted: None, **others})


def former(text: str, wanted: str) -> bool:
    """Whether a key other than the wanted one is taken without an end."""
    return any(end is None for key, end in parsed(text).items() if key != wanted)


def notes(text: str, wanted: str, now: int) -> list[str]:
    """What an operator should know of the keys that are taken beside the wanted one."""
    if former(text, wanted):
        return ["A former internal key is taken as well, until site.yml has given the new one to every gateway."]
    ends = [end for key, end in parsed(text).items() if key != wanted and end is not None and end > now]
    if not ends:
        return []
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(max(ends)))
    return [f"A former internal key is taken as well, until {moment}."]
