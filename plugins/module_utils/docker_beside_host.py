# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What else on a host decides whether an engine starts, and whom its networks take the addresses of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.docker_flags import SHORT, clashes, command_line, words
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Command

FILE = "/etc/docker/daemon.json"
# Networks that the engine itself made.
OWN_BRIDGES = re.compile(r"docker0|docker_gwbridge|br-[0-9a-f]{12}")


def flags(root: Path, unit: Mapping[str, str], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line of the unit says that is the file's business, and the files of the unit that say it."""
    files = [line.partition(" (")[0] for line in unit.get("EnvironmentFiles", "").splitlines()]
    texts = {name: read(root / name.lstrip("/")) for name in files}
    command = command_line(unit, texts)
    if unit.get("LoadState") != "loaded":  # before there is an engine, somebody may have said how it starts
        names = sorted((root / "etc/systemd/system/docker.service.d").glob("*.conf"))
        lines = [line for name in names for line in read(name).splitlines() if line.startswith("ExecStart=/")]
        command = words(lines[-1].partition("=")[2]) if lines else []
        unit = {"DropInPaths": " ".join("/" + str(name.relative_to(root)) for name in names)}
    said = clashes(command, wanted, FILE)
    paths = [unit.get("FragmentPath", ""), *unit.get("DropInPaths", "").split(), *files]
    # a short option may stand for any of them
    spelled = [*said, *(short for short, name in SHORT.items() if f"--{name}" in said)]
    where = [path for path in paths if path and any(word in read(root / path.lstrip("/")) for word in spelled)]
    return {"flags": said, "flags_from": where}


def routes(command: Command) -> list[str]:
    """Networks of IPv4 that this host reaches by a route, but for those of the engine."""
    _, output, _ = command(["ip", "-json", "-4", "route", "show", "table", "all"])
    try:
        entries = json.loads(output or "[]")
    except ValueError:
        return []
    return sorted(
        {
            str(entry["dst"])
            for entry in entries
            if entry.get("type", "unicast") == "unicast"
            and entry.get("dst") != "default"
            and not OWN_BRIDGES.fullmatch(entry.get("dev", ""))
        }
    )
