# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Files of a host that are read where they may be absent, and replaced at once."""

from __future__ import annotations

import os
from pathlib import Path


def read(path: Path | str) -> str:
    """A file; an absent one is empty."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def write(path: Path, content: str | bytes, mode: int = 0o600, durable: bool = False) -> None:
    """Replace a file at once. One that is durable is on the disk afterwards, whatever happens to the power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        if durable:
            os.fsync(file.fileno())
    aside.replace(path)
