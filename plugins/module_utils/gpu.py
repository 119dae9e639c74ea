"""What nvidia-smi says, as data: a short form for every role, and the full one for those who look after the driver."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

NVIDIA_SMI_QUERY = [
    "nvidia-smi",
    "--query-gpu=index,name,memory.total,compute_cap,driver_version,mig.mode.current",
    "--format=csv,noheader,nounits",
]
# Everything in one call. It has no compute capability, which the query above has.
NVIDIA_SMI_XML = ["nvidia-smi", "-q", "-x"]
# What nvidia-smi writes where a GPU has nothing to say.
NOTHING = {"", "N/A", "[N/A]", "[Not Supported]", "Not Supported", "None"}


def parse_nvidia_smi(output: str) -> list[dict[str, Any]]:
    """
    Parse the answer to NVIDIA_SMI_QUERY: one dict a GPU, memory in MiB. Memory that is not told (MIG, GB10) is 0.

    Answers without the last column, which recordings of older queries have, are understood too.
    """
    gpus = []
    for row in csv.reader(output.strip().splitlines(), skipinitialspace=True):
        if len(row) not in (5, 6) or not row[0].isdigit():
            continue
        index, name, memory, capability, driver = row[:5]
        gpus.append(
            {
                "index": int(index),
                "name": name,
                "memory_mib": int(memory) if memory.isdigit() else 0,
                "compute_capability": float(capability) if capability[:1].isdigit() else 0.0,
                "driver": driver,
                "mig": row[5:] == ["Enabled"],
            }
        )
    return gpus


def parse_nvidia_smi_full(query: str, xml: str) -> list[dict[str, Any]]:
    """
    The short form with what the XML document adds: address, MIG devices, ECC, remapped rows, fabric, recovery action.

    Both list the GPUs in the same order. A document that cannot be read adds nothing, and neither does a part that this driver does not
    have: a number is then null, a text empty.
    Names of the elements as nvidia-smi 535 to 590 write them, nvsmi_device_v12.dtd and v13.
    """
    gpus = parse_nvidia_smi(query)
    try:
        found = ElementTree.fromstring(xml).findall("gpu")  # noqa: S314 - of root's own program
    except ElementTree.ParseError:
        found = []
    if len(found) != len(gpus):
        found = []
    for number, gpu in enumerate(gpus):
        gpu.update(details(found[number] if found else ElementTree.Element("gpu")))
    return gpus


def details(gpu: ElementTree.Element) -> dict[str, Any]:
    """What one `gpu` element says beyond the short form."""
    return {
        "address": pci_address(gpu.get("id", "")),
        "uuid": text(gpu, "uuid"),
        "persistence": text(gpu, "persistence_mode") == "Enabled",
        "mig_devices": mig_devices(gpu),
        "ecc": text(gpu, "ecc_mode/current_ecc") == "Enabled",
        # since the module was loaded, and over the life of the GPU
        "ecc_uncorrected": uncorrected(gpu, "volatile"),
        "ecc_uncorrected_ever": uncorrected(gpu, "aggregate"),
        "remapped_rows": {
            "uncorrectable": number(gpu, "remapped_rows/remapped_row_unc"),
            "pending": flag(gpu, "remapped_rows/remapped_row_pending"),
            "failure": flag(gpu, "remapped_rows/remapped_row_failure"),
        },
        "fabric": {"state": text(gpu, "fabric/state"), "status": text(gpu, "fabric/status")},
        # R570 and newer; empty when nothing is to be done
        "recovery_action": text(gpu, "gpu_recovery_action"),
    }


def text(element: ElementTree.Element, path: str) -> str:
    """The text of an element, empty when it is not there or says nothing."""
    found = (element.findtext(path) or "").strip()
    return "" if found in NOTHING else found


def number(element: ElementTree.Element, path: str) -> int | None:
    """The number in an element, null when there is none."""
    found = text(element, path)
    return int(found) if found.isdigit() else None


def flag(element: ElementTree.Element, path: str) -> bool | None:
    """Yes or no in an element, null when it says neither. Some versions write a count instead."""
    found = text(element, path).lower()
    if found in ("yes", "no"):
        return found == "yes"
    return int(found) > 0 if found.isdigit() else None


def uncorrected(gpu: ElementTree.Element, since: str) -> int | None:
    """Uncorrected memory errors of all kinds. Each generation of GPUs names them its own way."""
    errors = gpu.find(f"ecc_errors/{since}")
    if errors is None:
        return None
    names = [child.tag for child in errors if "uncorrectable" in child.tag]
    counts = [count for name in names if (count := number(errors, name)) is not None]
    if counts:
        return sum(counts)
    return number(errors, "double_bit/total")  # before Ampere


def mig_devices(gpu: ElementTree.Element) -> list[dict[str, Any]]:
    """The parts of a GPU in MIG mode."""

    def each() -> Iterator[dict[str, Any]]:
        for device in gpu.iterfind("mig_devices/mig_device"):
            memory = re.match(r"\d+", text(device, "fb_memory_usage/total"))
            yield {"index": number(device, "index"), "memory_mib": int(memory[0]) if memory else 0}

    return list(each())


def pci_address(text_: str) -> str:
    """The address as /sys/bus/pci spells it: nvidia-smi writes eight digits for the domain and capitals."""
    found = re.fullmatch(r"([0-9A-Fa-f]{4,8}):([0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7])", text_)
    return f"{found[1][-4:]}:{found[2]}".lower() if found else ""
