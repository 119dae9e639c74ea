# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""How apt is kept to one source of the NVIDIA driver, and which packages of it a source has for a kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# The driver's packages as apt's preferences name them. Not the container toolkit's (libnvidia-container*), which is from another repository.
# Few patterns: apt compares each with all 150,000 names that it knows, whenever it is called. Names without one cost nothing.
APT_NAMES: Sequence[str] = (
    "nvidia-[!cdfntv]*", "nvidia-compute-utils*", "nvidia-d[kr]*", "nvidia-f[ai]*", "nvidia-v[du]*", "libnvidia-[!c]*", "libnvidia-cfg*", "libnvidia-com*",
    "linux-[mos]*s-nvidia-[0-9]*", "xserver-xorg-video-nvidia*", "cuda-drivers*", "libcuda1", "libnvcuvid1", "libnvoptix1", "libnvsdm", "nvlsm", "nvlink5",
    "firmware-nvidia-gsp",
)  # fmt: skip
# The origin that the Release files of the sources tell; a mirror tells the same.
APT_ORIGINS = {"nvidia": "NVIDIA", "ubuntu": "Ubuntu", "debian": "Debian", "ppa": "LP-PPA-graphics-drivers"}


def preferences(source: str, shut_out: Iterable[str] = APT_ORIGINS, version: str = "") -> str:
    """
    apt's preferences that keep the driver's packages of other sources than this one away, whatever their versions are.

    With a version, Ubuntu's packages of the driver are pinned to it: apt takes the newest of everything that a package depends on, and then
    refuses, because they depend on each other by exact version. NVIDIA's repository has packages for that (nvidia-driver-pinning-*).
    """
    others = "|".join(APT_ORIGINS[other] for other in shut_out if other != source)
    # One expression for all of them, and so one comparison.
    stanzas = [f"Package: {' '.join(APT_NAMES)}\nPin: release o=/^({others})$/\nPin-Priority: -1\n"]
    if version and source == "ubuntu":
        branch = version.partition(".")[0]
        names = f"*nvidia-*-{branch}-server* nvidia-fabricmanager-{branch} libnvidia-nscq-{branch}"
        stanzas.append(f"Package: {names}\nPin: version {version}-0ubuntu0*\nPin-Priority: 1001\n")
    return "\n".join(stanzas)


def fitting(shown: str, names: Sequence[str], version: str, required: Sequence[str] = ()) -> list[str]:
    """
    Those of the packages that a source has, as apt takes them, from what `apt-cache show` says of them.

    With a version of the driver, modules that were built for it: they say so by `nvidia-kernel-common-580-server (>= 580.159.03)`. The metapackage
    of a kernel's flavour fits when it depends on one that does.

    Modules always come with their own version: apt is told to install and not to upgrade, and would rather take away those of before.
    What is required and not there is named all the same, so that apt says so.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for paragraph in shown.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Depends): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Package") in names:
            found.setdefault(fields["Package"], []).append((fields.get("Version", ""), fields.get("Depends", "")))
    chosen: dict[str, str] = {}
    for name in names:
        for number, depends in found.get(name, []):
            on_modules = re.findall(r"(linux-modules-nvidia-\S+) \(= ([^)]+)\)", depends)
            exact = re.search(r"nvidia-kernel-common-\S+ \(>= ([^)]+)\)", depends)
            if not (exact or on_modules):
                chosen[name] = name
                break
            if (
                not version
                or (exact and exact[1] == version)
                or any(chosen.get(other) == f"{other}={what}" for other, what in on_modules)
            ):
                chosen[name] = f"{name}={number}"
                break
    return [*chosen.values(), *(name for name in required if name not in chosen)]
