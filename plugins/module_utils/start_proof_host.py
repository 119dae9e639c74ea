# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Instances that exist for a proof: put under the very unit of all instances, started, and taken away without a trace."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import generations_host, start_proof
from ansible_collections.gpufleet.llm.plugins.module_utils.files import write
from ansible_collections.gpufleet.llm.plugins.module_utils.program import SYSTEM_PATH, commands
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import CACHE_PATH

# Drop-ins that no boot survives.
RUNTIME_UNITS = Path("/run/systemd/system")


class ProofInstance:
    """One of them, by its name."""

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.instance = generations_host.Deployed(module, name)
        self.drop_in = RUNTIME_UNITS / f"{self.instance.unit}.d" / "proof.conf"

    def prepare(self, content: dict[str, str], drop_in: str, container_unit: str = "") -> None:
        """Put it there, with what differs in its unit. It is not enabled: after a boot nobody waits for it."""
        self.remove()
        number = self.instance.write(content)
        write(self.drop_in, drop_in, 0o644)
        self.instance.switch(number, container_unit)
        self.module.run_command(["systemctl", "daemon-reload"], check_rc=True)

    def start(self, wait: bool = False) -> tuple[int, str]:
        """Start it. Returns the exit status of systemctl and what it complained of."""
        command = ["systemctl", "start", *([] if wait else ["--no-block"]), self.instance.unit]
        status, output, error = self.module.run_command(command)
        return int(status), str(error or output).strip()

    def remove(self) -> None:
        """Stop it, and take away everything that it had; nothing when there is nothing."""
        there = self.instance.path.exists() or self.drop_in.exists()
        if not there:
            return
        self.module.run_command(["systemctl", "stop", self.instance.unit])
        self.module.run_command(["systemctl", "reset-failed", self.instance.unit])
        shutil.rmtree(self.drop_in.parent, ignore_errors=True)
        shutil.rmtree(Path(CACHE_PATH) / self.instance.name, ignore_errors=True)
        self.instance.erase()


def remove_left(module: Any) -> None:
    """Take away what a run that died left of its proofs."""
    root = Path(module.params["config_path"])
    for path in root.glob(f"{start_proof.PREFIX}*") if root.is_dir() else []:
        ProofInstance(module, path.name).remove()


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def gpu_memory(module: Any) -> dict[int, tuple[int, int]]:
    """Free and whole memory of each GPU in MiB, by its index; nothing where there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=index,memory.free,memory.total", "--format=csv,noheader,nounits"]
    status, output, _error = commands(module, SYSTEM_PATH)(query)
    rows = [line.split(",") for line in output.splitlines()] if status == 0 else []
    return {int(row[0]): (int(row[1]), int(row[2])) for row in rows if len(row) == 3}


def put_model(directory: Path, files: Mapping[str, str]) -> Path:
    """Put the files of a tiny model into a directory that everybody may read."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    for name, text in files.items():
        write(directory / name, text, 0o644)
    return directory
