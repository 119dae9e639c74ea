"""What the agent of a host decides, and the agent itself on loopback: by real TLS, with a real engine's metrics."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib
import json
import os
import runpy
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import host_agent, instance_tls
from ansible_collections.gpufleet.llm.plugins.module_utils.host_agent import RefusedError

from tests.certificates import Authority
from tests.upstream import Upstream, listening

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "roles/host_agent/templates/usr/local/lib/vllm-fleet"
METRICS = (ROOT / "tests/stand_in/vllm-0.32.0-cpu.prom").read_text()


# --- what is decided


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        (b"POST /state HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n", ("POST", "/state", 12, True)),
        (b"GET /metrics HTTP/1.1\r\nConnection: Close\r\n\r\n", ("GET", "/metrics", 0, False)),
        (b"GET /metrics HTTP/1.0\r\n\r\n", ("GET", "/metrics", 0, False)),
    ],
)
def test_a_request(head: bytes, wanted: tuple[str, str, int, bool]) -> None:
    assert host_agent.request(head) == host_agent.Request(*wanted)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n\r\n", 400),
        (b"GET http://a/ HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbroken\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nname : value\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: 1\r\n folded: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
    ],
)
def test_what_is_no_request_is_refused(head: bytes, status: int) -> None:
    with pytest.raises(RefusedError) as caught:
        host_agent.request(head)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("method", "path", "peer", "status"),
    [
        ("POST", "/state", "gw-1", 0),
        ("GET", "/metrics", "gw-1", 0),
        ("GET", "/metrics/chat", "watch", 0),
        ("POST", "/state", "watch", 403),
        ("POST", "/state", "gpu-2", 403),
        ("GET", "/metrics", "", 403),
        ("GET", "/state", "gw-1", 405),
        ("POST", "/metrics", "gw-1", 405),
        ("GET", "/", "gw-1", 404),
        ("GET", "/etc", "gpu-2", 403),
    ],
)
def test_who_may_ask_what(method: str, path: str, peer: str, status: int) -> None:
    asked = host_agent.Request(method, path, 0, True)
    if not status:
        host_agent.check_allowed(asked, peer, ["gw-1"], ["watch"])
        return
    with pytest.raises(RefusedError) as caught:
        host_agent.check_allowed(asked, peer, ["gw-1"], ["watch"])
    assert caught.value.status == status


def test_a_gateway_speaks_of_instances_that_are_here() -> None:
    body = {"gateway": "gw-1", "out": ["chat", "elsewhere"], "kept": {"embed": "x" * 999}, "in_flight": {"chat": 3, "elsewhere": 1}}  # fmt: skip
    said = host_agent.statement(json.dumps(body).encode(), "gw-1", ["chat", "embed"])
    assert said == {
        "out": ["chat"],
        "kept": {"embed": "x" * 200},
        "in_flight": {"chat": 3},
        "unrouted": [],
        "tls": False,
    }
    assert host_agent.statement(json.dumps({**body, "tls": True}).encode(), "gw-1", ["chat"])["tls"]


def test_gateways_that_cannot_ask_by_tls_are_those_that_do_not_say_so() -> None:
    heard = {"new": {"time": NOW, "tls": True}, "old": {"time": NOW}, "gone": {"time": NOW - 11}}
    assert host_agent.without_tls(heard, NOW) == ["old"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b"{", 400), (b"{}", 403), (b'{"gateway": "gw-2"}', 403), (b"\xff", 400),
        (b'{"gateway": "gw-1", "out": "chat"}', 400), (b'{"gateway": "gw-1", "in_flight": {"chat": -1}}', 400),
        (b'{"gateway": "gw-1", "in_flight": {"chat": true}}', 400), (b'{"gateway": "gw-1", "kept": []}', 400), (b'{"gateway": "gw-1", "unrouted": {}}', 400),
    ],
)  # fmt: skip
def test_a_gateway_that_says_nonsense_is_refused(body: bytes, status: int) -> None:
    with pytest.raises(RefusedError) as caught:
        host_agent.statement(body, "gw-1", ["chat"])
    assert caught.value.status == status


def test_the_word_of_an_operator() -> None:
    assert host_agent.word(None)["operator"] == "up"
    said = host_agent.spoken("drained", "ada", "2026-11-30T00:00:00Z", "new fan")
    drained = {"operator": "drained", "by": "ada", "since": "2026-11-30T00:00:00Z", "reason": "new fan"}
    assert host_agent.word(said) == {**drained, "turn": "", "force": "", "share": ""}
    for broken in ("", "{", "[]", "null", '{"operator": "sideways"}', '{"operator": null}'):
        assert host_agent.word(broken)["operator"] == "drained"
        assert "cannot be read" in host_agent.word(broken)["reason"]


NOW = 1000.0


def gateway(**said: Any) -> dict[str, Any]:
    """What a gateway said just now, that knows of the wish."""
    return {"time": NOW, "told": ["chat"], "out": [], "kept": {}, "in_flight": {}, **said}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (gateway(out=["chat"]), ""),
        (gateway(out=["chat"], in_flight={"chat": 0, "embed": 7}), ""),
        (gateway(out=["chat"], in_flight={"chat": 1}), "has 1 running request"),
        (gateway(out=["chat"], in_flight={"chat": 2}), "has 2 running requests"),
        (gateway(), "still uses it"),
        (gateway(kept={"chat": "the last one"}), "keeps it: the last one"),
        # out for another reason, and perhaps about to come back
        (gateway(out=["chat"], told=[]), "has not heard of it yet"),
        (gateway(out=["chat"], told=["embed"]), "has not heard of it yet"),
        # gone
        (gateway(time=NOW - 11), ""),
        (gateway(time=NOW - 9), "still uses it"),
    ],
)
def test_for_whom_an_instance_that_stops_waits(said: dict[str, Any], reason: str) -> None:
    assert host_agent.awaited("chat", {"gw-1": said}, NOW, 0, 30) == ({"gw-1": reason} if reason else {})


def test_a_gateway_that_keeps_an_instance_is_waited_for_a_while() -> None:
    heard = {"gw-1": gateway(kept={"chat": ""}), "gw-2": gateway(out=["chat"])}
    assert host_agent.awaited("chat", heard, NOW, 29, 30) == {"gw-1": "keeps it: no reason given"}
    assert host_agent.awaited("chat", heard, NOW, 30, 30) == {}
    assert host_agent.awaited("chat", {}, NOW, 0, 30) == {}


def test_the_standing_of_an_instance_in_words() -> None:
    heard = {"gw-2": gateway(out=["chat"], in_flight={"chat": 2}), "gw-1": gateway(time=NOW - 60), "gw-3": gateway(kept={"chat": "why"})}  # fmt: skip
    assert host_agent.standing("chat", heard, NOW) == {
        "gw-1": "in use, 0 in flight, silent for 60 s",
        "gw-2": "out, 2 in flight",
        "gw-3": "kept (why), 0 in flight",
    }


def test_metrics_of_two_instances_are_one_text() -> None:
    both = host_agent.merged({"chat": METRICS, "embed": METRICS, "dead": None})
    lines = both.splitlines()
    series = [line for line in METRICS.splitlines() if line and not line.startswith("#")]
    assert len([line for line in lines if not line.startswith("#")]) == 2 * len(series) + 3
    assert 'vllm_fleet_instance_up{instance_name="chat"} 1' in lines
    assert 'vllm_fleet_instance_up{instance_name="dead"} 0' in lines
    declared = [line for line in lines if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))
    # all series of a name stand together, behind its type
    families = [line.split()[2] for line in declared]
    current, seen = "", []
    for line in lines:
        if line.startswith("# TYPE"):
            current = line.split()[2]
            seen.append(current)
        elif not line.startswith("#"):
            name = line.partition("{")[0]
            assert name == current or name.startswith(f"{current}_")
    assert seen == families


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("up 1", 'up{instance_name="chat"} 1'),
        ('a_total{x="}{"} 2.5 123', 'a_total{instance_name="chat",x="}{"} 2.5 123'),
        ("a{} 1", 'a{instance_name="chat"} 1'),
        ("{} 1", ""),
    ],
)
def test_a_series_gets_a_label(line: str, wanted: str) -> None:
    assert host_agent.labelled(line, "chat") == wanted


def test_the_answer_of_an_instance() -> None:
    assert host_agent.content(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nup 1\n") == "up 1\n"
    assert host_agent.content(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nup 1\n") == "up 1"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nup \r\n2;x=y\r\n1\n\r\n0\r\n\r\n"
    assert host_agent.content(chunked) == "up 1\n"
    for broken in (b"", b"nonsense", b"HTTP/1.1 500 No\r\n\r\n", chunked[:-12], b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nup 1"):  # fmt: skip
        with pytest.raises(ValueError, match=r"answer|literal"):
            host_agent.content(broken)


# --- the agent itself


class Engine(Upstream):
    """An instance."""

    def get(self) -> tuple[int, str]:
        return (200, METRICS) if self.path == "/metrics" else (200, "")


class Running:
    """An agent on loopback."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(PROGRAMS))
        monkeypatch.setitem(sys.modules, "host_agent", host_agent)
        monkeypatch.setitem(sys.modules, "instance_tls", instance_tls)
        monkeypatch.setattr(instance_tls, "CERTIFICATES", directory)
        self.directory, self.authority = directory, Authority()
        self.files = self.load("agent_files", monkeypatch)
        self.module = self.load("agent", monkeypatch)
        for name in ("WORDS", "LEAVING", "HEARD", "SICK"):
            monkeypatch.setattr(self.files, name, directory / name.lower())
            (directory / name.lower()).mkdir()
        for name in ("METRICS", "SILENCE"):
            monkeypatch.setattr(self.files, name, directory / f"{name.lower()}.txt")
        self.certify()
        self.port = 0

    def load(self, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        """A program of the role as a module, anew for each test."""
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    def certify(self) -> None:
        """Give the host a certificate, in the order of the role."""
        certificate, key = self.authority.sign("gpu-1")
        for name, text in (("key", key), ("ca", self.authority.pem), ("cert", certificate)):
            aside = self.directory / f"{name}.new"
            aside.write_text(text)
            aside.replace(self.directory / f"{name}.pem")

    @contextlib.contextmanager
    def runs(self, instances: dict[str, int]) -> Iterator[None]:
        """While it listens."""
        known = {
            "host": "gpu-1", "gateways": ["gw-1", "gw-2"], "monitoring": ["watch"],
            "instances": {
                name: {"address": "127.0.0.1", "port": port, "config": str(self.directory / f"{name}.yaml")}
                for name, port in instances.items()
            },
        }  # fmt: skip
        ready = threading.Event()
        running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []

        async def main() -> None:
            agent = self.module.Agent(known)
            listener = self.module.Listener(agent, self.module.Certificates(self.directory))
            listening = self.module.listen("127.0.0.1", 0)
            self.port = listening.getsockname()[1]
            task = asyncio.ensure_future(listener.run(listening))
            running.append((asyncio.get_running_loop(), task))
            ready.set()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            listening.close()

        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        assert ready.wait(5)
        try:
            yield
        finally:
            loop, task = running[0]
            loop.call_soon_threadsafe(task.cancel)
            thread.join(5)

    def context(self, name: str | None, authority: Authority | None = None, **options: Any) -> ssl.SSLContext:
        """The TLS of a peer with a certificate for a name."""
        context = ssl.create_default_context(cadata=self.authority.pem)
        if name is not None:
            for text, file in zip((authority or self.authority).sign(name, **options), ("peer.pem", "peer.key"), strict=True):  # fmt: skip
                (self.directory / file).write_text(text)
            context.load_cert_chain(self.directory / "peer.pem", self.directory / "peer.key")
        return context

    def connection(self, name: str | None = "gw-1", **options: Any) -> http.client.HTTPSConnection:
        """A connection of a peer."""
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context(name, **options), timeout=10)

    def ask(self, name: str = "gw-1", **said: Any) -> Any:
        """What a gateway is answered."""
        connection = self.connection(name)
        connection.request("POST", "/state", json.dumps({"gateway": name, **said}))
        answer = connection.getresponse()
        assert answer.status == 200
        return json.loads(answer.read())


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    return Running(tmp_path, monkeypatch)


