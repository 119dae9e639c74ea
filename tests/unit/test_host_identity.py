"""Who a host is to the others, from the inventory alone."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, host_identity

HOSTS: dict[str, dict[str, Any]] = {
    "gpu-1": {"fleet_address": "10.0.0.11", "vllm_instances": [{"name": "chat", "port": 8000}]},
    "GPU_2": {"ansible_host": "fd00::2", "vllm_instances": [{"name": "chat", "port": 8001}, {"name": "embed", "port": 8002}]},
    "gw.example.com": {"ansible_host": "gw.example.com"},
    "alone": {"ansible_host": "alone.example.com", "vllm_instances": [{"name": "chat", "port": 8000}]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("host", "gateways", "names"),
    [
        ("gpu-1", ["gw.example.com"], ["gpu-1", "10.0.0.11"]),
        ("GPU_2", ["gw.example.com"], ["fd00::2"]),
        # a gateway needs no fleet_address while nobody else asks it
        ("gw.example.com", ["gw.example.com", "gpu-1"], ["gw.example.com"]),
        ("alone", ["alone"], ["alone", "127.0.0.1"]),
    ],
)
def test_the_names_of_a_certificate(host: str, gateways: list[str], names: list[str]) -> None:
    assert host_identity.names(HOSTS, host, gateways) == names
    assert host_identity.problems(HOSTS, host, gateways) == []


def test_a_host_that_nothing_names_is_told() -> None:
    (problem,) = host_identity.problems({"gpu_3": {}}, "gpu_3", ["gw"])
    assert "set fleet_address" in problem
    wrong = {"gw": {"fleet_address": "somewhere"}}
    assert "fleet_address is 'somewhere'" in host_identity.problems(wrong, "gw", ["gw"])[0]
    long = "a" * 65
    (problem,) = host_identity.problems({long: {"fleet_address": "10.0.0.1"}}, long, ["gw"])
    assert "at most 64 letters" in problem


def test_what_an_agent_knows() -> None:
    assert host_identity.agent(HOSTS, "GPU_2", ["gw-2", "gw-1"], ["watch"]) == {
        "host": "GPU_2", "address": "fd00::2", "port": 9440, "gateways": ["gw-1", "gw-2"], "monitoring": ["watch"],
        "instances": {
            "chat": {"address": "fd00::2", "port": 8001, "config": "/etc/vllm/chat/current/config.yaml"},
            "embed": {"address": "fd00::2", "port": 8002, "config": "/etc/vllm/embed/current/config.yaml"},
        },
    }  # fmt: skip
    alone = host_identity.agent(HOSTS, "alone", ["alone"], [])
    assert (alone["address"], alone["instances"]) == (
        "127.0.0.1", {"chat": {"address": "127.0.0.1", "port": 8000, "config": "/etc/vllm/chat/current/config.yaml"}},
    )  # fmt: skip
    moved = {
        "gpu-1": {
            **HOSTS["gpu-1"],
            "vllm_bind_address": "127.0.0.1",
            "host_agent_port": 9550,
            "vllm_config_path": "/srv/vllm/",
        }
    }
    known = host_identity.agent(moved, "gpu-1", ["gw"], [])
    assert (known["address"], known["port"], known["instances"]["chat"]["address"]) == ("10.0.0.11", 9550, "127.0.0.1")
    assert known["instances"]["chat"]["config"] == "/srv/vllm/chat/current/config.yaml"


def test_what_a_watch_knows() -> None:
    more = [
        {"name": "chat", "port": 8001, "model": "small", "gpus": [0, 1]},
        {"name": "embed", "port": 8002, "model": "e5", "options": {"served-model-name": ["embedder", "e5"]}},
    ]
    known = host_identity.watched({**HOSTS, "GPU_2": {**HOSTS["GPU_2"], "vllm_instances": more}}, "GPU_2", ["gw"])
    assert known == {
        "host": "GPU_2",
        "instances": {
            "chat": {
                "address": "fd00::2",
                "port": 8001,
                "config": "/etc/vllm/chat/current/config.yaml",
                "model": "small",
                "gpus": [0, 1],
            },
            "embed": {
                "address": "fd00::2",
                "port": 8002,
                "config": "/etc/vllm/embed/current/config.yaml",
                "model": "embedder",
                "gpus": [],
            },
        },
    }


def test_gateways_ask_where_the_agent_listens() -> None:
    for host in ("gpu-1", "GPU_2", "alone"):
        gateways = ["alone"] if host == "alone" else ["gw"]
        known = host_identity.agent(HOSTS, host, gateways, [])
        assert fleet.agent_endpoint(HOSTS, host, gateways) == fleet.with_port(known["address"], known["port"])
        assert known["address"] in host_identity.names(HOSTS, host, gateways)
    with pytest.raises(fleet.FleetError, match="set fleet_address"):
        fleet.agent_endpoint(HOSTS, "alone", ["gw"])


def test_an_instance_whose_file_would_be_another_ones_is_told() -> None:
    hostvars = {"gpu-1": {"fleet_address": "10.0.0.1", "vllm_instances": [{"name": "firewall", "port": 8000}]}}
    (problem,) = host_identity.agent_problems(hostvars, "gpu-1", ["gw"])
    assert "vllm_instances has firewall" in problem
    assert "set fleet_address" in host_identity.agent_problems({"a_b": {}}, "a_b", ["gw"])[0]
