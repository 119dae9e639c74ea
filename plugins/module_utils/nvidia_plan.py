# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""
What is to be done about the NVIDIA driver of a host: a pure function of what was found there and of the variables of the role.

Nothing here asks the host or the controller anything. What was found comes from nvidia_host.py, what is wanted from the role nvidia_driver, and
which packages a source has under which name is data of the role. So a table of recorded machines and variables tests it, and a run
tells what it is going to do before it does it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.dpkg import newest
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia import (
    DRIVER_PACKAGE,
    names_of,
    tells_origin,
    upstream,
    version_key,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_care import activation, aftercare, kept_together
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_found import SOURCES, Found, expected, gpus, workers
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_target import (
    OutdatedError,
    RefusedError,
    aim,
    branch_is_there,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_words import ailment, gpu_text, told, warnings

# Where newer versions are than in the archive that a host knows.
NEWER = {
    "ubuntu": "Have apt ask an archive that is up to date, or take another nvidia_driver_branch",
    "debian": "Have apt ask Debian's security archive, too (nvidia_driver_debian_security_url), for the proprietary modules (nvidia_driver_flavour); or take "
    "nvidia_driver_source: nvidia",
}


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
    if to_install(result):
        branch_is_there(found, wanted, target)
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


def to_install(result: Found) -> list[str]:
    """The packages that a decision has apt install."""
    due = result.get("action") in ("install", "upgrade")
    return [name.partition("=")[0] for name in result["packages"]] if due else []


def to_ask(result: Found, wanted: Found) -> list[str]:
    """What apt is asked about before that: `available` among the findings. A name that ends in * stands for all that begin so."""
    names = to_install(result)
    named_by = wanted["sources"][result["source"]].get("named_by", "") if names else ""
    return [*names, f"{named_by.partition('{')[0]}*"] if named_by else names


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
    differs, asked_for = differences(found, wanted, target)
    if not differs and not found["smi"]["gpus"] and not waits:
        return {**result, "reason": f"{current} is as asked for, and does not work: {ailment(found)}"}
    if not differs:
        return {**result, "reason": f"{current} is as asked for"}
    busy = workers(found)
    if busy and not wanted["reboot"]:
        if asked_for:
            raise RefusedError(
                f"The driver has to change ({'; '.join(differs)}) while {names_of(busy)} uses the GPUs: new programs would fail until the next boot.",
                "Drain the host and stop what uses them; or set nvidia_driver_reboot: true, which lets a run reboot it.",
            )
        return {
            **result,
            "reason": f"{current} is in use by {names_of(busy)}",
            "warnings": [f"{differs[0]}; drain the host and run again, or set nvidia_driver_reboot: true"],
        }
    version = found["userspace"]
    down = bool(target["version"]) and version_key(version) > version_key(target["version"])
    down = down or int(version.partition(".")[0] or 0) > int(target["branch"])
    return {
        **result,
        "action": "upgrade",
        "downgrade": down,
        "replaced": replaced(found, target),
        "reason": f"{what}; {'; '.join(differs)}",
    }


def differences(found: Found, wanted: Found, target: Found) -> tuple[list[str], bool]:
    """What is not as it is wanted, and whether it was asked for: the rest can wait until nothing uses the GPUs."""
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
    return differs, asked_for


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
