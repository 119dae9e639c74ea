"""
What is to be done about the NVIDIA driver of a host: a pure function of what was found there and of the variables of the role.

Nothing here asks the host or the controller anything. What was found comes from nvidia.py, what is wanted from the role nvidia_driver, and
which packages a source has under which name is data of the role. So a table of recorded machines and variables tests it, and a run
tells what it is going to do before it does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.dpkg import newest
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia import (
    DRIVER_PACKAGE,
    KERNEL_PACKAGE,
    names_of,
    tells_origin,
    upstream,
    version_key,
)

Found = Mapping[str, Any]
SOURCES = {
    "ubuntu": "Ubuntu's archive",
    "nvidia": "NVIDIA's repository",
    "debian": "Debian's archive",
    "mixed": "more than one source",
    "runfile": "NVIDIA's .run installer",
    "outside": "outside of the package manager",
}
# Where newer versions are than in the archive that a host knows.
NEWER = {
    "ubuntu": "Have apt ask an archive that is up to date, or take another nvidia_driver_branch",
    "debian": "Have apt ask Debian's security archive, too (nvidia_driver_debian_security_url), for the proprietary modules (nvidia_driver_flavour); or take "
    "nvidia_driver_source: nvidia",
}
# Units that hold the devices and may be stopped and started again; everything else is somebody's work.
OWN_UNITS = {
    "nvidia-persistenced.service",
    "nvidia-fabricmanager.service",
    "nvidia-dcgm.service",
    "nvidia-dcgm-exporter.service",
}
# The kernels that a release of Ubuntu came with. A newer generic one is its hardware enablement kernel.
UBUNTU_KERNELS = {"22.04": "5.15", "24.04": "6.8", "26.04": "7.0"}
NODES_UNIT = "vllm-fleet-nvidia-nodes.service"
PERSISTENCED_UNIT = "nvidia-persistenced.service"
FABRIC_UNIT = "nvidia-fabricmanager.service"


class RefusedError(Exception):
    """Something that this role must not do: why, and what a person can do."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason} {advice}")
        self.reason, self.advice = reason, advice


class OutdatedError(RefusedError):
    """What fresh package lists may change."""


def decide(found: Found, wanted: Found) -> dict[str, Any]:
    """
    The decision.

    action: none (no GPU), leave, install, upgrade, remove or refuse; reason: why, in a sentence; advice: what to do when it is refused.
    source, branch, version, flavour; pin, packages and optional: what apt is asked for; downgrade: whether versions may go down.
    activate: nothing, load, reload or reboot, for a driver that is installed and not in use; blocked: why that may not be done.
    replaced: installed packages of another branch or flavour, whose place is taken.
    fabric, holds, unholds, leftovers, services: what else is not as wanted. warnings, unproved: what a person should know, and what is broken.
    disturbs: whether a driver that is there is changed or replaced in the kernel, which ends what uses it.
    outdated: whether it is refused for what apt's lists have, which may be old.
    """
    result: dict[str, Any] = {
        "action": "leave", "reason": "", "advice": "", "warnings": [], "unproved": [], "managed": False, "expected_gpus": expected(found, wanted),
        "source": "", "branch": "", "version": "", "flavour": "", "pin": [], "packages": [], "optional": [], "required": [], "replaced": [], "downgrade": False,
        "activate": "", "activate_reasons": [], "blocked": "", "fabric": [], "holds": [], "unholds": [], "leftovers": [], "services": [], "outdated": False,
    }  # fmt: skip
    try:
        if wanted["state"] == "absent":
            result.update(removal(found, wanted))
        else:
            result.update(presence(found, wanted))
    except RefusedError as error:
        outdated = isinstance(error, OutdatedError)
        result.update(action="refuse", reason=error.reason, advice=error.advice, outdated=outdated)
    if result["action"] == "leave" and wanted["state"] == "present" and wanted["manage"] != "never":
        result.update(aftercare(found, wanted, result["managed"]))
    if result["action"] in ("install", "upgrade", "remove"):
        # apt takes no held package away, whatever it is allowed to change, and branches take each other's place. They are held again afterwards.
        result["unholds"] = sorted(set(kept_together(found)) & set(found["holds"]))
    if result["action"] in ("leave", "install", "upgrade"):
        result["warnings"] = [*result["warnings"], *warnings(found, wanted, result["action"])]
    result["disturbs"] = result["action"] in ("upgrade", "remove") or result["activate"] in ("reload", "reboot")
    result["told"] = told(found, result)
    result["gpus"] = [gpu_text(gpu) for gpu in found["smi"]["gpus"]]
    return result


