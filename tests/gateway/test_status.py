"""What the gateway says of itself to whoever looks after it."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import INTERNAL, Backend, held
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running, sha256
from tests.ports import free_port

DAY = 86400
EVIL = "<script>alert(1)</script>\" onload='x' & </td>"
FIRST, SECOND, EMBED = Backend("chat@gpu-1"), Backend("chat@gpu-2"), Backend("embed@gpu-1")
BACKENDS = [FIRST, SECOND, EMBED]
ROUTES = [
    route("small", [FIRST, SECOND], aliases=["older"], min_available=1),
    route("m3<b>", [EMBED], weight=3, balance="prefix"),
]
FLEET = document(ROUTES, BACKENDS)
PORT = free_port()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("gateway")
    with running(directory, FLEET, gateway_status_port=PORT, gateway_read_timeout_seconds=20) as gateway:
        yield gateway


class Page(HTMLParser):
    """What somebody reads there: the text, by table, row and cell, and which elements there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()


def page(gateway: Gateway) -> Page:
    return Page(gateway.admin_text("/status"))


def backend(said: dict[str, Any], name: str) -> dict[str, Any]:
    """What JSON says of a backend."""
    (found,) = [one for entry in said["routes"] for one in entry["backends"] if one["id"] == name]
    return dict(found)


