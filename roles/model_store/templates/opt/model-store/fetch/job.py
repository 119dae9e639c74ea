"""What every source of models shares: the job, how far it is, and what it fetches."""

from __future__ import annotations

import dataclasses
import email.utils
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RefusedError(Exception):
    """A reason that trying again would not change, in words for the operator."""


@dataclasses.dataclass
class File:
    """What the source says about a file. A size of None is not known before the file is here."""

    size: int | None
    sha256: str = ""
    blob: str = ""  # what git calls the file: Hugging Face has no SHA-256 of small ones


def amount(count: float) -> str:
    """Bytes as people read them."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


class Job:
    """What is to be done, and how far it is."""

    def __init__(self, wanted: dict[str, Any], secrets: dict[str, Any]) -> None:
        self.wanted, self.secrets = wanted, secrets
        self.staging = Path(wanted["staging"])
        self.what: str = wanted["repository"] or wanted["name"]
        self.state: dict[str, Any] = {
            "state": "checking",
            "done": 0,
            "total": 0,
            "message": "",
            "selection": "",
            "directory": self.staging.name,
            "peer": wanted["peer"],
        }
        self.lock = threading.Lock()

    def say(self, **news: Any) -> None:
        """Write the status file."""
        with self.lock:
            self.state.update(news, time=time.time())
            path = Path(self.wanted["status"])
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(self.state) + "\n")
            aside.replace(path)

    def on_disk(self) -> int:
        """Bytes in the staging directory, with the files that are still on their way."""
        total = 0
        for folder, _folders, names in os.walk(self.staging):
            for name in names:
                try:
                    status = (Path(folder) / name).stat()
                except OSError:
                    continue  # renamed meanwhile
                total += min(status.st_size, status.st_blocks * 512)
        return total

    def target(self, name: str) -> Path:
        """Where a file of the model belongs."""
        path = (self.staging / name).resolve()
        if not path.is_relative_to(self.staging.resolve()):
            raise RefusedError(f"{self.what} has a file that would lie outside of the model: {name}")
        return path

    def part(self, name: str) -> Path:
        """Where a file grows until it is whole."""
        path = self.staging / ".cache/parts" / hashlib.sha256(name.encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def arrived(self, name: str) -> None:
        """Give a file that is whole its name."""
        target = self.target(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.part(name).replace(target)


def asked_to_wait(status: int | None, headers: Mapping[str, str], otherwise: float) -> float | None:
    """Seconds that a server which has too much to do asks for, or nothing when it says something else.

    Retry-After takes seconds or a date; Hugging Face says it as `RateLimit: "api";r=0;t=55`. A 429 that names no time
    means `otherwise`.
    """
    if status not in (429, 503):
        return None
    known = {key.lower(): value.strip() for key, value in headers.items()}
    after = known.get("retry-after", "")
    if after.isdigit():
        return float(after)
    if after:
        try:
            return max(email.utils.parsedate_to_datetime(after).timestamp() - time.time(), 0.0)
        except ValueError:
            pass
    if found := re.search(r";\s*r=0\s*;\s*t=(\d+)", known.get("ratelimit", "")):
        return float(found[1])
    return otherwise if status == 429 else None


class Source:
    """What a source can do. `network` are the errors that another attempt may get around."""

    network: tuple[type[Exception], ...] = (OSError,)
    selects = True  # whether there may be more than a model needs: not where somebody wrote down each file

    def __init__(self, job: Job) -> None:
        self.job = job

    def look(self) -> tuple[str, dict[str, File]]:
        """Say which commit it is and which files it has; tell apart why it may not be had."""
        raise NotImplementedError

    def complete(self, name: str, file: File) -> File:
        """The same with size and hash, where the list of the source has none."""
        return file

    def fetch(self, name: str, file: File) -> None:
        """Put one file in its place, going on where an earlier run stopped."""
        raise NotImplementedError

    def other(self, repository: str, revision: str) -> Source:
        """Another repository of the same source."""
        raise RefusedError(f"{self.job.what} comes from addresses: {repository} cannot be fetched for it")

    def wait(self, error: Exception) -> float | None:
        """Seconds that the source asks for, when this error says that it has too much to do."""
        return None

    def damaged(self, name: str, file: File, size: int, got: str) -> RefusedError:
        """A file that came has this size and hash and not those of the source. It has been removed."""
        return RefusedError(
            f"{name} is not what the hub says: expected {file.size} bytes, {file.sha256 or file.blob}, got {size} bytes, "
            f"{got}. It was removed and is fetched anew in the next run; if that fails too, the mirror or a proxy damages it"
        )