# --- what to do about the packages ----------------------------------------------------------------------------------


def presence(found: Found, wanted: Found) -> dict[str, Any]:
    """The decision about a driver that should be there."""
    works, installed = bool(found["smi"]["gpus"]), bool(found["origin"])
    count = expected(found, wanted)
    if not gpus(found) and not works:
        if wanted["expected_gpus"] > 0:
            raise RefusedError(
                f"nvidia_driver_expected_gpus is {wanted['expected_gpus']}, but no NVIDIA GPU is on the PCI bus.",
                "A GPU that is missing there is a matter of hardware, of the firmware or of the cloud's machine type.",
            )
        return {"action": "none", "reason": "there is no NVIDIA GPU on the PCI bus"}
    current = (
        f"driver {found['userspace'] or found['loaded']['version']} from {SOURCES.get(found['origin'], 'nowhere')}"
    )
    if wanted["manage"] == "never":
        return {"reason": f"nvidia_driver_manage is never; {current if installed else 'there is no driver'}"}
    if found["image"] or found["origin"] in ("runfile", "outside") or found["container"]:
        return foreign(found, current, works)
    if found["origin"] == "mixed" and not works:
        raise RefusedError(
            "Packages of the driver come from more than one source, and nvidia-smi does not work.",
            "Remove them all (nvidia_driver_state: absent, nvidia_driver_manage: always), then let the role install them from one.",
        )
    takes_part = found["ours"] or wanted["manage"] == "always"
    if installed and works and not takes_part:
        return {
            "reason": f"{current} works ({count} {'GPU' if count == 1 else 'GPUs'}), and this role did not install it (nvidia_driver_manage: auto)"
        }
    how, _reasons = activation(found)
    if installed and not works and not takes_part:
        if how:
            return {"reason": f"{current} is installed and not in use yet"}
        raise RefusedError(
            f"{current[0].upper()}{current[1:]} is installed and does not work: {ailment(found)}",
            "Repair it, or let this role take it over (nvidia_driver_manage: always).",
        )
    if found["origin"] == "mixed":
        return {
            "reason": f"{current} works",
            "warnings": ["the driver's packages come from more than one source; the next upgrade may break it"],
        }
    target = aim(found, wanted)
    result = change(found, wanted, target, current, bool(how))
    offered(found, wanted, {**target, **result})
    return result


def foreign(found: Found, current: str, works: bool) -> dict[str, Any]:
    """The decision about a driver that somebody else looks after."""
    who = found["image"] or ("a container's machine" if found["container"] else SOURCES[found["origin"]])
    if works:
        return {"reason": f"{current} works, and it is a matter of {who}"}
    how, _reasons = activation(found)
    if how and found["origin"] and not found["container"]:
        return {"reason": f"{current} is a matter of {who}, and not in use yet"}
    advice = "Repair it there."
    if found["origin"] == "runfile":
        advice = "Remove it by nvidia-uninstall, reboot, and run again; or install it anew with the installer."
    elif found["container"]:
        advice = "Install the driver on the machine that runs the container, and hand its devices in."
    elif found["origin"] == "outside":
        advice = "Remove what put a module or libraries there without a package (a driver container, a copied image), and run again."
    raise RefusedError(f"nvidia-smi does not work, and the driver is a matter of {who}: {ailment(found)}", advice)


