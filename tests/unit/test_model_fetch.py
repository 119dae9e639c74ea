"""The downloader itself, with the real huggingface_hub and hf_xet, against the hub of the scenario model_store."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import model_layout, model_progress
from ansible_collections.gpufleet.llm.plugins.module_utils import model_store as rules
from ansible_collections.gpufleet.llm.plugins.modules import model_download

from tests.model_stores import CONTENTS, FIRST, GOOD, SERVER, SIZE, WEIGHTS, hub, url

ROOT = Path(__file__).resolve().parents[2]
FETCH = ROOT / "roles/model_store/templates/opt/model-store/fetch"


@dataclasses.dataclass
class Place:
    """A hub, and a disk to download to."""

    path: Path
    port: int

    def mode(self, words: str) -> None:
        (self.path / "mode").write_text(words)

    def busy(self, requests: int) -> None:
        (self.path / "busy").write_text(str(requests))

    def asked(self) -> list[str]:
        log = self.path / "log"
        return log.read_text().splitlines() if log.exists() else []

    def staging(self, model: dict[str, Any]) -> Path:
        return self.path / "store/.partial" / str(rules.plan([model])[0]["directory"])

    def fetch(self, model: dict[str, Any], token: str = "", **more: Any) -> dict[str, Any]:
        """Run the downloader as its unit does; return what it said last, with the names that have arrived."""
        parameters = {
            "path": str(self.path / "store"), "user": "", "endpoint": f"http://127.0.0.1:{self.port}", "token": token,
            "headers": {}, "queries": {}, "peer": {}, "parallel": 4, "reserve_bytes": 0, "environment": {}, "pause": 0,
            "model": rules.plan([model])[0], **more,
        }  # fmt: skip
        credentials = self.path / "credentials"
        credentials.mkdir(exist_ok=True)
        job = {**model_download.job_of(parameters), "status": str(self.path / "status.json")}
        (credentials / "job").write_text(json.dumps(job))
        (credentials / "secrets").write_text(json.dumps(model_download.secrets_of(parameters)))
        done = subprocess.run(
            [sys.executable, "-B", str(self.path / "fetch/fetch_model.py")],
            env={**os.environ, "CREDENTIALS_DIRECTORY": str(credentials)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        said: dict[str, Any] = json.loads((self.path / "status.json").read_text())
        assert said["state"] in ("done", "failed"), done.stdout + done.stderr
        manifest = self.staging(model) / ".model.json"
        files = json.loads(manifest.read_text())["files"] if manifest.exists() else {}
        return {**said, "files": files, "log": done.stdout}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    shutil.copytree(FETCH, tmp_path / "fetch")
    shutil.copy(str(model_layout.__file__), tmp_path / "fetch")  # as fetch.yml does
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "HUB_HOME": str(tmp_path), "HUB_PORT": str(port)}
    program = subprocess.Popen([sys.executable, str(ROOT / "molecule/model_store/files/hub.py")], env=environment)
    try:
        for _attempt in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield Place(tmp_path, port)
    finally:
        program.terminate()
        program.wait()


def test_xet_is_taken_where_it_is_offered_and_goes_on_in_the_middle(place: Place) -> None:
    place.mode("xet")
    model = hub("large", "acme/secret")
    part = place.staging(model) / ".cache/parts" / hashlib.sha256(b"model.safetensors").hexdigest()
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENTS["model.safetensors"][:5_000_001])  # of a run that was killed
    said = place.fetch(model, GOOD)
    assert said["state"] == "done", said
    assert said["files"]["model.safetensors"] == {"size": SIZE, "sha256": WEIGHTS}
    asked = [line for line in place.asked() if "reconstructions" in line]
    assert all(line.endswith("bytes=5000001-7999999") for line in asked), asked
    assert asked
    assert not [line for line in place.asked() if line.startswith("GET /acme/") and "model.safetensors" in line]


@pytest.mark.parametrize(
    ("words", "environment"), [("", {}), ("xet", {"HF_HUB_DISABLE_XET": "1"}), ("xet unreachable", {})]
)
def test_where_there_is_no_xet_files_of_any_size_come_by_http(
    place: Place, words: str, environment: dict[str, str]
) -> None:
    """The library gives up at 50 GB: here it is told that the eight megabytes are too many."""
    library = place.path / "fetch/from_huggingface.py"
    text = library.read_text()
    library.write_text(text.replace("from job import", "constants.MAX_HTTP_DOWNLOAD_SIZE = 1000\nfrom job import", 1))
    place.mode(words)
    patience = {"HF_XET_CLIENT_RETRY_MAX_DURATION": "1s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}
    said = place.fetch(hub("plain"), environment=environment | patience)
    assert said["state"] == "done", said
    assert said["files"]["model.safetensors"]["sha256"] == WEIGHTS
    assert ("Xet cannot be used, so files come by HTTP" in said["log"]) == ("unreachable" in words)


def test_the_same_weights_in_other_layouts_stay_where_they_are_and_that_is_told(place: Place) -> None:
    said = place.fetch(hub("layouts", "acme/layouts"))
    kept = {
        "config.json",
        "README.md",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
        "1_Dense/pytorch_model.bin",
    }
    assert set(said["files"]) == kept
    assert said["total"] == sum(file["size"] for file in said["files"].values()), (
        "the disk needs room for what is fetched"
    )
    assert said["selection"].startswith("5 of 12 files are fetched, 0.2 kB of 8.0 MB; left out: ")
    assert "consolidated.safetensors and 1 more (model.safetensors.index.json does not name it)" in said["selection"]
    for name in ("consolidated.safetensors", "model.gguf", "onnx/", "metal/"):
        assert name in said["selection"]
    assert len(place.fetch(hub("layouts", "acme/layouts") | {"exclude": []})["files"]) == 12
    chosen = hub("layouts", "acme/layouts") | {"include": ["*.json", "consolidated*"]}
    assert "consolidated.safetensors" in place.fetch(chosen)["files"]


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_a_server_that_has_too_much_to_do_is_asked_again_when_it_says(place: Place, kind: str) -> None:
    """Five times, which are all the attempts that a broken line gets."""
    place.busy(5)
    model = hub("busy") if kind == "hub" else url("busy")
    for file in model.get("files", []):  # type: ignore[attr-defined]
        file["url"] = file["url"].replace(SERVER, f"http://127.0.0.1:{place.port}")
    said = place.fetch(model)
    assert said["state"] == "done", said
    assert "has too much to do and asks to wait 1 s" in said["log"]


def test_a_mirror_needs_neither_whoami_nor_the_sizes_of_files(place: Place) -> None:
    place.mode("mirror")
    said = place.fetch(hub("mirrored", "acme/secret"), GOOD)
    assert said["state"] == "done", said
    assert said["total"] > SIZE
    assert said["files"]["model.safetensors"]["sha256"] == WEIGHTS
    assert not [line for line in place.asked() if "whoami" in line], "nobody was refused"


def test_code_of_another_repository_is_pinned_or_refused_before_the_weights(place: Place) -> None:
    said = place.fetch(hub("elsewhere", "acme/elsewhere"))
    assert said["state"] == "failed"
    assert "auto_map in config.json of acme/elsewhere takes code from acme/code" in said["message"]
    assert "`code: [{repository: acme/code, revision: <commit>}]`" in said["message"]
    assert not [line for line in place.asked() if line.startswith("GET /acme/") and "model.safetensors" in line]

    pinned = hub("elsewhere", "acme/elsewhere") | {"code": [{"repository": "acme/code", "revision": FIRST}]}
    said = place.fetch(pinned)
    assert said["state"] == "done", said
    assert "modeling.py" in said["files"]
    assert "notes.txt" not in said["files"]
    config = (place.staging(pinned) / "config.json").read_bytes()
    assert json.loads(config)["auto_map"] == {"AutoModel": "modeling.Tiny"}
    assert said["files"]["config.json"] == {"size": len(config), "sha256": hashlib.sha256(config).hexdigest()}

    waived = hub("elsewhere", "acme/elsewhere") | {"code": []}
    assert place.fetch(waived)["state"] == "done"
    assert "acme/code--" in (place.staging(waived) / "config.json").read_text()


def test_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FETCH))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    wait = importlib.import_module("job").asked_to_wait
    assert wait(429, {"Retry-After": "120"}, 60) == 120
    assert wait(503, {"retry-after": "5"}, 60) == 5
    assert wait(429, {"RateLimit": '"api";r=0;t=55'}, 60) == 55
    assert wait(429, {}, 60) == 60
    assert wait(429, {"Retry-After": "Sun, 29 Nov 2020 00:00:00 GMT"}, 60) == 0
    assert wait(429, {"Retry-After": "soon"}, 60) == 60
    assert wait(503, {}, 60) is None
    assert wait(404, {"Retry-After": "5"}, 60) is None
    assert model_progress.Progress().line("waiting", 0, 0, "the hub asks") == "the hub asks"
