"""The files of the agent: what operators, instances that stop and gateways said. Used by agent.py, leave and vllm-fleet."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import host_agent

CONFIGURATION = Path("/etc/vllm-fleet/agent.json")
# The operator's word on each instance; survives a boot.
WORDS = Path("/var/lib/vllm-fleet")
# A file for each instance that wants to stop.
LEAVING = Path("/run/vllm-fleet/leaving")
# What the watch found: a file for each instance that should get no requests because of its GPU, and files for monitoring and operators.
SICK = Path("/run/vllm-fleet/watch/sick")
METRICS = Path("/run/vllm-fleet/watch/watch.prom")
HEALTH = Path("/run/vllm-fleet/watch/health.json")
# Until when a person has dealt with what the kernel said of GPUs.
DEALT_WITH = Path("/run/vllm-fleet/dealt-with")
# Until when monitoring is to be silent about this host, as a turn said.
SILENCE = WORDS / "turn/silence.json"
# What each gateway said last; the agent's alone.
HEARD = Path("/run/vllm-fleet/agent")


def text(path: Path) -> str | None:
    """What is in a file, or nothing when there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def replace(path: Path, content: str) -> None:
    """Write a file as a whole: whoever reads it sees the one before or this one, also after a crash of the host."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def word(instance: str) -> dict[str, str]:
    """What the operator said of an instance."""
    try:
        return host_agent.word(text(WORDS / f"{instance}.json"))
    except OSError:
        return host_agent.word("")


def leaving(instance: str) -> dict[str, Any]:
    """Whether an instance wants to stop, and if so since when, by the clock of the host: gateways let go first who asked first."""
    try:
        return {"leaving": True, "asked": (LEAVING / instance).stat().st_mtime}
    except FileNotFoundError:
        return {"leaving": False}


def sick(instance: str) -> dict[str, Any]:
    """Why an instance should get no requests, and since when; nothing where there is no reason."""
    try:
        why, asked = text(SICK / instance), (SICK / instance).stat().st_mtime
    except OSError:
        return {}
    return {"sick": why[:400], "asked": asked} if why else {}


def wishes(instance: str) -> dict[str, Any]:
    """All that is wanted of gateways for an instance. Since when, is since the first wish of its host."""
    leaves, ill = leaving(instance), sick(instance)
    asked = [one["asked"] for one in (leaves, ill) if "asked" in one]
    return {**word(instance), **leaves, **ill, **({"asked": min(asked)} if asked else {})}


def metrics() -> str:
    """What the host itself has for monitoring."""
    return (text(METRICS) or "") + host_agent.silenced(text(SILENCE))


def hear(gateway: str, said: dict[str, Any]) -> None:
    """Keep what a gateway said. The clock is one that goes on evenly, and is the same for all programs of a boot."""
    replace(HEARD / f"{gateway}.json", json.dumps({"time": time.monotonic(), **said}))


def heard() -> dict[str, dict[str, Any]]:
    """What each gateway said last."""
    found = {}
    for path in HEARD.glob("[!.]*.json"):
        with contextlib.suppress(OSError, ValueError):
            found[path.stem] = json.loads(path.read_text())
    return found


def configuration() -> dict[str, Any]:
    """What the role wrote of this host."""
    found: dict[str, Any] = json.loads(CONFIGURATION.read_text())
    return found
