# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Which packages a role has brought to this host: a file of names for each role, one a line, so that they can go again with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write

RECORDS = Path("/var/lib/vllm-fleet/packages")


def recorded(role: str, records: Path = RECORDS) -> list[str]:
    """The packages that a role has brought."""
    return sorted(line for line in read(records / role).splitlines() if line and not line.startswith("#"))


def record(role: str, names: Iterable[str], records: Path = RECORDS) -> None:
    """Make these the packages that a role has brought. Without any there is no file."""
    lines = sorted(set(names))
    if not lines:
        (records / role).unlink(missing_ok=True)
        return
    head = f"# Packages that the role {role} of vLLM Fleet installed here. They were not there before; uninstall.yml goes by this.\n"
    write(records / role, head + "".join(f"{line}\n" for line in lines), 0o644)
