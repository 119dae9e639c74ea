# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Small files that come with the inventory (`vllm_files`): read on the controller, and put on hosts under a path that has their hash.

So another text is another path and with it another generation, and an earlier generation finds the text that it had.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
# They travel in the arguments of a task. What is larger is a model, or part of one.
LARGEST = 1024**2


def source(entry: Mapping[str, Any], base: str) -> Path:
    """The file on the controller; `base` is what a relative path is relative to."""
    return Path(base) / Path(str(entry["src"])).expanduser()


def text_of(entry: Mapping[str, Any], base: str) -> tuple[str, str]:
    """The text of an entry, and what is wrong with it."""
    if entry.get("src") is None:
        return str(entry.get("content")), ""
    file = source(entry, base)
    try:
        if file.stat().st_size > LARGEST:
            return "", f"src is {file}, which is larger than {LARGEST // 1024**2} MiB; put it into the model store"
        return file.read_bytes().decode(), ""
    except UnicodeDecodeError:
        return "", f"src is {file}, which is no UTF-8 text; put it into the model store"
    except OSError as error:
        return "", f"src is {file}, which cannot be read on this controller: {error.strerror}"


def entry_problem(entry: Mapping[str, Any], base: str) -> str:
    """What is wrong with an entry, or nothing."""
    name = str(entry.get("name"))
    if not NAME.fullmatch(name):
        return f"name is {name!r}; it must be the name of a file, of letters, digits, dot, dash and underscore"
    if name.endswith(".py") and not name.removesuffix(".py").isidentifier():
        return f"name is {name!r}; Python imports it by its name, which must have no dash and no further dot"
    if (entry.get("src") is None) == (entry.get("content") is None):
        return "it must have one of src, a file on the controller, and content"
    return text_of(entry, base)[1]


def problems(files: Sequence[Mapping[str, Any]], base: str) -> list[str]:
    """Everything that is wrong with `vllm_files`, one sentence each."""
    names = [str(entry.get("name")) for entry in files]
    found = [
        f"vllm_files[{number}] ({names[number]}): {problem}"
        for number, entry in enumerate(files)
        if (problem := entry_problem(entry, base))
    ]
    repeated = sorted({name for name in names if names.count(name) > 1})
    return found + [f"vllm_files: name {name!r} is used by {names.count(name)} files" for name in repeated]


def shipped(files: Sequence[Mapping[str, Any]], base: str, directory: str) -> dict[str, dict[str, str]]:
    """Name -> C(path) below `directory` of the host, C(sha256) and C(content), of the files without mistakes."""
    found: dict[str, dict[str, str]] = {}
    for entry in files:
        if entry_problem(entry, base):
            continue
        content = text_of(entry, base)[0]
        digest = hashlib.sha256(content.encode()).hexdigest()
        found[str(entry["name"])] = {
            "path": f"{directory}/{digest[:16]}/{entry['name']}",
            "sha256": digest,
            "content": content,
        }
    return found