def aim(found: Found, wanted: Found) -> dict[str, Any]:
    """Source, branch, flavour and packages that the variables ask for on this host. Refuses what cannot work."""
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
    version = wanted["version"]
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
            f"{SOURCES[source]} is not known to have the branch {branch}.", f"The oldest is {entry['first_branch']}."
        )
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


def to_install(result: Found) -> list[str]:
    """The packages that a decision has apt install. What apt has of them is `available` among the findings, once it was asked."""
    due = result.get("action") in ("install", "upgrade")
    return [name.partition("=")[0] for name in result["packages"]] if due else []


def offered(found: Found, wanted: Found, result: Found) -> None:
    """Refuse what would be installed and is below its floor, where it is known: apt may not know the source yet."""
    source, branch = result["source"], result["branch"]
    added = [url for url in (wanted["debian_url"], wanted["debian_security_url"]) if url and source == "debian"]
    # NVIDIA's repository is added on the way; until then others may have packages of the same names.
    if wanted["allow_insecure"] or source not in NEWER or added != found["added_archives"]:
        return
    floor = wanted["floors"][branch]
    for name in filter(tells_origin, to_install(result)):
        versions = found["available"].get(name, {"versions": []})["versions"]
        version = upstream(newest(one for one in versions if upstream(one).startswith(f"{branch}.")))
        if version and version_key(version) < version_key(floor):
            raise OutdatedError(
                f"Of {name} {SOURCES[source]} has {version}, by the package lists of the host, but security fixes of the branch {branch} came with {floor}.",
                f"{NEWER[source]}; or set nvidia_driver_allow_insecure: true.",
            )


def change(found: Found, wanted: Found, target: dict[str, Any], current: str, waits: bool) -> dict[str, Any]:
    """Install, upgrade or leave: a driver that is ours to look after, or none."""
    what = f"{target['flavour']} modules, {target['version'] or 'branch ' + target['branch']}, from {SOURCES[target['source']]}"
    result: dict[str, Any] = {
        key: target[key]
        for key in ("source", "branch", "version", "flavour", "pin", "packages", "optional", "required")
    }
    result["managed"] = True
    if not found["origin"]:
        return {**result, "action": "install", "reason": what}
    version = found["userspace"]
    differs = []
    if not version:
        differs.append("the libraries are missing")
    elif version.partition(".")[0] != target["branch"]:
        differs.append(f"the branch is {version.partition('.')[0]}, not {target['branch']}")
    elif target["version"] and version != target["version"]:
        differs.append(f"the version is {version}, not {target['version']}")
    flavours = {module["flavour"] for module in found["modules"].values()}
    if flavours and flavours != {target["flavour"]}:
        differs.append(f"the kernel modules are {' and '.join(sorted(flavours))}, not {target['flavour']}")
    asked_for = bool(differs)
    floor = wanted["floors"].get(target["branch"], "")
    if (
        not differs
        and floor
        and not target["version"]
        and version_key(version) < version_key(floor)
        and not wanted["allow_insecure"]
    ):
        differs.append(f"{version} lacks security fixes that came with {floor}")
    if not differs and found["unfinished"]:
        differs.append(f"{', '.join(found['unfinished'])} was left half installed")
        asked_for = True
    missing = [name for name in target["names"] if name not in found["packages"]]
    if not differs and missing:
        differs.append(f"{', '.join(missing)} is missing")
    if not differs and not found["smi"]["gpus"] and not waits:
        return {**result, "reason": f"{current} is as asked for, and does not work: {ailment(found)}"}
    if not differs:
        return {**result, "reason": f"{current} is as asked for"}
    busy = workers(found)
    if busy and not wanted["reboot"]:
        if asked_for:
            raise RefusedError(
                f"The driver has to change ({'; '.join(differs)}) while {names_of(busy)} uses the GPUs: new programs would fail until the next boot.",
                "Drain the host and stop what uses them; or set nvidia_driver_reboot: true, which reboots one host at a time.",
            )
        return {
            **result,
            "reason": f"{current} is in use by {names_of(busy)}",
            "warnings": [f"{differs[0]}; drain the host and run again, or set nvidia_driver_reboot: true"],
        }
    down = bool(target["version"]) and version_key(version) > version_key(target["version"])
    down = down or int(version.partition(".")[0] or 0) > int(target["branch"])
    return {
        **result,
        "action": "upgrade",
        "downgrade": down,
        "replaced": replaced(found, target),
        "reason": f"{what}; {'; '.join(differs)}",
    }


