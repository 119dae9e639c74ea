"""Dead hosts in the middle of a run: the very plays of the playbooks, with what they do on a host replaced by a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.playbooks import playbook, rooted

ROOT = Path(__file__).resolve().parents[2]
ALIVE = {"ansible_connection": "local"}
DEAD = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}  # nobody listens there
ACTS: dict[str, Any] = {"name": "Done", "ansible.builtin.raw": "{{ act | default('true') }}"}


def play(file: str, name: str) -> dict[str, Any]:
    """A play of a playbook, without rights and with a word instead of each role."""
    [found] = [play for play in yaml.safe_load((ROOT / "playbooks" / file).read_text()) if play.get("name") == name]
    directory = (ROOT / "playbooks" / file).parent
    tasks = [
        ACTS if any("_role" in key or "include_tasks" in key for key in task) else rooted(task, directory)
        for task in found["tasks"]
    ]
    assert ACTS in tasks
    return {**found, "become": False, "tasks": tasks}


def run(
    directory: Path, plays: list[dict[str, Any]], hosts: dict[str, dict[str, Any]], *arguments: str
) -> tuple[int, str]:
    """Run plays on hosts that are in all groups; the exit code, and what it said on one line."""
    groups = ("vllm", "gateway", "activation_restart")
    inventory = {group: {"hosts": hosts} for group in groups}
    (directory / "hosts.json").write_text(json.dumps(inventory))
    (directory / "plays.json").write_text(json.dumps(plays))
    done = playbook("-i", directory / "hosts.json", directory / "plays.json", *arguments)
    return done.returncode, " ".join(done.stdout.split())


def test_a_host_that_is_dead_from_the_beginning_is_left_out(tmp_path: Path) -> None:
    plays = [play("preflight.yml", "Look at the hosts"), {"hosts": "all", "gather_facts": False, "tasks": [ACTS]}]
    code, said = run(tmp_path, plays, {"a": ALIVE, "b": DEAD, "c": ALIVE})
    assert code == 4
    assert "b cannot be reached and stays as before" in said
    assert said.count("changed: [a]") == said.count("changed: [c]") == 2
    code, said = run(tmp_path, plays, {"a": ALIVE, "c": ALIVE})
    assert code == 0
    assert "cannot be reached" not in said


def test_a_host_that_fails_then_stops_all(tmp_path: Path) -> None:
    plays = [play("preflight.yml", "Look at the hosts"), {"hosts": "all", "gather_facts": False, "tasks": [ACTS]}]
    code, said = run(tmp_path, plays, {"a": ALIVE, "b": {**ALIVE, "act": "false"}, "c": ALIVE, "d": DEAD})
    assert code == 2
    assert said.count("changed: [a]") == 1


@pytest.mark.parametrize("lost", [DEAD, {**ALIVE, "act": "false"}])
def test_batches_end_with_the_first_host_that_fails_or_is_lost(tmp_path: Path, lost: dict[str, Any]) -> None:
    plays = [play("plays/serve.yml", "Change vLLM in batches where it serves")]
    hosts = {"a": ALIVE, "b": lost, "c": ALIVE, "d": ALIVE}
    code, said = run(tmp_path, plays, hosts, "--extra-vars", '{"fleet_batch": 2}')
    assert code != 0
    assert "changed: [a]" in said
    assert "changed: [c]" not in said
    assert "changed: [d]" not in said
    assert ("b cannot be reached since vLLM was changed there. c and the hosts after it" in said) == (lost is DEAD)


def test_batches_go_on_without_a_host_that_was_dead_before(tmp_path: Path) -> None:
    plays = [
        play("preflight.yml", "Look at the hosts"),
        play("plays/serve.yml", "Change vLLM in batches where it serves"),
    ]
    # the dead host is in no group of hosts to change: those are made of what a host said
    plays[1]["hosts"] = "all:!b"
    code, said = run(tmp_path, plays, {"a": ALIVE, "b": DEAD, "c": ALIVE})
    assert code == 4
    assert said.count("changed: [a]") == said.count("changed: [c]") == 2
