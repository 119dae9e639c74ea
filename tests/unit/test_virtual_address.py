"""Who has the address that gateways share, and what may not be asked for."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.filter import virtual_address as filters
from ansible_collections.gpufleet.llm.plugins.module_utils import virtual_address

GATEWAYS = ["gw1", "gw2", "gw3"]
HOSTVARS: dict[str, dict[str, Any]] = {
    name: {"fleet_address": f"10.0.0.{number}", "virtual_address_ip": "10.0.0.99"}
    for number, name in enumerate(GATEWAYS, 1)
}
GOOD: dict[str, Any] = {"ip": "10.0.0.99", "router_id": 0, "server_names": ["llm.example.com"]}
INTERFACES: list[dict[str, Any]] = [
    {"ifname": "lo", "addr_info": [{"family": "inet", "local": "127.0.0.1", "prefixlen": 8}]},
    {"ifname": "eth0", "addr_info": [{"family": "inet6", "local": "fe80::1", "prefixlen": 64}]},
    {"ifname": "eth1", "addr_info": [
        {"family": "inet", "local": "10.0.0.99", "prefixlen": 32}, {"family": "inet", "local": "10.0.0.1", "prefixlen": 24},
    ]},
]  # fmt: skip


def told(**changes: Any) -> list[str]:
    hostvars = changes.pop("hostvars", {})
    return list(
        virtual_address.problems(
            {**HOSTVARS, **hostvars}, "gw1", changes.pop("gateways", GATEWAYS), {**GOOD, **changes}
        )
    )


def test_what_is_right() -> None:
    assert told() == told(router_id=7) == told(server_names=["10.0.0.99"]) == told(server_names=[]) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ip": "llm.example.com"}, "virtual_address_ip is 'llm.example.com'"),
        ({"ip": "fd00::9"}, "it takes an IPv4 address"),
        ({"gateways": ["gw1"]}, "for two or more gateways, but the inventory has gw1"),
        ({"gateways": ["gw2", "gw3"]}, "for two or more gateways"),
        ({"router_id": 300}, "virtual_address_router_id is 300"),
        ({"ip": "10.0.0.0"}, "virtual_address_router_id is 0"),
        ({"ip": "10.0.0.2"}, "which is fleet_address of gw2"),
        ({"hostvars": {"gw2": {**HOSTVARS["gw2"], "fleet_address": "fd00::2"}}}, "reach each other by IPv4"),
        ({"hostvars": {"gw2": {"fleet_address": "10.0.0.2"}}}, "it must be the same on all gateways"),
        ({"hostvars": {"gw3": {"virtual_address_ip": "10.0.0.99"}}}, "gw3"),
        ({"server_names": ["10.0.0.1"]}, "has neither 10.0.0.99 (virtual_address_ip) nor a DNS name"),
    ],
)
def test_each_mistake_is_told(changes: dict[str, Any], problem: str) -> None:
    [found] = told(**changes)
    assert problem in found


def test_the_order_of_the_inventory_is_that_of_the_priorities() -> None:
    """One that leaves is behind all that are well, and one that is silent behind all that answer, leaving ones among them."""
    well = [virtual_address.priority(name, GATEWAYS) for name in GATEWAYS]
    assert well == sorted(well, reverse=True)
    many = [f"gw{number}" for number in range(50)]
    last, first = virtual_address.priority("gw49", many), virtual_address.priority("gw0", many)
    assert first + virtual_address.LEAVING < last + 1 <= 255
    assert first + virtual_address.SILENT < last + virtual_address.LEAVING + 1
    assert last + virtual_address.SILENT + virtual_address.LEAVING > 0


def test_the_interface_is_the_one_in_whose_network_the_address_is() -> None:
    assert virtual_address.interface("10.0.0.99", INTERFACES) == "eth1"
    assert virtual_address.interface("127.0.0.9", INTERFACES) == ""
    assert virtual_address.interface("192.0.2.1", INTERFACES, "eth0") == "eth0"
    assert virtual_address.host_problems("10.0.0.99", INTERFACES, "") == []
    [network] = virtual_address.host_problems("192.0.2.1", INTERFACES, "")
    assert "10.0.0.1/24 (eth1)" in network and "127.0.0.1" not in network
    assert virtual_address.host_problems("10.0.0.99", INTERFACES, "eth9") == [
        "virtual_address_interface is eth9, which the host does not have"
    ]


def test_the_plan() -> None:
    plan = filters.virtual_address_plan(HOSTVARS, "gw2", GATEWAYS, {**GOOD, "interface": "", "interfaces": INTERFACES})
    assert plan == {
        "router_id": 99, "priority": 199, "own": "10.0.0.2", "others": ["10.0.0.1", "10.0.0.3"], "interface": "eth1",
        "leaving": -50, "silent": -100,
    }  # fmt: skip
