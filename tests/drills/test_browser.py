"""A gateway seen by Chromium: a page of another origin that asks it, and the page of its status.

By hand (half a minute; needs Nginx with its Lua module, Node, and Debian's packages chromium and libnss3-tools):

    .venv/bin/pytest tests/drills/test_browser.py -s

The picture of docs/gateway.md is made by

    PICTURE=docs/images/gateway-status.png .venv/bin/pytest tests/drills/test_browser.py -k status
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.drills.test_clients import ODD, TOLD, told
from tests.gateway.backends import Asked, Backend, Handler, right
from tests.gateway.harness import CHAT, NAME, RESOLVED, document, route, running
from tests.gateway.stand_ins import served
from tests.ports import free_port

DAY = 86400
CHROMIUM = shutil.which("chromium") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not here: apt-get install chromium")


@contextlib.contextmanager
def pages(directory: Path) -> Iterator[int]:
    """A web server of the files in a directory, which both localhost and 127.0.0.1 reach; its port."""

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Files, directory=str(directory))
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def trusting(home: Path, authority: Authority) -> Path:
    """A home directory whose Chromium trusts an authority."""
    database = home / ".pki/nssdb"
    database.mkdir(parents=True)
    (home / "ca.pem").write_text(authority.pem)
    for command in (["-N", "--empty-password"], ["-A", "-n", "fleet", "-t", "C,,", "-i", str(home / "ca.pem")]):
        subprocess.run(["certutil", *command, "-d", f"sql:{database}"], check=True)
    return home


@pytest.mark.skipif(not shutil.which("certutil"), reason="certutil is not here: apt-get install libnss3-tools")
def test_a_page_of_another_origin(tmp_path: Path, node: str) -> None:
    """The library and fetch() work on a page that is allowed to ask, and the browser stands before every other page."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/index.html").write_text("<!DOCTYPE html><link rel=icon href=data:,><title>A chat</title>")
    (tmp_path / "pages/openai").symlink_to(f"{node}/node_modules/openai")
    (tmp_path / "stranger").mkdir()
    authority = Authority(name="The fleet")
    certificate, key = authority.sign(NAME, names=[NAME, RESOLVED])
    with pages(tmp_path / "pages") as port:
        origin = f"http://localhost:{port}"
        pair = (certificate + authority.pem, key)
        with served(tmp_path / "gateway", ODD, {"cors_origins": [origin]}, pair=pair) as gateway:
            said = told(
                gateway, "node", f"{node}/ask_chromium.mjs", BASE_URL=f"https://{NAME}:{gateway.port}/v1", GATEWAY=NAME, PAGE=origin,
                OTHER_PAGE=f"http://127.0.0.1:{port}", CHROMIUM=CHROMIUM, HOME=str(trusting(tmp_path / "home", authority)),
                STRANGER=str(tmp_path / "stranger"),
            )  # fmt: skip
            users = [one.json.get("user") for one in ODD.asked]
    fetched, preflights = said.pop("fetch"), said.pop("preflights")
    assert (fetched["status"], fetched["end"]) == (200, "AbortError")
    assert {"content-type", "x-request-id", "x-ratelimit-remaining-requests"} <= set(fetched["readable"])
    assert {status for status, _path in preflights} == {204}
    assert {path for _status, path in preflights} == {CHAT, "/v1/models", "/v1/models/embed", "/v1/embeddings"}
    assert said.pop("without_the_authority") == "net::ERR_CERT_AUTHORITY_INVALID"
    assert (said.pop("other_origin"), said.pop("other_origin_because")) == ("TypeError", True)
    assert "other origin" not in users and "without the authority" not in users
    assert said == {**TOLD, "models": ["generate", "embed", "odd"], "model": "embed", "embedding": 16}


@contextlib.contextmanager
def busy(directory: Path) -> Iterator[int]:
    """The gateway of the picture, with requests that run: two backends out, and one kept although it was drained. The port of its status."""
    leave = threading.Event()

    def answer(handler: Handler, asked: Asked) -> None:
        leave.wait(60)
        right(handler, asked)

    names = ["chat@gpu-1", "chat@gpu-2", "chat@gpu-3", "chat-long@gpu-4", "embed@gpu-1", "embed@gpu-2"]
    backends = [Backend(name, answer=answer) for name in names]
    chat, long, embed = "qwen2.5-7b", "qwen2.5-7b-long", "bge-m3"
    fleet = document(
        [
            route(chat, backends[:3], aliases=["gpt-4o"], min_available=2),
            route(long, backends[3:4], balance="prefix", min_available=1),
            route(embed, backends[4:], paths=["/v1/embeddings"], min_available=1),
        ],
        backends,
    )
    port, now = free_port(), time.time()
    told: dict[str, dict[str, Any]] = {
        "chat@gpu-1": {"since": now - 5 * DAY},
        "chat@gpu-2": {"since": now - 190},
        "chat@gpu-3": {"use": False, "check": "failed", "why": "no answer for 24 s, and none of its metrics moved", "since": now - 47},
        "chat-long@gpu-4": {
            "operator": "drained", "leaving": True, "kept": True, "since": now - DAY / 6,
            "why": f"drained by alice: new fan; kept, because the route {long} needs at least 1",
        },
        "embed@gpu-1": {"since": now - 5 * DAY},
        "embed@gpu-2": {"use": False, "operator": "drained", "leaving": True, "why": "drained by bob: kernel upgrade", "since": now - 720},
    }  # fmt: skip
    certificates = {"tls": now + 61.3 * DAY, "fleet": now + 243.4 * DAY}
    more: dict[str, Any] = {
        "gateway_status_port": port,
        "gateway_read_timeout_seconds": 60,
        "__gateway_program_id": "2e199db92892",
    }
    with running(directory, fleet, **more) as gateway, ThreadPoolExecutor(24) as pool:
        gateway.state(told, certificates=certificates)
        try:
            for model, path, count in ((chat, CHAT, 17), (long, CHAT, 2), (embed, "/v1/embeddings", 5)):
                for _ in range(count):
                    pool.submit(gateway.ask, path, {"model": model})
            gateway.until(lambda: sum(gateway.admin("/in_flight")["in_flight"].values()) == 24)
            yield port
        finally:
            leave.set()


def test_the_page_of_the_status(tmp_path: Path, node: str) -> None:
    """It shows all backends at every width of a screen, and loads nothing; a policy keeps it so, whatever gets into it."""
    picture = Path(os.environ.get("PICTURE", tmp_path / "status.png")).resolve()
    with busy(tmp_path / "gateway") as port, pages(tmp_path) as elsewhere:
        address = f"http://localhost:{port}/status"
        environment = {"CHROMIUM": CHROMIUM, "STATUS": address, "PICTURE": str(picture), "ELSEWHERE": f"http://localhost:{elsewhere}/image.png"}  # fmt: skip
        command = ["node", str(Path(node, "look_at_status.mjs"))]
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(said))
    assert (said["status"], said["title"]) == (200, "gw-1: 2 things to look at")
    assert said["requests"] == [address]
    assert (said["complaints"], said["too_wide"]) == ([], [])
    assert said["rows"] == [
        "chat@gpu-1", "chat@gpu-2", "chat@gpu-3", "chat-long@gpu-4", "embed@gpu-1", "embed@gpu-2",
    ]  # fmt: skip
    assert said["dark"] != said["light"]
    assert said["forced"]["title"] == said["title"]
    assert said["forced"]["complaints"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
