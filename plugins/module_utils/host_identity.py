# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Who a host of the fleet is to the others: the names of its certificate, and what its agent knows. Decided from the inventory alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, vllm

# The common name of a certificate has 64 characters at most, and it is the name of a file, too.
COMMON_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# /var/lib/vllm-fleet has files of these names that are not the operator's word on an instance.
TAKEN = ("firewall", "held-updates")


def names(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """What others may call a host when they compare its certificate: its name, when that is one of DNS, and its address."""
    found = [host.lower()] if fleet.is_dns_name(host.lower()) else []
    try:
        return [*found, fleet.fleet_address(hostvars, host)]
    except fleet.FleetError:
        if hostvars[host].get("fleet_address"):
            raise  # it is there, and wrong
        if list(gateways) == [host]:
            return [*found, fleet.LOOPBACK]
        if found:
            return found
        raise


def problems(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """Why a host cannot have a certificate of the fleet."""
    if not COMMON_NAME.fullmatch(host):
        return [
            f"{host} is no name for a certificate; in the inventory call the host something of at most 64 letters, digits, dots, _ and -"
        ]
    try:
        names(hostvars, host, gateways)
    except fleet.FleetError as error:
        return [str(error)]
    return []


def agent(hostvars: fleet.HostVars, host: str, gateways: Sequence[str], monitoring: Sequence[str]) -> dict[str, Any]:
    """What the agent of a host knows: where it listens, who may ask, and its instances, each with the configuration of its current generation."""
    address, _, port = fleet.agent_endpoint(hostvars, host, gateways).rpartition(":")
    bound = hostvars[host].get("vllm_bind_address")
    generations = str(hostvars[host].get("vllm_config_path") or "/etc/vllm").rstrip("/")
    instances = fleet.instances(hostvars, [host])
    return {
        "host": host,
        "address": address.strip("[]"),
        "port": int(port),
        "gateways": sorted(gateways),
        "monitoring": sorted(monitoring),
        "instances": {
            instance.name: {
                "address": str(bound or fleet.bind_address(hostvars, host, gateways)),
                "port": instance.port,
                "config": f"{generations}/{instance.name}/current/config.yaml",
            }
            for instance in instances
        },
    }


def watched(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> dict[str, Any]:
    """What the watch of a host knows: its instances, what each is asked for, and its GPUs."""
    known = agent(hostvars, host, gateways, [])
    found = {}
    for entry in hostvars[host].get("vllm_instances") or []:
        name = str(entry.get("name"))
        model = str(vllm.served_names(entry)[0])
        found[name] = {**known["instances"][name], "model": model, "gpus": list(entry.get("gpus") or [])}
    return {"host": host, "instances": found}


def agent_problems(hostvars: fleet.HostVars, host: str, gateways: Sequence[str]) -> list[str]:
    """Why a host cannot have an agent."""
    try:
        known = agent(hostvars, host, gateways, [])
    except fleet.FleetError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError):
        return []  # what is missing or of a wrong type is told by the argument specs
    taken = [name for name in known["instances"] if name in TAKEN]
    return [
        f"vllm_instances has {name}, a name that /var/lib/vllm-fleet has a file of already; call the instance something else"
        for name in taken
    ]
