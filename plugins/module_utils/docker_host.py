# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The Docker engine of a host: what it runs with, what it has to do to take over its file, and doing that without a loss.

A file says what an engine will be told at its next start, not what it was told. So it is remembered what it was told, for as long as it runs;
a run that changed the file and could not restart the engine leaves it due for the next one to see.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import systemctl
from ansible_collections.gpufleet.llm.plugins.module_utils.apt_host import loaded
from ansible_collections.gpufleet.llm.plugins.module_utils.docker import after_reload, due
from ansible_collections.gpufleet.llm.plugins.module_utils.docker_beside_host import flags, routes
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Command

UNIT, CONTAINERD = "docker.service", "containerd.service"
PROPERTIES = (
    "Id,LoadState,ActiveState,UnitFileState,MainPID,InvocationID,ExecMainStartTimestampMonotonic,"
    "ExecStart,Environment,EnvironmentFiles,FragmentPath,DropInPaths"
)
API_TIMEOUT = 20


class EngineError(Exception):
    """What went wrong, in words for the operator."""


class Connection(http.client.HTTPConnection):
    """HTTP through a socket of the host."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=API_TIMEOUT)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(API_TIMEOUT)
        self.sock.connect(str(self.path))


@dataclass
class Engine:
    """The engine of this host."""

    command: Command
    root: Path = Path("/")
    seconds_to_wait: float = 15
    file: Path = field(init=False)
    record: Path = field(init=False)
    socket: Path = field(init=False)

    def __post_init__(self) -> None:
        self.file = self.root / "etc/docker/daemon.json"
        self.record = self.root / "run/vllm-fleet/docker.json"
        # The file that the engine was seen to run with.
        self.proved = self.root / "run/vllm-fleet/docker-daemon.json"
        self.socket = self.root / "run/docker.sock"

    # --- looking

    def units(self) -> dict[str, dict[str, str]]:
        """The properties of the two units."""
        _, output, _ = self.command(["systemctl", "show", f"--property={PROPERTIES}", UNIT, CONTAINERD])
        return systemctl.by_unit(output)

    def ask(self, path: str) -> Any:
        """What the engine answers."""
        connection = Connection(self.socket)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != http.client.OK:
                raise EngineError(
                    f"the engine answers {path} with {answer.status}: {body[:300].decode(errors='replace')}"
                )
            return json.loads(body)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise EngineError(
                f"{UNIT} is active, but does not answer at {self.socket}: {error or type(error).__name__}; see journalctl -u docker"
            ) from error
        finally:
            connection.close()

    def running(self, unit: Mapping[str, str]) -> dict[str, Any] | None:
        """What the engine was told when it started, and since; nothing when that is not known."""
        noted = loaded(read(self.record))
        if noted.get("invocation") == unit.get("InvocationID") and isinstance(noted.get("options"), dict):
            options: dict[str, Any] = noted["options"]
            return options
        try:
            changed = self.file.stat().st_mtime
        except OSError:
            return {}
        # The clock of the wall is not what systemd tells in a form that its older versions have: this one counts from the boot.
        began = int(unit.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
        started = time.time() - (time.monotonic() - began)
        return loaded(read(self.file)) if began and changed <= started else None

    def note(self, unit: Mapping[str, str], options: Mapping[str, Any] | None) -> None:
        """Remember what the engine runs with, until it is started again or the host is."""
        if options is None:
            return
        text = json.dumps({"invocation": unit.get("InvocationID", ""), "options": options}, sort_keys=True)
        if read(self.record) == text:
            return
        write(self.record, text)  # for root alone: options may hold the password of a proxy

    def replaced(self, unit: Mapping[str, str]) -> bool:
        """Whether the program that runs is another one than the one that is installed."""
        try:
            # a name: a Path would not keep what the kernel adds to it
            return os.readlink(self.root / "proc" / unit.get("MainPID", "0") / "exe").endswith(" (deleted)")  # noqa: PTH115
        except OSError:
            return False

    def foreign_keys(self, wanted: Mapping[str, Any]) -> list[str]:
        """Keys of a file that was not written by the role, which would be lost."""
        manifest = loaded(read(self.root / "var/lib/vllm-fleet/tree/docker/manifest.json"))
        if "/etc/docker/daemon.json" in manifest.get("paths", []):
            return []
        return sorted(set(loaded(read(self.file))) - set(wanted))

    def look(self, wanted: Mapping[str, Any], remember: bool = True) -> dict[str, Any]:
        """What is there, and what is due."""
        units = self.units()
        unit = units.get(UNIT, {})
        active = unit.get("ActiveState") == "active"
        found: dict[str, Any] = {
            "installed": unit.get("LoadState") == "loaded",
            "active": active,
            "enabled": unit.get("UnitFileState") == "enabled",
            "containers": [],
            "foreign_keys": self.foreign_keys(wanted),
            "routes": routes(self.command),
            **flags(self.root, unit, wanted),
            **dict.fromkeys(("live_restore", "swarm"), False),
            **dict.fromkeys(("version", "log_driver", "due_reason"), ""),
            "due": "start",
            "due_keys": [],
        }
        if not found["installed"]:
            return {**found, "due": "install", "due_reason": "there is no engine yet"}
        if not active:
            return {**found, "due_reason": f"{UNIT} is {unit.get('ActiveState') or 'not there'}"}
        info = self.ask("/info")
        found.update(
            containers=sorted(container["Names"][0].lstrip("/") for container in self.ask("/containers/json")),
            version=info.get("ServerVersion", ""),
            live_restore=bool(info.get("LiveRestoreEnabled")),
            log_driver=info.get("LoggingDriver", ""),
            swarm=info.get("Swarm", {}).get("LocalNodeState", "inactive") not in ("", "inactive"),
        )
        running = self.running(unit)
        if running is not None and bool(running.get("live-restore")) != found["live_restore"]:
            running = {**running, "live-restore": found["live_restore"]}  # somebody else had it reloaded
        if remember:
            self.note(unit, running)
            if running is not None and running == loaded(read(self.file)):
                write(self.proved, json.dumps(read(self.file) if self.file.exists() else None))
        found["due"], found["due_keys"] = due(running, wanted)
        if found["due"]:
            found["due_reason"] = (
                f"daemon.json has other values than the engine runs with ({', '.join(found['due_keys'])})"
            )
            if running is None:
                found["due_reason"] = "daemon.json was changed after the engine was started"
        if outdated := [name for name in (UNIT, CONTAINERD) if self.replaced(units.get(name, {}))]:
            found["due"] = "restart"
            found["due_reason"] = f"the programs of {' and '.join(outdated)} were upgraded, and the old ones still run"
        if not found["due"] and not found["enabled"]:
            found.update(due="enable", due_reason=f"{UNIT} does not start with the host")
        return found

    # --- changing

    def run(self, *command: str) -> None:
        """Run a command that has to succeed."""
        status, output, error = self.command(list(command))
        if status:
            reason = (error or output).strip() or f"it ended with {status}"
            _, journal, _ = self.command(["journalctl", "--unit", UNIT, "--lines=8", "--output=cat", "--no-pager"])
            raise EngineError(f"`{' '.join(command)}` failed: {reason}\n{journal}".rstrip())

    def restart(self, *units: str) -> None:
        """Start the units with the file that is there; where they do not, with the one that the engine ran with before."""
        try:
            self.run("systemctl", "restart", *units)
        except EngineError as error:
            try:
                before = json.loads(read(self.proved))
            except ValueError:
                raise error from None  # it never ran as far as anybody knows
            if before == (read(self.file) if self.file.exists() else None):
                raise
            if before is None:
                self.file.unlink()
            else:
                write(self.file, before)
            self.command(["systemctl", "reset-failed", UNIT])
            self.run("systemctl", "restart", *units)
            raise EngineError(f"{error}\nThe daemon.json of before is back, and the engine runs with it.") from error

    def apply(self, wanted: Mapping[str, Any], restart: bool, replaced: bool = False) -> dict[str, Any]:
        """Do what is due, if it may be done now. A file that was replaced is read again in any case: it may have been read as it was."""
        look = self.look(wanted)
        if replaced and look["due"] in ("", "enable"):
            look.update(due="reload", due_reason="daemon.json was not as the engine was told, and is now")
        before = look["containers"]
        action = decided(look, restart)
        if action not in ("", "deferred") and not look["enabled"]:
            self.run("systemctl", "enable", "--quiet", UNIT)
        if action in ("started", "restarted"):
            if before and "live-restore" in look["due_keys"]:
                # From then on containers outlive the engine, so that its own restart does not end them.
                self.reload(wanted)
            self.command(["systemctl", "reset-failed", UNIT])
            # containerd first: it is not restarted with the engine, and its containers do not end with it
            units = (
                [CONTAINERD, UNIT]
                if action == "restarted" and self.replaced(self.units().get(CONTAINERD, {}))
                else [UNIT]
            )
            self.restart(*units)
            self.note(self.units().get(UNIT, {}), wanted)
        elif action == "reloaded":
            self.reload(wanted)
        elif action == "deferred" and "live-restore" in look["due_keys"]:
            # What can be had without a restart is not left waiting for it.
            self.reload(wanted)
        after = self.look(wanted) if action else look
        lost = sorted(set(before) - set(after["containers"]))
        return {**after, "action": action, "reason": look["due_reason"], "lost": lost}

    def reload(self, wanted: Mapping[str, Any]) -> None:
        """Have the engine read its file again. systemd only passes a signal on: that it took is seen from the outside."""
        unit = self.units().get(UNIT, {})
        running = self.running(unit)
        self.run("systemctl", "reload", UNIT)
        until = time.monotonic() + self.seconds_to_wait
        while bool(self.ask("/info").get("LiveRestoreEnabled")) != bool(wanted.get("live-restore")):
            if time.monotonic() > until:
                raise EngineError(
                    "the engine did not take over daemon.json when it was reloaded; see journalctl -u docker"
                )
            time.sleep(0.2)
        self.note(unit, after_reload(running, wanted))


def decided(look: Mapping[str, Any], restart: bool) -> str:
    """What is done about what is due: nothing, started, enabled, reloaded, restarted or deferred."""
    if look["due"] == "restart":
        return "restarted" if restart or not look["containers"] else "deferred"
    return {"start": "started", "install": "started", "reload": "reloaded", "enable": "enabled"}.get(
        str(look["due"]), ""
    )
