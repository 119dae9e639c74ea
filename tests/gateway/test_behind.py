"""A gateway with a proxy in front of it: who is believed to be the client, and what the proxy may ask for."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import Backend
from tests.gateway.harness import CHAT, KEY, NAME, Gateway, document, route, running

ONLY = Backend("chat@gpu-1")
FLEET = document([route("small", [ONLY])], [ONLY])
# The proxy has an address of its own on loopback; whoever comes from another one is none.
PROXY, OTHER = "127.0.0.2", "127.0.0.3"
CLIENT, SECOND_CLIENT = "203.0.113.7", "2001:db8::7"
# 127.0.0.1 is loopback to the gateway, and this one any address of its host.
HOST = "127.0.0.9"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    ONLY.reset()
    return tmp_path


def connected(gateway: Gateway, source: str, first: bytes = b"", host: str = HOST) -> http.client.HTTPConnection:
    """A connection from an address, whose first bytes come before TLS."""
    plain = socket.create_connection((host, gateway.port), 10, (source, 0))
    plain.sendall(first)
    made = http.client.HTTPConnection(NAME)
    made.sock = gateway.tls.wrap_socket(plain, server_hostname=NAME)
    return made


def seen(gateway: Gateway, connection: http.client.HTTPConnection, forwarded: str = "") -> str:
    """The address that the log has of a request."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request(
        "POST", CHAT, b'{"model":"small"}', {**headers, **({"X-Forwarded-For": forwarded} if forwarded else {})}
    )
    response = connection.getresponse()
    response.read()
    assert response.status == 200
    return str(gateway.logged(str(response.headers["X-Request-Id"]))["remote_addr"])


# --- X-Forwarded-For


@pytest.fixture
def behind(directory: Path) -> Iterator[Gateway]:
    """A gateway that trusts one proxy, and a second one behind it."""
    limits: dict[str, Any] = {"gateway_unauthorized_requests_per_minute": 1, "gateway_unauthorized_burst": 0}
    with running(directory, FLEET, [ONLY.id], gateway_trusted_proxies=[PROXY, "10.0.0.0/8"], **limits) as gateway:
        yield gateway


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        (CLIENT, CLIENT),
        (SECOND_CLIENT, SECOND_CLIENT),
        (f"192.0.2.1, {CLIENT}", CLIENT),  # what the client wrote itself stands in front
        (f"{CLIENT}, 10.1.2.3", CLIENT),  # two proxies
        ("", PROXY),
        ("nobody", PROXY),
    ],
)
def test_a_trusted_proxy_says_who_the_client_is(behind: Gateway, forwarded: str, client: str) -> None:
    assert seen(behind, connected(behind, PROXY), forwarded) == client
    assert ONLY.asked[-1].headers["x-forwarded-for"] == client


def test_nobody_else_is_believed(behind: Gateway) -> None:
    assert seen(behind, connected(behind, OTHER), CLIENT) == OTHER


def test_limits_are_those_of_the_client_and_not_of_the_proxy(behind: Gateway) -> None:
    def refused(client: str) -> int:
        connection = connected(behind, PROXY)
        connection.request("GET", "/v1/models", headers={"X-Forwarded-For": client})
        return connection.getresponse().status

    assert [refused(CLIENT), refused(SECOND_CLIENT), refused(CLIENT)] == [401, 401, 429]


def test_without_proxies_nobody_is_believed(directory: Path) -> None:
    with running(directory, FLEET, [ONLY.id]) as gateway:
        assert seen(gateway, connected(gateway, PROXY), CLIENT) == PROXY


# --- the PROXY protocol

SAID = f"PROXY TCP4 {CLIENT} {HOST} 5000 443\r\n".encode()
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
BINARY = SIGNATURE + b"\x21\x11\0\x0c" + socket.inet_aton(CLIENT) + socket.inet_aton(HOST) + b"\x13\x88\x01\xbb"


@pytest.fixture
def passed_on(directory: Path) -> Iterator[Gateway]:
    """A gateway to which TLS is passed on."""
    with running(directory, FLEET, [ONLY.id], gateway_trusted_proxies=[PROXY], gateway_proxy_protocol=True) as gateway:
        yield gateway


