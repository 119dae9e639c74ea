# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""
Takes a change of SSH back by itself, unless somebody proves in time that he still gets in.

Armed, a host has the files as they were, a script that puts them back (in sh: nothing but the base system may be needed), and a systemd
unit that runs it: by a timer when the time is up, and at the next boot, so that a reboot in between does not keep the change. Proved, all
of that is gone. Whoever moves the directory first, the script or the proof, has decided; the other one finds nothing.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

DIRECTORY = Path("/var/lib/vllm-fleet/ssh-rollback")
UNIT = "vllm-fleet-ssh-rollback"
BOOT_UNIT = f"{UNIT}-at-boot"
UNIT_FILE = Path(f"/etc/systemd/system/{BOOT_UNIT}.service")
UNIT_LINK = Path(f"/etc/systemd/system/multi-user.target.wants/{BOOT_UNIT}.service")

SCRIPT = """\
#!/bin/sh
# Takes back a change of SSH that nobody proved. Written by vLLM Fleet before the change, removed after the proof.
[ -e {undoing} ] || mv {directory} {undoing} 2>/dev/null
[ -e {undoing}/saved ] || exit 0
{restore}
systemctl daemon-reload
if [ "${{1:-}}" = boot ]; then
    # the server starts after this; the socket has started before
    [ ! -e {undoing}/socket ] || systemctl --no-block restart ssh.socket
elif [ -e {undoing}/socket ]; then
    systemctl stop ssh.socket ssh.service
    systemctl start ssh.socket || systemctl start ssh.service
elif systemctl --quiet is-active ssh.socket; then
    # behind a socket a reload ends sshd; the next connection starts it
    systemctl stop ssh.service
elif systemctl --quiet is-active ssh.service; then
    systemctl reload ssh.service || systemctl restart ssh.service
else
    systemctl start ssh.service
fi
logger -t {unit} "a change of SSH was not proved: the former state is back"
rm -f {unit_file} {unit_link}
rm -rf {undoing}
systemctl daemon-reload
"""

# Ordered before the server, which is why the timer starts another unit: a reload of the server would wait for this one.
SERVICE = """\
[Unit]
Description=Take back a change of SSH that nobody proved before the host was booted again
ConditionPathExists=|{directory}/saved
ConditionPathExists=|{undoing}/saved
Before=ssh.service

[Service]
Type=oneshot
ExecStart=-/bin/sh {directory}/script boot
ExecStart=-/bin/sh {undoing}/script boot
"""


class GuardError(Exception):
    """A reason why nobody watches over the change, in words for the operator."""


def command(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program."""
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, check=False, encoding="utf-8", errors="replace"
    )
    if check and done.returncode:
        raise GuardError(f"{' '.join(words)}: {' '.join((done.stderr or done.stdout).split()) or done.returncode}")
    return done


def restoring(directory: Path, paths: Sequence[str]) -> str:
    """The lines of the script that put the files back. Each file is there as a whole or as it was: a copy beside it is renamed."""
    lines = []
    for number, path in enumerate(paths):
        saved, place, aside = shlex.quote(f"{directory}/{number}"), shlex.quote(path), shlex.quote(f"{path}.rollback")
        # some of the directories belong to users, who could have put a link there
        copied = f"rm -f {aside}; cp -p --remove-destination {saved} {aside} && mv -fT {aside} {place}"
        lines.append(f"if [ -e {saved} ]; then {copied}; else rm -f {place}; fi")
    return "\n".join(lines)


class Guard:
    """The state of a host as it was, and the timer that brings it back."""

    def __init__(
        self,
        directory: Path = DIRECTORY,
        unit_file: Path = UNIT_FILE,
        unit_link: Path = UNIT_LINK,
        run: Callable[..., subprocess.CompletedProcess[str]] = command,
    ) -> None:
        self.directory = directory
        self.undoing = directory.with_name(f"{directory.name}.undoing")
        self.unit_file, self.unit_link = unit_file, unit_link
        self.run = run

    def script(self, paths: Sequence[str]) -> str:
        """What undoes the change."""
        return SCRIPT.format(
            directory=self.directory,
            undoing=self.undoing,
            restore=restoring(self.undoing, paths),
            unit=UNIT,
            unit_file=self.unit_file,
            unit_link=self.unit_link,
        )

    def arm(self, paths: Sequence[str], seconds: int, moves: bool) -> None:
        """
        Remember the files and start the timer.

        What a former change that was not proved remembers is the state that was proved last: it is kept, and only the timer starts again.
        """
        self.stop_timer()
        self.wait_for_undoing()
        if not (self.directory / "saved").exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700)
            self.remember(paths, moves)
        self.unit_file.write_text(SERVICE.format(directory=self.directory, undoing=self.undoing))
        self.unit_link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.unit_link.unlink(missing_ok=True)
        self.unit_link.symlink_to(self.unit_file)
        os.sync()
        self.run("systemctl", "daemon-reload")
        self.run(
            "systemd-run", "--quiet", "--collect", f"--on-active={seconds}", "--timer-property=AccuracySec=1s", f"--unit={UNIT}",
            "--description=Take back a change of SSH that nobody proved", "/bin/sh", f"{self.directory}/script",
        )  # fmt: skip

    def remember(self, paths: Sequence[str], moves: bool) -> None:
        """Copy the files; that `saved` is there says that all of them are."""
        for number, path in enumerate(paths):
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(path)  # noqa: PTH116 - it may be a link, and what is saved is its content
                shutil.copy2(path, self.directory / str(number))
                os.chown(self.directory / str(number), found.st_uid, found.st_gid)
        if moves:
            (self.directory / "socket").touch()
        (self.directory / "script").write_text(self.script(paths))
        os.sync()
        (self.directory / "saved").touch()

    def stop_timer(self) -> None:
        """Nothing comes of itself any more. A script that has begun is not stopped."""
        self.run("systemctl", "stop", f"{UNIT}.timer", check=False)
        self.run("systemctl", "reset-failed", f"{UNIT}.timer", f"{UNIT}.service", check=False)

    def wait_for_undoing(self, seconds: float = 30) -> None:
        """Let a script that has begun come to its end; one that died on the way is run again."""
        until = time.monotonic() + seconds
        while self.undoing.exists() and time.monotonic() < until:
            if self.run("systemctl", "is-active", f"{UNIT}.service", check=False).stdout.strip() not in (
                "active",
                "activating",
            ):
                self.run("/bin/sh", str(self.undoing / "script"))
            time.sleep(0.2)
        if self.undoing.exists():
            raise GuardError(f"a former change is still being taken back; see journalctl -u {UNIT}")

    def prove(self) -> bool:
        """The change stays. False when it has been taken back already."""
        self.stop_timer()
        proved = self.directory.with_name(f"{self.directory.name}.proved")
        shutil.rmtree(proved, ignore_errors=True)
        try:
            self.directory.rename(proved)
        except FileNotFoundError:
            self.wait_for_undoing()
            return False
        self.unit_link.unlink(missing_ok=True)
        self.unit_file.unlink(missing_ok=True)
        shutil.rmtree(proved, ignore_errors=True)
        self.run("systemctl", "daemon-reload")
        return True

    def undo(self) -> bool:
        """Take the change back now. False when there was nothing to take back."""
        self.stop_timer()
        if not (self.directory / "script").exists():
            self.wait_for_undoing()
            return False
        self.run("/bin/sh", str(self.directory / "script"))
        return True
