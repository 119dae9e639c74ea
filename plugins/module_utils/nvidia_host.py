# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""
What a host has of NVIDIA: devices, kernel modules, packages, services, and what nvidia-smi says. Only looked at, never changed.

Everything is read below a root and from programs that are handed in, so recorded machines test it. The files that the kernel shows (/sys,
/proc, /dev) and those that packages bring have a root each: a test host gets devices that its machine does not have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ansible_collections.gpufleet.llm.plugins.module_utils import host, host_sockets, nvidia_pci
from ansible_collections.gpufleet.llm.plugins.module_utils.apt_host import Apt
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu import (
    NVIDIA_SMI_QUERY,
    NVIDIA_SMI_XML,
    parse_nvidia_smi_full,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.host import ROOT
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia import (
    module_names,
    package_origin,
    parse_modinfo,
    parse_packages,
    parse_units,
    tells_origin,
    userspace_version,
    version_key,
)

# Seconds. nvidia-smi without persistence mode wakes every GPU, some seconds each.
NVIDIA_SMI_TIMEOUT = 90
TIMEOUT = 20

# Of several libraries the one that nvidia-smi and CUDA programs talk to the module with.
LIBRARIES = (
    "usr/lib/*-linux-gnu/libnvidia-ml.so.*.*",
    "usr/lib64/libnvidia-ml.so.*.*",
    "usr/local/nvidia/lib64/libnvidia-ml.so.*.*",
    "usr/lib/*-linux-gnu/nvidia/current/libnvidia-ml.so.*.*",
)
ADDED = "etc/apt/sources.list.d/vllm-fleet-debian.sources"
# Apart from the settings, which whoever looks after the host may change or take away. The second is that of hosts from before there was a mark.
MARKERS = ("var/lib/vllm-fleet/nvidia-driver", "etc/apt/preferences.d/50-vllm-fleet-nvidia")
# How files of apt name NVIDIA's CUDA repository.
REPOSITORIES = ("compute/cuda/repos/",)
UNITS = [
    "nvidia-persistenced.service", "nvidia-fabricmanager.service", "nvidia-dcgm.service", "vllm-fleet-nvidia-nodes.service",
]  # fmt: skip
SHOW_UNITS = ["systemctl", "show", "--property=Id,LoadState,ActiveState,UnitFileState", *UNITS]
EFI = "sys/firmware/efi/efivars"
SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
# `mokutil --disable-validation` leaves Secure Boot on and lets any module in.
UNVALIDATED = "MokSBStateRT-605dab50-e046-4300-abb6-3dd810dd8b23"
DEVICE_NODE = re.compile(r"/dev/nvidia(\d+|ctl|-uvm|-uvm-tools|-caps/.*|-nvswitch\w*|-modeset)$")


class Running(Protocol):
    """A program that was started."""

    def output(self, timeout: float) -> tuple[bool, str]:
        """Whether it went well, and what it printed or complained of."""


Start = Callable[[list[str]], Running]


def unasked(command: list[str]) -> tuple[int, str, str]:
    """No program is asked about files of apt."""
    return 1, "", command[0]


class Look:
    """One look at a host."""

    def __init__(
        self, start: Start, root: Path = ROOT, hardware: Path = ROOT, named: Sequence[str] = REPOSITORIES
    ) -> None:
        self.start = start
        self.named = named
        self.root = root
        self.hardware = hardware

    def findings(self) -> dict[str, Any]:
        """Everything that the decision goes by."""
        # They take longest, so the rest is read meanwhile.
        query, xml = self.start(NVIDIA_SMI_QUERY), self.start(NVIDIA_SMI_XML)
        units = self.start(SHOW_UNITS)
        system = host.system(self.root)
        running = read(self.hardware / "proc/sys/kernel/osrelease").strip()
        kernels = self.kernels(running)
        modules = {
            kernel: [self.start(["modinfo", "-k", kernel, name]) for name in module_names(system["distribution"])]
            for kernel in kernels
        }
        packages = parse_packages(read(self.root / "var/lib/dpkg/status"))
        devices = [
            {**device, **({"generation": nvidia_pci.generation(device["device"])} if device["kind"] == "gpu" else {})}
            for device in nvidia_pci.devices(self.hardware)
        ]
        apt = Apt(unasked, root=self.root)
        alone, mixed = apt.foreign(self.named, [])
        found: dict[str, Any] = {
            "distribution": system["distribution"],
            "release": system["release"],
            "architecture": system["architecture"],
            "container": host.container(self.hardware),
            "devices": devices,
            "fabric_bridges": nvidia_pci.fabric_bridges(self.hardware),
            "kernel": {"running": running, "newest": kernels[-1] if kernels else running},
            "loaded": self.loaded(),
            "nouveau": (self.hardware / "sys/module/nouveau").exists(),
            "packages": {name: entry["version"] for name, entry in packages.items() if entry["state"] == "installed"},
            "unfinished": sorted(
                name
                for name, entry in packages.items()
                if entry["state"] not in ("installed", "config-files", "not-installed")
            ),
            "holds": sorted(name for name, entry in packages.items() if entry["wanted"] == "hold"),
            "added_archives": re.findall(r"^URIs: (\S+)", read(self.root / ADDED), re.MULTILINE),
            "available": {},  # the action asks apt when something is to be installed
            "userspace": userspace_version(packages) or self.library_version(),
            "origin": self.origin(packages, system["distribution"]),
            "image": self.image(),
            "ours": any((self.root / marker).exists() for marker in MARKERS),
            "repositories": sorted([*alone, *mixed]),
            "mixed_repositories": mixed,
            "signed_by": apt.signed_by([f"/{ADDED}"]),
            "secure_boot": self.secure_boot(),
            "nodes": {
                "uvm": (self.hardware / "dev/nvidia-uvm").exists(),
                "control": (self.hardware / "dev/nvidiactl").exists(),
            },
            "users": self.users(),
            "reboot_required": (self.root / "run/reboot-required").exists(),
        }
        found["units"] = parse_units(units.output(TIMEOUT)[1])
        found["modules"] = {}
        for kernel, started in modules.items():
            for good, text in [program.output(TIMEOUT) for program in started]:
                if good and kernel not in found["modules"] and (module := parse_modinfo(text)):
                    found["modules"][kernel] = module
        found["smi"] = self.smi(query, xml)
        return found

    def kernels(self, running: str) -> list[str]:
        """The running kernel and the newest that is installed, which is the one that the next boot takes."""
        images = [path.name.removeprefix("vmlinuz-") for path in (self.root / "boot").glob("vmlinuz-*")]
        newest = sorted(images, key=version_key)[-1:]
        return [running] if newest in ([], [running]) else [running, *newest]

    def loaded(self) -> dict[str, str]:
        """Version and flavour of the module that the kernel has in use."""
        text = read(self.hardware / "proc/driver/nvidia/version")
        version = read(self.hardware / "sys/module/nvidia/version").strip()
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
        if not version and found:
            version = found[1]
        flavour = ("open" if "Open Kernel Module" in text else "proprietary") if text else ""
        return {"version": version, "flavour": flavour}

    def library_version(self) -> str:
        """Version of the libraries where no package has them."""
        for pattern in LIBRARIES:
            for path in sorted(self.root.glob(pattern)):
                if found := re.search(r"\.so\.(\d{3}\.\d+(?:\.\d+)?)$", path.name):
                    return found[1]
        return ""

    def origin(self, packages: Mapping[str, Mapping[str, str]], distribution: str) -> str:
        """Where the driver came from: ubuntu, nvidia, debian, mixed, runfile, outside (a container's machine, an image), or nothing."""
        found = {
            package_origin(name, entry, distribution)
            for name, entry in packages.items()
            if entry["state"] not in ("config-files", "not-installed") and tells_origin(name)
        }
        # NVIDIA's installer leaves its uninstaller; no package has one.
        if (self.root / "usr/bin/nvidia-uninstall").exists():
            return "runfile"
        if found:
            return found.pop() if len(found) == 1 else "mixed"
        return "outside" if self.loaded()["version"] or self.library_version() else ""

    def image(self) -> str:
        """The image of a vendor that brings a driver of its own."""
        found = host.os_release(read(self.root / "etc/dgx-release"))
        return " ".join(filter(None, [found.get("DGX_NAME"), found.get("DGX_SWBUILD_VERSION")])) if found else ""

    def secure_boot(self) -> bool:
        """Whether the kernel takes signed modules only. The variables begin with four bytes of attributes."""

        def last(name: str) -> int:
            try:
                return (self.hardware / EFI / name).read_bytes()[-1]
            except (OSError, IndexError):
                return 0

        return last(SECURE_BOOT) == 1 and last(UNVALIDATED) != 1

    def users(self) -> list[dict[str, Any]]:
        """The processes that hold NVIDIA's devices: while there are any, the module cannot be replaced."""
        proc = self.hardware / "proc"
        found = []
        for process in host_sockets.processes(proc):
            try:
                descriptors = [os.readlink(entry.path) for entry in os.scandir(f"{proc}/{process}/fd")]  # noqa: PTH115 - it is a name
            except OSError:
                continue
            if any(DEVICE_NODE.search(name) for name in descriptors):
                unit = host_sockets.unit_of(read(proc / process / "cgroup"))
                found.append({"pid": int(process), "program": read(proc / process / "comm").strip(), "unit": unit})
        return found

    def smi(self, query: Running, xml: Running) -> dict[str, Any]:
        """What nvidia-smi says, or why it does not."""
        good, answer = query.output(NVIDIA_SMI_TIMEOUT)
        document = xml.output(NVIDIA_SMI_TIMEOUT)[1] if good else ""
        gpus = parse_nvidia_smi_full(answer, document) if good else []
        if gpus:
            error = ""
        elif good:
            error = answer.strip() or "nvidia-smi shows no GPU"
        else:
            error = "" if "cannot be run" in answer else answer.strip()
        return {"present": good or "cannot be run" not in answer, "error": error, "gpus": gpus}
