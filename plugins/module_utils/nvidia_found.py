# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the findings about the NVIDIA devices of a host mean, for everything that decides by them. nvidia_host.py finds; here nobody is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Found = Mapping[str, Any]
SOURCES = {
    "ubuntu": "Ubuntu's archive",
    "nvidia": "NVIDIA's repository",
    "debian": "Debian's archive",
    "mixed": "more than one source",
    "runfile": "NVIDIA's .run installer",
    "outside": "outside of the package manager",
}
# Units that hold the devices and may be stopped and started again; everything else is somebody's work.
OWN_UNITS = {
    "nvidia-persistenced.service",
    "nvidia-fabricmanager.service",
    "nvidia-dcgm.service",
    "nvidia-dcgm-exporter.service",
}


def gpus(found: Found) -> list[Mapping[str, Any]]:
    """The GPUs that this host drives itself. Those that it hands to guests are none of its own."""
    return [device for device in found["devices"] if device["kind"] == "gpu" and device["driver"] != "vfio-pci"]


def expected(found: Found, wanted: Found) -> int:
    """How many GPUs nvidia-smi has to show."""
    asked = int(wanted["expected_gpus"])
    if asked >= 0:
        return asked
    return len(gpus(found)) or len(found["smi"]["gpus"])


def workers(found: Found) -> list[Mapping[str, Any]]:
    """The processes on the GPUs that are somebody's work."""
    return [user for user in found["users"] if user["unit"] not in OWN_UNITS]


def fabric_wanted(found: Found, wanted: Found) -> bool:
    """Whether NVSwitches are there for this host to look after. In a guest whose machine does it they are not visible."""
    switches = [
        device for device in found["devices"] if device["kind"] == "nvswitch" and device["driver"] != "vfio-pci"
    ]
    return bool(wanted["fabric_manager"] and (switches or found["fabric_bridges"]))