@pytest.mark.parametrize("first", [SAID, BINARY])
def test_the_proxy_protocol_says_who_the_client_is(passed_on: Gateway, first: bytes) -> None:
    assert seen(passed_on, connected(passed_on, PROXY, first), "192.0.2.1") == CLIENT


def test_the_proxy_protocol_of_others_is_not_believed(passed_on: Gateway) -> None:
    assert seen(passed_on, connected(passed_on, OTHER, SAID)) == OTHER


def test_without_the_proxy_protocol_a_connection_is_closed_but_on_loopback(passed_on: Gateway) -> None:
    with pytest.raises(OSError):
        connected(passed_on, PROXY)
    # the role's own questions
    assert seen(passed_on, connected(passed_on, "127.0.0.1", host="127.0.0.1"), CLIENT) == "127.0.0.1"


# --- plain HTTP

HTTPS = {"X-Forwarded-Proto": "https"}
MODEL = b'{"model":"small"}'


@pytest.fixture
def plain(directory: Path) -> Iterator[Gateway]:
    """A gateway whose proxy opens TLS."""
    with running(directory, FLEET, [ONLY.id], gateway_trusted_proxies=[PROXY], gateway_plain_http=True) as gateway:
        yield gateway


def by_http(
    gateway: Gateway, source: str, headers: dict[str, str], path: str = CHAT, method: str = "POST"
) -> http.client.HTTPResponse:
    """An answer without TLS, whose body has not been read."""
    connection = http.client.HTTPConnection(HOST, gateway.http_port, 10, (source, 0))
    everything = {"Host": NAME, "Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    connection.request(method, path, MODEL if method == "POST" else None, everything)
    return connection.getresponse()


def test_a_proxy_is_served_without_tls(plain: Gateway) -> None:
    response = by_http(plain, PROXY, {**HTTPS, "X-Forwarded-For": CLIENT})
    assert (response.status, response.headers["Strict-Transport-Security"]) == (200, "max-age=63072000")
    assert plain.logged(str(response.headers["X-Request-Id"]))["remote_addr"] == CLIENT
    refused = by_http(plain, PROXY, {**HTTPS, "Authorization": "Bearer wrong"})
    assert (refused.status, b"invalid_api_key" in refused.read()) == (401, True)


def test_a_proxy_that_says_nothing_of_its_clients_is_served_without_a_word_of_https(plain: Gateway) -> None:
    response = by_http(plain, PROXY, {})
    assert (response.status, response.headers["Strict-Transport-Security"]) == (200, None)


@pytest.mark.parametrize(
    ("source", "headers"),
    [(OTHER, {}), (OTHER, HTTPS), (OTHER, {"X-Forwarded-For": PROXY}), (PROXY, {"X-Forwarded-Proto": "http"})],
)
def test_everybody_else_is_sent_to_https(plain: Gateway, source: str, headers: dict[str, str]) -> None:
    response = by_http(plain, source, headers, CHAT + "?of=mine")
    assert response.status == 308
    assert response.headers["Location"] == f"https://{NAME}:{plain.port}{CHAT}?of=mine"
    assert response.headers["Strict-Transport-Security"] is None
    assert ONLY.asked == []


def test_by_default_a_proxy_is_sent_to_https_as_well(behind: Gateway) -> None:
    assert by_http(behind, PROXY, HTTPS).status == 308


def test_only_answers_by_https_say_to_stay_there(plain: Gateway) -> None:
    assert plain.ask("/healthz", key=None).headers["strict-transport-security"] == "max-age=63072000"
    for host in (NAME, "whoever.test"):
        response = by_http(plain, OTHER, {"Host": host}, "/healthz", "GET")
        assert (response.status, response.headers["Strict-Transport-Security"]) == (200, None)


# --- keep-alive


def test_an_idle_connection_is_kept_for_as_long_as_was_said(directory: Path) -> None:
    with running(directory, FLEET, [ONLY.id], gateway_keepalive_seconds=2) as gateway:
        connection = gateway.connection()
        for pause in (0.0, 1.0):
            time.sleep(pause)
            connection.request("GET", "/healthz")
            assert connection.getresponse().read()
        begin = time.monotonic()
        assert connection.sock.recv(1) == b""
        assert 1.5 < time.monotonic() - begin < 10
