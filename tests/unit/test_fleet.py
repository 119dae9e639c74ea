"""Who reaches whom, decided from the inventory."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet

CHAT: dict[str, Any] = {"vllm_instances": [{"name": "chat", "port": 8000}]}


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({"fleet_address": "10.0.0.1", "ansible_host": "192.0.2.1"}, "10.0.0.1"),
        ({"ansible_host": "192.0.2.1"}, "192.0.2.1"),
        ({"fleet_address": "", "ansible_host": "2001:db8::1"}, "2001:db8::1"),
    ],
)
def test_the_address_of_a_host(variables: dict[str, Any], address: str) -> None:
    assert fleet.fleet_address({"gpu1": variables}, "gpu1") == address


def test_a_host_may_be_named_by_its_address() -> None:
    assert fleet.fleet_address({"192.0.2.1": {}}, "192.0.2.1") == "192.0.2.1"


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"ansible_host": "gpu1.example.com"}, "gpu1.example.com, which is no IP address"),
        ({}, "not set"),
        ({"fleet_address": "gpu1"}, "must be an IP address"),
        ({"fleet_address": "127.0.0.1"}, "no other host can reach"),
        ({"fleet_address": "0.0.0.0"}, "no other host can reach"),
    ],
)
def test_a_host_without_an_address_is_named(variables: dict[str, Any], problem: str) -> None:
    with pytest.raises(fleet.FleetError, match=problem) as caught:
        fleet.fleet_address({"gpu1": variables}, "gpu1")
    assert str(caught.value).startswith("gpu1: ")
    assert "fleet_address" in str(caught.value)


def test_loopback_only_when_the_only_gateway_is_the_host() -> None:
    hostvars = {"gpu1": {"fleet_address": "10.0.0.1"}}
    assert fleet.bind_address(hostvars, "gpu1", ["gpu1"]) == "127.0.0.1"
    assert fleet.bind_address(hostvars, "gpu1", ["gpu1", "lb2"]) == "10.0.0.1"
    assert fleet.bind_address(hostvars, "gpu1", ["lb2"]) == "10.0.0.1"


def test_tls_is_for_what_a_network_lies_between() -> None:
    hostvars = {"gpu1": {"fleet_address": "10.0.0.1", "fleet_backend_tls": True}}
    assert fleet.backend_tls(hostvars, "gpu1", ["lb1"])
    assert not fleet.backend_tls(hostvars, "gpu1", ["gpu1"])
    hostvars["gpu1"]["fleet_backend_tls"] = "false"
    assert not fleet.backend_tls(hostvars, "gpu1", ["lb1"])
    assert not fleet.backend_tls({"gpu1": {}}, "gpu1", ["lb1"]), "and its address is asked of nobody"


def test_backends_are_the_hosts_that_have_the_instance() -> None:
    hostvars: dict[str, dict[str, Any]] = {
        "gpu1": {**CHAT, "fleet_address": "10.0.0.1"},
        "gpu2": {"vllm_instances": [{"name": "other", "port": 8001}, {"name": "chat", "port": 8002}], "ansible_host": "fd00::2"},
        "gpu3": {"vllm_instances": [{"name": "other", "port": 8001}]},
        "gpu4": {},
    }  # fmt: skip
    found = fleet.backends(hostvars, "chat", list(hostvars), ["lb1"])
    assert [(backend.id, backend.endpoint) for backend in found] == [
        ("chat@gpu1", "10.0.0.1:8000"),
        ("chat@gpu2", "[fd00::2]:8002"),
    ]
    assert fleet.backends(hostvars, "nowhere", list(hostvars), ["lb1"]) == []
    [alone] = fleet.backends({"one": dict(CHAT)}, "chat", ["one"], ["one"])
    assert alone.endpoint == "127.0.0.1:8000"


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "chat"},
        {"name": "chat", "port": "http"},
        {"name": "chat", "port": 70000},
        {"name": "chat", "port": "8000"},
        {"name": "chat", "port": 80},
    ],
)
def test_a_bad_port_is_named(entry: dict[str, Any]) -> None:
    with pytest.raises(
        fleet.FleetError, match=r"^gpu1: vllm_instances \(chat\): port is .*; it must be a number from 1024 to 65535$"
    ):
        fleet.backends({"gpu1": {"vllm_instances": [entry], "fleet_address": "10.0.0.1"}}, "chat", ["gpu1"], ["lb1"])


def test_two_hosts_with_one_address_are_refused() -> None:
    hostvars = {name: {**CHAT, "fleet_address": "10.0.0.1"} for name in ("gpu1", "gpu2")}
    with pytest.raises(fleet.FleetError, match=r"10\.0\.0\.1:8000"):
        fleet.backends(hostvars, "chat", list(hostvars), ["lb1"])


@pytest.mark.parametrize("name", ["llm.example.com", "localhost", "a-b.c", "x" * 63 + ".test"])
def test_dns_names(name: str) -> None:
    assert fleet.is_dns_name(name)


@pytest.mark.parametrize(
    "name", ["", "LLM.example.com", "-a.b", "a-.b", "a..b", "*.a.b", "a_b", "300.1.1.1", "a.b.", "a;b", "x" * 64]
)
def test_no_dns_names(name: str) -> None:
    assert not fleet.is_dns_name(name)
