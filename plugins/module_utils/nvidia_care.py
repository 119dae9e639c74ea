# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What an NVIDIA driver needs beside its packages: to get into use, holds, fabric manager and services; and what is not proved of it."""

from __future__ import annotations

import re
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia import DRIVER_PACKAGE, KERNEL_PACKAGE, upstream
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_found import (
    Found,
    expected,
    fabric_wanted,
    gpus,
    workers,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_words import ailment

NODES_UNIT = "vllm-fleet-nvidia-nodes.service"
PERSISTENCED_UNIT = "nvidia-persistenced.service"
FABRIC_UNIT = "nvidia-fabricmanager.service"


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
