"""What the role base decides: what unattended upgrades may not touch, and which of its settings make sense."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.filter import host

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    line.split()
    for line in (Path(__file__).parent / "recordings/package_names.txt").read_text().splitlines()
    if line[0] != "#"
]
DEFAULTS = yaml.safe_load((ROOT / "roles/base/defaults/main.yml").read_text())
VARS = yaml.safe_load((ROOT / "roles/base/vars/main.yml").read_text())
# The list in the template, without Jinja: a list of words between quotes.
KEPT_BACK = re.findall(r"'([^']+)'", VARS["__base_kept_back"])


@pytest.mark.parametrize(("sign", "name"), NAMES, ids=[name for _, name in NAMES])
def test_upgrades_of_themselves(sign: str, name: str) -> None:
    kept_back = [pattern for pattern in KEPT_BACK if re.match(pattern, name)]
    assert bool(kept_back) == (sign == "-"), kept_back


def test_every_pattern_is_needed() -> None:
    """By at least one of the names, which no other pattern catches."""
    unused = [
        pattern
        for pattern in KEPT_BACK
        if not any(
            sign == "-" and [one for one in KEPT_BACK if re.match(one, name)] == [pattern] for sign, name in NAMES
        )
    ]
    assert unused == []
    assert host.pattern_problems(KEPT_BACK, "x") == []


def test_every_setting_of_the_kernel_has_a_reason() -> None:
    assert set(DEFAULTS["base_sysctl"]) == set(VARS["__base_sysctl_reasons"])
    assert host.sysctl_problems(DEFAULTS["base_sysctl"], "base_sysctl") == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("net.ipv4.ip_forward", 1, "switches forwarding on itself"),
        ("net.ipv6.conf.all.forwarding", 0, "switches forwarding on itself"),
        ("vm.swappiness", "10\nkernel.panic = 1", "must be a number, or words"),
        ("vm.swappiness", True, "must be a number, or words"),
        ("vm.swappiness", "", "must be a number, or words"),
        ("swappiness", 10, "is written with dots"),
        ("vm/swappiness", 10, "is written with dots"),
    ],
)
def test_a_setting_that_makes_no_sense(key: str, value: Any, words: str) -> None:
    (problem,) = host.sysctl_problems({key: value}, "base_sysctl")
    assert words in problem
    assert problem.startswith("base_sysctl")


def test_settings_with_several_values() -> None:
    assert host.sysctl_problems({"net.ipv4.tcp_rmem": "4096 131072 6291456"}, "x") == []
    lines = ["/proc/sys/net/ipv4/tcp_rmem:4096\t131072\t6291456", "/proc/sys/vm/swappiness:60"]
    wanted = {"net.ipv4.tcp_rmem": "4096 131072 6291456", "vm.swappiness": 10, "vm.gone": 1}
    assert host.sysctl_differences(wanted, sorted(wanted), lines) == ["vm.gone (is missing)", "vm.swappiness (is 60)"]


@pytest.mark.parametrize("pattern", ["", 'x"; evil', "a b", "(", "x{2}"])
def test_a_pattern_that_apt_could_not_read(pattern: str) -> None:
    (problem,) = host.pattern_problems([pattern], "base_unattended_upgrades_exclude")
    assert problem.startswith(f"base_unattended_upgrades_exclude has {pattern!r}")


def test_names_of_accounts() -> None:
    """What a directory calls somebody is for the host to know."""
    assert (
        host.account_problems(
            ["ops", "_x", "a-1", "john.doe", "jdoe@corp.example", "CORP\\jdoe", "u1234", "host$"], "v"
        )
        == []
    )
    assert (
        len(host.account_problems(["", "1000", "a b", "a\n", "a:b", "a,b", "x" * 300, "%all", "-x", "Wheel!"], "v"))
        == 10
    )


@pytest.mark.parametrize(
    ("lines", "local", "directory", "words"),
    [
        (["none", "none no", "local no"], ["john", "jane"], [], ""),
        (["local", "directory no", "local no"], ["jane"], ["john"], ""),
        # members already, by the directory
        (["directory", "directory yes", "local yes"], [], [], ""),
        (
            ["directory", "directory no", "local yes"],
            [],
            [],
            "base_admin_users has john, who is not in ops: that group is one of a directory",
        ),
    ],
)
def test_how_administrators_get_into_their_group(
    lines: list[str], local: list[str], directory: list[str], words: str
) -> None:
    plan = host.admin_plan(lines, "ops", ["john", "jane"])
    assert (plan["local"], plan["directory"], plan["group"]) == (local, directory, lines[0] == "none")
    assert "".join(plan["problems"]).startswith(words)
    assert len(plan["problems"]) == bool(words)


def test_nobody_is_made_by_a_name_that_only_a_directory_can_have() -> None:
    plan = host.admin_plan(["none", "none no"], "Domain.Admins", ["john.doe"])
    assert [problem.partition(",")[0] for problem in plan["problems"]] == [
        "base_admin_group is Domain.Admins",
        "base_admin_users has john.doe",
    ]
    assert plan["local"] == plan["directory"] == []


def test_updates_that_wait_are_told_oldest_first() -> None:
    updates = {
        "linux-image-generic": {"version": "6.8.0.90.92", "since": 1_000_000},
        "docker-ce": {"version": "5:29.1", "since": 1_000_000 + 12 * 86400},
    }
    assert host.held_updates_text(updates, now=1_000_000 + 12.5 * 86400) == (
        "linux-image-generic 6.8.0.90.92 (for 12 days), docker-ce 5:29.1 (since today)"
    )
