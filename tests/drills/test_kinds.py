"""Every kind of model on the real vLLM (its CPU build): tiny ones with random weights, one after the other on one host, through gate, gateway and verify.

By hand, as root (twenty minutes on two cores; KINDS=rerank,transcribe for some of them):

    .venv/bin/pytest tests/drills/test_kinds.py -s
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds

from tests import tiny_models
from tests.e2e.conftest import Done, program
from tests.hosts import hosts
from tests.stand_in import contract

FLEET = "e2e-kinds"
HOST = f"{FLEET}-1"
KEY = "c" * 40
NOUNS = {
    "generate": "completion", "embed": "embedding", "rerank": "rank", "reward": "rank", "classify": "class", "pool": "pooled output",
    "transcribe": "transcription",
}  # fmt: skip
# Sound comes last, and needs a release of its own.
KINDS = [kind for kind in NOUNS if kind in os.environ.get("KINDS", ",".join(NOUNS)).split(",")]
REQUEST = f"Authorization: Bearer {KEY}"


@dataclass
class Fleet:
    """The host, which is its own gateway."""

    directory: Path

    def run(self, kind: str, **variables: Any) -> Done:
        """Serve a model of a kind: site.yml, whose end is the proof from the outside."""
        wheels = Path(os.environ.get("PIP_FIND_LINKS", "")).is_dir() and os.environ.get("PIP_FIND_LINKS", "") != ""
        instance = {
            "name": "one", "model": kind, "port": 8000, "options": tiny_models.OPTIONS, "environment": {"VLLM_CPU_KVCACHE_SPACE": 1},
        }  # fmt: skip
        told = {
            "ansible_connection": "community.docker.docker",
            "ansible_python_interpreter": "/usr/bin/python3",
            "fleet_skip_roles": ["base", "firewall", "ssh_hardening"],
            "vllm_device": "cpu",
            "vllm_internal_key": KEY,
            "vllm_torch_backend": "" if wheels else "cpu",
            "uv_find_links": ["/srv/wheels"] if wheels else [],
            "vllm_instances": [instance],
            "model_store_models": [
                {"name": kind, "source": "path", "path": str(self.directory / kind), "copy": True} for kind in tiny_models.KINDS
            ],
            "gateway_server_names": ["llm.test"],
            "gateway_routes": [{"model": kind, "instance": "one"}],
            "gateway_clients": [{"name": "a", "key": "a" * 40, "requests_per_minute": 600, "concurrent_requests": 4}],
            "gateway_paths": [*model_kinds.open_paths(), "/pooling"],
            "verify_connect_address": hosts.address(HOST),
            **variables,
        }  # fmt: skip
        groups: dict[str, Any] = {group: {"hosts": {HOST: {}}} for group in ("vllm", "gateway")}
        file = self.directory / "hosts.json"
        file.write_text(json.dumps({"all": {"vars": told}, **groups}))
        return program("ansible-playbook", "site.yml", "-i", str(file), check=False)

    def ask(self, path: str, body: tuple[bytes, str] | None) -> contract.Answer:
        """Ask the instance from its own host."""
        sent = ["--data-binary", "@-", "-H", f"Content-Type: {body[1]}"] if body else []
        command = [
            "docker",
            "exec",
            "-i",
            HOST,
            "curl",
            "-sS",
            "-m",
            "60",
            "-w",
            "\n%{http_code}",
            "-H",
            REQUEST,
            *sent,
        ]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:8000{path}"], input=body[0] if body else b"", capture_output=True, check=True
        )
        text, status = done.stdout.decode().rsplit("\n", 1)
        return contract.Answer(int(status), text)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The bare host."""
    directory = tmp_path_factory.mktemp("kinds")
    for kind in tiny_models.KINDS:
        tiny_models.write(directory, kind)
    hosts.down(FLEET)
    hosts.up(FLEET, {HOST: "debian12"})
    yield Fleet(directory)
    hosts.down(FLEET)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "transcribe"])
def test_a_model_is_served_as_what_it_is(fleet: Fleet, kind: str) -> None:
    done = fleet.run(kind)
    assert done.status == 0, done.output
    assert f"ok      {NOUNS[kind]} {kind}" in done.output
    if kind in contract.HAS:
        contract.it_is_of_its_kind(kind, fleet.ask, kind)


@pytest.mark.skipif("transcribe" not in KINDS, reason="not among KINDS")
def test_a_model_that_hears_is_refused_without_the_packages_for_sound_and_served_with_them(fleet: Fleet) -> None:
    """vLLM starts without them, says that it is healthy, and refuses every sound. The gate says so at once, long before vllm_start_timeout."""
    done = fleet.run("transcribe")
    assert done.status == 2, done.output
    told = " ".join(done.output.split())
    assert "asked to transcribe (/v1/audio/transcriptions), it answered HTTP 400" in told
    assert "vllm_extras: [audio]" in told
    done = fleet.run("transcribe", vllm_extras=["audio"])
    assert done.status == 0, done.output
    assert "ok      transcription transcribe" in done.output
    contract.it_is_of_its_kind("transcribe", fleet.ask, "transcribe")
