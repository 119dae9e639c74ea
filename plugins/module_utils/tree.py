# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What is wanted at each path of a tree of files, on its way from the controller to the host."""

from __future__ import annotations

import base64
import fnmatch
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

NAME = re.compile(r"[a-z0-9_-]+")
MODE = re.compile(r"[0-7]{3,4}")
# the argument spec of what a change requires
REQUIREMENT = {"path": {"type": "str", "required": True}, "fail_msg": {"type": "str", "required": True}}


class TreeError(Exception):
    """A reason why the files are not in place, in words for the operator."""


@dataclass(frozen=True)
class Entry:
    """What is wanted at one path. What the controller can see to be wrong is refused there, when the entry is made."""

    path: str
    kind: str = "file"  # or directory, or link
    content: bytes = field(default=b"", repr=False)
    target: str = ""  # of a link
    mode: str = "0644"
    owner: str = "root"
    group: str = "root"
    secret: bool = False

    def __post_init__(self) -> None:
        if (
            not isinstance(self.path, str)
            or not re.match("/[^/]", self.path)
            or os.path.normpath(self.path) != self.path
            or "\0" in self.path
        ):
            raise TreeError(f"path: {self.path!r} must be absolute and plain, without '..', '//' or a slash at its end")
        if not isinstance(self.mode, str) or not MODE.fullmatch(self.mode):
            raise TreeError(f'{self.path}: mode must be a quoted octal string such as "0644", not {self.mode!r}')
        if self.kind == "link" and not self.target:
            raise TreeError(f"{self.path}: target of the link must not be empty")


def pack(entries: Iterable[Entry]) -> str:
    """All entries in one word, which Ansible can take for one secret without blackening anything else that it shows."""
    plain = [{**vars(entry), "content": entry.content.decode("utf-8", "surrogateescape")} for entry in entries]
    return base64.b64encode(zlib.compress(json.dumps(plain).encode())).decode()


def unpack(packed: str) -> list[Entry]:
    """The entries again, byte for byte."""
    plain = json.loads(zlib.decompress(base64.b64decode(packed))) if packed else []
    return [Entry(**{**entry, "content": entry["content"].encode("utf-8", "surrogateescape")}) for entry in plain]


def handlers(notify: Mapping[str, Sequence[str]], paths: Iterable[str]) -> list[str]:
    """The handlers whose patterns match one of the paths, each once."""
    changed = list(paths)
    return list(
        dict.fromkeys(
            name
            for pattern, listed in notify.items()
            if any(fnmatch.fnmatchcase(path, pattern) for path in changed)
            for name in listed
        )
    )
