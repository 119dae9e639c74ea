"""What a gateway knows of the fleet, made from the inventory."""

from __future__ import annotations

import hashlib
import json
from datetime import date, datetime, timezone
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, gateway_fleet

KEY, OTHER = "sk-Team A's".replace(" ", "_") + "x" * 32, "y" * 32
GATEWAYS = ["gw1"]


def digest(text: str) -> str:
    """The SHA-256 of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def inventory(**options: Any) -> dict[str, dict[str, Any]]:
    """Two hosts with a model for chats, one of which has another that embeds."""
    chat = {"name": "chat", "model": "qwen", "port": 8000, "options": options}
    embed = {"name": "embed", "model": "bge", "port": 8001, "options": {"runner": "pooling", "convert": "embed"}}
    return {
        "gpu1": {"vllm_instances": [chat], "fleet_address": "10.0.0.11"},
        "gpu2": {"vllm_instances": [chat, embed], "fleet_address": "fd00::12", "host_agent_port": 9441},
    }


def asked(hostvars: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What a gateway of it is asked for."""
    return {
        "routes": [{"model": "qwen", "instance": "chat"}, {"model": "bge", "instance": "embed"}],
        "clients": [{"name": "team-a", "key": KEY, "requests_per_minute": 600, "concurrent_requests": 32}],
        "paths": ["/v1/chat/completions", "/v1/embeddings", "/v1/models"],
        "internal_key": "internal" * 4,
        "hosts": list(hostvars),
        "gateways": GATEWAYS,
        "settings": {"max_body_bytes": 1},
        **more,
    }


