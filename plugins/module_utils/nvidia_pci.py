"""NVIDIA's devices on the PCI bus: what they are, and which kernel modules drive them. Told by numbers, never by names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.host import ENTRY_NAME, ROOT

VENDOR = "0x10de"
# PCI classes. A data center GPU is a 3D controller (0302) and no VGA one (0300): `lspci | grep VGA` misses an H100.
KINDS = {"0x0300": "gpu", "0x0302": "gpu", "0x0680": "nvswitch"}

# The first device id of each generation; all ids up to the next line belong to it. Ids rise with the generations but for GA100 (0x2080 to
# 0x20ff, among the Turing ones), which makes no difference here.
# Sources: the table of supported GPUs in the README of NVIDIA/open-gpu-kernel-modules (it begins with 0x1e02), pci.ids.
# `flavours`: which kernel modules drive it. Source: docs.nvidia.com/datacenter/tesla/driver-installation-guide/kernel-modules.html
# `first`, `last`: branches of the driver that know it, 0 for no limit. R580 is the last one for Maxwell, Pascal and Volta.
GENERATIONS: list[dict[str, Any]] = [
    {"id": 0x0000, "name": "Kepler or older", "flavours": [], "first": 0, "last": 470},
    {"id": 0x1340, "name": "Maxwell, Pascal or Volta", "flavours": ["proprietary"], "first": 0, "last": 580},
    {"id": 0x1E00, "name": "Turing or Ampere", "flavours": ["open", "proprietary"], "first": 0, "last": 0},
    {"id": 0x2300, "name": "Hopper", "flavours": ["open", "proprietary"], "first": 525, "last": 0},
    {"id": 0x2400, "name": "Ampere", "flavours": ["open", "proprietary"], "first": 0, "last": 0},
    {"id": 0x2680, "name": "Ada", "flavours": ["open", "proprietary"], "first": 525, "last": 0},
    {"id": 0x2900, "name": "Blackwell or newer", "flavours": ["open"], "first": 570, "last": 0},
]
# GH200 is a Hopper, but hangs on a Grace CPU: only the open modules know that.
GRACE_HOPPER = {0x2342, 0x2345, 0x2348}


def generation(device: str) -> dict[str, Any]:
    """The generation of a GPU by its device id, such as 0x2330."""
    number = int(device, 16)
    found = [entry for entry in GENERATIONS if entry["id"] <= number][-1]
    if number in GRACE_HOPPER:
        return {**found, "name": "Grace Hopper", "flavours": ["open"]}
    return found


def devices(root: Path = ROOT) -> list[dict[str, str]]:
    """NVIDIA's GPUs and NVSwitches, by address. Sound and USB controllers of a graphics card are left out."""
    found = []
    for path in sorted((root / "sys/bus/pci/devices").glob("*"), key=ENTRY_NAME):
        kind = KINDS.get(read(path / "class").strip()[:6], "")
        if not kind or read(path / "vendor").strip() != VENDOR:
            continue
        try:
            driver = (path / "driver").readlink().name
        except OSError:
            driver = ""
        found.append({"address": path.name, "device": read(path / "device").strip(), "kind": kind, "driver": driver})
    return found


def fabric_bridges(root: Path = ROOT) -> list[str]:
    """
    ConnectX-7 devices that lead to NVSwitches: on HGX B200 and newer the switches themselves are not on the PCI bus.

    Such a one says SW_MNG in its vital product data; nvidia-fabricmanager-start.sh of the vendor looks for the same.
    """
    found = []
    for path in sorted((root / "sys/class/infiniband").glob("*"), key=ENTRY_NAME):
        try:
            if b"SW_MNG" in (path / "device/vpd").read_bytes():
                found.append(path.name)
        except OSError:
            continue
    return found
