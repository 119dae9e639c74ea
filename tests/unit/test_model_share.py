"""Models that hosts copy from each other: who has what, the server that hands a model out, and its unit."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.filter import model_store as filters
from ansible_collections.gpufleet.llm.plugins.module_utils import model_server, model_unit
from ansible_collections.gpufleet.llm.plugins.module_utils import model_store as rules
from ansible_collections.gpufleet.llm.plugins.modules import model_download, model_share

from tests.unit.test_model_store import DOWNLOAD, Keeper, copied, hub

TOKEN = "s3cret"


# --- who has what ---------------------------------------------------------------------------------------------------


def test_hosts_are_told_apart_by_what_they_have() -> None:
    hostvars: dict[str, Any] = {
        "has": {"__model_store_state": {"present": ["a-1"], "absent": ["b-1"]}},
        "lacks": {"__model_store_state": {"present": [], "absent": ["a-1"]}},
        "silent": {"__model_store_state": {"present": [], "absent": []}},  # it does not share
        "later": {"model_store_share": True},
        "asked": {"model_store_share": "true"},  # as -e gives it
        "never": {"model_store_share": "false"},
        "bare": {},
    }
    hosts = list(hostvars)
    assert filters.model_store_holders(hostvars, hosts, "a-1") == ["has"]
    assert filters.model_store_lackers(hostvars, hosts, "a-1") == ["lacks"]
    assert filters.model_store_unseen(hostvars, hosts) == ["later", "asked"]
    # a host that did not answer has nothing
    looked = {"results": [{"item": "later", "present": ["a-1"]}, {"item": "never", "unreachable": True}]}
    assert filters.model_store_holders(hostvars, hosts, "a-1", looked) == ["has", "later"]
    assert filters.model_store_holders(hostvars, hosts, "b-1", looked) == []


def test_the_store_tells_what_came_from_elsewhere_when_it_is_asked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    keeper = Keeper(tmp_path)
    here = keeper.path / ".revisions/tiny-0123456789ab"
    here.mkdir(parents=True)
    (here / ".model.json").write_text(json.dumps({"files": {}}))
    models = (hub(), hub(name="other"), copied(source, name="copied"))
    assert keeper.run(*models, share=False).present == []
    store = keeper.run(*models, share=True)
    assert (store.present, store.absent) == (["tiny-0123456789ab"], ["other-0123456789ab"])


# --- the server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[model_server.Server]:
    """A server of a model with three files, and of a neighbour that it must not show."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub/my weights.bin").write_bytes(bytes(range(256)) * 4096)
    (directory / "empty").touch()
    (directory / ".model.json").write_text("not on the list")
    (tmp_path / "neighbour").write_text("private")
    job = {
        "address": "127.0.0.1", "port": 0, "token": TOKEN, "directory": str(directory), "idle": 60,
        "files": ["sub/my weights.bin", "empty", "gone"],
    }  # fmt: skip
    with model_server.Server(job) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(
    server: model_server.Server, path: str, token: str = f"Bearer {TOKEN}", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    connection.request(method, path, headers={"Authorization": token, **headers})
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read()


def test_files_and_parts_of_them_are_sent(server: model_server.Server) -> None:
    whole = bytes(range(256)) * 4096
    assert ask(server, "/sub/my%20weights.bin")[::2] == (200, whole)
    status, headers, body = ask(server, "/sub/my%20weights.bin", Range="bytes=1000-")
    assert (status, body) == (206, whole[1000:])
    assert headers["Content-Range"] == f"bytes 1000-{len(whole) - 1}/{len(whole)}"
    assert ask(server, "/sub/my%20weights.bin", Range="bytes=0-0")[::2] == (206, b"\0")
    status, headers, _body = ask(server, "/sub/my%20weights.bin", Range=f"bytes={len(whole)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(whole)}")
    assert ask(server, "/empty")[::2] == (200, b"")


@pytest.mark.parametrize("token", ["", "Bearer ", "Bearer wrong", TOKEN, "Bearer \xe9"])
def test_without_the_token_nothing_is_sent(server: model_server.Server, token: str) -> None:
    assert ask(server, "/empty", token)[::2] == (401, b"")
    assert ask(server, "/none", token)[::2] == (401, b"")


@pytest.mark.parametrize(
    "path", ["/", "/none", "/.model.json", "/../neighbour", "/sub/../../neighbour", "/%2e%2e/neighbour", "//etc/passwd"]
)
def test_only_the_files_of_the_model_are_sent(server: model_server.Server, path: str) -> None:
    assert ask(server, path)[::2] == (404, b"")


def test_nothing_but_get_is_answered(server: model_server.Server) -> None:
    for method in ("POST", "PUT", "DELETE", "HEAD"):
        assert ask(server, "/empty", method=method)[0] == 501


def test_a_file_that_is_gone_does_not_end_the_server(server: model_server.Server) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        ask(server, "/gone")
    assert ask(server, "/empty")[0] == 200
    end = time.monotonic() + 5  # the answer is here a moment before its thread is done
    while server.busy and time.monotonic() < end:
        time.sleep(0.01)
    assert server.busy == 0


def test_the_server_ends_when_nobody_asks_but_not_under_somebody(tmp_path: Path) -> None:
    job = {"address": "127.0.0.1", "port": 0, "token": TOKEN, "directory": str(tmp_path), "files": [], "idle": 0.01}
    with model_server.Server(job) as running:
        running.count(1)
        running.last = 0.0
        running.service_actions()
        running.count(-1)
        running.last = 0.0
        with pytest.raises(model_server.IdleError):
            running.serve_forever(poll_interval=0.05)


def test_the_program_runs_by_itself_and_says_when_it_is_ready(tmp_path: Path) -> None:
    """As systemd runs it: the file alone, without the collection, told by credentials."""
    with socket.socket() as free, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        notified.bind(str(tmp_path / "notify"))
        free.close()
        job = {
            "address": "127.0.0.1", "port": port, "token": TOKEN, "directory": "/", "files": [], "idle": 0.1,
        }  # fmt: skip
        (tmp_path / "job").write_text(json.dumps(job))
        program = tmp_path / "program"
        program.write_text(Path(model_server.__file__).read_text())
        done = subprocess.run(
            [sys.executable, "-BI", str(program)], text=True, capture_output=True, timeout=30, check=False,
            env={"CREDENTIALS_DIRECTORY": str(tmp_path), "NOTIFY_SOCKET": str(tmp_path / "notify")},
        )  # fmt: skip
        assert notified.recv(100) == b"READY=1"
        assert (done.returncode, done.stdout) == (0, "nobody asked for 0.1 s\n"), done.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = subprocess.run(
            [sys.executable, "-BI", str(program)], text=True, capture_output=True, timeout=30, check=False,
            env={"CREDENTIALS_DIRECTORY": str(tmp_path)},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, f"127.0.0.1 port {port}: Address already in use\n")


# --- the unit -------------------------------------------------------------------------------------------------------


class FakeModule:
    """What a module has of AnsibleModule: it notes what is run, and what the credentials are meanwhile."""

    def __init__(self, rc: int = 0) -> None:
        self.rc = rc
        self.commands: list[list[str]] = []
        self.credentials: dict[str, tuple[int, str]] = {}
        self.warnings: list[str] = []
        self.params: dict[str, Any] = {}

    def run_command(self, command: list[str]) -> tuple[int, str, str]:
        self.commands.append(command)
        for entry in command:
            if entry.startswith("--property=LoadCredential="):
                path = Path(entry.rpartition(":")[2])
                self.credentials[path.name] = (path.stat().st_mode & 0o777, path.read_text())
        return (self.rc, "", "no such luck\n") if command[0] == "systemd-run" else (0, "", "")

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_credentials_are_there_for_the_start_only(tmp_path: Path) -> None:
    unit = model_unit.Unit("x", "X", ["Type=exec"], {"secrets": "hf_secret"}, ["/bin/true"])
    fake = FakeModule()
    assert model_unit.start(fake, unit, tmp_path / "run") == ""
    assert fake.credentials == {"secrets": (0o600, "hf_secret")}
    assert list((tmp_path / "run").iterdir()) == []
    assert "hf_secret" not in " ".join(fake.commands[0])
    assert model_unit.start(FakeModule(1), unit, tmp_path / "run") == "no such luck"


@pytest.fixture
def store(tmp_path: Path) -> dict[str, Any]:
    """What model_share is asked for, about a store that has it."""
    model = rules.plan([hub()])[0]
    directory = tmp_path / ".revisions" / model["directory"]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    manifest = {
        **rules.asks_for(model),
        "files": {"config.json": {"size": 2, "sha256": "a" * 64}},
        "commit": "c",
    }
    (directory / ".model.json").write_text(json.dumps(manifest))
    return {
        "path": str(tmp_path), "model": model, "address": "10.0.0.1", "port": 8990, "token": TOKEN,
        "idle_seconds": 300, "limit_seconds": 86400,
    }  # fmt: skip


def test_the_server_is_told_its_secret_as_a_credential(
    store: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_unit.start, "__defaults__", (tmp_path / "run",))
    fake = FakeModule()
    fake.params = store
    told = model_share.opened(fake)
    assert (told["opened"], told["url"], told["commit"]) == (True, "http://10.0.0.1:8990", "c")
    assert told["files"] == {"config.json": {"size": 2, "sha256": "a" * 64}}
    assert TOKEN not in json.dumps(told)
    assert TOKEN not in " ".join(entry for command in fake.commands for entry in command)
    job = json.loads(fake.credentials["job"][1])
    assert (job["token"], job["files"]) == (TOKEN, ["config.json"])
    # one that a killed run left is ended before
    assert fake.commands[0] == ["systemctl", "stop", "model-share"]
    command = fake.commands[1]
    for wanted in ("DynamicUser=yes", f"TemporaryFileSystem={tmp_path}:ro", "RuntimeMaxSec=86400"):
        assert f"--property={wanted}" in command
    compile(fake.credentials["program"][1], "program", "exec")


@pytest.mark.parametrize("changes", [{"exclude": []}, {"include": ["*.json"]}, {"revision": "f" * 40}])
def test_a_model_that_is_not_just_what_is_asked_for_stays(store: dict[str, Any], changes: dict[str, Any]) -> None:
    fake = FakeModule()
    fake.params = {**store, "model": {**store["model"], **changes}}
    assert model_share.opened(fake) == {"changed": False, "opened": False}
    assert "is not whole, or has other files than model_store_models asks for" in fake.warnings[0]
    assert fake.commands == []


def test_a_model_that_lost_bytes_stays(store: dict[str, Any]) -> None:
    assert model_share.held(store)[1]
    (model_share.held(store)[0] / "config.json").write_text("")
    assert model_share.held(store)[1] is None


def test_a_port_that_is_taken_is_a_warning(
    store: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_unit.start, "__defaults__", (tmp_path / "run",))
    fake = FakeModule(1)
    fake.params = store
    assert model_share.opened(fake) == {"changed": False, "opened": False}
    assert fake.warnings == ["tiny cannot be copied from here: model-share does not start: no such luck"]


# --- the receiver ---------------------------------------------------------------------------------------------------


def test_a_receiver_shows_its_token_to_the_peer_and_to_nobody_else() -> None:
    peer = {"files": {"sub/my weights.bin": {"size": 7, "sha256": "a" * 64}}, "commit": "c"}
    parameters = {**DOWNLOAD, "headers": {}, "endpoint": "http://10.0.0.1:8990", "token": TOKEN, "peer": peer}
    job = model_download.job_of(parameters)
    assert job["peer"] is True
    assert job["files"] == [
        {
            "path": "sub/my weights.bin",
            "url": "http://10.0.0.1:8990/sub/my%20weights.bin",
            "size": 7,
            "sha256": "a" * 64,
        }
    ]
    assert TOKEN not in json.dumps(job)
    secrets = model_download.secrets_of(parameters)
    assert secrets == {
        "token": "", "headers": {"http://10.0.0.1:8990": {"Authorization": f"Bearer {TOKEN}"}}, "queries": {},
    }  # fmt: skip
    # its manifest says where the model is from, not who handed it out
    assert (job["source"], job["repository"]) == ("huggingface", "acme/tiny")


def test_what_a_download_asks_for_is_what_its_manifest_says() -> None:
    """So that a host knows whether what it has is what another one wants."""
    job = model_download.job_of(DOWNLOAD)
    assert {key: job[key] for key in rules.asks_for(DOWNLOAD["model"])} == rules.asks_for(DOWNLOAD["model"])
