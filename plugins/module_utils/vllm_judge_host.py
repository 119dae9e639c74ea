# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own judgement on a host: asked once for each content, and remembered."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import generations_host, vllm_container, vllm_judge
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.program import SYSTEM_PATH

# What is older than so many others is about releases and options that are long gone.
RECORDS = 100
RUNTIME = "/run"


class Judge:
    """Asks for instances of one host. `settings` is the option C(judgement) of M(gpufleet.llm.vllm_look)."""

    def __init__(self, settings: Mapping[str, Any], release: str, remember: bool) -> None:
        self.settings = settings
        self.release = release
        self.remember = remember
        self.unit = read(settings["unit"])
        self.owner = generations_host.owner_of(settings["user"])

    def judge(self, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The answers, by the names of the instances; what passed before is not asked again, and has none."""
        asked = [(wanted, vllm_judge.request(wanted, generations_host.real_config(wanted))) for wanted in instances]
        due = [(wanted, request, self.record(wanted, request)) for wanted, request in asked]
        due = [one for one in due if not one[2].exists()]
        if not due:
            return {}
        if ":" not in self.owner:
            return {wanted["name"]: {"unjudged": f"there is no user {self.owner} yet"} for wanted, *_ in due}
        with self.program() as program, ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
            answers = list(pool.map(lambda one: self.ask(one[0], one[1], one[2], program), due))
        return {wanted["name"]: answer for (wanted, *_), answer in zip(due, answers, strict=True)}

    def record(self, wanted: Mapping[str, Any], request: Mapping[str, Any]) -> Path:
        """The file that says that vLLM took this."""
        runs = (
            [wanted["container"]["image"]] if "container" in wanted else [self.release, vllm_judge.sandbox(self.unit)]
        )
        gpus = [(gpu["name"], gpu["driver"]) for gpu in self.settings["gpus"] if gpu["index"] in wanted["gpus"]]
        files = [[path, identity(Path(path))] for path in sorted(set(vllm_judge.named_paths(request["wish"])))]
        key = vllm_judge.record_key(request, [self.settings["program"], runs, self.owner, gpus, files])
        return Path(self.settings["records_path"]) / f"{key}.json"

    @contextmanager
    def program(self) -> Iterator[str]:
        """The program as a file that vLLM's user can read, for as long as it is needed."""
        with tempfile.TemporaryDirectory(prefix="vllm-judge-", dir=RUNTIME) as directory:
            path = Path(directory)
            path.chmod(0o755)
            write(path / "judge.py", self.settings["program"], 0o644)
            yield str(path / "judge.py")

    def command(self, wanted: Mapping[str, Any], program: str) -> list[str]:
        """What is run to ask."""
        if "container" not in wanted:
            return vllm_judge.from_release(self.release, self.settings["user"], self.unit, program)
        container = wanted["container"]
        own_files = [container[name] for name in ("serve", "library", "keys")]
        config = generations_host.real_config(wanted)
        compose = vllm_container.compose(wanted, config, self.owner, container)
        return vllm_judge.from_image(compose["services"][vllm_container.SERVICE], own_files, program)

    def ask(self, wanted: Mapping[str, Any], request: Mapping[str, Any], record: Path, program: str) -> dict[str, Any]:
        """Ask for one instance, and remember what passed."""
        begun = time.monotonic()
        answer = answered(self.command(wanted, program), json.dumps(request))
        answer["seconds"] = round(time.monotonic() - begun, 1)
        refusal = answer.get("refusal") or ""
        named = [path for path in vllm_judge.named_paths(request["wish"]) if path in refusal]
        if absent := [path for path in named if not Path(path).exists()]:  # it may be about to come
            return {**answer, "refusal": "", "unjudged": f"{absent[0]} is not there"}
        if answer.get("refusal") == "" and self.remember:
            write(record, json.dumps({"instance": wanted["name"], **answer}) + "\n", 0o644)
            forget(record.parent)
        return answer


def answered(command: list[str], request: str) -> dict[str, Any]:
    """What a command makes of a request."""
    environment = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, errors="replace", check=False, env=environment,
            timeout=vllm_judge.LONGEST_SECONDS + 30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"unjudged": str(error)[-300:]}
    return vllm_judge.understood(done.returncode, done.stdout, done.stderr)


def identity(path: Path) -> list[Any]:
    """By what a file, or the files of a directory, are known to be the same as before."""
    try:
        entries = sorted(path.iterdir()) if path.is_dir() else [path]
        states = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return []
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def forget(directory: Path) -> None:
    """Remove the oldest records beyond those that are kept."""
    records = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for old in records[:-RECORDS]:
        old.unlink(missing_ok=True)