def replaced(found: Found, target: Mapping[str, Any]) -> list[str]:
    """
    The installed packages that cannot stay beside the ones that are wanted: of another branch, or the modules of the other flavour.

    apt has to be told: by its own judgement an installed package weighs more than a new one that something else depends on, and it gives up.
    """
    kinds = r"linux-(modules|objects)-nvidia-|nvidia-(dkms|headless|kernel-source|kernel-open|kernel-dkms|open-kernel|open|driver-\d)"
    found_names = []
    for name in found["packages"]:
        number = re.search(r"-(\d{3})(-|$)", name) if DRIVER_PACKAGE.match(name) and "pinning" not in name else None
        of_modules = re.match(kinds, name)
        if (number and number[1] != target["branch"]) or (
            of_modules and ("open" in name) != (target["flavour"] == "open")
        ):
            found_names.append(name)
    return sorted(found_names)


def removal(found: Found, wanted: Found) -> dict[str, Any]:
    """The decision about a driver that should not be there."""
    names = [name for name in [*found["packages"], *found["unfinished"]] if DRIVER_PACKAGE.match(name)]
    if not names and not found["ours"]:
        return {"action": "none", "reason": "no package of the driver is installed"}
    if found["image"]:
        raise RefusedError(f"The driver belongs to {found['image']}.", "Remove it as its vendor says.")
    if not found["ours"] and wanted["manage"] != "always":
        raise RefusedError(
            "This role did not install the driver.", "To remove it all the same: nvidia_driver_manage: always."
        )
    if busy := workers(found):
        raise RefusedError(f"{names_of(busy)} uses the GPUs.", "Drain the host and stop what uses them.")
    return {
        "action": "remove",
        "reason": f"{len(names)} packages of the driver are removed",
        "packages": sorted(set(names)),
        "managed": True,
    }


# --- what to do beside the packages ---------------------------------------------------------------------------------


def aftercare(found: Found, wanted: Found, managed: bool) -> dict[str, Any]:
    """For a driver that stays as it is: what is needed to bring it into use, and what beside it is not as wanted."""
    how, reasons = activation(found)
    result: dict[str, Any] = {"activate": how, "activate_reasons": reasons}
    if how == "reboot" and not wanted["reboot"]:
        result["blocked"] = (
            f"The host has to be rebooted: {'; '.join(reasons)}. Reboot it when it is drained, or set nvidia_driver_reboot: true."
        )
    held = kept_together(found)
    if managed:
        result["holds"] = sorted(set(held) - set(found["holds"])) if wanted["hold"] else []
        result["unholds"] = [] if wanted["hold"] else sorted(set(held) & set(found["holds"]))
        result["leftovers"] = leftovers(found)
        result["fabric"] = fabric_packages(found, wanted)
    result["services"] = services(found, wanted)
    result["unproved"] = [] if how else problems(found, wanted)
    return result


def kept_together(found: Found) -> list[str]:
    """The installed packages that are held together: the driver, and with prebuilt modules the kernel."""
    prebuilt = any(name.startswith("linux-modules-nvidia-") for name in found["packages"])
    return [
        name for name in found["packages"] if DRIVER_PACKAGE.match(name) or (prebuilt and KERNEL_PACKAGE.match(name))
    ]


