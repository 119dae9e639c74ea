# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the packages, modules and units of an NVIDIA driver are called, what their versions say, and what programs say of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import systemctl

# Packages of the driver, whoever made them: not of the container toolkit, of CUDA's toolkit or of DCGM, which have versions of their own.
# Headers (libnvidia-ml-dev comes with compilers) are none: nothing runs by them.
DRIVER_PACKAGE = re.compile(
    r"(?!.*-dev$)(?:nvidia-(open|driver|headless|dkms|kernel|utils|compute-utils|firmware|fabricmanager|persistenced|modprobe|smi|imex|settings"
    r"|alternative|legacy-check|support|suspend-common|opencl-icd|vulkan|egl|vdpau|xconfig|prime)\b"
    r"|libnvidia-(?!container)|libcuda1$|libnvcuvid1$|libnvoptix1$|libnvsdm|cuda-drivers|nvlsm$|nvlink5"
    r"|linux-(modules|objects|signatures)-nvidia-\d|xserver-xorg-video-nvidia|firmware-nvidia-gsp)"
)
# The kernel of a host that moves together with prebuilt modules: its metapackages, whose names hold no version.
KERNEL_PACKAGE = re.compile(
    r"linux-(image|headers|modules-extra)?-?(generic|lowlatency|virtual|aws|azure|gcp|gke|oracle|kvm|ibm|nvidia)[a-z0-9.-]*$"
)
OTHER_PACKAGE = re.compile(
    r"cuda-keyring$|dkms$|linux-headers-|linux-image-|linux-modules-\d|mokutil$|nvidia-container-toolkit$|datacenter-gpu-manager"
)
# The packages whose version is that of the driver in use, the best first: Ubuntu and NVIDIA, then Debian.
USERSPACE = ("libnvidia-compute", "libcuda1", "libnvidia-ml1", "nvidia-utils", "nvidia-smi")


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
    return {
        name: {"active": unit.get("ActiveState", ""), "enabled": unit.get("UnitFileState", "")}
        for name, unit in systemctl.by_unit(text).items()
    }


def names_of(entries: Iterable[Mapping[str, Any]]) -> str:
    """Processes in words: unit or program, each once."""
    return ", ".join(dict.fromkeys(str(entry["unit"] or entry["program"]) for entry in entries))
