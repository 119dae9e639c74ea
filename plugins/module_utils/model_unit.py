# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Transient systemd units that do a long piece of work, without root and with their secrets as credentials."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = Path("/run/model-download")
# What none of them needs. Who they are and what they may write, each says itself.
HARDENING = (
    "ProtectSystem=strict",
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "RestrictSUIDSGID=yes",
    "ProtectKernelTunables=yes",
    "ProtectControlGroups=yes",
    "Nice=5",
)


@dataclass
class Unit:
    """What is to run."""

    name: str
    description: str
    properties: Sequence[str]
    credentials: Mapping[str, str]
    command: Sequence[str]

    def start_command(self, credentials: Path) -> list[str]:
        """The command that starts it. Nothing of it is secret: the secrets are files below `credentials`."""
        properties = [
            *self.properties,
            *HARDENING,
            *(f"LoadCredential={name}:{credentials}/{name}" for name in self.credentials),
        ]
        return [
            "systemd-run",
            "--quiet",
            "--collect",
            f"--unit={self.name}",
            f"--description={self.description}",
            *(f"--property={entry}" for entry in properties),
            *self.command,
        ]


def homes(path: str) -> list[str]:
    """Close the homes of users, unless the store is in one."""
    return [] if path.startswith(("/home/", "/root/")) else ["ProtectHome=yes"]


def active(module: Any, name: str) -> bool:
    """Whether it runs."""
    _rc, state, _error = module.run_command(["systemctl", "is-active", name])
    return str(state).strip() in ("active", "activating", "deactivating")


def start(module: Any, unit: Unit, run: Path = RUN) -> str:
    """Start it; return why that is not possible, or nothing."""
    secrets = run / unit.name
    for directory in (run, secrets):
        directory.mkdir(mode=0o700, exist_ok=True)
    try:
        for name, content in unit.credentials.items():
            with os.fdopen(os.open(secrets / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(content)
        # It returns when the program runs (Type=exec) or says that it is ready (notify): the credentials were read.
        rc, _out, error = module.run_command(unit.start_command(secrets))
    finally:
        shutil.rmtree(secrets, ignore_errors=True)
    return str(error).strip() or f"systemd-run ended with {rc}" if rc else ""


def stop(module: Any, name: str) -> None:
    """End it. One that does not run is no error."""
    module.run_command(["systemctl", "stop", name])


def last_lines(module: Any, name: str) -> str:
    """What it said last."""
    command = ["journalctl", f"--unit={name}", "--lines=15", "--no-pager", "--output=cat"]
    _rc, log, _error = module.run_command(command)
    return str(log).strip()
