"""Certificates of clients: who has none is refused before a key is looked at, and health needs none."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import Endpoint

from tests.certificates import Authority
from tests.gateway.backends import Backend
from tests.gateway.harness import CHAT, KEY, NAME, Answer, Gateway, document, route, running

ONLY = Backend("chat@gpu-1")
FLEET = document([route("small", [ONLY])], [ONLY])
FLEET["settings"]["cors_origins"] = ["https://chat.example.com"]
AUTHORITY, STRANGER = Authority(), Authority(name="Stranger")
SHOWN = {
    "right": AUTHORITY.sign("team-a"),
    "stranger": STRANGER.sign("team-a"),
    "expired": AUTHORITY.sign("team-a", days=-30),
    "server": AUTHORITY.sign("team-a", client=False),
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("gateway")
    (directory / "clients.pem").write_text(AUTHORITY.pem)
    for name, (certificate, key) in SHOWN.items():
        (directory / f"{name}.pem").write_text(certificate + key)
    with running(directory, FLEET, [ONLY.id], gateway_client_ca_file=str(directory / "clients.pem")) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh() -> None:
    ONLY.reset()


def ask(gateway: Gateway, shown: str, path: str = CHAT, method: str = "POST", **headers: str) -> Answer:
    """A request of a client that shows a certificate."""
    tls = ssl.create_default_context(cafile=str(gateway.ca_file))
    if shown:
        tls.load_cert_chain(gateway.directory / f"{shown}.pem")
    connection = http.client.HTTPConnection(NAME)
    plain = socket.create_connection(("127.0.0.1", gateway.port), 10)
    connection.sock = tls.wrap_socket(plain, server_hostname=NAME)
    everything = {
        "Authorization": f"Bearer {KEY}",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    body = json.dumps({"model": "small"}).encode() if method == "POST" else None
    connection.request(method, path, body, everything)
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def test_a_certificate_and_a_key_are_both_needed(gateway: Gateway) -> None:
    assert ask(gateway, "right").status == 200
    assert ask(gateway, "right", Authorization="Bearer wrong").error["code"] == "invalid_api_key"


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", "Bearer wrong"])
def test_without_a_certificate_a_key_is_not_looked_at(gateway: Gateway, authorization: str) -> None:
    for path in (CHAT, "/v1/models"):
        answer = ask(gateway, "", path, "POST" if path == CHAT else "GET", Authorization=authorization)
        assert (answer.status, answer.error["code"]) == (400, "client_certificate_required")
    assert ONLY.asked == []


@pytest.mark.parametrize("shown", ["stranger", "expired", "server"])
@pytest.mark.parametrize("path", [CHAT, "/healthz"])
def test_a_certificate_that_is_not_valid_is_refused_everywhere(gateway: Gateway, shown: str, path: str) -> None:
    answer = ask(gateway, shown, path)
    assert (answer.status, answer.error["code"]) == (400, "invalid_client_certificate")
    assert ONLY.asked == []


@pytest.mark.parametrize(("shown", "status"), [(None, 400), ("right", 200)])
def test_the_playbooks_can_show_one(gateway: Gateway, shown: str | None, status: int) -> None:
    file = str(gateway.directory / f"{shown}.pem") if shown else None
    url = f"https://{NAME}:{gateway.port}"
    endpoint = Endpoint(url, KEY, "127.0.0.1", str(gateway.ca_file), certificate_file=file)
    assert endpoint.ask("GET", "/v1/models", key=KEY).status == status


@pytest.mark.parametrize("path", ["/healthz", "/health"])
def test_health_needs_no_certificate(gateway: Gateway, path: str) -> None:
    assert ask(gateway, "", path, "GET").json["status"] == "ok"


def test_a_browser_shows_none_when_it_asks_beforehand(gateway: Gateway) -> None:
    asked = {"Origin": "https://chat.example.com", "Access_Control_Request_Method": "POST"}
    assert ask(gateway, "", CHAT, "OPTIONS", **asked).status == 204


def test_who_speaks_no_tls_is_refused_as_before(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), 10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: llm.test\r\nConnection: close\r\n\r\n")
        assert b'"bad_request"' in connection.makefile("rb").read()
