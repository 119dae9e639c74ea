# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM instances in containers, as the Docker engine of the host has them: what it is asked, and what it is told to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Command
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container import CDI_KIND, COMPOSE, LABEL

# Images that were fetched for instances, a line each: what of it no generation needs any more may be removed.
FETCHED = "images"
# Docker waits twelve seconds for a process that it killed and says this then, while one that frees GPUs or waits for a disk takes longer.
NOT_GONE_YET = "did not receive an exit event"
KILLS = 10


class ContainerError(Exception):
    """What went wrong, in words for the operator."""


class Containers:
    """The containers of one instance, a compose project for each generation."""

    def __init__(self, run: Command, instance: str, path: Path) -> None:
        self.run = run
        self.instance = instance
        self.path = path

    def docker(self, *words: str) -> str:
        """Run docker, and fail in its words."""
        status, output, error = self.run(["docker", *words])
        if status:
            raise ContainerError(f"`docker {' '.join(words)}` failed: {(error or output).strip()[-800:]}")
        return output

    def project(self, number: int, *words: str) -> None:
        """Run compose on the project of a generation."""
        file = self.path / str(number) / COMPOSE
        self.docker("compose", "--project-name", f"vllm-{self.instance}-{number}", "--file", str(file), *words)

    def create(self, number: int) -> None:
        """Make the container of a generation, unless it is there. It is not started."""
        self.project(number, "create", "--pull", "never")

    def remove(self, number: int) -> None:
        """Remove the container of a generation and its network; what runs of it is killed."""
        if not self.has_docker():
            return
        for left in reversed(range(KILLS)):
            try:
                self.project(number, "down", "--timeout", "0")
                return
            except ContainerError as error:
                if NOT_GONE_YET not in str(error) or not left:
                    raise

    def running(self) -> list[str]:
        """Names of the containers of this instance that run, whatever their generation."""
        if not self.has_docker():
            return []
        names = ["--filter", f"label={LABEL}={self.instance}", "--format", "{{.Names}}"]
        return self.docker("container", "ls", *names).split()

    def has_docker(self) -> bool:
        """Whether there is a Docker; where somebody has taken it away, there is no container either."""
        return self.run(["docker", "--version"])[0] == 0


class Engine:
    """The Docker engine of a host, asked by its own program."""

    def __init__(self, run: Command) -> None:
        self.run = run

    def has(self, image: str) -> bool:
        """Whether an image is there."""
        return self.run(["docker", "image", "inspect", "--format", "{{.Id}}", image])[0] == 0

    def remove(self, image: str) -> bool:
        """Remove an image. Returns whether it is gone; one that is in use stays."""
        return self.run(["docker", "image", "rm", image])[0] == 0 or not self.has(image)

    def findings(self) -> dict[str, Any]:
        """Its C(version) and C(complaint), whether C(compose) is there, C(cdi_directories), and whether C(cdi) in them has GPUs."""
        status, output, error = self.run(["docker", "info", "--format", "{{json .}}"])
        info = json.loads(output) if status == 0 and output.startswith("{") else {}
        if not info.get("ServerVersion"):
            complaint = (error or "; ".join(info.get("ServerErrors") or []) or output).strip()[-300:]
            return {"version": "", "complaint": complaint}
        directories = info.get("CDISpecDirs") or []
        return {
            "version": info["ServerVersion"],
            "compose": self.run(["docker", "compose", "version"])[0] == 0,
            "cdi_directories": directories,
            "cdi": specified(directories),
        }

    def published(self) -> dict[int, str]:
        """Ports that containers publish which are no instances of ours: port -> name of the container."""
        line = f'{{{{.Names}}}} {{{{.Label "{LABEL}"}}}} {{{{.Ports}}}}'
        status, output, _error = self.run(["docker", "container", "ls", "--format", line])
        found: dict[int, str] = {}
        for name, _, rest in (entry.partition(" ") for entry in output.splitlines() if status == 0):
            label, _, ports = rest.partition(" ")
            if not label:
                for first, last in re.findall(r":(\d+)(?:-(\d+))?->", ports):
                    found.update(dict.fromkeys(range(int(first), int(last or first) + 1), name))
        return found


def specified(directories: Iterable[str]) -> bool:
    """Whether any specification of devices has GPUs."""
    return any(CDI_KIND in read(file) for directory in directories for file in Path(directory).glob("*"))
