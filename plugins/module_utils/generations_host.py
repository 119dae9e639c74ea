"""Generations of vLLM instances on a host: what is there, what is wanted, and how the one follows from the other."""

from __future__ import annotations

import grp
import hashlib
import json
import os
import pwd
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import (
    host_agent,
    vllm_container,
    vllm_container_host,
    vllm_named_files,
    vllm_named_files_host,
    vllm_shared_gpus,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import render_environment
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container import COMPOSE
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_spelling import render_config

CONFIRMED = "confirmed"
# In the directory of an instance: as long as it is there, the instance stays as it is.
HELD = "held"
FILES = ("config.yaml", "environment", "gate.json", "inputs")
RUNTIME = Path("/run/vllm")
UNITS = Path("/etc/systemd/system")
# The group that may read the key of the host's certificate.
CERTIFICATE_READERS = "vllm-fleet"
# Where the operator's word on each instance is kept.
WORDS = Path("/var/lib/vllm-fleet")
CACHES = Path("/var/cache/vllm")


class Deployed:
    """One instance on the host."""

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.name = name
        self.unit = f"vllm@{name}.service"
        self.path = Path(module.params["config_path"]) / name
        self.link = self.path / "current"
        self.containers = vllm_container_host.Containers(commands(module), name, self.path)

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

    def held(self) -> str:
        """Who wants the instance to stay as it is, since when and why, as an operator wrote it; empty when nobody does."""
        try:
            text = (self.path / HELD).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return " ".join(text.split()) or "nobody said why"

    def word(self) -> dict[str, str]:
        """The operator's word on it."""
        try:
            return host_agent.word((WORDS / f"{self.name}.json").read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            return host_agent.word(None)
        except OSError:
            return host_agent.word("")

    def idle(self) -> bool:
        """Whether a person stopped it: then it need not run, nor have answered."""
        return self.word()["operator"] == host_agent.STOPPED

    def confirmed(self) -> list[int]:
        """Numbers of the generations that answered, oldest first."""
        return [number for number in self.numbers() if (self.path / str(number) / CONFIRMED).exists()]

    def confirm(self, number: int, seconds: float | None) -> bool:
        """Mark a generation as one that answered, and after how long; whether that is news."""
        mark = self.path / str(number) / CONFIRMED
        if mark.exists():
            return False
        write(mark, "" if seconds is None else f"{seconds:.1f}\n", 0o644)
        return True

    def start_seconds(self, number: int | None) -> float | None:
        """The seconds that a generation took to answer; nothing where nobody wrote them down."""
        try:
            return None if number is None else float(read(self.path / str(number) / CONFIRMED))
        except ValueError:
            return None

    def content(self, number: int | None) -> dict[str, str]:
        """What makes a generation: its files, and the release it links to."""
        if number is None:
            return {}
        directory = self.path / str(number)
        try:
            found = {name: (directory / name).read_text() for name in FILES}
            if (directory / COMPOSE).exists():
                found[COMPOSE] = (directory / COMPOSE).read_text()
            else:
                found["release"] = str((directory / "release").readlink())
        except OSError:
            return {}
        return found

    def in_container(self, number: int | None) -> bool:
        """Whether a generation runs in a container."""
        return number is not None and (self.path / str(number) / COMPOSE).exists()

    def write(self, content: dict[str, str]) -> int:
        """Write a generation beside the others; it is there as a whole or not at all."""
        number = max([*self.numbers(), self.current() or 0], default=0) + 1
        partial = self.path / f".{number}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.path.mkdir(mode=0o755, exist_ok=True)
        partial.mkdir(mode=0o755)
        for name in (*FILES, *([COMPOSE] if COMPOSE in content else [])):
            # What vLLM reads is readable; what systemd reads for it, which may hold secrets, is root's.
            descriptor = os.open(
                partial / name,
                os.O_CREAT | os.O_WRONLY | os.O_EXCL,
                0o644 if name in ("config.yaml", COMPOSE) else 0o600,
            )
            with os.fdopen(descriptor, "w") as file:
                if name == "environment" and COMPOSE in content:  # in a container, vLLM's user reads it
                    os.fchown(descriptor, -1, group_of(content[COMPOSE]))
                    os.fchmod(descriptor, 0o640)
                file.write(content[name])
        if COMPOSE not in content:
            (partial / "release").symlink_to(content["release"])
        partial.rename(self.path / str(number))
        return number

    def drop_after(self, number: int | None) -> None:
        """Remove generations that a run wrote and died before it switched to them: the newest one has to be the wanted one."""
        for newer in self.numbers():
            if number is not None and newer > number:
                self.remove(newer)

    def remove(self, number: int) -> None:
        """Remove a generation, its container first: what is left of a run that died here is found again by the directory."""
        if self.in_container(number):
            self.containers.remove(number)
        shutil.rmtree(self.path / str(number))

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

    def switch(self, number: int, unit: str) -> None:
        """Make a generation the current one, under the unit of its runtime; `unit` is the one of instances in containers.

        What it takes is there before anything stops. An instance that changes its runtime is stopped by the unit that started it.
        """
        if self.in_container(number):
            self.containers.create(number)
        if self.use_unit(unit if self.in_container(number) else ""):
            self.module.run_command(["systemctl", "daemon-reload"], check_rc=True)
        if number != self.current():
            self.point_to(number)

    def use_unit(self, unit: str) -> bool:
        """Give the instance a unit of its own, or with an empty one that of all instances. Returns whether systemd has to be told."""
        file = UNITS / self.unit
        there = read(file)
        if there == unit:
            return False
        if not (there and unit):
            self.stop()
            # its link leads to the unit that goes
            self.module.run_command(["systemctl", "disable", "--quiet", self.unit])
        if unit:
            write(file, unit, 0o644)
        else:
            file.unlink()
        return True

    def stop(self) -> None:
        """Stop the unit and wait for it. A container that runs on, because its engine did not answer, would answer in the place of what follows."""
        self.systemctl("stop")
        if read(UNITS / self.unit) and (left := self.containers.running()):
            raise vllm_container_host.ContainerError(
                f"{self.unit} was stopped, but {', '.join(left)} runs; docker stop {' '.join(left)}"
            )

    def restart(self) -> None:
        """Start the unit anew, whatever state it is in, and at every boot."""
        self.module.run_command(["systemctl", "reset-failed", self.unit])  # fails when there is nothing to reset
        self.systemctl("enable", "--quiet")
        # A start takes minutes and is watched by the gate, a stop waits for requests: neither is waited for here.
        self.systemctl("restart", "--no-block")

    def stopped(self) -> bool:
        """Whether the unit neither runs nor is about to."""
        return self.module.run_command(["systemctl", "is-active", self.unit])[1].strip() == "inactive"  # type: ignore[no-any-return]

    def running(self) -> int | None:
        """Number of the generation that the running process was started with."""
        if self.module.run_command(["systemctl", "is-active", "--quiet", self.unit])[0]:
            return None
        return self.started()

    def started(self) -> int | None:
        """Number of the generation that the unit was started with, for a unit that is known to run."""
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
                self.remove(number)

    def erase(self) -> None:
        """Remove all that there is of an instance which is stopped: its generations, what it has compiled, a unit of its own, the operators' word."""
        for number in self.numbers():
            self.remove(number)
        shutil.rmtree(self.path, ignore_errors=True)
        (UNITS / self.unit).unlink(missing_ok=True)
        (WORDS / f"{self.name}.json").unlink(missing_ok=True)
        shutil.rmtree(CACHES / self.name, ignore_errors=True)
        self.module.run_command(["systemctl", "daemon-reload"])

    def images(self) -> set[str]:
        """Images that its generations name."""
        texts = [self.content(number).get(COMPOSE) for number in self.numbers()]
        return {vllm_container.image_of(text) for text in texts if text}


def fingerprint(paths: list[str]) -> str:
    """A hash of files; one that is not there counts as empty."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.encode() + b"\0")
        file = Path(path)
        if file.exists():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def owner_of(user: str) -> str:
    """uid and gid of a user; the name of one that is not there yet, as in a run with --check."""
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        return user
    return f"{found.pw_uid}:{found.pw_gid}"


def gid_of(group: str) -> str:
    """gid of a group; the name of one that is not there yet, as in a run with --check."""
    try:
        return str(grp.getgrnam(group).gr_gid)
    except KeyError:
        return group


def group_of(compose: str) -> int:
    """The gid that a container runs with."""
    return int(json.loads(compose)["services"][vllm_container.SERVICE]["user"].partition(":")[2])


def fingerprints(inputs: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The fingerprint of what instances of each runtime read beside their own files."""
    return {runtime: fingerprint(list(paths)) for runtime, paths in inputs.items()}


def real_config(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an instance with the very revisions of its models, as its generation has it."""
    # So going back goes back to their weights too, and a new revision makes a new generation.
    shipped = {file["path"] for file in wanted.get("files") or []}
    return vllm_named_files.with_revisions(
        wanted["config"], lambda path: path if path in shipped else os.path.realpath(path)
    )


def wanted_content(wanted: dict[str, Any], inputs: Mapping[str, str], release: str) -> dict[str, str]:
    """What the generation of a wanted instance is made of; `inputs` has the fingerprint of what instances of its runtime read beside their files."""
    config = real_config(wanted)
    runtime = wanted.get("runtime", "systemd")
    content = {
        "config.yaml": render_config(config),
        "environment": render_environment(wanted["environment"]),
        "gate.json": json.dumps(wanted["gate"]) + "\n",  # how to ask this generation, when it comes back
        "inputs": f"{inputs.get(runtime, '')}{vllm_named_files_host.fingerprint({**wanted, 'config': config})}\n",
    }
    if runtime == "systemd":
        return {**content, "release": release}
    container = wanted["container"]
    file = vllm_container.compose(wanted, config, owner_of(container["user"]), container, gid_of(CERTIFICATE_READERS))
    return {**content, COMPOSE: json.dumps(file, indent=2) + "\n"}


def gate_of(text: str) -> dict[str, Any]:
    """How to ask a generation, from its gate.json: without what a former version of this collection wrote there and nobody reads any more."""
    return {key: value for key, value in json.loads(text).items() if key in ("name", "unit", "url", "model")}


def described(content: dict[str, str]) -> dict[str, Any]:
    """What a generation runs, and where; of one that is not there, nothing."""
    if not content:
        return {"runtime": "", "runs": "", "port": None, "gpus": [], "gate": {}}
    options = dict(line.split(": ", 1) for line in content["config.yaml"].splitlines())
    compose = content.get(vllm_container.COMPOSE)
    return {
        "runtime": "docker" if compose else "systemd",
        "runs": vllm_container.image_of(compose) if compose else content["release"],
        "port": json.loads(options["port"]) if "port" in options else None,
        "gpus": vllm_shared_gpus.gpus_of(content),
        "gate": gate_of(content["gate.json"]),
    }


def pending(instance: Deployed, content: dict[str, str]) -> bool:
    """Whether the instance is to be changed: nobody holds it, and it does not run a confirmed generation with this content, under a unit of its
    runtime.
    """
    return not instance.held() and differs(instance, content, instance.running())


def differs(instance: Deployed, content: dict[str, str], running: int | None) -> bool:
    """Whether the instance, of which generation `running` runs, does not run a confirmed one with this content, under a unit of its runtime.

    One that a person stopped is to have the content; whether that answers is seen when it is started.
    """
    current = instance.current()
    # How it is asked follows from the rest, and is no reason for a restart.
    known = {**instance.content(current), "gate.json": content["gate.json"]}
    return (
        known != content
        or (not instance.idle() and (current not in instance.confirmed() or running != current))
        or (UNITS / instance.unit).exists() != (COMPOSE in content)
    )


def there(config_path: str) -> list[str]:
    """Names of the instances that are there."""
    root = Path(config_path)
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []


def images(module: Any) -> set[str]:
    """Images that any generation of any instance names."""
    names = there(module.params["config_path"])
    return {image for name in names for image in Deployed(module, name).images()}


def obsolete(config_path: str, names: set[str]) -> list[str]:
    """Instances that are there, not among the wanted ones, and held by nobody."""
    found = there(config_path)
    return [name for name in found if name not in names and not (Path(config_path) / name / HELD).exists()]
