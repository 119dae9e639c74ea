#!/usr/bin/env python3
"""Records a machine in the format of README.md: record.py DIRECTORY, as root. Needs nothing but Python and what the machine has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EFI = Path("/sys/firmware/efi/efivars")
FILES = [
    "/etc/os-release", "/etc/dgx-release", "/proc/sys/kernel/osrelease", "/proc/driver/nvidia/version", "/sys/module/nvidia/version",
    "/sys/module/nouveau/refcnt", "/run/systemd/container",
]  # fmt: skip
PRESENT = [
    "/usr/bin/nvidia-uninstall",
    "/dev/nvidiactl",
    "/dev/nvidia-uvm",
    "/etc/apt/preferences.d/50-vllm-fleet-nvidia",
]
UNITS = [
    "nvidia-persistenced.service", "nvidia-fabricmanager.service", "nvidia-dcgm.service", "vllm-fleet-nvidia-nodes.service",
]  # fmt: skip
QUERY = "--query-gpu=index,name,memory.total,compute_cap,driver_version,mig.mode.current"


def run(*command: str) -> tuple[bool, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"{error}\n"
    return done.returncode == 0, done.stdout if done.returncode == 0 else done.stderr or done.stdout


def devices() -> str:
    lines = []
    for path in sorted(Path("/sys/bus/pci/devices").glob("*")):
        vendor, device, kind = ((path / name).read_text().strip() for name in ("vendor", "device", "class"))
        if vendor == "0x10de":
            driver = (path / "driver").readlink().name if (path / "driver").exists() else "-"
            lines.append(f"{path.name} {vendor} {device} {kind} {driver}\n")
    return "".join(lines)


def processes() -> str:
    lines = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            links = [str(entry.readlink()) for entry in (path / "fd").iterdir()]
            nodes = sorted({link for link in links if link.startswith("/dev/nvidia")})
            name, group = (path / "comm").read_text().strip().replace(" ", "_"), (path / "cgroup").read_text()
        except OSError:
            continue
        unit = re.search(r"([^/\n]+\.(service|scope))$", group, re.MULTILINE)
        lines += [f"{path.name} {name} {unit[1] if unit else '-'} {' '.join(nodes)}\n"] if nodes else []
    return "".join(lines)


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    parts = [("file " + name, Path(name).read_text()) for name in FILES if Path(name).exists()]
    parts += [("file " + name, "") for name in PRESENT if Path(name).exists()]
    parts += [
        (f"file {path}", "")
        for path in [*Path("/boot").glob("vmlinuz-*"), *Path("/usr/lib").glob("*/libnvidia-ml.so.*.*")]
    ]
    parts += [(f"hex {path}", path.read_bytes().hex(" ") + "\n") for path in EFI.glob("SecureBoot-*")]
    parts += [("pci", devices())]
    _, packages = run("dpkg-query", "-W", "-f=${db:Status-Abbrev}|${Package}|${Version}|${Maintainer}\n")
    wanted = re.compile(r"^..\s*\|[^|]*(nvidia|cuda|nvcuvid|^linux-|linux-(image|headers|generic)|dkms)", re.MULTILINE)
    parts += [
        (
            "packages",
            "".join(line.replace(" |", "|", 1) + "\n" for line in packages.splitlines() if wanted.search(line)),
        )
    ]
    parts += [("processes", processes())]
    kernels = {os.uname().release, *(path.name.removeprefix("vmlinuz-") for path in Path("/boot").glob("vmlinuz-*"))}
    commands = [("systemctl", ["systemctl", "show", "--property=Id,LoadState,ActiveState,UnitFileState", *UNITS])]
    commands += [
        (" ".join(command), command) for kernel in sorted(kernels) for command in [["modinfo", "-k", kernel, "nvidia"]]
    ]
    for title, command in commands:
        good, text = run(*command)
        parts.append((f"{'run' if good else 'fails'} {title}", text))
    for name, command in (
        ("nvidia-smi.csv", [QUERY, "--format=csv,noheader,nounits"]),
        ("nvidia-smi.xml", ["-q", "-x"]),
    ):
        good, text = run("nvidia-smi", *command)
        if good:
            (directory / name).write_text(text)
        elif name.endswith("csv"):
            parts.append(("fails nvidia-smi", text))
    bodies = "".join(
        f"== {title}\n{body if not body or body.endswith(chr(10)) else body + chr(10)}" for title, body in parts
    )
    (directory / "host.txt").write_text(f"Recorded. Say here what is special about it.\n{bodies}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
