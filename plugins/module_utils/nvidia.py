"""
What a host has of NVIDIA: devices, kernel modules, packages, services, and what nvidia-smi says. Only looked at, never changed.

Everything is read below a root and from programs that are handed in, so recorded machines test it. The files that the kernel shows (/sys,
/proc, /dev) and those that packages bring have a root each: a test host gets devices that its machine does not have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ansible_collections.gpufleet.llm.plugins.module_utils import host, nvidia_pci
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu import (
    NVIDIA_SMI_QUERY,
    NVIDIA_SMI_XML,
    parse_nvidia_smi_full,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.host import ROOT

# Seconds. nvidia-smi without persistence mode wakes every GPU, some seconds each.
NVIDIA_SMI_TIMEOUT = 90
TIMEOUT = 20

# Packages of the driver, whoever made them: not of the container toolkit, of CUDA's toolkit or of DCGM, which have versions of their own.
DRIVER_PACKAGE = re.compile(
    r"nvidia-(open|driver|headless|dkms|kernel|utils|compute-utils|firmware|fabricmanager|persistenced|modprobe|smi|imex|settings"
    r"|alternative|legacy-check|support|suspend-common|opencl-icd|vulkan|egl|vdpau|xconfig|prime)\b"
    r"|libnvidia-(?!container)|libcuda1$|libnvcuvid1$|libnvoptix1$|libnvsdm|cuda-drivers|nvlsm$|nvlink5"
    r"|linux-(modules|objects|signatures)-nvidia-\d|xserver-xorg-video-nvidia|firmware-nvidia-gsp"
)
# The kernel of a host that moves together with prebuilt modules: its metapackages, whose names hold no version.
KERNEL_PACKAGE = re.compile(
    r"linux-(image|headers|modules-extra)?-?(generic|lowlatency|virtual|aws|azure|gcp|gke|oracle|kvm|ibm|nvidia)[a-z0-9.-]*$"
)
OTHER_PACKAGE = re.compile(
    r"cuda-keyring$|dkms$|linux-headers-|linux-image-|linux-modules-\d|mokutil$|nvidia-container-toolkit$|datacenter-gpu-manager"
)
# Of several libraries the one that nvidia-smi and CUDA programs talk to the module with.
LIBRARIES = (
    "usr/lib/*-linux-gnu/libnvidia-ml.so.*.*",
    "usr/lib64/libnvidia-ml.so.*.*",
    "usr/local/nvidia/lib64/libnvidia-ml.so.*.*",
    "usr/lib/*-linux-gnu/nvidia/current/libnvidia-ml.so.*.*",
)
# The packages whose version is that of the driver in use, the best first: Ubuntu and NVIDIA, then Debian.
USERSPACE = ("libnvidia-compute", "libcuda1", "libnvidia-ml1", "nvidia-utils", "nvidia-smi")
ADDED = "etc/apt/sources.list.d/vllm-fleet-debian.sources"
MARKER = "etc/apt/preferences.d/50-vllm-fleet-nvidia"
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


class Look:
    """One look at a host."""

    def __init__(self, start: Start, root: Path = ROOT, hardware: Path = ROOT) -> None:
        self.start = start
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
        devices = nvidia_pci.devices(self.hardware)
        found: dict[str, Any] = {
            "distribution": system["distribution"],
            "release": system["release"],
            "architecture": system["architecture"],
            "container": host.container(self.hardware),
            "devices": [
                {
                    **device,
                    **({"generation": nvidia_pci.generation(device["device"])} if device["kind"] == "gpu" else {}),
                }
                for device in devices
            ],
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
            "ours": (self.root / MARKER).exists(),
            "repositories": self.repositories(),
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

    def repositories(self) -> list[str]:
        """Files of apt that name NVIDIA's CUDA repository or a mirror of it."""
        directory = self.root / "etc/apt"
        files = [directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))]
        wanted = re.compile(r"^(?!\s*#).*compute/cuda/repos/", re.MULTILINE)
        return [
            f"/{path.relative_to(self.root)}"
            for path in files
            if path.suffix in (".list", ".sources") and wanted.search(read(path))
        ]

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
        for process in host.processes(proc):
            try:
                descriptors = [os.readlink(entry.path) for entry in os.scandir(f"{proc}/{process}/fd")]  # noqa: PTH115 - it is a name
            except OSError:
                continue
            if any(DEVICE_NODE.search(name) for name in descriptors):
                unit = host.unit_of(read(proc / process / "cgroup"))
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


def module_names(distribution: str) -> list[str]:
    """What the file of the kernel module is called. Debian's own packages rename it, and modprobe has a rule; modinfo knows none."""
    return ["nvidia", *(["nvidia-current", "nvidia-current-open"] if distribution == "Debian" else [])]


