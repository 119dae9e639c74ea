"""Restarts instances that the watch of this host asks for, with root's rights, within limits. Nothing else can be asked of it.

systemd starts it when a request is there. A hung engine ends no request and takes no SIGTERM in time, so it is killed; its unit starts it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import agent_files
from ansible_collections.gpufleet.llm.plugins.module_utils import host_watch, systemctl

CONFIGURATION = Path("/etc/vllm-fleet/watch.json")
REQUESTS = Path("/run/vllm-fleet/watch/restart")
HISTORIES = Path("/run/vllm-fleet/heal")
# Where the unit of an instance in a container says which one it is.
CONTAINERS = Path("/run/vllm")
CONTAINER = re.compile(r"[0-9a-f]{64}")
PROGRAM_SECONDS = 20.0
# Until its unit has started it again.
BACK_SECONDS = 30.0
REQUEST_BYTES = 4096


def log(text: str, level: int = 5) -> None:
    """A line of the journal."""
    print(f"<{level}>{text}", flush=True)


def run(*command: str) -> tuple[bool, str]:
    """Whether a program went well, and what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def unit_of(name: str) -> host_watch.Unit:
    """The unit of an instance."""
    properties = "--property=ActiveState,InvocationID,ActiveEnterTimestampMonotonic"
    good, told = run("systemctl", "show", properties, f"vllm@{name}.service")
    return host_watch.Unit.of(systemctl.shown(told)[0]) if good else host_watch.Unit()


def take(path: Path) -> str:
    """The content of a request, which is then gone. A link is none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.read(file, REQUEST_BYTES).decode(errors="replace")
        finally:
            os.close(file)
    except OSError:
        return ""
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def kill(name: str) -> str:
    """End an engine that does not end by itself. Returns what went wrong."""
    container = (agent_files.text(CONTAINERS / name / "container") or "").strip()
    if CONTAINER.fullmatch(container):
        good, told = run("docker", "container", "kill", container)
    else:
        good, told = run("systemctl", "kill", "--signal=KILL", f"vllm@{name}.service")
    return "" if good else told or "it does not say why"


def comes_back(name: str, before: str) -> bool:
    """Whether its unit starts it again."""
    end = time.monotonic() + BACK_SECONDS
    while time.monotonic() < end:
        unit = unit_of(name)
        if unit.invocation not in ("", before) and unit.state in ("active", "activating"):
            return True
        time.sleep(0.5)
    return False


def heal(request: host_watch.Request, instances: list[str], limits: host_watch.Limits) -> str:
    """Follow one request, or say why not. Returns the start of the instance that was ended."""
    name, now = request.instance, time.monotonic()
    history = host_watch.History.read(agent_files.text(HISTORIES / f"{name}.json"))
    unit = unit_of(name)
    if why := host_watch.refusal(request, instances, unit, agent_files.word(name), history.times, limits, now):
        if name in instances:
            agent_files.replace(HISTORIES / f"{name}.json", history.refusing().written())
        log(f"{name} is not restarted: {why}", 4)
        return ""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    history = history.restarted(request, now, when, limits.restarts)
    # first, so that it counts whatever happens now
    agent_files.replace(HISTORIES / f"{name}.json", history.written())
    left = limits.left(history.times, now)
    log(
        f"{request.why}: it is killed, and its unit starts it again; {left} restarts are left within {limits.seconds / 60:.0f} min",
        4,
    )
    if problem := kill(name):
        log(f"{name} cannot be killed: {problem}", 3)
        return ""
    return unit.invocation


def main() -> None:
    """Follow all requests that are there."""
    os.umask(0o022)
    told = json.loads(CONFIGURATION.read_text())
    limits = host_watch.Limits(int(told["restarts"]), float(told["restart_seconds"]))
    killed: dict[str, str] = {}
    begun = time.monotonic()
    for path in sorted(REQUESTS.glob("[!.]*.json")):
        text = take(path)
        request = host_watch.Request.read(path.stem, text)
        if path.exists():
            sys.exit(f"{path} cannot be removed")
        if request is None or not told["restart"]:
            log(f"a request to restart {path.stem[:64]!r} is none that can be followed", 4)
        elif before := heal(request, list(told["instances"]), limits):
            killed[path.stem] = before
    for name, before in killed.items():
        if comes_back(name, before):
            log(f"{name} was started again after {time.monotonic() - begun:.1f} s")
        else:
            log(
                f"{name} was killed and is not started again: systemctl status vllm@{name}. What cannot end needs a reboot.",
                3,
            )


if __name__ == "__main__":
    main()
