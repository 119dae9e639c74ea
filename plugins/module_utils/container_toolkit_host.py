# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The container toolkit of the host and its specification, as they are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Command

REFRESH = "nvidia-cdi-refresh.service"
REFRESH_PATH = "nvidia-cdi-refresh.path"
KIND = "nvidia.com/gpu"
# The libraries that a specification names: they bear the version of the driver. Sockets and device nodes come and go.
LIBRARIES = re.compile(r"^\s*(?:- )?hostPath: ['\"]?(/[^'\"\n]+\.so[^'\"\n]*?)['\"]?\s*$", re.MULTILINE)
GPU_LINE = re.compile(r"^(GPU|\s+MIG) .*\(UUID: ((?:GPU|MIG)-[^)]+)\)", re.MULTILINE)
# Hooks of old packages, by which containers got GPUs before. Devices that they add are taken away by the next `systemctl daemon-reload`.
LEGACY_HOOKS = (
    "usr/share/containers/oci/hooks.d/oci-nvidia-hook.json",
    "etc/containers/oci/hooks.d/oci-nvidia-hook.json",
)


class ToolkitError(Exception):
    """What went wrong, in words for the operator."""


def parse_gpus(output: str) -> list[str]:
    """What a container can be given, by the output of `nvidia-smi -L`: GPUs, or the parts of those that are divided."""
    found: list[list[str]] = []
    for kind, uuid in GPU_LINE.findall(output):
        if kind == "GPU":
            found.append([uuid])
        elif found:
            found[-1].append(uuid)
    return [uuid for gpu in found for uuid in (gpu[1:] or gpu)]


def parse_devices(output: str) -> list[str]:
    """The names that `nvidia-ctk cdi list` tells for GPUs."""
    return sorted(
        {line.strip().partition("=")[2] for line in output.splitlines() if line.strip().startswith(f"{KIND}=")}
    )


def difference(uuids: Sequence[str], devices: Sequence[str]) -> str:
    """What the specification has too many or too few, empty when it has the GPUs of the host."""
    named = [name for name in devices if name.startswith(("GPU-", "MIG-"))]
    if named or not devices:
        missing, extra = sorted(set(uuids) - set(named)), sorted(set(named) - set(uuids))
        words = [f"{', '.join(names)} {what}" for names, what in ((missing, "missing"), (extra, "gone")) if names]
        return f"{' and '.join(words)}" if words else ""
    # One that was made with numbers only.
    numbers = [name for name in devices if re.fullmatch(r"[0-9]+(:[0-9]+)?", name)]
    return "" if len(numbers) == len(uuids) else f"it has {len(numbers)} GPUs instead of {len(uuids)}"


@dataclass
class Toolkit:
    """The toolkit of this host."""

    command: Command
    root: Path = Path("/")
    spec: Path = field(init=False)

    def __post_init__(self) -> None:
        self.spec = self.root / "run/cdi/nvidia.yaml"

    def pci_gpus(self) -> int:
        """NVIDIA's GPUs on the bus, with a driver or without."""
        devices = (self.root / "sys/bus/pci/devices").glob("*")
        return sum(
            read(device / "vendor").strip() == "0x10de" and read(device / "class").startswith(("0x0300", "0x0302"))
            for device in devices
        )

    def has(self, program: str) -> bool:
        """Whether a program is there."""
        return any((self.root / directory / program).exists() for directory in ("usr/bin", "usr/sbin", "usr/local/bin"))

    def uuids(self) -> tuple[list[str], str]:
        """The GPUs that the driver shows, or why it shows none."""
        if not self.has("nvidia-smi"):
            return [], "there is no driver (nvidia-smi)"
        status, output, error = self.command(["nvidia-smi", "-L"])
        found = parse_gpus(output) if status == 0 else []
        return found, "" if found else (error or output).strip() or "nvidia-smi shows no GPU"

    def look(self) -> dict[str, Any]:
        """What is there, and what is due: refresh, remove or nothing."""
        uuids, driver_problem = self.uuids()
        found: dict[str, Any] = {
            "gpus": uuids,
            "pci_gpus": self.pci_gpus(),
            "driver_problem": driver_problem,
            "devices": [],
            "other_specs": self.other_specs(),
            "legacy_hooks": [f"/{path}" for path in LEGACY_HOOKS if (self.root / path).exists()],
            "due": "",
            "reason": "",
        }
        if not self.has("nvidia-ctk"):
            return {**found, "due": "refresh" if uuids else "", "reason": "there is no toolkit yet" if uuids else ""}
        status, output, error = self.command(["nvidia-ctk", "cdi", "list"])
        found["devices"] = parse_devices(output)
        reason = self.wrong(uuids, found["devices"]) if status == 0 else f"`nvidia-ctk cdi list` says {error.strip()}"
        if uuids and reason:
            found.update(due="refresh", reason=reason)
        elif not uuids and self.spec.exists():
            found.update(due="remove", reason=f"there is a specification of GPUs, but {driver_problem}")
        return found

    def wrong(self, uuids: Sequence[str], devices: Sequence[str]) -> str:
        """What is wrong with the specification, empty when nothing is."""
        text = read(self.spec)
        if not text:
            return f"{self.spec} is not there"
        if text_of_difference := difference(uuids, devices):
            return f"in {self.spec}: {text_of_difference}"
        gone = [path for path in dict.fromkeys(LIBRARIES.findall(text)) if not (self.root / path[1:]).exists()]
        return f"{self.spec} names {gone[0]}, which is not there: it is of another driver" if gone else ""

    def other_specs(self) -> list[str]:
        """Other specifications of GPUs, made by hand before there was a unit for it. Nobody refreshes them."""
        paths = [*sorted((self.root / "etc/cdi").glob("*")), *sorted((self.root / "run/cdi").glob("*"))]
        return [
            f"/{path.relative_to(self.root)}"
            for path in paths
            if path != self.spec
            and path.suffix in (".yaml", ".json")
            and re.search(rf"\"?kind\"?: \"?{re.escape(KIND)}\"?", read(path))
        ]

    def refresh(self) -> dict[str, Any]:
        """Put the specification right."""
        before = self.look()
        if before["due"] == "remove":
            self.spec.unlink()
        elif before["due"] == "refresh":
            self.command(["systemctl", "enable", "--quiet", "--now", REFRESH_PATH])
            self.command(["systemctl", "enable", "--quiet", REFRESH])
            self.command(["systemctl", "restart", REFRESH])
            if self.look()["due"]:
                # The unit does nothing where the kernel's directory of modules does not have the driver, as in a container.
                status, output, error = self.command(
                    ["nvidia-ctk", "cdi", "generate", f"--output=/{self.spec.relative_to(self.root)}"]
                )
                after = self.look()
                if after["due"]:
                    said = f"; `nvidia-ctk cdi generate` says: {(error or output).strip()}" if status else ""
                    if "missing" in after["reason"]:
                        said += ". A GPU in MIG mode that has no instances yet can be given to nobody: `nvidia-smi mig -lgi` lists them"
                    raise ToolkitError(
                        f"the specification of the GPUs is not right after it was made again: {after['reason']}{said}"
                    )
        return {**self.look(), "done": before["due"], "done_reason": before["reason"]}


# --- what is asked for