def test_a_gateway_asks_again_and_again_in_one_connection(running: Running) -> None:
    running.files.replace(running.files.WORDS / "chat.json", host_agent.spoken("drained", "ada", "now", "fan"))
    (running.files.LEAVING / "embed").touch()
    (running.directory / "chat.yaml").write_text('model: "/srv/models/a"\nssl-certfile: "/etc/a.pem"\n')
    with running.runs({"chat": 1, "embed": 2}):
        connection = running.connection()
        for told in ([], ["chat", "embed"]):
            connection.request(
                "POST", "/state", json.dumps({"gateway": "gw-1", "out": ["chat"], "in_flight": {"chat": 3}})
            )
            answer = json.loads(connection.getresponse().read())
            assert answer["host"] == "gpu-1"
            chat = answer["instances"]["chat"]
            assert chat.pop("unit")
            assert chat == {
                "operator": "drained",
                "by": "ada",
                "since": "now",
                "reason": "fan",
                "turn": "",
                "force": "",
                "share": "",
                "leaving": False,
                "scheme": "https",
            }
            assert answer["instances"]["embed"]["leaving"] is True
            assert abs(answer["instances"]["embed"]["asked"] - time.time()) < 60
            heard = running.files.heard()["gw-1"]
            assert time.monotonic() - heard.pop("time") < 2
            assert heard == {
                "out": ["chat"],
                "kept": {},
                "in_flight": {"chat": 3},
                "unrouted": [],
                "tls": False,
                "told": told,
            }


