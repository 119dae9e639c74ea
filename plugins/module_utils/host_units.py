# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The units of a host: what they do now, and whether they start with it."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.host import ROOT

# There is no call of `systemctl list-unit-files`: it costs a second of CPU on a host with a few hundred units, reading the files 10 ms.
LIST_UNITS = [
    "systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager", "--full", "--type=service,timer,socket,mount",
]  # fmt: skip
UNIT_TYPES = (".service", ".timer", ".socket", ".mount")
# Where systemd looks for units, the strongest first (man systemd.unit), and what it calls those that come from a place of their own.
UNIT_DIRECTORIES = {
    "etc/systemd/system.control": "",
    "run/systemd/system.control": "",
    "run/systemd/transient": "transient",
    "run/systemd/generator.early": "generated",
    "etc/systemd/system": "",
    "etc/systemd/system.attached": "",
    "run/systemd/system": "",
    "run/systemd/system.attached": "",
    "run/systemd/generator": "generated",
    "usr/local/lib/systemd/system": "",
    "usr/lib/systemd/system": "",
    "lib/systemd/system": "",
    "run/systemd/generator.late": "generated",
}
PERSISTENT = "etc/systemd/system"


def parse_units(text: str) -> dict[str, str]:
    """What each loaded unit does, from the output of LIST_UNITS."""
    found = {}
    for line in text.splitlines():
        # Older ones mark failed units with a dot, --plain or not.
        fields = line.lstrip("●* \t").split(None, 4)
        # What another unit only speaks of is not there.
        if len(fields) >= 4 and fields[0].endswith(UNIT_TYPES) and fields[1] != "not-found":
            found[fields[0]] = fields[2]
    return found


def install_section(text: str) -> dict[str, list[str]]:
    """The words of each setting in the [Install] section of a unit file."""
    found: dict[str, list[str]] = {}
    begin = text.find("[Install]")
    for line in text[begin:].splitlines()[1:] if begin >= 0 else ():
        if line.startswith("["):
            break
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found.setdefault(name.strip(), []).extend(value.split())
    return found


class UnitFiles:
    """The unit files of a host and the links that enable them, as systemd judges them (unit_file_lookup_state in its install.c)."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.files: dict[str, tuple[str, Path]] = {}  # directory and path of the strongest file of each name
        self.links: dict[str, list[tuple[str, str]]] = {}  # directory and name of the links to each unit
        seen = set()
        for directory in UNIT_DIRECTORIES:
            try:
                real = os.path.realpath(root / directory)
                entries = [] if real in seen else list(os.scandir(real))
            except OSError:
                continue
            seen.add(real)
            for entry in entries:
                if entry.name.endswith((".wants", ".requires", ".upholds")):
                    with contextlib.suppress(OSError):
                        for link in os.scandir(entry.path):
                            self._add_link(directory, link)
                elif entry.name.endswith(UNIT_TYPES):
                    self.files.setdefault(entry.name, (directory, Path(entry.path)))
                    self._add_link(directory, entry, top=True)

    def _add_link(self, directory: str, entry: os.DirEntry[str], top: bool = False) -> None:
        with contextlib.suppress(OSError):
            if entry.is_symlink():
                target = Path(entry.path).readlink().name
                # At the top a link of the same name only says where the file is, it enables nothing.
                for name in {target} if top else {target, entry.name}:
                    if not top or target != entry.name:
                        self.links.setdefault(name, []).append((directory, entry.name))

    def target(self, name: str) -> str:
        """The unit that a link leads to, else the name itself."""
        with contextlib.suppress(OSError, KeyError):
            return self.files[name][1].readlink().name
        return name

    def state(self, name: str) -> str:
        """What `systemctl is-enabled` says of a unit that has a file."""
        directory, path = self.files[name]
        runtime = "-runtime" if directory.startswith("run/") else ""
        linked = path.is_symlink()
        try:
            target = str(path.readlink()) if linked else name
            if target == "/dev/null":
                return "masked" + runtime
            if target.rsplit("/", 1)[-1] != name:
                return "alias"
            if linked:
                path = self.root / target.lstrip("/") if target.startswith("/") else path.parent / target
            if not path.stat().st_size:
                return "masked" + runtime
        except OSError:
            return "bad"
        if UNIT_DIRECTORIES[directory]:
            return UNIT_DIRECTORIES[directory]
        install = install_section(read(path))
        known = {name, *install.get("Alias", ())}
        known |= {name.replace("@.", f"@{instance}.") for instance in install.get("DefaultInstance", ())}
        links = self.links.get(name, [])
        for place, state in ((PERSISTENT, "enabled"), ("run/systemd/system", "enabled-runtime")):
            if any(found == place and link in known for found, link in links):
                return state
        if linked and directory in (PERSISTENT, "run/systemd/system"):
            return "linked" + runtime
        if any(found in (PERSISTENT, "run/systemd/system") for found, _link in links):
            return "indirect"
        if any(install.get(setting) for setting in ("WantedBy", "RequiredBy", "UpheldBy", "Alias")):
            return "disabled"
        return "indirect" if install.get("Also") else "static"

    def instance_state(self, name: str) -> str:
        """The same of an instance, whose file is its template."""
        places = [found for found, link in self.links.get(name, []) if link == name]
        if PERSISTENT in places:
            return "enabled"
        if "run/systemd/system" in places:
            return "enabled-runtime"
        if places:  # the distribution wants it
            return "static"
        template = template_of(name)
        state = self.state(template) if template in self.files else ""
        return "disabled" if state in ("enabled", "enabled-runtime", "indirect") else state


def template_of(name: str) -> str:
    """getty@.service of getty@tty1.service."""
    return re.sub(r"@.*\.", "@.", name)


def units(loaded: str, root: Path = ROOT) -> dict[str, dict[str, str]]:
    """Units by name: what they do now, by the output of LIST_UNITS, and whether they start with the host."""
    active = parse_units(loaded)
    files = UnitFiles(root)
    instances = {name for name in files.links if name.endswith(UNIT_TYPES) and "@" in name and "@." not in name}
    found = {}
    for name in sorted({*active, *files.files, *instances}):
        state = ""
        if name in files.files:
            state = files.state(name)
        elif "@" in name:
            state = files.instance_state(name)
        does = active.get(name) or active.get(files.target(name) if state == "alias" else "", "inactive")
        found[name] = {"active": does, "enabled": state}
    return found
