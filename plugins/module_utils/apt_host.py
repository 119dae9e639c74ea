# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""One repository of apt on a host: its key, other files that name it, holds, and what can be had from it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import openpgp
from ansible_collections.gpufleet.llm.plugins.module_utils.dpkg import parse_policy
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Command

# apt passes over files that end so without a word (Dir::Ignore-Files-Silently).
DISABLED = ".disabled"
TIMEOUT = 30
LARGEST_KEY = 1 << 20


class AptError(Exception):
    """What went wrong, in words for the operator."""


def entries(path: str, text: str) -> list[str]:
    """The entries of a file of sources that are in use: lines of a .list, stanzas of a .sources."""
    if not path.endswith(".sources"):
        return [line for line in map(str.strip, text.splitlines()) if re.match(r"deb(-src)?\s", line)]
    # fields go on in lines that begin with a blank
    stanzas = re.split(r"\n\s*\n", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [
        stanza
        for stanza in stanzas
        if re.search(r"(?im)^uris:", stanza) and not re.search(r"(?im)^enabled:\s*(no|false|0)\s*$", stanza)
    ]


def parse_holds(status: str, names: Iterable[str]) -> list[str]:
    """Of these packages, those that are held, by the text of dpkg's status file."""
    wanted = set(names)
    held = re.findall(r"^Package: (\S+)\nStatus: hold ", status, re.MULTILINE)
    return sorted(wanted & set(held))


@dataclass
class Apt:
    """The apt of this host."""

    command: Command
    root: Path = Path("/")
    fetch: Callable[[str], bytes] = field(default=lambda url: fetched(url))
    # for another apt: a cloud image updates itself at its first boot
    seconds_to_wait: float = 600
    pause: float = 2

    def at(self, path: str) -> Path:
        """A path of the host."""
        return self.root / path.lstrip("/")

    def look(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is there of what a repository needs. `given` are the options of the module apt_source."""
        foreign, mixed = self.foreign(given["repositories"], given["own_files"])
        return {
            "key_problem": self.key_problem(given["key_path"], given["key_fingerprints"]) if given["key_path"] else "",
            "foreign": foreign,
            "mixed": mixed,
            "held": parse_holds(self.status(), given["packages"]),
            "available": self.available(given["packages"]) if given["available"] else {},
        }

    def status(self) -> str:
        """What dpkg knows, with what a dpkg that was killed had begun."""
        base = self.root / "var/lib/dpkg"
        return "\n".join(read(path) for path in (base / "status", *sorted((base / "updates").glob("[0-9]*"))))

    def key_problem(self, path: str, expected: Sequence[str]) -> str:
        """What is wrong with the key file, empty when it is as it should be."""
        try:
            data = self.at(path).read_bytes()
        except OSError:
            return "it is not there"
        return openpgp.problem(data, list(expected))

    def foreign(self, repositories: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
        """Other files that name the repositories: those that name nothing else, and those that do.

        Two entries for one repository with different keys make every call of apt fail (`Conflicting values set for option Signed-By`).
        """
        alone, mixed = [], []
        directory = self.root / "etc/apt/sources.list.d"
        paths = [
            self.root / "etc/apt/sources.list",
            *sorted(directory.glob("*.list")),
            *sorted(directory.glob("*.sources")),
        ]
        for path in paths:
            name = f"/{path.relative_to(self.root)}"
            found = entries(name, read(path)) if name not in own else []
            of_vendor = [entry for entry in found if any(part in entry for part in repositories)]
            if of_vendor and len(of_vendor) == len(found) and path.parent == directory:
                alone.append(name)
            elif of_vendor:
                mixed.append(name)
        return alone, mixed

    def available(self, packages: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What apt could install, by the package lists that are there."""
        status, output, _ = self.command(["apt-cache", "policy", *packages])
        return parse_policy(output) if status == 0 else {}

    def disable(self, paths: Sequence[str]) -> None:
        """Rename files of sources, so that apt passes over them."""
        for path in paths:
            self.at(path).replace(self.at(path + DISABLED))

    def place_key(self, path: str, content: str, url: str, expected: Sequence[str]) -> None:
        """Put a key file in place, from its content or from its address, when it holds the keys that are expected."""
        origin = "the content that was given" if content else url
        data = content.encode() if content else self.fetch(url)
        if problem := openpgp.problem(data, list(expected)):
            raise AptError(f"{origin} is not the key of this repository: {problem}")
        # apt reads it as a user without privileges
        write(self.at(path), data, mode=0o644, durable=True)

    def mark(self, what: str, packages: Sequence[str]) -> None:
        """Keep packages as they are (hold), or let them change again (unhold)."""
        until = time.monotonic() + self.seconds_to_wait
        while True:
            status, output, error = self.command(["apt-mark", what, *packages])
            # apt-mark does not wait for another apt, whatever DPkg::Lock::Timeout says
            if not status or "was locked by" not in error or time.monotonic() > until:
                break
            time.sleep(self.pause)
        if status:
            raise AptError(f"`apt-mark {what} {' '.join(packages)}` failed: {(error or output).strip()}")


def fetched(url: str) -> bytes:
    """A small file from an address; proxies are those of the environment."""
    # 40 ms to import, which a call that only looks need not pay
    from urllib.request import urlopen

    if not re.match(r"(https?|file):", url):
        raise AptError(f"{url} is no address of a key: it begins with https:, http: or file:")
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:  # noqa: S310 - the schemes are those above, and the fingerprint decides
            data: bytes = answer.read(LARGEST_KEY)
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise AptError(f"{url} cannot be fetched: {getattr(error, 'reason', None) or error}") from error
    return data


def loaded(text: str) -> dict[str, Any]:
    """A JSON object; anything else is an empty one."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
