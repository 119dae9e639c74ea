"""uv from an index by pip, with a real pip and a real HTTP server on loopback, and what uv is told of pip's configuration."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import credentials, uv_host
from ansible_collections.gpufleet.llm.plugins.modules import uv_release

ROOT = Path(__file__).resolve().parents[2]
FILE, OLDER = "uv-1.2.3-py3-none-any.whl", "uv-1.2.2-py3-none-any.whl"


def make_wheel(version: str = "1.2.3", says: str = "") -> bytes:
    """A wheel with the two programs of uv, each a script."""
    memory = io.BytesIO()
    information = f"uv-{version}.dist-info"
    with zipfile.ZipFile(memory, "w") as archive:
        for name in ("uv", "uvx"):
            program = zipfile.ZipInfo(f"uv-{version}.data/scripts/{name}")
            program.external_attr = 0o100755 << 16
            archive.writestr(program, f"#!/bin/sh\necho {name} {says or version}\n")
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: uv\nVersion: {version}\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return memory.getvalue()


def pinned(wheel: bytes, version: str = "1.2.3") -> str:
    return f"uv=={version} --hash=sha256:{hashlib.sha256(wheel).hexdigest()}"


class Index(http.server.ThreadingHTTPServer):
    """A package index with one project. Tests change its attributes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {FILE: make_wheel(), OLDER: make_wheel("1.2.2")}
        self.password = ""
        self.asked: list[str] = []
        self.seen_in_arguments = False

    @property
    def url(self) -> str:
        user = f"me:{self.password}@" if self.password else ""
        return f"http://{user}127.0.0.1:{self.server_port}/simple"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if password := self.server.password:
            for arguments in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.server.seen_in_arguments |= password.encode() in arguments.read_bytes()
                except OSError:
                    continue
            if self.headers.get("Authorization") != "Basic " + base64.b64encode(f"me:{password}".encode()).decode():
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic")
                return self.end_headers()
        name = self.path.rpartition("/")[2]
        if self.path == "/simple/uv/":
            links = (f'<a href="../../files/{name}">{name}</a>' for name in self.server.files)
            return self.answer(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode(), "text/html")
        if name in self.server.files:
            return self.answer(self.server.files[name], "application/octet-stream")
        return self.send_error(404)

    def answer(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815 (as http.server calls it)


@pytest.fixture
def index() -> Iterator[Index]:
    server = Index()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python whose `-m venv` copies an environment that was made once: making one takes seconds."""
    directory = tmp_path_factory.mktemp("python")
    subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
    (directory / "python").write_text(f'#!/bin/sh\nexec cp -a {directory}/venv/. "$3"\n')
    (directory / "python").chmod(0o755)
    return str(directory / "python")


@pytest.fixture(autouse=True)
def pip_is_not_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither this machine's pip nor its uv counts. Returns a configuration of pip that does, empty."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "SSL_")):
            monkeypatch.delenv(name)
    configuration = tmp_path / "pip.conf"
    configuration.write_text("")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(uv_host, "SYSTEM_CONFIGURATION", tmp_path / "etc/uv.toml")
    monkeypatch.setattr(uv_host, "ROLE_CONFIGURATION", tmp_path / "opt/uv.toml")
    return configuration


def parameters(tmp_path: Path, index: Index, python: str, **more: Any) -> dict[str, Any]:
    return {
        "requirements": pinned(index.files[FILE]),
        "index_url": index.url,
        "extra_index_urls": [],
        "find_links": [],
        "offline": False,
        "environment": {"PIP_RETRIES": "0"},
        "directory": str(tmp_path / "releases"),
        "link_directory": str(tmp_path / "bin"),
        "python": python,
        **more,
    }


def former(tmp_path: Path) -> Path:
    """A uv that was there before. Returns its directory."""
    release = tmp_path / "releases/uv-former"
    (release / "bin").mkdir(parents=True)
    for name in ("uv", "uvx"):
        (release / "bin" / name).write_text(f"#!/bin/sh\necho {name} 1.2.2\n")
        (release / "bin" / name).chmod(0o755)
    uv_release.link(release, tmp_path / "bin")
    return release


def says(tmp_path: Path) -> str:
    return subprocess.run([tmp_path / "bin/uv"], capture_output=True, text=True, check=True).stdout.strip()


def test_uv_is_installed_beside_the_former_one_and_remembered(tmp_path: Path, index: Index, python: str) -> None:
    older = former(tmp_path)
    assert says(tmp_path) == "uv 1.2.2"
    wanted = parameters(tmp_path, index, python)
    assert uv_release.ensure(wanted) == f"{index.url}, as the inventory says (uv_index_url)"
    assert (says(tmp_path), uv_host.installed(tmp_path / "bin")) == ("uv 1.2.3", wanted["requirements"])
    assert not older.exists()
    assert sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["uv", "uvx"]
    (release,) = (tmp_path / "releases").iterdir()
    assert release.stat().st_mode & 0o777 == 0o755
    assert uv_host.pip(tmp_path / "bin")[0] == str(release / "bin/python")


def test_a_touched_or_missing_program_is_noticed(tmp_path: Path, index: Index, python: str) -> None:
    uv_release.ensure(parameters(tmp_path, index, python))
    release = (tmp_path / "bin/uv").resolve().parents[1]
    for place in (
        release / "bin/uv",
        release / "bin/uvx",
        tmp_path / "bin/uvx",
        release / "bin/python",
        release / uv_host.RECORD,
    ):
        assert uv_host.installed(tmp_path / "bin")
        place.rename(tmp_path / "aside")
        assert uv_host.installed(tmp_path / "bin") == "", place
        place.symlink_to("/usr/bin/env")
        assert uv_host.installed(tmp_path / "bin") == "", place
        place.unlink()
        (tmp_path / "aside").rename(place)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"requirements": "uv==1.2.3 --hash=sha256:" + "0" * 64}, r"pip could not install uv: [\s\S]*Expected sha256 0{64}[\s\S]*Got +[0-9a-f]{64}"),
        ({"requirements": "uv==9.9 --hash=sha256:" + "0" * 64}, r"uv==9\.9 \(from versions: 1\.2\.2, 1\.2\.3\)"),
        ({"index_url": "http://127.0.0.1:1/simple"}, r"No matching distribution found for uv==1\.2\.3"),
        ({"requirements": "uv==1.2.3"}, "hash"),
        ({"offline": True}, "No matching distribution found"),
    ],
    ids=["wrong-hash", "missing-version", "unreachable", "no-hash", "offline"],
)  # fmt: skip
def test_what_cannot_be_had_is_named_and_the_uv_that_was_there_stays(
    tmp_path: Path, index: Index, python: str, more: dict[str, Any], complaint: str
) -> None:
    former(tmp_path)
    with pytest.raises(uv_host.UvError, match=complaint):
        uv_release.ensure(parameters(tmp_path, index, python, **more))
    assert says(tmp_path) == "uv 1.2.2"
    assert len(list((tmp_path / "releases").iterdir())) == 1


def test_a_uv_that_is_not_what_it_says_is_not_put_to_use(tmp_path: Path, index: Index, python: str) -> None:
    former(tmp_path)
    index.files[FILE] = make_wheel(says="9.9")
    with pytest.raises(uv_host.UvError, match=r"The new uv says that it is uv 9\.9, and 1\.2\.3 was asked for"):
        uv_release.ensure(parameters(tmp_path, index, python))
    assert says(tmp_path) == "uv 1.2.2"


def test_what_a_killed_run_left_is_not_used_and_goes(tmp_path: Path, index: Index, python: str) -> None:
    half = tmp_path / "releases/uv-half"
    (half / "bin").mkdir(parents=True)
    (half / "bin/uv").write_text("half of it")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/.uv.new").symlink_to(half / "bin/uv")
    assert uv_host.installed(tmp_path / "bin") == ""
    uv_release.ensure(parameters(tmp_path, index, python))
    assert says(tmp_path) == "uv 1.2.3"
    assert not half.exists()
    assert sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["uv", "uvx"]


def test_credentials_reach_the_index_and_neither_arguments_nor_messages(
    tmp_path: Path, index: Index, python: str
) -> None:
    index.password = "s3cret"
    assert "s3cret" not in uv_release.ensure(parameters(tmp_path, index, python))
    wrong = index.url.replace("s3cret", "wr0ng")
    with pytest.raises(uv_host.UvError) as refused:
        uv_release.ensure(parameters(tmp_path, index, python, index_url=wrong))
    assert "wr0ng" not in str(refused.value)
    assert not index.seen_in_arguments


def test_an_index_in_a_directory_and_wheels_in_one_work_offline(tmp_path: Path, index: Index, python: str) -> None:
    (tmp_path / "simple/uv").mkdir(parents=True)
    (tmp_path / "simple/uv" / FILE).write_bytes(index.files[FILE])
    (tmp_path / "simple/uv/index.html").write_text(f'<!DOCTYPE html><a href="{FILE}">{FILE}</a>')
    uv_release.ensure(parameters(tmp_path, index, python, index_url=f"file://{tmp_path}/simple", offline=True))
    wheels = [str(tmp_path / "simple/uv")]
    came_from = uv_release.ensure(parameters(tmp_path, index, python, index_url="", find_links=wheels, offline=True))
    assert came_from == "no network, as the inventory says (uv_offline)"
    assert index.asked == []


def test_without_an_index_in_the_inventory_the_one_of_pip_counts(
    tmp_path: Path, index: Index, python: str, pip_is_not_configured: Path
) -> None:
    index.password = "s3cret"
    pip_is_not_configured.write_text(f"[global]\nindex-url = {index.url}\n[install]\nuser = true\n")
    came_from = uv_release.ensure(parameters(tmp_path, index, python, index_url=""))
    assert came_from == f"http://127.0.0.1:{index.server_port}/simple, as pip is configured on the host"
    # one that the inventory names counts instead
    with pytest.raises(uv_host.UvError, match="No matching distribution"):
        uv_release.ensure(parameters(tmp_path, index, python, index_url="http://127.0.0.1:1/simple"))
    pip_is_not_configured.write_text(f"[global]\nindex-url = {index.url.replace('s3cret', 'wr0ng')}\n")
    with pytest.raises(uv_host.UvError) as refused:
        uv_release.ensure(parameters(tmp_path, index, python, index_url=""))
    assert "wr0ng" not in str(refused.value)


def test_uv_is_given_what_pip_goes_by(
    tmp_path: Path, index: Index, python: str, pip_is_not_configured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real uv installs from the index of pip, with its credentials, and shows them nowhere."""
    uv_release.ensure(parameters(tmp_path, index, python))
    index.password = "s3cret"
    pip_is_not_configured.write_text(
        f"[global]\nindex-url = https://nowhere.example/simple\n[install]\nindex-url = {index.url}\n"
    )
    monkeypatch.setenv("PIP_CERT", "/etc/ssl/own.pem")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.example/simple  https://b.example/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path} https://w.example/ /not/there")
    found = uv_host.call_environment(tmp_path / "bin")
    assert found == {
        "UV_DEFAULT_INDEX": index.url,
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": f"{tmp_path},https://w.example/",
        "SSL_CERT_FILE": "/etc/ssl/own.pem",
    }
    index.asked.clear()
    real = [
        str(ROOT / ".venv/bin/uv"),
        "pip",
        "install",
        "--no-cache",
        "--verbose",
        "--target",
        str(tmp_path / "target"),
        "uv==1.2.3",
    ]
    done = subprocess.run(
        real,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "UV_DEFAULT_INDEX": found["UV_DEFAULT_INDEX"]},
    )
    assert done.returncode == 0, done.stderr
    assert f"/files/{FILE}" in index.asked
    assert "s3cret" not in done.stderr
    assert not index.seen_in_arguments
    pip_is_not_configured.write_text("no configuration")
    with pytest.raises(uv_host.UvError, match=r"pip cannot read its configuration: [\s\S]*pip\.conf"):
        uv_host.call_environment(tmp_path / "bin")


