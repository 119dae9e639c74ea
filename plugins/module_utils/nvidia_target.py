# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Which NVIDIA driver the variables ask for on a host: source, branch, flavour and packages. What cannot work is refused."""

from __future__ import annotations

import re
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia import version_key
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_found import SOURCES, Found, gpus

# The kernels that a release of Ubuntu came with. A newer generic one is its hardware enablement kernel.
UBUNTU_KERNELS = {"22.04": "5.15", "24.04": "6.8", "26.04": "7.0"}


class RefusedError(Exception):
    """Something that this role must not do: why, and what a person can do."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason} {advice}")
        self.reason, self.advice = reason, advice


class OutdatedError(RefusedError):
    """What fresh package lists may change."""


def aim(found: Found, wanted: Found) -> dict[str, Any]:
    """Source, branch, flavour and packages that the variables ask for on this host. Refuses what cannot work."""
    source = source_for(found, wanted)
    entry, version = wanted["sources"][source], wanted["version"]
    branch = branch_for(found, wanted, source)
    kernel = kernel_flavour(found, wanted)
    flavour = flavour_for(found, wanted, int(branch))
    secure(found, wanted, branch, version)
    if found["secure_boot"] and not entry["signed"] and not wanted["mok_enrolled"]:
        raise RefusedError(
            f"Secure Boot is on, and the modules of {SOURCES[source]} are built on the host (DKMS): the firmware does not know their key.",
            "Take Ubuntu's archive, whose modules are signed; or enroll DKMS's key at the console (mokutil --import) and set "
            "nvidia_driver_mok_enrolled: true; or switch Secure Boot off.",
        )
    if found["fabric_bridges"] and wanted["fabric_manager"] and not entry["bridges"]:
        raise RefusedError(
            f"The NVSwitches of this host are behind ConnectX-7 bridges (HGX B200 and newer). They need nvlsm, which {SOURCES[source]} does not have.",
            "Set nvidia_driver_source: nvidia.",
        )
    names = next(part for part in entry["packages"] if int(branch) >= part["from"])
    fill = {"branch": branch, "version": version or branch, "open": "-open" if flavour == "open" else ""}
    fill.update(kernel=kernel, running=found["kernel"]["running"])
    names_wanted = [name.format(**fill) for name in [*names["first"], *names[flavour]]]
    # Of an exact version there may be modules for the running kernel only: nvidia_fitting finds out.
    kernels = [name for name in names_wanted if name.startswith("linux-modules-nvidia-")]
    others = [name for name in names_wanted if name not in kernels]
    return {
        "source": source, "branch": branch, "version": version, "flavour": flavour,
        "pin": [name.format(**fill) for name in names.get("pin", [])],
        "names": others if version else names_wanted,
        "packages": [name + wildcard(name, branch, version, entry["versioned"]) for name in others],
        "optional": [names["running"].format(**fill), *kernels],
        "required": [] if version else kernels,
    }  # fmt: skip


def source_for(found: Found, wanted: Found) -> str:
    """Where the driver comes from."""
    source = wanted["source"]
    if source == "auto":
        source = found["origin"] if found["origin"] in wanted["sources"] else ""
        source = source or {"Ubuntu": "ubuntu"}.get(found["distribution"], "nvidia")
    entry = wanted["sources"][source]
    if found["distribution"] not in entry["distributions"]:
        raise RefusedError(
            f"nvidia_driver_source is {source}, but the host runs {found['distribution']}.",
            f"Take {'nvidia' if source != 'nvidia' else 'another one'}, or auto.",
        )
    if found["origin"] and found["origin"] != source:
        raise RefusedError(
            f"The driver is from {SOURCES[found['origin']]}, and {SOURCES[source]} is wanted. The two must not be mixed.",
            "Drain the host, remove the driver (nvidia_driver_state: absent), and run again with the new source.",
        )
    return str(source)


def branch_for(found: Found, wanted: Found, source: str) -> str:
    """The branch, one that the source has."""
    entry, version = wanted["sources"][source], wanted["version"]
    entry = {**entry, **entry.get("releases", {}).get(f"{found['distribution']}-{found['release']}", {})}
    own = entry.get("branches", {}).get(found["release"], "")
    branch = wanted["branch"] if wanted["branch"] != "auto" else version.partition(".")[0] or own or entry["branch"]
    if version and version.partition(".")[0] != branch:
        raise RefusedError(
            f"nvidia_driver_version is {version}, which is not of the branch {branch}.",
            "Let nvidia_driver_branch be auto.",
        )
    if own and branch != own:
        raise RefusedError(
            f"{SOURCES[source]} has the branch {own} for {found['distribution']} {found['release']}, not {branch}.",
            "Set nvidia_driver_source: nvidia for another branch.",
        )
    if not own and int(branch) < entry["first_branch"]:
        raise RefusedError(
            f"{SOURCES[source]} is not known to have the branch {branch} for {found['distribution']} {found['release']}.",
            f"The oldest is {entry['first_branch']}: nvidia_driver_branch, or auto.",
        )
    return str(branch)


def branch_is_there(found: Found, wanted: Found, target: Found) -> None:
    """Refuse a branch that the source does not have, where apt knows the source."""
    source, branch = target["source"], target["branch"]
    named_by = wanted["sources"][source].get("named_by", "")
    pattern = re.compile(re.escape(named_by).replace(r"\{branch\}", r"(\d{3}(?:\.[\d.]+)?)"))
    named = {match[1] for match in map(pattern.fullmatch, found["available"]) if match}
    branches = sorted({one.partition(".")[0] for one in named})
    if branches and branch not in branches:
        raise OutdatedError(
            f"{SOURCES[source]} has no branch {branch} for {found['distribution']} {found['release']}, by the package lists of the host.",
            f"It has {', '.join(branches)}: nvidia_driver_branch.",
        )
    versions = sorted((one for one in named if one.startswith(f"{branch}.")), key=version_key)
    if versions and target["version"] and target["version"] not in versions:
        raise OutdatedError(
            f"{SOURCES[source]} has no driver {target['version']} for {found['distribution']} {found['release']}, by the package lists of the host.",
            f"Of the branch {branch} it has {', '.join(versions)}: nvidia_driver_version.",
        )


def wildcard(name: str, branch: str, version: str, versioned: bool) -> str:
    """What apt is asked for beside the name. Packages of a kernel and small helpers have versions of their own."""
    if not versioned or name.startswith(("linux-", "dkms", "firmware-")) or "pinning" in name:
        return ""
    return f"={version}-*" if version else f"={branch}.*"


def kernel_flavour(found: Found, wanted: Found) -> str:
    """The kernel by the name of its metapackages: generic, generic-hwe-24.04, aws, amd64, cloud-amd64."""
    if wanted["kernel_flavour"]:
        return str(wanted["kernel_flavour"])
    running = found["kernel"]["running"]
    flavour = re.sub(r"^[0-9][^-]*(-\d+)?-?", "", running)
    if not flavour:
        raise RefusedError(
            f"The running kernel {running} is none of the distribution's, so there are no modules and no headers for it.",
            "Boot a kernel of the distribution, or name its flavour in nvidia_driver_kernel_flavour.",
        )
    if found["distribution"] == "Ubuntu" and flavour in ("generic", "lowlatency"):
        enablement = f"{flavour}-hwe-{found['release']}"
        if any(f"linux-{kind}{enablement}" in found["packages"] for kind in ("", "image-")):
            return enablement
        if any(f"linux-{kind}{flavour}" in found["packages"] for kind in ("", "image-")):
            return flavour
        came_with = UBUNTU_KERNELS.get(found["release"], "")
        if came_with and not running.startswith(f"{came_with}."):
            return enablement
    return flavour


def flavour_for(found: Found, wanted: Found, branch: int) -> str:
    """Open or proprietary modules, by the devices."""
    asked, possible = wanted["flavour"], {"open", "proprietary"}
    for device in gpus(found):
        kind = device["generation"]
        name = f"{device['address']} ({kind['name']}, {device['device']})"
        if not kind["flavours"]:
            raise RefusedError(
                f"The GPU {name} is older than every driver that still gets fixes.",
                "Take it out, or leave this role out.",
            )
        if kind["last"] and branch > kind["last"]:
            raise RefusedError(
                f"The GPU {name} is not driven by the branch {branch} any more.",
                f"The last one for it is {kind['last']}: nvidia_driver_branch.",
            )
        if branch < kind["first"]:
            raise RefusedError(
                f"The GPU {name} is not known to the branch {branch} yet.",
                f"It needs {kind['first']} or newer: nvidia_driver_branch.",
            )
        if asked != "auto" and asked not in kind["flavours"]:
            raise RefusedError(
                f"The GPU {name} does not work with the {asked} kernel modules.",
                f"Set nvidia_driver_flavour: {kind['flavours'][0]}, or auto.",
            )
        possible &= set(kind["flavours"])
    if not possible:
        raise RefusedError(
            "One GPU of this host needs the open kernel modules and another one the proprietary ones; a host has only one of them.",
            "Put them into different hosts.",
        )
    if asked != "auto":
        return str(asked)
    return "open" if "open" in possible else "proprietary"


def secure(found: Found, wanted: Found, branch: str, version: str) -> None:
    """Refuse a branch without fixes and a version below its floor."""
    floor = wanted["floors"].get(branch, "")
    if wanted["allow_insecure"] or (floor and (not version or version_key(version) >= version_key(floor))):
        return
    alternatives = ", ".join(sorted(wanted["floors"]))
    if not floor:
        raise RefusedError(
            f"The branch {branch} gets no security fixes any more, as far as nvidia_driver_floors knows.",
            f"Take one of {alternatives}; or set nvidia_driver_allow_insecure: true.",
        )
    raise RefusedError(
        f"nvidia_driver_version is {version}, but security fixes of the branch {branch} came with {floor}.",
        f"Take {floor} or newer; or set nvidia_driver_allow_insecure: true.",
    )
