"""How the stand-in is to behave, and to misbehave.

Commanded by a file, so that units and configuration stay as they are: `stand_in.json` in the instance's cache directory (its HOME,
/var/cache/vllm/NAME), read anew for each request. The environment variable STAND_IN holds the same for all instances of an image, and the
member `stand_in` of a request's body for that request alone. Later ones win. In all of them the members are those of Settings, in JSON.
A version that misbehaves wherever it is installed has such a file in its wheel, which all others win over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "stand_in.json"


@dataclass(frozen=True)
class Settings:
    """What it does. The defaults are a healthy, quick vLLM."""

    start_seconds: float = 0.5  # until it listens
    start_error: str = ""  # it does not start, and says this
    dies_after: float = 0.0  # seconds after it listens its engine is killed; 0 is never
    seconds_per_token: float = 0.02
    prefill_seconds: float = 0.0  # it computes a prompt for so long, in chunks: who comes later waits, and of its metrics only the KV cache moves
    # right | wrong (200 without content) | nonsense (whole answers, as broken weights give them) | hang (200 on /health, never a token)
    # | drop (closes) | STATUS (an error) | echo (any path: what came)
    answers: str = "right"
    version: str = ""  # what it calls itself instead of its own version

    @classmethod
    def current(cls, body: Any = None) -> Settings:
        """What holds now, for a request with this body."""
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            found |= json.loads(Path(__file__).with_name("settings.json").read_text())
        found |= json.loads(os.environ.get("STAND_IN") or "{}")
        with contextlib.suppress(OSError):
            found |= json.loads(Path(os.environ.get("HOME", "/"), FILE).read_text())
        asked = body.get("stand_in") if isinstance(body, dict) else None
        found |= asked if isinstance(asked, dict) else {}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(found) - known):
            raise ValueError(f"the stand-in has no settings {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**found)

    def start(self) -> None:
        """Take the time that a start takes, or fail."""
        time.sleep(self.start_seconds)
        if self.start_error:
            raise RuntimeError(self.start_error)