def ask(path: str, host: str = "localhost", method: str = "GET") -> http.client.HTTPResponse:
    """Ask as through a tunnel."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=10)
    connection.request(method, path, headers={"Host": host})
    return connection.getresponse()


def test_without_a_state_it_says_so(tmp_path: Path) -> None:
    with running(tmp_path / "gateway", FLEET) as gateway:
        said = gateway.admin("/status.json")
        assert "age_seconds" not in said["state"] and not said["state"]["stale"]
        assert backend(said, FIRST.id)["use"]
        assert "nothing since this host started" in backend(said, FIRST.id)["why"]
        assert said["certificates"] == {}
        assert "none since this host started" in page(gateway).text
        assert "vllm_gateway_state_age_seconds" not in gateway.metrics()


def test_all_is_well(gateway: Gateway) -> None:
    now = time.time()
    gateway.state(
        {one.id: {"since": now - 200} for one in BACKENDS},
        certificates={"tls": now + 61.5 * DAY, "fleet": now + 150.5 * DAY},
    )
    said = gateway.admin("/status.json")
    assert said["problems"] == []
    assert said["gateway"] == "gw-1" and said["program"] == "of-the-test"
    assert said["configuration"] == sha256(json.dumps(FLEET))[:12]
    assert said["state"]["serial"] == gateway.serial
    assert said["state"]["age_seconds"] < 10
    assert said["workers"] == {"all": len(gateway.workers()), "old": 0}
    assert said["certificates"]["tls"]["days_left"] == 61
    assert said["routes"][1]["aliases"] == [], "an empty list is none, and no object"
    first, second = said["routes"]
    assert (first["model"], first["used"], first["min_available"], second["weight"]) == ("small", 2, 1, 3)
    read = page(gateway)
    assert "All is well: every backend is in use." in read.text
    assert f"{said['configuration']}, loaded " in read.text
    assert f"serial {gateway.serial}, written " in read.text
    assert "61 days left (until " in read.text and "150 days left" in read.text
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now - 200))
    assert read.tables[0] == [
        ["Backend", "In use", "Why", "Since", "Check", "Operator", "Leaving", "In flight"],
        ["chat@gpu-1", "in use", "", f"3 min ago{since}", "ok", "up", "no", "0"],
        ["chat@gpu-2", "in use", "", f"3 min ago{since}", "ok", "up", "no", "0"],
    ]
    assert [len(table) for table in read.tables] == [3, 2]


def test_what_is_wrong_stands_in_words(gateway: Gateway) -> None:
    now = time.time()
    gateway.state(
        {
            FIRST.id: {"operator": "drained", "leaving": True, "kept": True, "why": "drained by alice: new fan", "since": now - 3 * DAY},
            SECOND.id: {"use": False, "check": "failed", "why": "connection refused", "since": now - 7210},
            EMBED.id: {"use": False, "operator": "stopped", "leaving": True, "why": "stopped by bob", "since": now - 5},
        },
        time=now - 45, certificates={"tls": now - DAY / 2, "fleet": now + 3.5 * DAY},
    )  # fmt: skip
    said = gateway.admin("/status.json")
    assert said["state"]["stale"] and 44 < said["state"]["age_seconds"] < 60
    assert said["certificates"]["tls"]["days_left"] == -1
    assert [re.sub(r"\d+ seconds", "N seconds", text) for text in said["problems"]] == [
        "The checks have written nothing for N seconds; the backends are used as they said last.",
        "small (chat): 1 of 2 backends not in use.",
        "m3<b> (embed) has no backend in use.",
        "The certificate for clients has expired.",
        "The certificate of the fleet expires in 3 days.",
    ]
    assert {key: value for key, value in backend(said, FIRST.id).items() if key != "since"} == {
        "id": FIRST.id, "host": "gpu-1", "instance": "chat", "use": True, "why": "drained by alice: new fan", "check": "ok",
        "operator": "drained", "leaving": True, "kept": True, "in_flight": 0,
    }  # fmt: skip
    read = page(gateway)
    assert "5 things to look at" in read.text and "stale: written 4" in read.text
    assert "expired (on " in read.text and "3 days left" in read.text
    for text in said["problems"][1:]:
        assert text in read.text
    rows = [[cell for cell in row if not cell.endswith(" UTC")] for table in read.tables for row in table[1:]]
    assert rows == [
        ["chat@gpu-1", "in use", "drained by alice: new fan", "ok", "drained", "kept", "0"],
        ["chat@gpu-2", "not in use", "connection refused", "failed", "up", "no", "0"],
        ["embed@gpu-1", "not in use", "stopped by bob", "ok", "stopped", "wants to", "0"],
    ]


def test_a_state_that_is_lost_or_broken_is_told(gateway: Gateway) -> None:
    gateway.state({FIRST.id: {}, EMBED.id: {}})
    said = gateway.admin("/status.json")
    assert backend(said, SECOND.id)["why"] == "the checks do not know it yet"
    gateway.write("run/vllm-gateway/state.json", "{")
    said = gateway.admin("/status.json")
    assert backend(said, FIRST.id)["use"] and not backend(said, SECOND.id)["use"], "the last one stays in use"
    assert backend(said, FIRST.id)["why"] == "what the checks wrote last cannot be read any more"
    assert len(page(gateway).tables) == 2


def test_no_text_becomes_html(gateway: Gateway) -> None:
    gateway.state({one.id: {} for one in BACKENDS})
    clean = page(gateway)
    gateway.state({FIRST.id: {"use": False, "why": EVIL, "operator": EVIL, "check": EVIL}, SECOND.id: {}, EMBED.id: {}})
    read = page(gateway)
    assert backend(gateway.admin("/status.json"), FIRST.id)["why"] == EVIL
    assert read.tables[0][1][2] == EVIL and read.tables[0][1][5] == EVIL
    assert [name for name in read.elements if name != "li"] == [name for name in clean.elements if name != "li"]
    assert read.attributes == clean.attributes
    assert "script" not in read.elements
    assert "m3<b>" in read.text


def test_the_page_needs_nothing_else_and_may_fetch_nothing(gateway: Gateway) -> None:
    text = gateway.admin_text("/status")
    read = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(read.elements)
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    answer = ask("/status")
    assert answer.getheader("Content-Type") == "text/html; charset=utf-8"
    assert (answer.getheader("Content-Security-Policy") or "").startswith(
        "default-src 'none'; style-src 'unsafe-inline'"
    )
    assert answer.getheader("Cache-Control") == "no-store"


def test_no_key_is_there(gateway: Gateway) -> None:
    for path in ("/status", "/status.json"):
        text = gateway.admin_text(path)
        for secret in (KEY, INTERNAL, sha256(KEY), sha256(INTERNAL), "team-a"):
            assert secret not in text


def test_the_port_for_a_tunnel_has_the_status_and_nothing_else(gateway: Gateway) -> None:
    assert json.loads(ask("/status.json").read())["gateway"] == "gw-1"
    assert ask("/status.json", f"127.0.0.1:{PORT}").status == ask("/status", "[::1]:1").status == 200
    for path in ("/in_flight", "/metrics", "/", "/healthz", CHAT, "/status/", "/status.json/x"):
        assert ask(path).status == 404, path
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1"):
        assert ask("/status.json", host).status == 421, host
    assert ask("/status", method="POST").status == 403
    assert gateway.ask("/status").status == gateway.ask("/status.json").status == 404
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    local = re.findall(rf" ([0-9A-F]+):{PORT:04X} [0-9A-F]+:0000 0A", listening)
    assert local == ["0100007F"], "loopback, and no IPv6"


def test_without_a_port_there_is_only_the_socket(tmp_path: Path) -> None:
    with running(tmp_path / "gateway", FLEET) as gateway:
        assert gateway.admin("/status.json")["gateway"] == "gw-1"
        assert len(re.findall(r"^ +listen ", (gateway.directory / "nginx.conf").read_text(), re.MULTILINE)) == 5


def test_requests_in_flight_and_old_workers_are_counted(gateway: Gateway) -> None:
    gateway.state({FIRST.id: {}, SECOND.id: {"use": False}, EMBED.id: {"use": False}})
    FIRST.answer = held(3)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(gateway.ask, CHAT, {"model": "small"}) for _ in range(3)]
        gateway.until(lambda: backend(gateway.admin("/status.json"), FIRST.id)["in_flight"] == 3)
        assert page(gateway).tables[0][1][-1] == "3"
        full = {**FLEET, "backends": {**FLEET["backends"], FIRST.id: {**FIRST.described(), "most_requests": 40}}}
        gateway.configure(full)
        assert page(gateway).tables[0][1][-1] == "3 of 40"
        said = gateway.admin("/status.json")
        assert said["workers"]["old"] > 0
        assert f"{said['workers']['old']} of former configurations" in page(gateway).text
        assert [one.result().status for one in asked] == [200] * 3
    gateway.until(lambda: gateway.admin("/status.json")["workers"]["old"] == 0)
    assert "none of former configurations" in page(gateway).text
    gateway.configure(FLEET)


def test_metrics_have_the_age_of_the_state_and_the_ends_of_the_certificates(gateway: Gateway) -> None:
    end = int(time.time()) + 5 * DAY
    gateway.state({one.id: {} for one in BACKENDS}, time=time.time() - 100, certificates={"tls": end})
    metrics = gateway.metrics()
    assert 100 <= metrics["vllm_gateway_state_age_seconds"] < 120
    name = "vllm_gateway_certificate_expiry_timestamp_seconds"
    assert {series: value for series, value in metrics.items() if series.startswith(name)} == {
        f'{name}{{certificate="tls"}}': end
    }


def test_hundreds_of_routes_are_shown(tmp_path: Path) -> None:
    backends = [Backend(f"chat@gpu-{number}") for number in range(4)]
    many = document([route(f"m{number}", backends) for number in range(500)], backends)
    with running(tmp_path / "gateway", many, [one.id for one in backends]) as gateway:
        read = page(gateway)
        assert len(read.tables) == 500 and all(len(table) == 5 for table in read.tables)
        assert len(gateway.admin("/status.json")["routes"]) == 500
    for one in backends:
        one.close()