def activation(found: Found) -> tuple[str, list[str]]:
    """
    How an installed driver gets into use: nothing, load, reload or reboot, and why.

    By versions only. A file that says "reboot required" is written for every new kernel and is no reason.
    """
    running, newest = found["kernel"]["running"], found["kernel"]["newest"]
    disk, future = found["modules"].get(running), found["modules"].get(newest)
    loaded, libraries = found["loaded"], found["userspace"]
    if found["container"] or not found["origin"] or not (disk or future):
        return "", []
    if not loaded["version"]:
        if not disk:
            return "reboot", [
                f"there is no module for the running kernel {running}, but one for {newest}, which the next boot takes"
            ]
        if found["nouveau"]:
            return "reboot", ["nouveau has the GPUs"]
        return "load", [f"the module {disk['version']} is not loaded"]
    if found["smi"]["gpus"] and loaded["version"] == libraries and (not disk or disk["flavour"] == loaded["flavour"]):
        return "", []
    reasons = []
    if libraries and loaded["version"] != libraries:
        reasons.append(
            f"the kernel runs the module {loaded['version']}, and the libraries are {libraries}, so new programs fail"
        )
    if disk and disk["flavour"] != loaded["flavour"] and loaded["flavour"]:
        reasons.append(f"the kernel runs the {loaded['flavour']} modules, and the {disk['flavour']} ones are installed")
    if not reasons:
        return "", []
    if disk and libraries in ("", disk["version"]) and not workers(found):
        return "reload", reasons
    fits = [module for module in (disk, future) if module and libraries in ("", module["version"])]
    return ("reboot", reasons) if fits else ("", [])


def leftovers(found: Found) -> list[str]:
    """Installed packages of another branch than the one in use, which are in nobody's way and in nobody's use."""
    branch = found["userspace"].partition(".")[0]
    numbered = {name: re.search(r"-(\d{3})(-|$)", name) for name in found["packages"] if DRIVER_PACKAGE.match(name)}
    return sorted(name for name, number in numbered.items() if branch and number and number[1] != branch)


def fabric_wanted(found: Found, wanted: Found) -> bool:
    """Whether NVSwitches are there for this host to look after. In a guest whose machine does it they are not visible."""
    switches = [
        device for device in found["devices"] if device["kind"] == "nvswitch" and device["driver"] != "vfio-pci"
    ]
    return bool(wanted["fabric_manager"] and (switches or found["fabric_bridges"]))


def fabric_packages(found: Found, wanted: Found) -> list[str]:
    """The packages of the fabric manager that are missing or not of the driver's version, to the last digit."""
    if not fabric_wanted(found, wanted) or found["origin"] not in wanted["sources"] or not found["userspace"]:
        return []
    version = found["userspace"]
    branch = version.partition(".")[0]
    parts = wanted["sources"][found["origin"]]["fabric"]
    names = [
        name.format(branch=branch) for name in next(part["packages"] for part in parts if int(branch) >= part["from"])
    ]
    asked = [f"{name}={version}-*" for name in names if upstream(found["packages"].get(name, "")) != version]
    floating = wanted["sources"][found["origin"]]["bridges"] if found["fabric_bridges"] else []
    return asked + [name for name in floating if name not in found["packages"]]


def services(found: Found, wanted: Found) -> list[str]:
    """The units that should run and start with the host, and do not."""
    if found["container"]:
        return []
    units = found["units"]
    wished = [NODES_UNIT]
    if wanted["persistenced"] and PERSISTENCED_UNIT in units:
        wished.append(PERSISTENCED_UNIT)
    if fabric_wanted(found, wanted) and FABRIC_UNIT in units:
        wished.append(FABRIC_UNIT)

    def right(unit: str) -> bool:
        state = units.get(unit, {"active": "", "enabled": ""})
        # A static one is started by udev when a GPU appears.
        return state["active"] == "active" and state["enabled"] in ("enabled", "static", "indirect")

    return [unit for unit in wished if not right(unit) or (unit == NODES_UNIT and not found["nodes"]["uvm"])]


# --- what is told ---------------------------------------------------------------------------------------------------


