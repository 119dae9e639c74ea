# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""One line about how far a download is."""

from __future__ import annotations

WINDOW = 30.0


def size(count: float) -> tuple[float, str]:
    """The unit in which a number of bytes is read best."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= limit:
            return limit, unit
    return 1e3, "kB"


def amount(count: float) -> str:
    """Bytes as people read them."""
    limit, unit = size(count)
    return f"{count / limit:.1f} {unit}"


class Progress:
    """Remembers the last half minute to tell the speed."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def add(self, now: float, done: int) -> None:
        """Note how far it is."""
        self.seen = [entry for entry in self.seen if now - entry[0] <= WINDOW] + [(now, done)]

    def speed(self) -> float:
        """Bytes a second."""
        if len(self.seen) < 2:
            return 0.0
        (first, before), (last, after) = self.seen[0], self.seen[-1]
        return max(after - before, 0) / (last - first) if last > first else 0.0

    def line(self, state: str, done: int, total: int, message: str = "") -> str:
        """Such as `3.2 of 15.2 GB, 410 MB/s, about 30 s left`, or what it waits for."""
        if state == "waiting":
            return message
        if state != "downloading" or not total:
            return {"checking": "asking what there is", "verifying": "verifying what arrived"}.get(state, state)
        limit, unit = size(total)
        text = f"{min(done, total) / limit:.1f} of {total / limit:.1f} {unit}"
        if speed := self.speed():
            speed_limit, speed_unit = size(speed)
            left = max(total - done, 0) / speed
            text += f", {speed / speed_limit:.0f} {speed_unit}/s, about {duration(left)} left"
        return text


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