DEFAULT = '[[index]]\nurl = "https://mirror.example/simple"\ndefault = true\n'


@pytest.mark.parametrize(
    ("configuration", "variables", "given"),
    [
        ("", {}, ["UV_CONFIG_FILE", "UV_DEFAULT_INDEX"]),
        ('cache-dir = "/srv"\n', {}, ["UV_DEFAULT_INDEX"]),
        ('[[index]]\nurl = "https://extra.example/simple"\n', {}, ["UV_DEFAULT_INDEX"]),
        (DEFAULT, {}, []),
        ('[pip]\nindex-url = "https://mirror.example/simple"\n', {}, []),
        ('index = [{ url = "https://mirror.example/simple", default = true }]\n', {}, []),
        ('extra-index-url = ["https://extra.example/simple"]\n', {}, ["UV_DEFAULT_INDEX"]),
        ("", {"UV_DEFAULT_INDEX": "https://mirror.example/simple"}, ["UV_CONFIG_FILE"]),
    ],
)
def test_pip_counts_only_where_uv_has_no_index_of_its_own(
    tmp_path: Path, configuration: str, variables: dict[str, str], given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, text in (
        (uv_host.SYSTEM_CONFIGURATION, configuration),
        (uv_host.ROLE_CONFIGURATION, "offline = false\n"),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        uv_host, "pip", lambda _links: ["sh", "-c", "echo \"global.index-url='https://pip.example/simple'\""]
    )
    assert sorted(uv_host.call_environment(tmp_path / "bin")) == given


def test_a_uv_of_somebody_else_is_called_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uv").write_text("#!/bin/sh\n")
    assert (uv_host.installed(tmp_path / "bin"), uv_host.pip(tmp_path / "bin")) == ("", [])
    assert uv_host.call_environment(tmp_path / "bin") == {}


def test_the_password_of_an_address_is_hidden_as_it_is_written_and_as_it_is_meant() -> None:
    module = SimpleNamespace(no_log_values=set())
    credentials.hide_passwords(module, "https://me:a%2Fb@mirror.example/simple", "https://mirror.example", "")
    assert module.no_log_values == {"a%2Fb", "a/b"}
    said = credentials.hidden("me:a%2Fb@x a/b t0ken@y", "https://me:a%2Fb@x/simple  https://t0ken@y/simple")
    assert not re.search("a%2Fb|a/b|t0ken", said), said