def problems(found: Found, wanted: Found) -> list[str]:
    """What is not proved: why this host cannot serve with all of its GPUs."""
    smi, count = found["smi"], expected(found, wanted)
    if not smi["gpus"]:
        return [f"nvidia-smi shows no GPU: {ailment(found)}"]
    said = []
    shown = len(smi["gpus"])
    if shown != count:
        known = {gpu["address"] for gpu in smi["gpus"]}
        missing = [device["address"] for device in gpus(found) if device["address"] not in known]
        detail = f"; missing is {', '.join(missing)}" if missing and "" not in known else ""
        said.append(f"nvidia-smi shows {shown} GPUs, and {count} are expected{detail}")
    versions = {
        "nvidia-smi": smi["gpus"][0]["driver"],
        "the loaded module": found["loaded"]["version"],
        "the libraries": found["userspace"],
    }
    if len({version for version in versions.values() if version}) > 1:
        said.append("versions differ: " + ", ".join(f"{who} {version}" for who, version in versions.items() if version))
    if fabric_wanted(found, wanted):
        said += fabric_problems(found)
    # Also in a guest, whose machine runs the fabric manager.
    for gpu in found["smi"]["gpus"]:
        fabric = gpu["fabric"]
        if fabric["state"] and (fabric["state"], fabric["status"]) != ("Completed", "Success"):
            said.append(
                f"GPU {gpu['index']} is not part of the fabric: {fabric['state']}, {fabric['status'] or 'no status'}"
            )
    for gpu in smi["gpus"]:
        if gpu["remapped_rows"]["failure"]:
            said.append(f"GPU {gpu['index']} ({gpu['address']}) has no spare memory rows left; its vendor replaces it")
    return said


def fabric_problems(found: Found) -> list[str]:
    """What is wrong with the fabric of NVSwitches."""
    installed = [version for name, version in found["packages"].items() if name.startswith("nvidia-fabricmanager")]
    state = found["units"].get(FABRIC_UNIT, {}).get("active", "")
    said = []
    if not installed and not state:
        return ["NVSwitches are visible, and the fabric manager is not installed: CUDA fails with error 802"]
    if installed and upstream(installed[0]) != found["userspace"]:
        said.append(
            f"the fabric manager is {upstream(installed[0])}, and the driver {found['userspace']}; they have to be the same to the last digit"
        )
    if state != "active":
        said.append(f"nvidia-fabricmanager.service is {state or 'not there'}")
    return said


def warnings(found: Found, wanted: Found, action: str) -> list[str]:
    """What does not stop a host from serving, and should not be forgotten."""
    said = []
    version = found["userspace"] or found["loaded"]["version"]
    branch = version.partition(".")[0]
    floor = wanted["floors"].get(branch, "")
    if action == "leave" and version and not floor:
        said.append(f"the branch {branch} gets no security fixes any more, as far as nvidia_driver_floors knows")
    elif action == "leave" and version and version_key(version) < version_key(floor):
        said.append(f"driver {version} lacks security fixes that came with {floor}")
    kernel = found["kernel"]
    if action == "leave" and found["modules"].get(kernel["running"]) and kernel["newest"] not in found["modules"]:
        said.append(f"the next boot takes the kernel {kernel['newest']}, and there is no module for it")
    for gpu in found["smi"]["gpus"]:
        name = f"GPU {gpu['index']} ({gpu['address'] or gpu['name']})"
        if gpu["remapped_rows"]["pending"]:
            said.append(f"{name} replaces memory rows at its next reset")
        if gpu["ecc_uncorrected"]:
            said.append(f"{name} had {gpu['ecc_uncorrected']} uncorrected memory errors since the module was loaded")
        if gpu["recovery_action"]:
            said.append(f"{name} asks for a recovery action: {gpu['recovery_action']}")
    return said


def ailment(found: Found) -> str:
    """Why a driver does not work, as exactly as it is known."""
    running = found["kernel"]["running"]
    if found["unfinished"]:
        return f"{', '.join(found['unfinished'])} is half installed (dpkg --configure -a)."
    if found["origin"] not in ("", "outside") and running not in found["modules"]:
        dkms = any("dkms" in name for name in found["packages"])
        headers = f"linux-headers-{running}"
        if dkms and headers not in found["packages"]:
            return f"there is no module for the kernel {running}, because {headers} is not installed and DKMS could not build it."
        return f"there is no module for the kernel {running}."
    if found["nouveau"] and not found["loaded"]["version"]:
        return "nouveau has the GPUs."
    if not gpus(found):
        return "no NVIDIA GPU is on the PCI bus."
    if found["smi"]["error"]:
        return " ".join(found["smi"]["error"].split()).rstrip(".") + "."
    return "nvidia-smi is not there." if not found["smi"]["present"] else "nvidia-smi shows nothing."


