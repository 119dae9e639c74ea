"""What nvidia-smi says, as data."""

from __future__ import annotations

import csv
from typing import Any

NVIDIA_SMI_QUERY = [
    "nvidia-smi",
    "--query-gpu=index,name,memory.total,compute_cap,driver_version",
    "--format=csv,noheader,nounits",
]


def parse_nvidia_smi(output: str) -> list[dict[str, Any]]:
    """Parse the answer to NVIDIA_SMI_QUERY: one dict a GPU, memory in MiB. Memory that is not told (MIG, GB10) is 0."""
    gpus = []
    for row in csv.reader(output.strip().splitlines(), skipinitialspace=True):
        if len(row) != 5 or not row[0].isdigit():
            continue
        index, name, memory, capability, driver = row
        gpus.append(
            {
                "index": int(index),
                "name": name,
                "memory_mib": int(memory) if memory.isdigit() else 0,
                "compute_capability": float(capability) if capability[:1].isdigit() else 0.0,
                "driver": driver,
            }
        )
    return gpus
