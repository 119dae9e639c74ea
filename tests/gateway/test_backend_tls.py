"""Backends that speak TLS: both sides show a certificate of the fleet, and a backend that changes from the one to the other loses no request."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.gateway.backends import INTERNAL, Backend
from tests.gateway.harness import CHAT, Gateway, document, route, running

FLEET, OTHERS = Authority(), Authority()
QUESTION: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}


def served(directory: Path, pair: tuple[str, str], authority: Authority = FLEET) -> ssl.SSLContext:
    """As vLLM has it with the options of the role: a certificate and its key, and an authority whose certificates are taken."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (directory / "served.pem").write_text("".join(pair))
    context.load_cert_chain(directory / "served.pem")
    context.load_verify_locations(cadata=authority.pem)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def shows(authority: Authority = FLEET) -> dict[str, str]:
    """What the gateway has in /etc/ssl/vllm-fleet/fleet."""
    cert, key = authority.sign("gw-1")
    return {"ca": FLEET.pem, "cert": cert, "key": key}


def idle(gateway: Gateway, backend: str) -> bool:
    """Whether Nginx has no request there."""
    return bool(gateway.admin("/in_flight")["in_flight"][backend] == 0)


@contextlib.contextmanager
def gateway_with(directory: Path, *backends: Backend, **more: Any) -> Iterator[Gateway]:
    """A gateway with one route to these backends, all of which are used, each by what it speaks."""
    fleet = document([route("small", backends)], backends)
    with running(directory / "gateway", fleet, shows=more.pop("shows", None) or shows()) as gateway:
        gateway.state({one.id: {"tls": one.tls is not None, **more} for one in backends})
        yield gateway


def test_a_backend_is_asked_by_tls_and_connections_are_kept(tmp_path: Path) -> None:
    backend = Backend("chat@gpu-1", tls=served(tmp_path, FLEET.sign("gpu-1", names=["gpu-1"])))
    with gateway_with(tmp_path, backend) as gateway:
        for _ in range(20):
            assert gateway.ask(CHAT, QUESTION).json["backend"] == "chat@gpu-1"
        streamed = gateway.ask(CHAT, {**QUESTION, "stream": True})
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        # one for each worker of Nginx, whoever of them has the request
        assert len(backend.connections) <= len(gateway.workers())
        assert set(backend.connections.values()) == {"gw-1"}
        assert {asked.headers["authorization"] for asked in backend.asked} == {f"Bearer {INTERNAL}"}


@pytest.mark.parametrize("host", ["gpu-1", "GPU-1", "gpu_1", "127.0.0.1"])
def test_a_certificate_is_for_the_name_in_the_inventory(tmp_path: Path, host: str) -> None:
    """As the role fleet_authority makes it: what is no name of DNS is its common name only."""
    dns_name = host.lower() if host.lower() == "gpu-1" else ""
    backend = Backend(f"chat@{host}", tls=served(tmp_path, FLEET.sign(host, names=[dns_name] if dns_name else [])))
    with gateway_with(tmp_path, backend) as gateway:
        assert gateway.ask(CHAT, QUESTION).status == 200


WRONG = {
    "of another authority": lambda: OTHERS.sign("gpu-1", names=["gpu-1"]),
    "of another host of the fleet": lambda: FLEET.sign("gpu-2", names=["gpu-2"]),
    "that has ended": lambda: FLEET.sign("gpu-1", names=["gpu-1"], days=-1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_who_is_not_the_backend_is_told_nothing(tmp_path: Path, wrong: str) -> None:
    stranger = Backend("chat@gpu-1", tls=served(tmp_path, WRONG[wrong]()))
    with gateway_with(tmp_path, stranger) as gateway:
        assert gateway.ask(CHAT, QUESTION).status == 502
        assert stranger.asked == []
        assert "upstream SSL certificate" in gateway.errors()


def test_a_gateway_without_a_certificate_of_the_fleet_is_not_answered(tmp_path: Path) -> None:
    backend = Backend("chat@gpu-1", tls=served(tmp_path, FLEET.sign("gpu-1", names=["gpu-1"])))
    with gateway_with(tmp_path, backend, shows=shows(OTHERS)) as gateway:
        assert gateway.ask(CHAT, QUESTION).status == 502
        assert backend.asked == []


def test_a_backend_that_should_speak_tls_is_never_asked_without_it(tmp_path: Path) -> None:
    plain = Backend("chat@gpu-1")
    with gateway_with(tmp_path, plain, tls=True) as gateway:
        assert gateway.ask(CHAT, QUESTION).status == 502
        assert plain.asked == []


def test_without_a_word_of_the_checks_the_inventory_counts(tmp_path: Path) -> None:
    backend = Backend("chat@gpu-1", tls=served(tmp_path, FLEET.sign("gpu-1", names=["gpu-1"])))
    fleet = document([route("small", [backend])], [backend])
    with running(tmp_path / "gateway", fleet, shows=shows()) as gateway:
        assert gateway.ask(CHAT, QUESTION).status == 200
        gateway.state({backend.id: {}})  # one that checks of a former version wrote
        assert gateway.ask(CHAT, QUESTION).status == 200


def test_a_wrong_certificate_costs_a_client_nothing_where_there_is_another_backend(tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    right = Backend("chat@gpu-1", tls=served(tmp_path, FLEET.sign("gpu-1", names=["gpu-1"])))
    wrong = Backend("chat@gpu-2", tls=served(tmp_path / "wrong", OTHERS.sign("gpu-2", names=["gpu-2"])))
    with gateway_with(tmp_path, right, wrong) as gateway:
        assert {gateway.ask(CHAT, QUESTION).json["backend"] for _ in range(20)} == {right.id}
        assert wrong.asked == []


def test_a_backend_goes_over_to_tls_and_back_without_a_failed_request(tmp_path: Path) -> None:
    """At the same port, one backend after the other, as turns do it."""
    backends = []
    for host in ("gpu-1", "gpu-2"):
        (tmp_path / host).mkdir()
        backends.append(Backend(f"chat@{host}"))
    contexts = {
        one.id: served(tmp_path / one.id.partition("@")[2], FLEET.sign("-", names=[one.id.partition("@")[2]]))
        for one in backends
    }
    ended = threading.Event()
    failed: list[object] = []
    asked: list[int] = []
    with gateway_with(tmp_path, *backends) as gateway:

        def ask() -> None:
            while not ended.is_set():
                try:
                    answer = gateway.ask(CHAT, {**QUESTION, "stream": len(asked) % 2 == 0})
                    asked.append(answer.status)
                    whole = answer.body.endswith((b"[DONE]\n\n", b"}"))
                    if answer.status != 200 or not whole:
                        failed.append(answer)
                except OSError as error:
                    failed.append(error)

        def told(**out: bool) -> None:
            gateway.state({one.id: {"use": one.id not in out, "tls": one.tls is not None} for one in backends})

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(ask) for _ in range(4)]
            try:
                for tls in (True, False):
                    for one in backends:
                        told(**{one.id: True})
                        gateway.until(partial(idle, gateway, one.id))
                        one.close()
                        one.tls = contexts[one.id] if tls else None
                        one.connections.clear()
                        one.open()
                        told()
                        gateway.until(partial(len, one.connections))
                        assert set(one.connections.values()) == {"gw-1" if tls else ""}
            finally:
                ended.set()
            for client in clients:
                client.result()
    assert failed == []
    assert len(asked) > 20
