# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The user's own commands that hear of a rollout: which ones, with what on their standard input, and what became of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

EVENTS = ("started", "host_done", "failed", "finished")
SHOWN = 300


def problems(hooks: Any) -> list[str]:
    """What is wrong with turn_hooks beyond the types of its fields."""
    found = []
    for event, commands in hooks.items() if isinstance(hooks, Mapping) else []:
        for number, hook in enumerate(commands if isinstance(commands, list) else []):
            at = f"turn_hooks.{event}[{number}]"
            command = hook.get("command") if isinstance(hook, Mapping) else None
            if (
                not isinstance(command, list)
                or not command
                or not all(isinstance(part, str) and part for part in command[:1])
            ):
                found.append(
                    f"{at}.command must be a list of a program and its arguments, such as [/usr/local/bin/announce, --channel, ops]."
                )
            if isinstance(hook, Mapping) and not _positive(hook.get("seconds", 30)):
                found.append(f"{at}.seconds is {hook.get('seconds')}; it must be 1 or more.")
    return found


def _positive(value: Any) -> bool:
    try:
        return int(value) >= 1
    except (TypeError, ValueError):
        return False


def told(event: str, details: Mapping[str, Any]) -> str:
    """What a command reads."""
    return json.dumps({"event": event, **details}, sort_keys=True) + "\n"


def call(hook: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Run one command. Returns its `command`, and as `problem` what went wrong; an empty one is none."""
    command = [str(part) for part in hook["command"]]
    seconds = int(hook.get("seconds") or 30)
    result: dict[str, Any] = {"command": command, "required": bool(hook.get("required")), "problem": ""}
    try:
        run = subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        result["problem"] = f"it was not done after {seconds} s, and was killed"
    except OSError as error:
        result["problem"] = f"it cannot be run: {error.strerror}"
    else:
        if run.returncode:
            said = " ".join((run.stderr or run.stdout).split())
            result["problem"] = f"it ended with {run.returncode}" + (f": {said[:SHOWN]}" if said else "")
    return result


def sentence(event: str, result: Mapping[str, Any]) -> str:
    """What went wrong, in a sentence."""
    return f"turn_hooks.{event}: {result['command'][0]}: {result['problem']}"


def split(event: str, results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """What went wrong with hooks that are required, and with the others."""
    failed = [result for result in results if result["problem"]]
    required = [sentence(event, result) for result in failed if result["required"]]
    return required, [sentence(event, result) for result in failed if not result["required"]]
