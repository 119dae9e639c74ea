"""Instances on one GPU: one starts after the other, and none while another one gives its memory back."""

from __future__ import annotations

import http.server
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import generations_host, vllm_shared_gpus
from ansible_collections.gpufleet.llm.plugins.modules import vllm_generation

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/vllm/files/gpu_turn.py"


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers /health."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def gpu() -> int:
    """A GPU that no other test has."""
    return random.randrange(10**6, 10**9)


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is about to become an engine."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def generation(path: Path, port: int, gpus: list[int] | None = None) -> Path:
    """What the program reads of a generation, in a container when it names GPUs."""
    path.mkdir()
    (path / "config.yaml").write_text(f'model: "/m"\nhost: "127.0.0.1"\nport: {port}\n')
    if gpus:
        ids = [f"nvidia.com/gpu={gpu}" for gpu in gpus]
        (path / "compose.json").write_text(json.dumps({"device_ids": ids}))
        (path / "gate.json").write_text(json.dumps({"url": f"http://127.0.0.1:{port}"}))
    return path


def turn(generation: Path, process: subprocess.Popen[bytes], gpus: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", str(PROGRAM), str(generation), str(process.pid)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_next_one_starts_when_the_former_answers(tmp_path: Path, gpu: int, engine: subprocess.Popen[bytes]) -> None:
    port = free_port()
    first = generation(tmp_path / "first", port)
    assert turn(first, engine, str(gpu)).wait(10) == 0
    second = turn(generation(tmp_path / "second", 1), engine, f"{gpu},{gpu + 1}")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1.5)
    other = turn(generation(tmp_path / "other", 1), engine, str(gpu + 2))
    assert other.wait(10) == 0, "another GPU is another turn"
    server = http.server.HTTPServer(("127.0.0.1", port), Healthy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert second.wait(10) == 0
        assert second.stdout is not None
        assert second.stdout.read() == f"another engine is starting on GPU {gpu}: waiting for it\n"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_turn_of_one_that_died_is_over(tmp_path: Path, gpu: int, engine: subprocess.Popen[bytes]) -> None:
    """In a container: its GPUs and its address stand in other files."""
    assert turn(generation(tmp_path / "first", 1, [gpu]), engine).wait(10) == 0
    second = turn(generation(tmp_path / "second", 1, [gpu]), engine)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1)
    engine.kill()
    engine.wait()
    assert second.wait(10) == 0


def test_an_instance_without_gpus_waits_for_nobody(tmp_path: Path, engine: subprocess.Popen[bytes]) -> None:
    assert turn(generation(tmp_path / "first", 1), engine).wait(10) == 0


def test_who_shares_a_gpu_is_named() -> None:
    assert vllm_shared_gpus.sharing({"a": [0], "b": [1, 2], "c": [2], "d": [0, 0]}) == ["a", "b", "c", "d"]
    assert vllm_shared_gpus.sharing({"a": [0, 0], "b": [1]}) == []


class Module:
    """Stands in for AnsibleModule: records commands."""

    def __init__(self, path: Path, wanted: list[dict[str, Any]]) -> None:
        self.params: dict[str, Any] = {
            "config_path": str(path), "inputs": {}, "release": "/opt/r1", "container_unit": None, "generation": None, "generations": {},
            "idle": [], "seconds": None, "wanted": wanted, "keep": 3, "releases_path": None, "files_path": None,
        }  # fmt: skip
        self.check_mode = False
        self.commands: list[str] = []

    def run_command(self, command: list[str], **_options: object) -> tuple[int, str, str]:
        self.commands.append(" ".join(command))
        return 0, "", ""


def test_all_have_stopped_before_the_first_one_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations_host, "UNITS", tmp_path / "units")
    monkeypatch.setattr(generations_host, "RUNTIME", tmp_path / "run")
    wanted: list[dict[str, Any]] = [
        {
            "name": name, "config": {"model": "/m", "port": port}, "gate": {"name": name}, "environment": {"CUDA_VISIBLE_DEVICES": gpus},
        }
        for name, port, gpus in (("a", 1, "0"), ("b", 2, "0,1"), ("alone", 3, "2"))
    ]  # fmt: skip
    etc = tmp_path / "etc"
    etc.mkdir()
    vllm_generation.prepared(Module(etc, wanted))
    module = Module(etc, wanted)
    deployed = [generations_host.Deployed(module, entry["name"]) for entry in wanted]
    vllm_generation.activate(module, deployed)
    starts = [number for number, command in enumerate(module.commands) if " restart " in command]
    stops = [number for number, command in enumerate(module.commands) if command.startswith("systemctl stop")]
    assert module.commands[stops[0]] == "systemctl stop vllm@a.service vllm@b.service"
    assert max(stops) < min(starts)
    assert not [module.commands[number] for number in stops if "alone" in module.commands[number]]

    module.commands.clear()
    vllm_generation.revert(module, deployed)
    assert module.commands[0] == "systemctl stop vllm@a.service vllm@b.service", "going back is a start, too"
