# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA driver of a host in words: what is told before anything is done, and why a driver does not work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia import version_key
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_found import SOURCES, Found, gpus


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
