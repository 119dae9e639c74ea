# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What is on a host, read from its files and from what its programs print. Each part takes text or a root, so recordings test it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import platform
import re
import shlex
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read

ROOT = Path("/")
HELD_UPDATES = Path("/var/lib/vllm-fleet/held-updates.json")
PROC = Path("/proc")
DISTRIBUTIONS = {"debian": "Debian", "ubuntu": "Ubuntu"}  # as the facts of ansible.builtin.setup spell them

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
UNIT_SUFFIXES = (".service", ".scope", ".socket", ".mount", ".swap")

# File systems whose server may be dead: asking one how full it is can wait for ever.
NETWORK_FILE_SYSTEMS = {
    "9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "smb3", "wekafs",
}  # fmt: skip
# Real file systems whose device is no file below /dev.
LOCAL_FILE_SYSTEMS = {"btrfs", "overlay", "virtiofs", "zfs"}
# Images that are full by nature: a snap is one.
IMAGE_FILE_SYSTEMS = {"erofs", "iso9660", "squashfs"}

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


def socket_address(text: str) -> str:
    """The IP address that /proc/net shows as words of the CPU's byte order (little-endian on x86-64 and AArch64)."""
    packed = b"".join(bytes.fromhex(text[begin : begin + 8])[::-1] for begin in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def listeners(root: Path = PROC) -> list[tuple[int, str, str]]:
    """Port, address and inode of each TCP socket that listens."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in read(root / "net" / table).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == "0A":  # TCP_LISTEN, include/net/tcp_states.h
                address, port = fields[1].rsplit(":", 1)
                with contextlib.suppress(ValueError):
                    found.append((int(port, 16), socket_address(address), fields[9]))
    return found


def processes(root: Path) -> Iterator[str]:
    """Numbers of the processes. The first one last: systemd keeps the sockets that it hands to services."""
    try:
        numbers = [int(name) for name in map(ENTRY_NAME, os.scandir(root)) if name.isdigit()]
    except OSError:
        return
    yield from map(str, sorted(numbers, key=lambda number: (number == 1, number)))


def network_namespace(process: Path) -> str:
    """The network that a process sees, empty when that may not be known."""
    try:
        return os.readlink(process / "ns/net")  # noqa: PTH115 - it is a name and no path
    except OSError:
        return ""


def holders(inodes: Iterable[str], root: Path = PROC) -> dict[str, tuple[str, str]]:
    """Program and control group of a process that holds each socket, by the socket's inode. One walk, ended when all are found."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, tuple[str, str]] = {}
    here = network_namespace(root / "self")
    for process in processes(root) if wanted else ():
        # The kernel's own sockets (an NFS server's) have no holder and make the walk a full one: leave the containers out.
        if here and network_namespace(root / process) != here:
            continue
        directory = f"{root}/{process}/fd"
        try:
            descriptors = list(map(ENTRY_NAME, os.scandir(directory)))
        except OSError:  # ended meanwhile, or another user's
            continue
        for descriptor in descriptors:
            try:
                # There are ten thousands of them on a busy host, and a Path for each takes five times as long.
                inode = wanted.pop(os.readlink(f"{directory}/{descriptor}"), None)  # noqa: PTH115 - a name too
            except OSError:
                continue
            if inode is not None:
                found[inode] = (read(root / process / "comm").strip(), read(root / process / "cgroup"))
        if not wanted:
            break
    return found


def unit_of(cgroup: str) -> str:
    """The systemd unit of a process, from its /proc/PID/cgroup, or nothing."""
    for line in cgroup.splitlines():
        hierarchy, _, path = line.partition("::") if line.startswith("0::") else line.partition(":name=systemd:")
        if not path or not hierarchy.isdigit():
            continue
        for part in path.split("/"):
            if part.endswith(UNIT_SUFFIXES):
                return part.removeprefix("_")  # how systemd escapes names that the kernel uses itself
            if part not in ("", "..") and not part.endswith(".slice"):
                break
    return ""


def ports(root: Path = PROC) -> list[dict[str, Any]]:
    """TCP sockets that listen, with who listens."""
    sockets = listeners(root)
    who = holders({inode for _port, _address, inode in sockets}, root)
    found = []
    for port, address, inode in sorted(sockets):
        program, cgroup = who.get(inode, ("", ""))
        entry = {"port": port, "address": address, "protocol": "tcp", "program": program, "unit": unit_of(cgroup)}
        if entry not in found:  # workers of one program may each have a socket of their own (SO_REUSEPORT)
            found.append(entry)
    return found


def parse_mounts(text: str) -> list[dict[str, Any]]:
    """Real file systems of a mounts file, network ones included. What is mounted over is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 4:
            continue
        # Blanks and the like are octal numbers there.
        device, path, kind = (
            re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field) for field in fields[:3]
        )
        found.pop(path, None)
        network = kind in NETWORK_FILE_SYSTEMS or (kind.startswith("fuse.") and not device.startswith("/dev/"))
        local = kind in LOCAL_FILE_SYSTEMS or device.startswith("/dev/")
        if (network and kind != "fuse.lxcfs") or (local and kind not in IMAGE_FILE_SYSTEMS | {"autofs", "devtmpfs"}):
            found[path] = {"path": path, "device": device, "fstype": kind, "network": network}
    return list(found.values())


def mounts(root: Path = ROOT) -> list[dict[str, Any]]:
    """Real file systems with their sizes; those of the network without, because asking a dead server never ends."""
    found = []
    for mount in parse_mounts(read(root / "proc/self/mounts")):
        size: int | None = None
        free: int | None = None
        if not mount["network"]:
            path = root / mount["path"].lstrip("/")
            # Container engines mount single files (/etc/hosts).
            if not path.is_dir():
                continue
            with contextlib.suppress(OSError):
                state = os.statvfs(path)
                size, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
        found.append({**mount, "size_bytes": size, "free_bytes": free})
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
