# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Versions of Debian packages, compared as `dpkg --compare-versions` does (deb-version(7)), and apt's word on what can be had.

A distribution keeps the version of the program and backports fixes, so only the whole version of the package says what is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cmp_to_key
from itertools import zip_longest
from typing import Any

PARTS = re.compile(r"([^0-9]*)([0-9]*)")
VERSION = re.compile(r"(?:[0-9]+:)?[0-9][A-Za-z0-9.+:~-]*")


def split(version: str) -> tuple[int, str, str]:
    """Epoch, version of the program, revision of the package."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return int(epoch) if epoch.isdigit() else 0, upstream, revision


def weight(character: str) -> int:
    """Where a character sorts: a tilde before the end, letters before the rest."""
    if character == "~":
        return -1
    return 0 if not character else ord(character) if character.isalpha() else ord(character) + 256


def compare_part(one: str, other: str) -> int:
    """Less than 0, 0, or more: characters and numbers by turns."""
    for (text, number), (other_text, other_number) in zip_longest(
        PARTS.findall(one), PARTS.findall(other), fillvalue=("", "")
    ):
        for left, right in zip_longest(text, other_text, fillvalue=""):
            if weight(left) != weight(right):
                return weight(left) - weight(right)
        if difference := int(number or 0) - int(other_number or 0):
            return difference
    return 0


def compare(one: str, other: str) -> int:
    """-1 when a version is older than the other one, 0 when they count the same, 1 when it is newer."""
    epoch, upstream, revision = split(one)
    other_epoch, other_upstream, other_revision = split(other)
    difference = epoch - other_epoch or compare_part(upstream, other_upstream) or compare_part(revision, other_revision)
    return (difference > 0) - (difference < 0)


def older(one: str, other: str) -> bool:
    """Whether a version is older than another one."""
    return compare(one, other) < 0


def newest(versions: Iterable[str]) -> str:
    """The newest of some versions, empty without any."""
    return max(versions, key=cmp_to_key(compare), default="")


def is_version(text: str) -> bool:
    """Whether dpkg would take it for a version."""
    return bool(VERSION.fullmatch(text))


def means(wanted: str, version: str) -> bool:
    """Whether a version of a package is the one that is asked for: by its whole version, or by that of the program."""
    upstream = split(version)[1]
    # what a distribution adds to it, such as +dfsg1, is not the program's
    return wanted in (version, upstream, upstream.partition("+")[0])


def parse_policy(output: str) -> dict[str, dict[str, Any]]:
    """What `apt-cache policy` says: for each package the version that apt would install, and all that can be had from somewhere."""
    found: dict[str, dict[str, Any]] = {}
    package: dict[str, Any] = {}
    version = ""
    for line in output.splitlines():
        if line and not line[0].isspace():
            package = found.setdefault(line.rstrip(":"), {"candidate": "", "versions": []})
        elif words := line.split():
            if words[0] == "Candidate:":
                package["candidate"] = "" if words[1] == "(none)" else words[1]
            elif line.startswith((" *** ", "     ")) and not line.startswith("        ") and len(words) >= 2:
                # one with a priority below 0 is not to be installed
                version = "" if words[-1].startswith("-") else words[1] if words[0] == "***" else words[0]
            # A source below the version: what is only installed can not be installed once more.
            elif (
                line.startswith("        ")
                and "/var/lib/dpkg/status" not in line
                and version not in ("", *package["versions"])
            ):
                package["versions"].append(version)
    return found


def below(floors: Mapping[str, str], versions: Mapping[str, str]) -> dict[str, str]:
    """Of the packages that are there, those that are older than they may be, with the version that is needed."""
    # a version with one dot is a number in YAML
    return {
        name: str(floor) for name, floor in floors.items() if name in versions and older(versions[name], str(floor))
    }
