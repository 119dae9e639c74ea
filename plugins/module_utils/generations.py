"""Generations of vLLM instances on a host: what is there, what is wanted, and how the one follows from the other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import render_environment

CONFIRMED = "confirmed"
FILES = ("config.yaml", "environment", "gate.json", "inputs")
RUNTIME = Path("/run/vllm")


def render_config(config: dict[str, Any]) -> str:
    """Render the file for `vllm serve --config`: YAML with a line for each option, nested values as JSON, which YAML contains.

    What is nested in a list is a string with JSON in it: vLLM hands the entries of a list to its parser as strings, a mapping
    as Python writes it, which the parser refuses.
    """
    lines = []
    for key, value in config.items():
        if isinstance(value, list):
            value = [json.dumps(entry) if isinstance(entry, dict | list) else entry for entry in value]
        lines.append(f"{key}: {json.dumps(value)}\n")
    return "".join(lines)


class Instance:
    """One instance on the host."""

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.name = name
        self.unit = f"vllm@{name}.service"
        self.path = Path(module.params["config_path"]) / name
        self.link = self.path / "current"

    def numbers(self) -> list[int]:
        """Numbers of the generations that are there, oldest first."""
        return (
            sorted(int(entry.name) for entry in self.path.iterdir() if entry.name.isdigit())
            if self.path.is_dir()
            else []
        )

    def current(self) -> int | None:
        """Number of the generation that the link points to."""
        try:
            number = int(str(self.link.readlink()))
        except (OSError, ValueError):
            return None
        return number if (self.path / str(number)).is_dir() else None

    def confirmed(self) -> list[int]:
        """Numbers of the generations that answered, oldest first."""
        return [number for number in self.numbers() if (self.path / str(number) / CONFIRMED).exists()]

    def content(self, number: int | None) -> dict[str, str]:
        """What makes a generation: its files, and the release it links to."""
        if number is None:
            return {}
        directory = self.path / str(number)
        try:
            found = {name: (directory / name).read_text() for name in FILES}
            found["release"] = str((directory / "release").readlink())
        except OSError:
            return {}
        return found

    def write(self, content: dict[str, str]) -> int:
        """Write a generation beside the others; it is there as a whole or not at all."""
        number = max([*self.numbers(), self.current() or 0], default=0) + 1
        partial = self.path / f".{number}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.path.mkdir(mode=0o755, exist_ok=True)
        partial.mkdir(mode=0o755)
        for name in FILES:
            # What vLLM reads is readable; what systemd reads for it, which may hold secrets, is root's.
            descriptor = os.open(
                partial / name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644 if name == "config.yaml" else 0o600
            )
            with os.fdopen(descriptor, "w") as file:
                file.write(content[name])
        (partial / "release").symlink_to(content["release"])
        partial.rename(self.path / str(number))
        return number

    def drop_after(self, number: int | None) -> None:
        """Remove generations that a run wrote and died before it switched to them: the newest one has to be the wanted one."""
        for newer in self.numbers():
            if number is not None and newer > number:
                shutil.rmtree(self.path / str(newer))

    def point_to(self, number: int) -> None:
        """Move the link, written aside and renamed."""
        aside = self.path / ".current.new"
        aside.unlink(missing_ok=True)
        aside.symlink_to(str(number))
        aside.rename(self.link)

    def systemctl(self, *command: str) -> None:
        """Run systemctl on the unit; failing ends the module."""
        status, output, error = self.module.run_command(["systemctl", *command, self.unit])
        if status:
            self.module.fail_json(msg=f"systemctl {' '.join(command)} {self.unit}: {(error or output).strip()}")

    def restart(self) -> None:
        """Start the unit anew, whatever state it is in, and at every boot."""
        self.module.run_command(["systemctl", "reset-failed", self.unit])  # fails when there is nothing to reset
        self.systemctl("enable", "--quiet")
        # A start takes minutes and is watched by the gate, a stop waits for requests: neither is waited for here.
        self.systemctl("restart", "--no-block")

    def running(self) -> int | None:
        """Number of the generation that the running process was started with."""
        if self.module.run_command(["systemctl", "is-active", "--quiet", self.unit])[0]:
            return None
        try:
            return int((RUNTIME / self.name / "generation").read_text())
        except (OSError, ValueError):
            return None

    def prune(self, keep: int) -> None:
        """Remove generations beyond the newest `keep`, but never the current nor the last two confirmed ones."""
        for partial in self.path.glob(".*.partial"):  # of a run that died
            shutil.rmtree(partial)
        precious = {self.current(), *self.confirmed()[-2:]}
        for number in self.numbers()[:-keep]:
            if number not in precious:
                shutil.rmtree(self.path / str(number))


def fingerprint(paths: list[str]) -> str:
    """A hash of files; one that is not there counts as empty."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.encode() + b"\0")
        file = Path(path)
        if file.exists():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def wanted_content(wanted: dict[str, Any], inputs: str, release: str) -> dict[str, str]:
    """What the generation of a wanted instance is made of; `inputs` is the fingerprint of what it reads beside its own files."""
    # A generation holds the very revisions of the model and its adapters, so that going back goes back to their weights too,
    # and a new revision makes a new generation.
    config = {**wanted["config"], "model": os.path.realpath(wanted["config"]["model"])}
    if "lora-modules" in config:
        config["lora-modules"] = [
            {**entry, "path": os.path.realpath(entry["path"])} for entry in config["lora-modules"]
        ]
    return {
        "config.yaml": render_config(config),
        "environment": render_environment(wanted["environment"]),
        "gate.json": json.dumps(wanted["gate"]) + "\n",  # how to ask this generation, when it comes back
        "inputs": f"{inputs}\n",
        "release": release,
    }


def pending(instance: Instance, content: dict[str, str]) -> bool:
    """Whether the instance does not run a confirmed generation with this content."""
    current = instance.current()
    return instance.content(current) != content or current not in instance.confirmed() or instance.running() != current


def obsolete(config_path: str, names: set[str]) -> list[str]:
    """Instances that are there and not among the wanted ones."""
    root = Path(config_path)
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    return [name for name in there if name not in names]
