"""The example inventory, as a user fills it in: every example taken out of its comment passes the preflight, alone and with all others.

Each variant is a host of its own in one run of playbooks/site.yml --tags preflight; all of them are the host of this scenario, which has the
hardware of a machine with 8 GPUs and no driver yet, as a new user's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml

from tests.certificates import make_pair
from tests.examples import Example, examples, largest_sets, uncommented, with_needs
from tests.hosts import hosts as hosts_tool
from tests.playbooks import playbook
from tests.roles import ROOT

HOST = "cuda-toolkit-debian12"
PROD = ROOT / "inventories/prod"
FILES = sorted(PROD.glob("group_vars/*/*.yml"))
EXAMPLES = [example for file in FILES for example in examples(file)]
VARIANTS: dict[str, list[Example]] = {
    "as it is": [],
    **{example.name: with_needs(example, EXAMPLES) for example in EXAMPLES},
    **{f"set {number}": chosen for number, chosen in enumerate(largest_sets(EXAMPLES), 1)},
}


def groups(chosen: list[Example]) -> list[str]:
    """The groups of a variant's host: those whose roles read what differs, because judging all of them takes its time."""
    places = {example.file.parent.name for example in chosen}
    if places == {"vllm"}:
        return ["vllm"]
    return ["gateway"] if places and "vllm" not in places else ["vllm", "gateway"]


def alias(variant: str) -> str:
    """The name of a variant's host."""
    return "v_" + re.sub(r"\W+", "_", variant)


def fixtures(directory: Path) -> None:
    """What the examples name: models, a certificate, an archive, tasks."""
    for name in ("our-other-model", "support-adapter"):
        model = directory / "data" / name
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (directory / "data/vllm-openai-v0.33.0.tar").write_bytes(b"x")
    (directory / "path/to").mkdir(parents=True)
    for name, text in zip(("fullchain.pem", "privkey.pem"), make_pair(name="llm.example.com"), strict=True):
        (directory / "path/to" / name).write_text(text)
    (directory / "tasks").mkdir()
    for name in ("drain", "undrain"):
        (directory / f"tasks/{name}.yml").write_text("[]\n")


def variables(directory: Path, chosen: list[Example], key: str) -> dict[str, Any]:
    """What a host of both groups reads of the inventory with these examples; `key` is somebody's public one."""
    found: dict[str, Any] = {name: f"{number:x}" * 40 for number, name in enumerate(vault(), 1)}
    for file in FILES:
        text = uncommented(file, chosen)
        for place in ("/data/", "/path/to/"):
            text = text.replace(f" {place}", f" {directory}{place}")
        text = text.replace("{{ inventory_dir }}", str(directory)).replace("ssh-ed25519 AAAA...", key)
        found |= yaml.safe_load(text) or {}
    return found


def vault() -> list[str]:
    """The names of the secrets."""
    return list(yaml.safe_load((PROD / "group_vars/all/vault.yml.example").read_text()))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run says of all variants."""
    directory = tmp_path_factory.mktemp("prod")
    fixtures(directory)
    testinfra.get_host(f"docker://{HOST}").check_output(
        "getent group ssh-users || (groupadd ssh-users && usermod --append --groups ssh-users root && useradd ubuntu)"
    )
    key = " ".join(hosts_tool.ssh_key(directory / "alice").read_text().split()[:2])
    hosts = {alias(name): variables(directory, chosen, key) for name, chosen in VARIANTS.items()}
    for name, chosen in VARIANTS.items():
        if chosen and "all" not in {example.file.parent.name for example in chosen}:
            hosts[alias(name)]["fleet_skip_roles"] = ["base", "firewall", "ssh_hardening"]
    shared = {
        "ansible_connection": "community.docker.docker",
        "ansible_host": HOST,
        "ansible_user": "root",
        "fleet_address": "10.0.0.11",
        "__nvidia_driver_test_hardware": "/srv/vendors/hardware",
        # This role looks for them on the PCI bus, where this host has none.
        "nvidia_container_toolkit_without_gpu": "install",
        # Ansible comes by the container engine here, so it is not known whose login by SSH has to be kept.
        "ssh_hardening_login_users": ["root"],
        # each of the hosts is a fleet of its own
        "gateway_vllm_group": "{{ inventory_hostname }}_fleet",
    }
    members: dict[str, dict[str, Any]] = {"vllm": {}, "gateway": {}}
    for name, chosen in VARIANTS.items():
        for group in groups(chosen):
            members[group][alias(name)] = {}
    tree = {
        "all": {
            "hosts": {name: {**own, **shared} for name, own in hosts.items()},
            "children": {
                **{group: {"hosts": names} for group, names in members.items()},
                **{f"{name}_fleet": {"hosts": {name: {}}} for name in hosts},
            },
        }
    }
    (directory / "hosts.json").write_text(json.dumps(tree))
    done = playbook("site.yml", "--tags", "preflight", "--forks", "6", "-i", directory / "hosts.json")
    return done.stdout + done.stderr


def test_there_are_examples_in_each_file_that_has_comments_of_yaml() -> None:
    assert len(EXAMPLES) > 20
    assert len({example.name for example in EXAMPLES}) == len(EXAMPLES), "each has a name of its own"
    known = {example.name for example in EXAMPLES}
    assert {name for example in EXAMPLES for name in example.needs | example.excludes} <= known


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_example_passes_the_preflight(told: str, variant: str) -> None:
    name = alias(variant)
    part = re.search(rf"fatal: \[{name}\]: FAILED!(.*?)(?=\nfatal: |\n\[ERROR\]|\nTASK |\nPLAY |\Z)", told, re.DOTALL)
    assert part is None, " ".join(part[1].split())
    assert re.search(rf"^{name} +: ok=\d+ +changed=0 +unreachable=0 +failed=0", told, re.MULTILINE), told[-3000:]