def made(hostvars: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The document, as it comes out of JSON."""
    hostvars = hostvars or inventory()
    document: dict[str, Any] = json.loads(
        json.dumps(gateway_fleet.document(hostvars, "gw1", asked(hostvars, **more)), allow_nan=False)
    )
    return document


def test_a_document_with_everything_left_out() -> None:
    found = made()
    assert found == {
        "version": 1,
        "internal_key_sha256": digest("internal" * 4),
        "gateway": "gw1",
        "settings": {"max_body_bytes": 1},
        "backends": {
            "chat@gpu1": {"instance": "chat", "host": "gpu1", "address": "10.0.0.11", "port": 8000, "agent": "10.0.0.11:9440",
                          "tls": False, "most_requests": None},
            "chat@gpu2": {"instance": "chat", "host": "gpu2", "address": "fd00::12", "port": 8000, "agent": "[fd00::12]:9441",
                          "tls": False, "most_requests": None},
            "embed@gpu2": {"instance": "embed", "host": "gpu2", "address": "fd00::12", "port": 8001, "agent": "[fd00::12]:9441",
                          "tls": False, "most_requests": None},
        },
        "routes": [
            {
                "model": "qwen", "aliases": [], "instance": "chat", "backends": ["chat@gpu1", "chat@gpu2"],
                "paths": ["/v1/chat/completions", "/v1/embeddings"], "clients": None, "weight": 1, "balance": "least", "session_header": None,
                "min_available": 1, "retry": True, "priority": False,
            },
            {
                "model": "bge", "aliases": [], "instance": "embed", "backends": ["embed@gpu2"], "paths": ["/v1/embeddings"], "clients": None,
                "weight": 1, "balance": "least", "session_header": None, "min_available": 0, "retry": True,
                "priority": False,
            },
        ],
        "clients": {
            "team-a": {
                "requests_per_minute": 600, "burst": 100, "concurrent_requests": 32, "models": None, "tokens_per_minute": None,
                "tokens_per_day": None, "tokens_per_month": None, "priority": None,
            },
        },
        "keys": {digest(KEY): {"client": "team-a", "expires": None}},
    }  # fmt: skip
    assert KEY not in json.dumps(found)
    assert "internalinternal" not in json.dumps(found)


def test_a_route_says_all_that_it_can() -> None:
    route = {
        "model": "qwen", "instance": "chat", "aliases": ["gpt-4o", "gpt-4o", "o1"], "paths": ["/v1/messages", "/tokenize", "/v1/models"],
        "clients": [], "weight": "3", "balance": "session", "min_available": 0, "retry": False,
    }  # fmt: skip
    [found] = made(inventory(**{"max-num-queued-reqs": 8, "scheduling-policy": "priority"}), routes=[route])["routes"]
    assert found == {
        "model": "qwen", "aliases": ["gpt-4o", "o1"], "instance": "chat", "backends": ["chat@gpu1", "chat@gpu2"],
        "paths": ["/v1/messages", "/tokenize"], "clients": [], "weight": 3, "balance": "session", "session_header": "x-session-id",
        "min_available": 0, "retry": False, "priority": True,
    }  # fmt: skip
    [found] = made(routes=[{**route, "session_header": "X-Chat-Id"}])["routes"]
    assert found["session_header"] == "x-chat-id"


def test_the_requests_that_a_backend_takes_are_those_it_works_on_and_those_that_wait() -> None:
    hostvars = inventory(**{"max-num-seqs": 32, "max-num-queued-reqs": 8})
    hostvars["gpu1"]["vllm_instances"] = [
        {"name": "chat", "model": "qwen", "port": 8000, "options": {"max-num-queued-reqs": 8}}
    ]
    found = made(hostvars)["backends"]
    assert (found["chat@gpu1"]["most_requests"], found["chat@gpu2"]["most_requests"]) == (None, 40)


def test_a_client_has_several_keys_and_budgets() -> None:
    client = {
        "name": "team-a", "requests_per_minute": 60, "concurrent_requests": 4, "burst": 0, "models": ["qwen"], "tokens_per_minute": 1000,
        "tokens_per_day": 2000, "tokens_per_month": 3000, "priority": 0,
        "keys": [{"key": KEY, "expires": "2027-01-31"}, {"sha256": digest(OTHER).upper()}],
    }  # fmt: skip
    found = made(clients=[client])
    assert found["keys"] == {
        digest(KEY): {"client": "team-a", "expires": 1801353600},
        digest(OTHER): {"client": "team-a", "expires": None},
    }
    assert found["clients"]["team-a"] == {
        "requests_per_minute": 60, "burst": 0, "concurrent_requests": 4, "models": ["qwen"], "tokens_per_minute": 1000, "tokens_per_day": 2000,
        "tokens_per_month": 3000, "priority": 0,
    }  # fmt: skip


def test_a_gateway_alone_on_its_host_asks_by_loopback_where_the_host_has_no_address() -> None:
    hostvars = {
        "one": {"vllm_instances": [{"name": "chat", "model": "qwen", "port": 8000}], "ansible_host": "one.example"}
    }
    routes = [{"model": "qwen", "instance": "chat"}]
    found = made(hostvars, routes=routes, gateways=["one"])
    assert found["backends"]["chat@one"]["agent"] == "127.0.0.1:9440"
    hostvars["one"]["fleet_address"] = "10.0.0.1"
    backend = made(hostvars, routes=routes, gateways=["one"])["backends"]["chat@one"]
    assert (backend["address"], backend["agent"]) == ("127.0.0.1", "10.0.0.1:9440")
    with pytest.raises(fleet.FleetError, match="fleet_address is not set"):
        made({"one": {**hostvars["one"], "fleet_address": ""}}, routes=routes)


def test_a_backend_that_is_to_speak_tls_is_told_as_such() -> None:
    hostvars = inventory()
    hostvars["gpu2"]["fleet_backend_tls"] = True
    found = made(hostvars)["backends"]
    assert {name: backend["tls"] for name, backend in found.items()} == {
        "chat@gpu1": False,
        "chat@gpu2": True,
        "embed@gpu2": True,
    }


def test_a_gateway_that_is_told_gets_backends_and_nothing_else() -> None:
    former = inventory(**{"max-num-queued-reqs": 8})
    wanted = [{"model": "qwen", "instance": "chat", "aliases": ["a"]}, {"model": "bge", "instance": "embed"}]
    present = made(former, routes=wanted)
    now = inventory(**{"max-num-queued-reqs": 9})
    now["gpu3"] = {**now["gpu2"], "fleet_address": "10.0.0.13"}
    del now["gpu1"]
    told = gateway_fleet.with_backends(present, now, list(now), GATEWAYS)
    assert told == made(now, routes=wanted)
    assert [route["min_available"] for route in told["routes"]] == [1, 1]
    assert told["keys"] == present["keys"]
    one = {"gpu2": now["gpu2"]}
    assert gateway_fleet.with_backends(told, one, list(one), GATEWAYS) == made(one, routes=wanted)


@pytest.mark.parametrize(("asked_for", "left"), [(2, 2), (0, 0), (3, 3)])
def test_what_a_route_asks_for_itself_stays_when_it_is_told(asked_for: int, left: int) -> None:
    hostvars = inventory()
    present = made(hostvars, routes=[{"model": "qwen", "instance": "chat", "min_available": min(asked_for, 2)}])
    present["routes"][0]["min_available"] = asked_for
    now = {**hostvars, "gpu3": {**hostvars["gpu1"], "fleet_address": "10.0.0.13"}}
    told = gateway_fleet.with_backends(present, now, list(now), GATEWAYS)
    assert told["routes"][0]["min_available"] == left


def test_another_version_of_the_data_is_refused() -> None:
    with pytest.raises(fleet.FleetError, match="version 2"):
        gateway_fleet.with_backends({**made(), "version": 2}, inventory(), [], GATEWAYS)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("2027-01-31", "2027-01-31T00:00:00"),
        (date(2027, 1, 31), "2027-01-31T00:00:00"),
        ("2027-01-31T12:30:00Z", "2027-01-31T12:30:00"),
        ("2027-01-31 12:30:00.25z", "2027-01-31T12:30:00"),
        ("2027-01-31T12:30+02:00", "2027-01-31T10:30:00"),
        ("2027-01-31T12:30:05", "2027-01-31T12:30:05"),
        (datetime(2027, 1, 31, 12, 30, tzinfo=timezone.utc), "2027-01-31T12:30:00"),
        (datetime(2027, 1, 31, 12, 30, 0, 5), "2027-01-31T12:30:00"),
    ],
)
def test_when_a_key_expires(said: Any, meant: str) -> None:
    assert datetime.fromtimestamp(fleet.moment(said), timezone.utc).replace(tzinfo=None).isoformat() == meant


@pytest.mark.parametrize(
    "said", ["", "soon", "31.01.2027", "2027-02-31", "2027-1-3", 20270131, "2027-01-31T25:00Z", "2027-01-31T1"]
)
def test_no_time(said: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        fleet.moment(said)


def test_a_client_shows_its_keys_to_nobody() -> None:
    entry = {"name": "a", "requests_per_minute": 60, "concurrent_requests": 4}
    client = fleet.Client.of({**entry, "key": KEY})
    assert client == fleet.Client("a", 60, 4, 10, (fleet.Key(digest(KEY)),))
    assert KEY not in repr(client)
    several = fleet.Client.of(
        {**entry, "keys": [{"key": KEY, "expires": "2020-01-01"}, {"sha256": digest("z")}, {"key": OTHER}]}
    )
    assert not {KEY, OTHER} & set(repr(several).split("'"))


def test_the_key_that_a_playbook_shows_is_the_one_that_lasts() -> None:
    entry = {"name": "a", "requests_per_minute": 60, "concurrent_requests": 4}
    keys = [{"key": KEY, "expires": "2027-01-01"}, {"sha256": digest("z")}, {"key": OTHER, "expires": "2028-01-01"}]
    client = fleet.Client.of({**entry, "keys": keys})
    assert client.known_key(0) == OTHER
    assert client.known_key(fleet.moment("2028-01-01")) == ""
    assert fleet.Client.of({**entry, "keys": [*keys, {"key": "k" * 20}]}).known_key(0) == "k" * 20


@pytest.mark.parametrize(("clients", "models", "may"), [
    (None, None, True), (["a"], None, True), (["b"], None, False), ([], None, False), (None, ["m"], True), (None, ["n"], False), (["a"], [], False),
])  # fmt: skip
def test_who_may_use_a_route(clients: Any, models: Any, may: bool) -> None:
    client = fleet.Client.of(
        {"name": "a", "key": KEY, "requests_per_minute": 1, "concurrent_requests": 1, "models": models}
    )
    assert client.may(fleet.Route.of({"model": "m", "instance": "i", "clients": clients})) is may