def test_a_gateway_hears_of_an_instance_whose_gpu_is_sick(running: Running) -> None:
    """A word of the host beside the operator's, since the first of both wishes."""
    (running.files.SICK / "chat").write_text("GPU 1 needs a reset")
    os.utime(running.files.SICK / "chat", (1000, 1000))
    (running.files.LEAVING / "chat").touch()
    (running.files.SICK / "embed").write_text("")
    with running.runs({"chat": 1, "embed": 2}):
        told = running.ask()["instances"]
        assert {name: told["chat"][name] for name in ("operator", "leaving", "sick", "asked")} == {
            "operator": "up", "leaving": True, "sick": "GPU 1 needs a reset", "asked": 1000.0,
        }  # fmt: skip
        assert not {"sick", "asked"} & set(told["embed"])
        (running.files.LEAVING / "chat").unlink()
        running.ask()
        running.ask()
        assert running.files.heard()["gw-1"]["told"] == ["chat"], "that it is sick is a wish as any other"
        (running.files.SICK / "chat").unlink()
        assert "sick" not in running.ask()["instances"]["chat"]


def test_the_metrics_of_the_host_come_with_those_of_its_instances(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metrics() -> str:
        connection = running.connection("watch")
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()

    with running.runs({"dead": 1}):
        assert metrics().endswith('vllm_fleet_instance_up{instance_name="dead"} 0\n')
        running.files.METRICS.write_text("vllm_fleet_findings 3\n")
        running.files.SILENCE.write_text(json.dumps({"until": "2026-11-30T14:00:00Z"}))
        assert "vllm_fleet_findings 3\n# HELP vllm_fleet_silenced" in metrics()
        monkeypatch.setattr(running.files, "METRICS", running.directory)  # cannot be read
        assert 'vllm_fleet_instance_up{instance_name="dead"} 0' in metrics()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (None, None), ("", None), ("[]", None), ("{}", None), ('{"until": null}', None), ('{"until": "soon"}', None), ('{"until": []}', None),
        ('{"until": "2026-11-30T14:00:00Z"}', 1796047200), ('{"until": "2026-11-30T15:00:00+01:00"}', 1796047200), ('{"until": 12.7}', 13),
    ],
)  # fmt: skip
def test_the_silence_of_a_turn(text: str | None, value: int | None) -> None:
    lines = host_agent.silenced(text).splitlines()
    assert lines[2:] == ([] if value is None else [f"vllm_fleet_silenced_until_timestamp_seconds {value}"])


