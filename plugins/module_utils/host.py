# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What is on a host, read from its files and from what its programs print. Each part takes text or a root, so recordings test it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import operator
import os
import platform
import re
import shlex
import stat
import time
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read

ROOT = Path("/")
HELD_UPDATES = Path("/var/lib/vllm-fleet/held-updates.json")
DISTRIBUTIONS = {"debian": "Debian", "ubuntu": "Ubuntu"}  # as the facts of ansible.builtin.setup spell them

HASH_LIMIT = 1024**2
ENTRY_NAME = operator.attrgetter("name")


def os_release(text: str) -> dict[str, str]:
    """The variables of an os-release file."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            with contextlib.suppress(ValueError):  # quotes that do not end
                found[name] = "".join(shlex.split(value))
    return found


def container(root: Path = ROOT) -> str:
    """The kind of container that this is, as systemd-detect-virt says it, or nothing."""
    name = read(root / "run/host/container-manager") or read(root / "run/systemd/container")
    if not name:
        variables = read(root / "proc/1/environ").split("\0")
        name = next((entry[10:] for entry in variables if entry.startswith("container=")), "")
    name = name.strip()
    # Engines leave these files, and some say only "oci" of themselves.
    if name in ("", "oci"):
        if (root / "run/.containerenv").exists():
            return "podman"
        if (root / ".dockerenv").exists():
            return "docker"
    return name


def system(root: Path = ROOT) -> dict[str, Any]:
    """What the host is and runs."""
    release = os_release(read(root / "etc/os-release"))
    memory = re.search(r"^MemTotal:\s+(\d+) kB", read(root / "proc/meminfo"), re.MULTILINE)
    return {
        "distribution": DISTRIBUTIONS.get(release.get("ID", ""), release.get("NAME", "")),
        "release": release.get("VERSION_ID", ""),
        "codename": release.get("VERSION_CODENAME", ""),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "container": container(root),
        "service_manager": "systemd" if (root / "run/systemd/system").is_dir() else "",
        "memory_bytes": int(memory[1]) * 1024 if memory else 0,
        "cpus": len(os.sched_getaffinity(0)),
    }


def parse_dpkg_status(*texts: str) -> dict[str, str]:
    """
    Versions of the packages that are installed and configured, from dpkg's status file and what was to be merged into it.

    A package of another architecture is named as dpkg names it: libc6:i386.
    """
    packages: dict[tuple[str, str], str] = {}
    for text in texts:
        for paragraph in text.split("\n\n"):
            # A regular expression for each field of each package takes ten times as long.
            fields = []
            lines = "\n" + paragraph + "\n"
            for field in ("\nPackage: ", "\nArchitecture: ", "\nStatus: ", "\nVersion: "):
                begin = lines.find(field)
                fields.append(lines[begin + len(field) : lines.find("\n", begin + 1)].strip() if begin >= 0 else "")
            name, architecture, status, version = fields
            if not name:
                continue
            if status.endswith(" ok installed"):
                packages[name, architecture] = version
            else:
                packages.pop((name, architecture), None)
    native = next((architecture for name, architecture in packages if name == "dpkg"), "")
    return {
        name if architecture in (native, "all", "") or not native else f"{name}:{architecture}": version
        for (name, architecture), version in packages.items()
    }


def packages(root: Path = ROOT) -> dict[str, str]:
    """Versions of the installed packages."""
    # A dpkg that works or was killed has its last changes in small files beside the big one.
    with_updates = [root / "var/lib/dpkg/status", *sorted((root / "var/lib/dpkg/updates").glob("[0-9]*"))]
    return parse_dpkg_status(*map(read, with_updates))


def lists_age(root: Path = ROOT, now: float | None = None) -> int | None:
    """Seconds since the package lists were fetched, or nothing when there are none: a fresh image has a fresh, empty directory."""
    lists = root / "var/lib/apt/lists"
    try:
        if not any("_Packages" in name or name.endswith("Release") for name in map(ENTRY_NAME, os.scandir(lists))):
            return None
    except OSError:
        return None
    # The lists bear the dates of the mirror; when they were asked for is told by the directories and by Ubuntu's stamp.
    times = []
    for path in (lists, lists / "partial", root / "var/lib/apt/periodic/update-success-stamp"):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(0, int((time.time() if now is None else now) - max(times))) if times else None


def members(text: str) -> dict[str, list[str]]:
    """The users that a group file names for each group that has any."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and fields[3]:
            found.setdefault(fields[0], fields[3].split(","))
    return found


def held_updates(file: Path = HELD_UPDATES) -> dict[str, dict[str, Any]]:
    """Security updates that wait, as the role base has them noted; none when it does not."""
    try:
        noted = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def ids(text: str) -> dict[str, int]:
    """Names and numbers of a passwd or group file."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and fields[2].isdigit():
            found.setdefault(fields[0], int(fields[2]))
    return found


def path_state(path: Path) -> dict[str, Any]:
    """What is at a path. Links are not followed."""
    found: dict[str, Any] = {
        "exists": False, "type": "", "target": "", "size": 0, "mode": "", "uid": None, "gid": None, "sha256": "",
    }  # fmt: skip
    try:
        state = path.lstat()
    except (OSError, ValueError):
        return found
    found.update(
        exists=True, type="other", mode=f"{stat.S_IMODE(state.st_mode):04o}", uid=state.st_uid, gid=state.st_gid
    )
    with contextlib.suppress(OSError):  # gone meanwhile, or not for us to read
        if stat.S_ISLNK(state.st_mode):
            found.update(type="link", target=os.readlink(path))  # noqa: PTH115 - a Path would tidy it up
        elif stat.S_ISDIR(state.st_mode):
            found["type"] = "directory"
        elif stat.S_ISREG(state.st_mode):
            found.update(type="file", size=state.st_size)
            if state.st_size <= HASH_LIMIT:
                found["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def python(root: Path = ROOT, has_apt: bool | None = None) -> dict[str, str]:
    """
    The distribution's Python, and what stands in its place where an alternative, or a link by hand, made /usr/bin/python3 another one.

    That is in the way when the modules run with it, too: it has no bindings for apt, and often no ssl.
    """
    named = re.search(
        r"^default-version *= *(python3\.\d+)$", read(root / "usr/share/python3/debian_defaults"), re.MULTILINE
    )
    usual = root / "usr/bin/python3"
    own = usual.with_name(named[1]) if named else usual
    if not own.exists():
        own = usual
    bound = importlib.util.find_spec("apt_pkg") is not None if has_apt is None else has_apt
    other = "" if bound or not usual.exists() or usual.resolve() == own.resolve() else str(usual.resolve())
    return {"python_path": f"/{own.relative_to(root)}", "python_replaced": other}