def version_key(version: str) -> list[tuple[int, int, str]]:
    """For sorting releases of kernels and versions of drivers: numbers as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|[a-z]+", version)]


def upstream(version: str) -> str:
    """The version of the driver in the version of a package: 580.159.03 of 580.159.03-0ubuntu0.24.04.1."""
    return version.rpartition(":")[2].partition("-")[0]


def parse_packages(status: str) -> dict[str, dict[str, str]]:
    """The packages that have to do with the driver, from dpkg's status file: version, state, wanted state, maintainer."""
    found = {}
    for paragraph in status.split("\n\n"):
        name = field(paragraph, "Package")
        if not (DRIVER_PACKAGE.match(name) or OTHER_PACKAGE.match(name) or KERNEL_PACKAGE.match(name)):
            continue
        words = field(paragraph, "Status").split()
        architecture = field(paragraph, "Architecture")
        if len(words) != 3 or (architecture == "i386" and name in found):
            continue  # a 32-bit library beside the real one
        found[name] = {
            "version": field(paragraph, "Version"),
            "state": words[2],
            "wanted": words[0],
            "maintainer": field(paragraph, "Maintainer"),
        }
    return found


def field(paragraph: str, name: str) -> str:
    """One field of a paragraph of dpkg's status file."""
    lines = f"\n{paragraph}\n"
    begin = lines.find(f"\n{name}: ")
    return lines[begin + len(name) + 3 : lines.find("\n", begin + 1)].strip() if begin >= 0 else ""


def tells_origin(name: str) -> bool:
    """Whether a package belongs to the driver proper. Small helpers exist everywhere at versions of their own."""
    helpers = r"nvidia-(settings|modprobe|persistenced|prime|alternative|legacy-check|support|xconfig|egl|vulkan|vdpau|opencl)|libnvidia-egl|nvlsm|libnvsdm"
    return bool(DRIVER_PACKAGE.match(name)) and not re.match(helpers, name) and "pinning" not in name


def package_origin(name: str, entry: Mapping[str, str], distribution: str) -> str:
    """
    Who made a package of the driver.

    Ubuntu's carry the release after `ubuntu0` (580.159.03-0ubuntu0.24.04.1), or are built for a kernel; NVIDIA's end in -0ubuntu1, -1ubuntu1 or -1.
    On Debian both are called alike, and the maintainer tells: cudatools@nvidia.com is NVIDIA's repository.
    """
    if "@nvidia.com" in entry["maintainer"]:
        return "nvidia"
    if name.startswith("linux-") or re.search(r"ubuntu0[.~]", entry["version"]) or "-server" in name:
        return "ubuntu"
    if distribution == "Debian":
        return "debian"
    return "nvidia" if re.search(r"-(0ubuntu1|1ubuntu1|1)$", entry["version"]) else "ubuntu"


def userspace_version(packages: Mapping[str, Mapping[str, str]]) -> str:
    """Version of the installed libraries, by their packages."""
    for prefix in USERSPACE:
        versions = [
            upstream(entry["version"])
            for name, entry in packages.items()
            if (name == prefix or name.startswith(f"{prefix}-"))
            and entry["state"] not in ("config-files", "not-installed")
        ]
        # A transitional package has no library: the highest is the one that does.
        if versions:
            return max(versions, key=version_key)
    return ""


def parse_modinfo(text: str) -> dict[str, str]:
    """Version, flavour, signer and kind of a module on disk, from `modinfo nvidia`."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    if not fields.get("version"):
        return {}
    path = fields.get("filename", "")
    return {
        "version": fields["version"],
        # The open modules are under two licences, the proprietary ones under NVIDIA's.
        "flavour": "open" if "GPL" in fields.get("license", "") else "proprietary",
        "signer": fields.get("signer", ""),
        "kind": "dkms" if "/dkms/" in path else "prebuilt" if re.search(r"/kernel/nvidia-\d", path) else "other",
    }


def parse_units(text: str) -> dict[str, dict[str, str]]:
    """The units that are there, from SHOW_UNITS: what they do now, and whether they start with the host."""
    found = {}
    for paragraph in text.split("\n\n"):
        values = dict(line.split("=", 1) for line in paragraph.splitlines() if "=" in line)
        if values.get("Id") and values.get("LoadState") not in ("not-found", None):
            found[values["Id"]] = {"active": values.get("ActiveState", ""), "enabled": values.get("UnitFileState", "")}
    return found


def names_of(entries: Iterable[Mapping[str, Any]]) -> str:
    """Processes in words: unit or program, each once."""
    return ", ".join(dict.fromkeys(str(entry["unit"] or entry["program"]) for entry in entries))
