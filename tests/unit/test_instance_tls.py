"""How programs of a host ask its instances, with a stand-in for vLLM that speaks TLS as the role has it, and how certificates are taken up."""

from __future__ import annotations

import asyncio
import importlib.util
import runpy
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet_status_host, instance_tls
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks import FAILED, GOOD, SILENT, Backend
from ansible_collections.gpufleet.llm.plugins.module_utils.gateway_checks_host import Asker, Times
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_state_host import InstanceHost
from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds_host import Instance
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import TLS_OPTIONS

from tests.certificates import Authority
from tests.stand_in import contract
from tests.stand_in.local import KEY, Running, unpack, up

ROOT = Path(__file__).resolve().parents[2]
OF_HOST = ("ca", "cert", "key")


@dataclass
class Host:
    """A host with certificates of the fleet and an instance that speaks TLS."""

    certificates: Path
    authority: Authority
    instance: Running
    config: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.instance.port}"


def certify(directory: Path, authority: Authority, days: int = 30) -> None:
    """What the role fleet_authority puts there, and in its order: into the files that are there."""
    cert, key = authority.sign("gpu-1", days=days, names=["gpu-1"])
    for name, text in (("key", key), ("ca", authority.pem), ("cert", cert)):
        (directory / f"{name}.pem").write_text(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture
def host(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    authority, certificates, home = Authority(), tmp_path / "fleet", tmp_path / "home"
    for directory in (certificates, home):
        directory.mkdir()
    certify(certificates, authority)
    monkeypatch.setattr(instance_tls, "CERTIFICATES", certificates)
    options = {
        name: value.replace("/etc/ssl/vllm-fleet/fleet", str(certificates)) if isinstance(value, str) else value
        for name, value in TLS_OPTIONS.items()
    }
    (home / "stand_in.json").write_text('{"start_seconds": 0}')
    instance = up(site, home, KEY, **options)
    instance.tls = instance_tls.context()
    yield Host(certificates, authority, instance, home / "config.yaml")
    instance.process.kill()
    instance.process.wait()


def asked(host: Host, tls: Any = instance_tls.context) -> Any:
    """The answer that checks and the watch of a host hear."""
    backend = Backend("chat@gpu-1", "chat", "gpu-1", "127.0.0.1", host.instance.port, "small")
    return asyncio.run(Asker(backend, KEY, Times(timeout=5), tls).check(5))


def test_it_is_a_vllm_like_any_other(host: Host) -> None:
    for holds in contract.CONTRACT:
        holds(host.instance)


def test_the_configuration_of_a_generation_says_by_what(host: Host, tmp_path: Path) -> None:
    assert instance_tls.scheme(host.config) == "https"
    (tmp_path / "plain.yaml").write_text('model: "/srv/models/ssl-certfile: x"\nport: 8000\n')
    assert instance_tls.scheme(tmp_path / "plain.yaml") == "http"
    assert instance_tls.context_of(tmp_path / "plain.yaml") is None
    assert instance_tls.scheme(tmp_path / "none.yaml") == ""


def test_whoever_asks_on_the_host_shows_its_certificate(host: Host) -> None:
    answered = Instance(host.url, "small", KEY)
    assert answered.ask(5).reason == ""
    assert not answered.answers_anybody(5)
    assert asked(host).heard == GOOD
    where = {"address": "127.0.0.1", "port": host.instance.port, "config": str(host.config)}
    assert InstanceHost().ask(where) == 0
    status, _nginx = asyncio.run(
        fleet_status_host.everything({"chat": ("https", "127.0.0.1", host.instance.port)}, None, 0, 5)
    )
    assert "why" not in status["chat"]


def test_the_programs_of_the_host_ask_by_tls(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = ROOT / "roles/host_agent/templates/usr/local/lib/vllm-fleet"
    monkeypatch.syspath_prepend(str(programs))
    monkeypatch.syspath_prepend(str(ROOT / "plugins/module_utils"))
    monkeypatch.setitem(sys.modules, "instance_tls", instance_tls)
    agent = runpy.run_path(str(programs / "agent.py"))
    leave = runpy.run_path(str(programs / "leave"))
    where: dict[str, Any] = {"address": "127.0.0.1", "port": host.instance.port, "config": str(host.config)}
    assert "vllm:num_requests_running" in asyncio.run(agent["metrics_of"](**where))
    assert leave["answers"](where)
    # what is wrong with the certificate of this host is nothing that the gateways have to suffer for
    (host.certificates / "ca.pem").write_text(Authority().pem)
    assert leave["answers"](where)
    (host.certificates / "ca.pem").unlink()
    assert leave["answers"](where)
    assert not leave["answers"]({**where, "port": 9, "config": "/nothing"})


def test_the_turn_of_a_gpu_ends_when_an_instance_answers_by_tls(host: Host) -> None:
    spec = importlib.util.spec_from_file_location("gpu_turn", ROOT / "roles/vllm/files/gpu_turn.py")
    assert spec and spec.loader
    turn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(turn)
    options = turn.options_of(host.config.parent)
    assert turn.answers("127.0.0.1", host.instance.port, options)
    assert not turn.answers("127.0.0.1", host.instance.port, {"host": "127.0.0.1"})
    assert not turn.answers("127.0.0.1", host.instance.port, {**options, "ssl-keyfile": "/nothing"})


def test_without_a_certificate_of_the_fleet_nobody_is_answered(host: Host) -> None:
    def stranger() -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(host.certificates / "ca.pem"))

    def other() -> ssl.SSLContext:
        context = stranger()
        cert, key = Authority().sign("gpu-1")
        (host.certificates / "other.pem").write_text(cert + key)
        context.load_cert_chain(host.certificates / "other.pem")
        return context

    for tls in (stranger, other, lambda: None):
        assert asked(host, tls).heard == FAILED
    before = host.instance.log()
    assert Instance(host.url.replace("https", "http"), "small", KEY).ask(5).reason != ""
    assert "POST" not in host.instance.log()[len(before) :]


def test_an_instance_of_another_authority_or_name_is_told_nothing(host: Host) -> None:
    others = Authority()
    (host.certificates / "ca.pem").write_text(others.pem)
    assert "certificate verify failed" in Instance(host.url, "small", KEY).ask(5).reason
    said = asked(host)
    assert said.heard == FAILED
    assert said.reason.startswith("its certificate is not the one of the fleet")


def test_a_renewed_certificate_is_taken_up_again_and_again_without_a_restart(host: Host) -> None:
    """As it is written, into the file: what is put in its place is seen once, by the real one as well."""
    shown = []
    for days in (31, 32, 33):
        certify(host.certificates, host.authority, days)
        wanted = (host.certificates / "cert.pem").read_text()
        end = time.monotonic() + 10
        while ssl.get_server_certificate(("127.0.0.1", host.instance.port)).strip() != wanted.strip():
            assert time.monotonic() < end, "the former certificate is shown"
            time.sleep(0.1)
        shown.append(wanted)
        assert asked(host).heard == GOOD
    assert len(set(shown)) == 3


def test_an_engine_too_busy_for_a_handshake_is_no_silent_one() -> None:
    """Connections are taken by the kernel, handshakes by the server: who takes none for a while is as busy as one that does not answer."""

    async def check() -> Any:
        async def takes_nothing(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(30)

        server = await asyncio.start_server(takes_nothing, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        backend = Backend("chat@gpu-1", "chat", "gpu-1", "127.0.0.1", port, "small")
        context = ssl.create_default_context()
        return await Asker(backend, KEY, Times(connect=0.2, timeout=1.5), lambda: context).check(10)

    answer = asyncio.run(check())
    assert answer.heard != SILENT
    assert "its engine did nothing" in answer.reason
