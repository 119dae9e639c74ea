"""The wheel_program module and its page reader, against a real HTTP server on loopback."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import wheel
from ansible_collections.gpufleet.llm.plugins.modules import wheel_program

FILE = "tool-1.2.3-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
OTHER = "tool-1.2.3-py3-none-manylinux_2_17_aarch64.whl"
OLDER = "tool-1.2.2-py3-none-manylinux_2_17_x86_64.whl"


def make_wheel(program: bytes = b"#!/bin/sh\necho tool\n") -> bytes:
    """A wheel with two programs and something that is none."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("tool-1.2.3.data/scripts/tool", program)
        archive.writestr("tool-1.2.3.data/scripts/toolx", b"#!/bin/sh\n")
        archive.writestr("tool/__init__.py", b"")
    return memory.getvalue()


class Index(http.server.ThreadingHTTPServer):
    """A package index with one project. Tests change its attributes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {FILE: make_wheel(), OTHER: make_wheel(), OLDER: make_wheel()}
        self.as_json = False
        self.hashes = True
        self.password = ""
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.password:
            wanted = "Basic " + base64.b64encode(f"me:{self.server.password}".encode()).decode()
            if self.headers.get("Authorization") != wanted:
                return self.send_error(401)
        name = self.path.rpartition("/")[2]
        if self.path == "/simple/tool/":
            return self.answer(self.page())
        if name in self.server.files:
            return self.answer(self.server.files[name])
        return self.send_error(404)

    def page(self) -> bytes:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.server.files.items()}
        if self.server.as_json:
            listed = [
                {
                    "filename": name,
                    "url": f"../../files/{name}",
                    "hashes": {"sha256": digest} if self.server.hashes else {},
                }
                for name, digest in digests.items()
            ]
            return json.dumps({"meta": {"api-version": "1.0"}, "name": "tool", "files": listed}).encode()
        rows = [
            f'<a href="../../files/{name}{"#sha256=" + digest if self.server.hashes else ""}">{name}</a><br/>'
            for name, digest in digests.items()
        ]
        return f"<!DOCTYPE html><html><body>{''.join(rows)}</body></html>".encode()

    def answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def index() -> Iterator[Index]:
    server = Index()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def parameters(tmp_path: Path, index: Index, **more: str) -> dict[str, Any]:
    return {
        "name": "tool",
        "version": "1.2.3",
        "sha256": hashlib.sha256(index.files[FILE]).hexdigest(),
        "index_url": index.url,
        "directory": str(tmp_path / "bin"),
        "record_directory": str(tmp_path / "record"),
        "architecture": "x86_64",
        "timeout": 5,
        **more,
    }


def ensure(tmp_path: Path, wanted: dict[str, Any], check_mode: bool = False) -> dict[str, Any]:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    done: dict[str, Any] = wheel_program.ensure(wanted, check_mode, tmp_path / "scratch")
    return done


@pytest.mark.parametrize("as_json", [False, True], ids=["html", "json"])
@pytest.mark.parametrize("hashes", [False, True], ids=["index-without-hashes", "index-with-hashes"])
def test_programs_are_installed_and_left_alone_the_second_time(
    tmp_path: Path, index: Index, as_json: bool, hashes: bool
) -> None:
    index.as_json, index.hashes = as_json, hashes
    first = ensure(tmp_path, parameters(tmp_path, index))
    assert first["changed"]
    assert first["programs"] == [str(tmp_path / "bin/tool"), str(tmp_path / "bin/toolx")]
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["tool", "toolx"]
    index.asked.clear()
    assert ensure(tmp_path, parameters(tmp_path, index)) == {"changed": False, "programs": first["programs"]}
    assert index.asked == []


def test_a_touched_or_missing_program_is_put_back(tmp_path: Path, index: Index) -> None:
    ensure(tmp_path, parameters(tmp_path, index))
    (tmp_path / "bin/tool").write_bytes(b"#!/bin/sh\necho evil\n")
    assert ensure(tmp_path, parameters(tmp_path, index))["changed"]
    assert b"evil" not in (tmp_path / "bin/tool").read_bytes()
    (tmp_path / "bin/toolx").unlink()
    assert ensure(tmp_path, parameters(tmp_path, index))["changed"]


def test_check_mode_asks_nobody_and_writes_nothing(tmp_path: Path, index: Index) -> None:
    assert ensure(tmp_path, parameters(tmp_path, index), check_mode=True) == {"changed": True, "programs": []}
    assert index.asked == []
    assert not (tmp_path / "bin").exists()


def test_a_wrong_hash_is_refused_before_the_download(tmp_path: Path, index: Index) -> None:
    with pytest.raises(wheel.WheelError, match=f"expected sha256 {'0' * 64}, the index offers [0-9a-f]{{64}}"):
        ensure(tmp_path, parameters(tmp_path, index, sha256="0" * 64))
    assert index.asked == ["/simple/tool/"]


def test_a_wrong_hash_is_refused_after_the_download(tmp_path: Path, index: Index) -> None:
    index.hashes = False
    with pytest.raises(wheel.WheelError, match=f"expected sha256 {'0' * 64}, got [0-9a-f]{{64}}"):
        ensure(tmp_path, parameters(tmp_path, index, sha256="0" * 64))
    assert not (tmp_path / "bin").exists()


def test_a_lying_index_is_found_out(tmp_path: Path, index: Index) -> None:
    wanted = parameters(tmp_path, index)
    page = Handler.page
    honest = index.files[FILE]

    def lie(self: Handler) -> bytes:
        index.files[FILE] = honest
        try:
            return page(self)
        finally:
            index.files[FILE] = make_wheel(b"#!/bin/sh\necho evil\n")

    Handler.page = lie  # type: ignore[method-assign]
    try:
        with pytest.raises(wheel.WheelError, match=r"expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}"):
            ensure(tmp_path, wanted)
    finally:
        Handler.page = page  # type: ignore[method-assign]


def test_a_missing_version_is_named_with_what_there_is(tmp_path: Path, index: Index) -> None:
    with pytest.raises(
        wheel.WheelError, match=r"version 9.9 of tool is not on the index; its newest are: 1.2.2, 1.2.3"
    ):
        ensure(tmp_path, parameters(tmp_path, index, version="9.9"))


def test_a_missing_architecture_is_named(tmp_path: Path, index: Index) -> None:
    with pytest.raises(wheel.WheelError, match="no Linux wheel of it for riscv64"):
        ensure(tmp_path, parameters(tmp_path, index, architecture="riscv64"))


def test_an_unreachable_index_is_named(tmp_path: Path, index: Index) -> None:
    with pytest.raises(wheel.WheelError, match=r"cannot read http://127.0.0.1:1/simple/tool/"):
        ensure(tmp_path, parameters(tmp_path, index, index_url="http://127.0.0.1:1/simple"))


def test_a_missing_project_is_named(tmp_path: Path, index: Index) -> None:
    with pytest.raises(wheel.WheelError, match=r"cannot read .*/simple/none/: HTTP Error 404"):
        ensure(tmp_path, parameters(tmp_path, index, name="none"))


def test_credentials_reach_the_index_and_its_files_but_no_message(tmp_path: Path, index: Index) -> None:
    index.password = "s3cret"
    address = index.url.replace("://", "://me:s3cret@")
    done = ensure(tmp_path, parameters(tmp_path, index, index_url=address))
    assert done["changed"]
    assert "s3cret" not in done["url"]
    with pytest.raises(wheel.WheelError) as refused:
        ensure(tmp_path, parameters(tmp_path, index, index_url=address.replace("s3cret", "wr0ng"), sha256="0" * 64))
    assert "401" in str(refused.value)
    assert "wr0ng" not in str(refused.value)


def test_an_index_in_a_directory_works(tmp_path: Path, index: Index) -> None:
    (tmp_path / "simple/tool").mkdir(parents=True)
    (tmp_path / "simple/tool" / FILE).write_bytes(index.files[FILE])
    (tmp_path / "simple/tool/index.html").write_text(f'<a href="{FILE}">{FILE}</a>')
    assert ensure(tmp_path, parameters(tmp_path, index, index_url=f"file://{tmp_path}/simple"))["changed"]


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path, index: Index) -> None:
    index.files[FILE] = b"not a zip"
    with pytest.raises(wheel.WheelError, match="is not a wheel"):
        ensure(tmp_path, parameters(tmp_path, index))


def test_links_to_other_hosts_do_not_get_the_credentials() -> None:
    page = '<a href="https://files.example.org/tool.whl">x</a><a href="/tool.whl">y</a>'
    urls = [link.url for link in wheel.links(page, "https://me:pw@index.example.org/simple/tool/")]
    assert urls == ["https://files.example.org/tool.whl", "https://me:pw@index.example.org/tool.whl"]


def test_a_page_that_is_json_but_no_index_is_refused() -> None:
    with pytest.raises(wheel.WheelError, match="is not a simple page"):
        wheel.links('{"message": "sign in"}', "https://index.example.org/simple/tool/")


def test_the_password_of_an_address_is_hidden_as_it_is_written_and_as_it_is_meant() -> None:
    module = SimpleNamespace(no_log_values=set())
    wheel.hide_passwords(module, "https://me:a%2Fb@mirror.example/simple", "https://mirror.example", "")
    assert module.no_log_values == {"a%2Fb", "a/b"}
