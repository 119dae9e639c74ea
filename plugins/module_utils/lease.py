# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Who may change a host: one run at a time, told by a file that is gone after a reboot."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PATH = Path("/run/vllm-fleet/lease.json")


class LeaseError(Exception):
    """A lease that cannot be read or written, in words for the operator."""


@dataclass(frozen=True)
class Holder:
    """A run of Ansible, as the host is told of it."""

    run: str  # tells this run from every other
    who: str  # the user on the controller
    controller: str  # its host name
    pid: int  # its process there
    place: str = ""  # which kernel, boot and process namespace that number belongs to
    since: str = ""  # when it took the host, by the host's clock, in UTC

    def __str__(self) -> str:
        return f"{self.who} on {self.controller} (process {self.pid}), since {self.since} UTC"


def holder(found: Mapping[str, Any]) -> Holder:
    """The holder that a lease or a task names. What a newer release adds is left out."""
    try:
        return Holder(**{name: found[name] for name in Holder.__annotations__ if name in found})
    except TypeError as error:
        raise LeaseError(f"{PATH} does not name its holder: {error}") from error


class Lease:
    """The lease of this host."""

    def __init__(self, path: Path = PATH) -> None:
        self.path = path

    def read(self) -> Holder | None:
        """Who holds the host."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        try:
            found = json.loads(text)
        except ValueError as error:
            raise LeaseError(f"{self.path} cannot be read: {error}") from error
        return holder(found if isinstance(found, dict) else {})

    def take(self, wanted: Holder, instead_of: str = "") -> Holder:
        """Hold the host, when nobody does or only the run `instead_of`. Returns who holds it now."""
        with self.locked():
            present = self.read()
            if present and present.run not in (wanted.run, instead_of):
                return present
            if present is None or present.run != wanted.run:
                now = datetime.datetime.now(datetime.timezone.utc)
                present = Holder(**{**asdict(wanted), "since": f"{now:%Y-%m-%d %H:%M:%S}"})
                aside = self.path.with_suffix(".new")
                aside.write_text(json.dumps(asdict(present)) + "\n")
                aside.replace(self.path)
            return present

    def release(self, run: str) -> bool:
        """Let go of the host, when this run holds it."""
        with self.locked():
            present = self.read()
            if present is None or present.run != run:
                return False
            self.path.unlink()
            return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One at a time looks and writes."""
        self.path.parent.mkdir(mode=0o755, exist_ok=True)
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