def told(found: Found, result: Mapping[str, Any]) -> list[str]:
    """The decision in lines for a person, before anything is done."""
    lines = [f"devices: {devices_text(found)}"]
    version = found["userspace"] or found["loaded"]["version"]
    source = SOURCES.get(found["origin"], "nowhere")
    lines.append(f"found: driver {version} from {source}" if version else "found: no driver")
    lines.append(f"decision: {result['action']}: {result['reason']}")
    if result["advice"]:
        lines.append(f"what to do: {result['advice']}")
    if result["packages"] and result["action"] in ("install", "upgrade"):
        lines.append(
            f"packages: {' '.join([*result['pin'], *result['packages']])}, and {' '.join(result['optional'])} as the source has them"
        )
    if result["activate"]:
        lines.append(f"then: {result['activate']}, because {'; '.join(result['activate_reasons'])}")
    for key, title in (
        ("fabric", "fabric manager"),
        ("replaced", "removed"),
        ("leftovers", "removed"),
        ("holds", "held"),
        ("unholds", "not held any more"),
        ("services", "started"),
    ):
        if result[key]:
            lines.append(f"{title}: {' '.join(result[key])}")
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    lines += [f"not proved: {problem}" for problem in result["unproved"]]
    if result["blocked"]:
        lines.append(f"blocked: {result['blocked']}")
    return lines


def devices_text(found: Found) -> str:
    """The devices in words: 8 x 0x2330 (Hopper), 4 NVSwitches."""
    counted: dict[str, int] = {}
    for device in sorted(found["devices"], key=lambda device: device["kind"]):
        kind = f"{device['device']} ({device['generation']['name']})" if device["kind"] == "gpu" else "NVSwitch"
        kind += ", given to guests" if device["driver"] == "vfio-pci" else ""
        counted[kind] = counted.get(kind, 0) + 1
    return ", ".join(f"{count} x {kind}" for kind, count in counted.items()) or "none"


def gpu_text(gpu: Found) -> str:
    """A GPU and the state of its memory in words."""
    said = [f"GPU {gpu['index']}: {gpu['name']}", f"{gpu['memory_mib']} MiB", f"driver {gpu['driver']}"]
    if gpu["mig"]:
        said.append(f"MIG, {len(gpu['mig_devices'])} parts")
    count = gpu["ecc_uncorrected"]
    said.append(f"ECC on, uncorrected errors {'not told' if count is None else count}" if gpu["ecc"] else "ECC off")
    rows = gpu["remapped_rows"]
    if rows["uncorrectable"] is not None:
        said.append(
            f"rows remapped for uncorrectable errors {rows['uncorrectable']}{', more at the next reset' if rows['pending'] else ''}"
        )
    if gpu["fabric"]["state"]:
        said.append(f"fabric {gpu['fabric']['state']}")
    return ", ".join(said)


def gpus(found: Found) -> list[Mapping[str, Any]]:
    """The GPUs that this host drives itself. Those that it hands to guests are none of its own."""
    return [device for device in found["devices"] if device["kind"] == "gpu" and device["driver"] != "vfio-pci"]


def expected(found: Found, wanted: Found) -> int:
    """How many GPUs nvidia-smi has to show."""
    asked = int(wanted["expected_gpus"])
    if asked >= 0:
        return asked
    return len(gpus(found)) or len(found["smi"]["gpus"])


def workers(found: Found) -> list[Mapping[str, Any]]:
    """The processes on the GPUs that are somebody's work."""
    return [user for user in found["users"] if user["unit"] not in OWN_UNITS]


# --- apt ------------------------------------------------------------------------------------------------------------

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