def test_a_file_that_the_agent_cannot_read_is_told(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(_instance: str) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(running.files, "leaving", unreadable)
    with running.runs({"chat": 1}):
        connection = running.connection()
        connection.request("POST", "/state", json.dumps({"gateway": "gw-1"}))
        answer = connection.getresponse()
        assert (answer.status, b"Permission denied" in answer.read()) == (500, True)


def test_the_agent_sees_who_leaves_whatever_the_umask_of_the_unit(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.files, "LEAVING", running.directory / "run" / "leaving")
    monkeypatch.setattr(sys, "argv", ["leave", "chat"])
    monkeypatch.setenv("MAINPID", str(os.getpid()))
    with listening(Engine) as engine:
        port = int(engine.url.rpartition(":")[2])
        known = {"instances": {"chat": {"address": "127.0.0.1", "port": port, "config": "/nothing"}}}
        monkeypatch.setattr(
            running.files, "configuration", lambda: {**known, "leave": {"seconds": 5, "kept_seconds": 1}}
        )
        before = os.umask(0o077)
        try:
            runpy.run_path(str(PROGRAMS / "leave"))["main"]()
        finally:
            os.umask(before)
    said = running.files.LEAVING / "chat"
    assert [path.stat().st_mode & 0o777 for path in (said, said.parent, said.parent.parent)] == [0o644, 0o755, 0o755]


@pytest.mark.parametrize(
    ("name", "options"),
    [(None, {}), ("gw-1", {"authority": Authority()}), ("gw-1", {"days": -1}), ("gw-1", {"client": False})],
    ids=["none", "of another authority", "one that has ended", "one for servers"],
)
def test_without_a_certificate_for_it_there_is_no_answer(
    running: Running, name: str | None, options: dict[str, Any]
) -> None:
    with running.runs({"chat": 1}):
        connection = running.connection(name, **options)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            connection.request("POST", "/state", json.dumps({"gateway": "gw-1"}))
            connection.getresponse()
        assert running.ask()["host"] == "gpu-1"


def test_another_host_of_the_fleet_is_refused(running: Running) -> None:
    with running.runs({"chat": 1}):
        for name, method, path in (
            ("gpu-2", "GET", "/metrics"),
            ("watch", "POST", "/state"),
            ("gw-2", "POST", "/state"),
        ):
            connection = running.connection(name)
            connection.request(method, path, json.dumps({"gateway": "gw-1"}))
            assert connection.getresponse().status == 403
    assert running.files.heard() == {}


def test_plain_http_gets_no_answer(running: Running) -> None:
    with running.runs({"chat": 1}):
        plain = http.client.HTTPConnection("127.0.0.1", running.port, timeout=5)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            plain.request("GET", "/metrics")
            plain.getresponse()


def test_metrics_of_the_living_come_while_others_hang(running: Running) -> None:
    hanging = socket.create_server(("127.0.0.1", 0))
    with (
        listening(Engine) as engine,
        running.runs({"chat": int(engine.url.rpartition(":")[2]), "hangs": hanging.getsockname()[1], "dead": 1}),
    ):
        connection, begin = running.connection("watch"), time.monotonic()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        assert time.monotonic() - begin < 8
        assert [
            f'vllm_fleet_instance_up{{instance_name="{name}"}} {up}' in text
            for name, up in (("chat", 1), ("hangs", 0), ("dead", 0))
        ] == [True] * 3
        assert 'vllm:num_requests_running{instance_name="chat",' in text
        for path, status in (("/metrics/chat", 200), ("/metrics/dead", 502), ("/metrics/other", 404)):
            connection = running.connection("watch")
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == status
            if status == 200:
                assert answer.read().decode() == METRICS
    hanging.close()


def test_a_renewed_certificate_is_shown_without_a_restart(running: Running) -> None:
    def shown() -> int:
        plain = socket.create_connection(("127.0.0.1", running.port))
        with running.context("gw-1").wrap_socket(plain, server_hostname="127.0.0.1") as tls:
            return int(tls.getpeercert()["serialNumber"], 16)  # type: ignore[index, arg-type]

    with running.runs({"chat": 1}):
        before = shown()
        assert shown() == before
        running.certify()
        after = shown()
        assert after != before
        # one that cannot be used changes nothing
        (running.directory / "cert.pem").write_text("broken")
        assert shown() == after
        running.certify()
        assert shown() not in (before, after)


def test_nobody_holds_up_the_others(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who say nothing, those who never finish, and those who say too much."""
    monkeypatch.setattr(running.module, "HANDSHAKE_SECONDS", 1.0)
    monkeypatch.setattr(running.module, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(running.module, "BODY_SECONDS", 1.0)
    with running.runs({"chat": 1}):
        silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(12)]
        assert running.ask()["host"] == "gpu-1"
        more = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(12)]
        time.sleep(0.2)
        more[-1].settimeout(2)
        assert more[-1].recv(1) == b""  # at once: one address has had enough
        time.sleep(1.2)
        assert running.ask()["host"] == "gpu-1"  # room again
        for sent, wanted in (
            (b"GET /metrics HT", b""),
            (b"POST /state HTTP/1.1\r\nContent-Length: 5\r\n\r\n12", b"HTTP/1.1 408"),
            (b"GET /metrics HTTP/1.1\r\nA: " + b"x" * 20000, b"HTTP/1.1 431"),
            (b"POST /state HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", b"HTTP/1.1 413"),
        ):
            with socket.create_connection(("127.0.0.1", running.port), 5) as plain:
                tls = running.context("gw-1").wrap_socket(plain, server_hostname="127.0.0.1")
                tls.sendall(sent)
                assert tls.recv(12)[:12] == wanted
        assert running.ask()["host"] == "gpu-1"
    for one in silent + more:
        one.close()
