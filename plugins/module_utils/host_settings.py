# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of ours that a file which is read later sets otherwise: what is right now, and gone after the next boot or start.

Files of ours have `vllm-fleet` in their names. Of each kind it is known where its files are, in which order they are read, and how a line says a setting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read

OURS = "vllm-fleet"
Settings = Iterator[tuple[str, str]]
# What may be said several times in a unit: a later file adds to it, unless its value is empty, which takes all back.
ADDS_UP = re.compile(
    r"\[\w+\] (Exec|Environment|After|Before|Wants|Requires|Conflicts|PartOf|Bind|Read|Inaccessible|Device|SystemCall|Listen|Condition|Assert|Load)"
)
APT = re.compile(r'^\s*([A-Za-z][\w:/-]*[\w])\s+"([^"]*)"\s*;', re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """Files that say the same sort of things."""

    parse: Callable[[str], Settings]
    directories: tuple[str, ...]  # of two files of one name, the one in the earlier directory counts
    first: tuple[str, ...] = ()  # read before all of them
    last: tuple[str, ...] = ()  # and after


def assignments(text: str) -> Settings:
    """Lines such as `vm.swappiness = 10`; a dash in front lets a setting be missing."""
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith(("#", ";")):
            yield name.strip().lstrip("-").replace("/", "."), " ".join(value.split())


def sections(text: str) -> Settings:
    """Lines such as `SystemMaxUse=2G` below `[Journal]`. What may be said several times is added up, until an empty value takes it back."""
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip()
        elif "=" in line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield f"{section} {name.strip()}", value.strip()


def limits(text: str) -> Settings:
    """Lines such as `* soft nofile 1024`; a dash is both kinds."""
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) == 4:
            who, kinds, what, value = words
            for kind in ("soft", "hard") if kinds == "-" else (kinds,):
                yield f"{who} {kind} {what}", value


def apt(text: str) -> Settings:
    """Lines such as `APT::Periodic::Unattended-Upgrade "1";`."""
    for match in APT.finditer(text):
        yield match[1], match[2]


def module_options(text: str) -> Settings:
    """Lines such as `options nvidia NVreg_X=1`, each parameter by itself."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["options"]:
            for word in words[2:]:
                name, _, value = word.partition("=")
                yield f"{words[1]} {name}", value


def systemd(name: str) -> Kind:
    """A configuration of systemd itself: its file is read first, whatever the names of the others."""
    return Kind(
        sections,
        tuple(f"{place}/systemd/{name}.d" for place in ("etc", "run", "usr/lib")),
        first=(f"etc/systemd/{name}",),
    )


KINDS = (
    # systemd reads /etc/sysctl.conf by a link, where the distribution has one, and `sysctl --system` last of all
    Kind(
        assignments,
        ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d"),
        last=("etc/sysctl.conf",),
    ),
    systemd("journald.conf"),
    systemd("coredump.conf"),
    systemd("system.conf"),
    Kind(limits, ("etc/security/limits.d",), first=("etc/security/limits.conf",)),
    Kind(apt, ("etc/apt/apt.conf.d",), last=("etc/apt/apt.conf",)),
    Kind(module_options, ("etc/modprobe.d", "run/modprobe.d", "usr/lib/modprobe.d")),
)


def drop_ins(root: Path) -> Iterator[Kind]:
    """The units that we add something to."""
    for name in {path.parent.name for path in (root / "etc/systemd/system").glob(f"*.d/*{OURS}*.conf")}:
        yield Kind(sections, tuple(f"{place}/systemd/system/{name}" for place in ("etc", "run", "usr/lib")))


def files(kind: Kind, root: Path) -> list[Path]:
    """The files of a kind that count, in the order in which they are read."""
    found: dict[str, Path] = {}
    for directory in reversed(kind.directories):
        found |= {path.name: path for path in (root / directory).glob("*") if not path.name.startswith(".")}
    ends = [[root / name for name in names if (root / name).exists()] for names in (kind.first, kind.last)]
    return [*ends[0], *(found[name] for name in sorted(found)), *ends[1]]


def overruled(root: Path = Path("/")) -> list[dict[str, str]]:
    """Settings of ours that something later sets otherwise: which, in which file of ours, and by which file to what."""
    told = []
    for kind in (*KINDS, *drop_ins(root)):
        order = files(kind, root)
        for number, ours in enumerate(order):
            if OURS not in ours.name:
                continue
            wanted = dict(kind.parse(read(ours)))
            winners = {
                name: (value, file)
                for file in order[number + 1 :]
                for name, value in (kind.parse(read(file)) if wanted else ())
                if name in wanted and not (value and ADDS_UP.match(name))
            }
            told += [
                {
                    "setting": name,
                    "file": f"/{ours.relative_to(root)}",
                    "by": f"/{file.relative_to(root)}",
                    "value": value,
                }
                for name, (value, file) in sorted(winners.items())
                if value != wanted[name]
            ]
    return told
