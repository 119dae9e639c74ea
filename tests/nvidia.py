"""Recorded machines with NVIDIA devices: tests/unit/recordings/nvidia/README.md says how a recording is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.dpkg import parse_policy
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu import NVIDIA_SMI_QUERY, NVIDIA_SMI_XML
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_host import Look

RECORDINGS = Path(__file__).resolve().parent / "unit/recordings/nvidia"
MACHINES = sorted(path.parent.name for path in RECORDINGS.glob("*/host.txt"))
STATES = {"i": "installed", "c": "config-files", "U": "unpacked", "F": "half-configured", "H": "half-installed"}
WANTED = {"i": "install", "h": "hold", "r": "deinstall", "p": "purge", "u": "unknown"}


class Answer:
    """What a program said when the machine was recorded."""

    def __init__(self, good: bool, text: str) -> None:
        self.good, self.text = good, text

    def output(self, timeout: float) -> tuple[bool, str]:
        return self.good, self.text


class Machine:
    """A recording, its files put below a directory."""

    def __init__(self, name: str, root: Path) -> None:
        self.directory, self.root = RECORDINGS / name, root
        self.answers: dict[str, Answer] = {}
        self.available: dict[str, Any] = {}
        for title, body in sections((self.directory / "host.txt").read_text()):
            kind, _, rest = title.partition(" ")
            getattr(self, f"put_{kind}")(rest, body)

    def findings(self) -> dict[str, Any]:
        """What the module would find there, with what apt has."""
        return {**Look(self.start, root=self.root, hardware=self.root).findings(), "available": self.available}

    def start(self, command: list[str]) -> Answer:
        """Stands in for starting a program."""
        for known, file in ((NVIDIA_SMI_QUERY, "nvidia-smi.csv"), (NVIDIA_SMI_XML, "nvidia-smi.xml")):
            if command == known and (self.directory / file).exists():
                return Answer(True, (self.directory / file).read_text())
        return self.answers.get(
            " ".join(command), self.answers.get(command[0], Answer(False, f"{command[0]} cannot be run"))
        )

    def write(self, path: str, content: bytes) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    # Each kind of section.

    def put_file(self, path: str, body: str) -> None:
        self.write(path, body.encode())

    def put_hex(self, path: str, body: str) -> None:
        self.write(path, bytes.fromhex(body))

    def put_run(self, command: str, body: str) -> None:
        self.answers[command] = Answer(True, body)

    def put_fails(self, command: str, body: str) -> None:
        self.answers[command] = Answer(False, body)

    def put_pci(self, _rest: str, body: str) -> None:
        for line in body.splitlines():
            address, vendor, device, kind, driver = (*line.split(), "")[:5]
            path = f"sys/bus/pci/devices/{address}"
            for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
                self.write(f"{path}/{name}", f"{value}\n".encode())
            if driver and driver != "-":
                (self.root / path / "driver").symlink_to(f"../../../../bus/pci/drivers/{driver}")

    def put_offers(self, _rest: str, body: str) -> None:
        self.available = parse_policy(body)

    def put_packages(self, _rest: str, body: str) -> None:
        paragraphs = []
        for line in body.splitlines():
            state, name, version, maintainer = line.split("|")
            paragraphs.append(
                f"Package: {name}\nStatus: {WANTED[state[0]]} ok {STATES[state[1]]}\nMaintainer: {maintainer}\nArchitecture: amd64\nVersion: {version}\n"
            )
        self.write("var/lib/dpkg/status", "\n".join(paragraphs).encode())

    def put_processes(self, _rest: str, body: str) -> None:
        for line in body.splitlines():
            pid, program, unit, *nodes = line.split()
            self.write(f"proc/{pid}/comm", f"{program}\n".encode())
            self.write(
                f"proc/{pid}/cgroup", f"0::/system.slice/{unit}\n".encode() if unit != "-" else b"0::/user.slice\n"
            )
            descriptors = self.root / f"proc/{pid}/fd"
            descriptors.mkdir()
            for number, node in enumerate(nodes):
                (descriptors / str(number)).symlink_to(node)


def sections(text: str) -> list[tuple[str, str]]:
    """Titles and bodies: a line `== kind rest` begins a section. What is before the first one is said about the machine."""
    parts = re.split(r"^== (.*)\n", text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))
