# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The file systems of a host."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.host import ROOT

# File systems whose server may be dead: asking one how full it is can wait for ever.
NETWORK_FILE_SYSTEMS = {
    "9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "smb3", "wekafs",
}  # fmt: skip
# Real file systems whose device is no file below /dev.
LOCAL_FILE_SYSTEMS = {"btrfs", "overlay", "virtiofs", "zfs"}
# Images that are full by nature: a snap is one.
IMAGE_FILE_SYSTEMS = {"erofs", "iso9660", "squashfs"}


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
