# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""One repository of apt on a host: its key, other files that name it, holds, and what can be had from it."""

from __future__ import annotations

import hashlib
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
PARTS = "etc/apt/sources.list.d"
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
            "key_problem": self.key_problem(given) if given["key_path"] else "",
            "foreign": foreign,
            "mixed": mixed,
            "held": parse_holds(self.status(), given["packages"]),
            "available": self.available(given["packages"]) if given["available"] else {},
        }

    def status(self) -> str:
        """What dpkg knows, with what a dpkg that was killed had begun."""
        base = self.root / "var/lib/dpkg"
        return "\n".join(read(path) for path in (base / "status", *sorted((base / "updates").glob("[0-9]*"))))

    def key_problem(self, given: Mapping[str, Any]) -> str:
        """What is wrong with the key file, empty when it is as it should be."""
        try:
            data = self.at(given["key_path"]).read_bytes()
        except OSError:
            return "it is not there"
        return unexpected(data, given)

    def foreign(self, repositories: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
        """Other files that name the repositories: those that name nothing else, and those that do.

        Two entries for one repository with different keys make every call of apt fail (`Conflicting values set for option Signed-By`).
        """
        alone, mixed = [], []
        for name, found in self.sources():
            of_vendor = [entry for entry in found if name not in own and any(part in entry for part in repositories)]
            if of_vendor and len(of_vendor) == len(found) and name.startswith(f"/{PARTS}/"):
                alone.append(name)
            elif of_vendor:
                mixed.append(name)
        return alone, mixed

    def sources(self) -> list[tuple[str, list[str]]]:
        """The files of sources that apt reads, with their entries."""
        parts = [path for kind in ("list", "sources") for path in sorted((self.root / PARTS).glob(f"*.{kind}"))]
        named = [(f"/{path.relative_to(self.root)}", path) for path in (self.root / "etc/apt/sources.list", *parts)]
        return [(name, entries(name, read(path))) for name, path in named]

    def signed_by(self, own: Sequence[str] = ()) -> dict[str, str]:
        """Addresses of repositories as the files of the host name them, without the slash at their end -> the key, empty where none is named."""
        found: dict[str, str] = {}
        for name, entry in ((name, entry) for name, listed in self.sources() if name not in own for entry in listed):
            if name.endswith(".sources"):
                key = re.search(r"(?im)^signed-by:(.*(?:\n[ \t].*)*)", entry)
                words = " ".join(re.findall(r"(?im)^uris:(.*(?:\n[ \t].*)*)", entry)).split()
            else:
                key = re.search(r"\[.*\bsigned-by=([^\s\]]+).*\]", entry)
                words = re.sub(r"\[.*?\]", "", entry).split()[1:2]
            found.update({url.rstrip("/"): key[1].strip() if key else "" for url in words})
        return found

    def available(self, packages: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What apt could install, by the package lists that are there. A name that ends in * stands for all that begin so."""
        packages = [one for name in packages for one in (self.names(name[:-1]) if name.endswith("*") else [name])]
        status, output, _ = self.command(["apt-cache", "policy", *packages])
        return parse_policy(output) if status == 0 else {}

    def names(self, beginning: str) -> list[str]:
        """The packages that apt knows whose names begin so."""
        status, output, _ = self.command(["apt-cache", "pkgnames", beginning])
        return sorted(output.split()) if status == 0 else []

    def disable(self, paths: Sequence[str]) -> None:
        """Rename files of sources, so that apt passes over them."""
        for path in paths:
            self.at(path).replace(self.at(path + DISABLED))

    def place_key(self, given: Mapping[str, Any]) -> None:
        """Put a key file in place, from its content or from its address, when it holds what is expected."""
        origin = "the content that was given" if given["key"] else given["key_url"]
        data = given["key"].encode() if given["key"] else self.fetch(given["key_url"])
        if problem := unexpected(data, given):
            raise AptError(f"{origin} is not the key of this repository: {problem}")
        # apt reads it as a user without privileges
        write(self.at(given["key_path"]), data, mode=0o644, durable=True)

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


def unexpected(data: bytes, given: Mapping[str, Any]) -> str:
    """What is wrong with the content of a key file, or of the package that brings it; empty when it is what is expected."""
    if not given.get("key_sha256"):
        return openpgp.problem(data, list(given["key_fingerprints"]))
    digest = hashlib.sha256(data).hexdigest()
    return "" if digest == given["key_sha256"] else f"its SHA-256 is {digest}, and {given['key_sha256']} was expected"


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
