"""A vendor's repository as roles describe it to gpufleet.llm.host_support: what they say is what its entry point takes, and the look before agrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.filter.apt import vendor_source

from tests.playbooks import playbook

ROLES = Path(__file__).resolve().parents[2] / "roles"
GRAFANA = {
    "name": "grafana",
    "repository": {"url": "https://apt.grafana.com", "suite": "stable", "components": ["main"]},
    "key": {"url": "https://apt.grafana.com/gpg.key", "fingerprints": ["A" * 40], "content": ""},
    "known_as": ["packages.grafana.com/"],
    "pins": {"version": "", "versioned": [], "exclusive": ["grafana"], "shut_out": []},
    "packages": ["grafana"],
    "hold": True,
    "starts_units": True,
}


def load(role: str, path: str) -> Any:
    return yaml.safe_load((ROLES / role / path).read_text())


def spec() -> dict[str, Any]:
    options: dict[str, Any] = load("host_support", "meta/argument_specs.yml")["argument_specs"]["vendor_packages"][
        "options"
    ]
    return options


def differences(value: Any, option: Mapping[str, Any], where: str) -> Iterator[str]:
    """Keys that are said and not taken, or taken and not said."""
    if "options" in option and isinstance(value, dict):
        yield from sorted(f"{where}.{name}" for name in set(value) ^ set(option["options"]))
        for name in set(value) & set(option["options"]):
            yield from differences(value[name], option["options"][name], f"{where}.{name}")


@pytest.mark.parametrize("role", ["docker", "nvidia_container_toolkit"])
def test_a_role_says_what_is_taken_and_no_more(role: str) -> None:
    """Ansible does not compare them in a run: that would be a task in every one."""
    (task,) = load(role, "tasks/install.yml")
    assert sorted(task["vars"]) == sorted(spec())
    internal = load(role, "vars/main.yml")
    vendor = internal[f"__{role}_vendor"]
    assert list(differences(vendor, spec()["host_support_vendor"], role)) == []
    choice = internal[f"__{role}_choice"]
    assert list(differences(choice, spec()["host_support_vendor_choice"], role)) == []


def test_the_look_goes_by_the_files_that_are_written() -> None:
    look = vendor_source(GRAFANA)
    assert look["own_files"] == ["/etc/apt/sources.list.d/grafana.sources"]
    assert look["key_path"] == "/etc/apt/keyrings/grafana.asc"
    assert look["repositories"] == ["packages.grafana.com/", "apt.grafana.com"]
    assert vendor_source({**GRAFANA, "repository": {}})["repositories"] == []


def test_a_third_vendor_needs_no_more_than_its_description(tmp_path: Path) -> None:
    """Another role's call, with its arguments compared, in check mode: the files are shown, and nothing is done."""
    variables = {
        "ansible_connection": "local",
        "host_support_facts": {"changed": False},
        "host_support_vendor": GRAFANA,
        "host_support_vendor_look": {"key_problem": "", "foreign": [], "held": ["grafana"]},
        "host_support_vendor_due": False,
        "host_support_vendor_choice": {"install": ["grafana=12.3.0"], "problems": []},
    }
    role = {"name": "gpufleet.llm.host_support", "tasks_from": "vendor_packages"}
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars": variables,
        "tasks": [
            {"ansible.builtin.set_fact": {"gpufleet": {"architecture": "x86_64"}, "cacheable": True}},
            {"ansible.builtin.include_role": role},
        ],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    done = playbook("-i", "here,", tmp_path / "play.yml", "--check", "--diff")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("URIs: https://apt.grafana.com", "Suites: stable", "Components: main", "Signed-By: /etc/apt/keyrings/grafana.asc",
                 "Pin: origin apt.grafana.com", "Architectures: amd64"):  # fmt: skip
        assert f"+{line}" in done.stdout
