"""The hash locks that the role brings: what they pin fits together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "roles/vllm/files/locks").glob("*-cuda.txt"))
# nvcc and what it includes and runs come from one CUDA release, or it ends with "CUDA compiler and CUDA toolkit headers are incompatible".
ONE_RELEASE = (
    "nvidia-cuda-runtime",
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-cccl",
    "nvidia-cuda-nvrtc",
)


def pins(lock: Path) -> dict[str, str]:
    """Distribution -> version, of those for the machines that vLLM's CUDA wheels are for."""
    rows = re.findall(r"^([a-z0-9-]+)==(\S+)((?: ;[^\\\n]*)?)", lock.read_text(), re.MULTILINE)
    return {name: version for name, version, marker in rows if "platform_machine == 's390x'" not in marker}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_the_compiler_of_a_lock_fits_its_headers(lock: Path) -> None:
    found = pins(lock)
    releases = {name: ".".join(found[name].split(".")[:2]) for name in ONE_RELEASE if name in found}
    assert "nvidia-cuda-runtime" in releases and "nvidia-cuda-nvcc" in releases
    assert len(set(releases.values())) == 1, releases
    assert set(releases.values()) == {".".join(found["cuda-toolkit"].split(".")[:2])}
