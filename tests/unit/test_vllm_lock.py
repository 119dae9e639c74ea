"""The hash locks that the role brings: what they pin fits together."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import lock as lock_tool

ROOT = Path(__file__).resolve().parents[2]
ALL = ROOT / "roles/vllm/files/locks"
LOCKS = sorted(ALL.glob("*-cuda*.txt"))
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


@pytest.mark.parametrize(
    "plain", [lock for lock in sorted(ALL.glob("*.txt")) if "+" not in lock.name], ids=lambda lock: lock.name
)
def test_there_is_a_lock_with_audio_that_differs_by_its_packages_only(plain: Path) -> None:
    without, sound = pins(plain), pins(plain.with_name(f"{plain.stem}+audio.txt"))
    assert {name: version for name, version in sound.items() if name in without} == without
    assert set(sound) - set(without) == {"av", "scipy", "soundfile", "soxr"}


def test_an_extra_that_the_package_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """uv only warns, and would lock what is there without it."""
    asked: list[str] = []

    def run(_command: list[str], **options: str) -> SimpleNamespace:
        asked.append(options["input"])
        return SimpleNamespace(
            returncode=0, stderr="warning: The package `vllm==0.33.0` does not have an extra named `nope`\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"EXTRAS names nope, but vllm 0\.33\.0 has no such extra"):
        lock_tool.compile_lock("0.33.0", "cuda", "3.11", "vllm", [], extras=["audio", "nope"])
    assert asked[0].startswith("vllm[audio,nope]==0.33.0; ")
