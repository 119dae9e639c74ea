# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The TCP sockets of a host that listen, and who holds them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.host import ENTRY_NAME

PROC = Path("/proc")
UNIT_SUFFIXES = (".service", ".scope", ".socket", ".mount", ".swap")


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
