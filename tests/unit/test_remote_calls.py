"""The callback remote_calls in real runs of ansible-playbook, by a connection that pretends to be remote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.playbooks import playbook

ROOT = Path(__file__).resolve().parents[2]

# The local connection by another name: what counts is the kind of connection, not where it leads.
PRETEND = '''
DOCUMENTATION = """
name: pretend
short_description: pretends to be remote
extends_documentation_fragment: [connection_pipelining]
"""
from ansible.plugins.connection import local

class Connection(local.Connection):
    transport = "pretend"
'''
PLAYBOOK = """
- name: Controller only
  hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.assert: {that: true}
    - ansible.builtin.set_fact: {x: 1}
    - ansible.builtin.ping:
      when: false
    - ansible.builtin.ping:
      delegate_to: localhost
      vars: {ansible_connection: local}

- name: Remote
  hosts: all
  gather_facts: false
  tasks:
    - name: Loop
      ansible.builtin.ping:
      loop: [1, 2, 3]
    - ansible.builtin.include_role: {name: inner}
    - name: To another one
      ansible.builtin.ping:
      delegate_to: two
      when: inventory_hostname == 'one'
  handlers:
    - name: Handler
      ansible.builtin.command: "true"
"""
ROLE = """
- name: Changed
  ansible.builtin.command: "true"
  notify: Handler
- name: A file that is right already
  ansible.builtin.copy: {content: "x", dest: "{{ file }}", mode: "0644"}
"""


@pytest.fixture
def play(tmp_path: Path) -> Path:
    """A directory with a playbook, a role, a connection plugin and an inventory of two hosts."""
    (tmp_path / "connection_plugins").mkdir()
    (tmp_path / "connection_plugins/pretend.py").write_text(PRETEND)
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    (tmp_path / "roles/inner/tasks").mkdir(parents=True)
    (tmp_path / "roles/inner/tasks/main.yml").write_text(ROLE)
    (tmp_path / "hosts").write_text("one\ntwo\n")
    (tmp_path / "file").write_text("x")
    (tmp_path / "file").chmod(0o644)
    return tmp_path


def run(play: Path, connection: str = "pretend", **environment: str) -> tuple[str, dict[str, Any]]:
    """Run the playbook. Returns what it printed, and the counts."""
    done = playbook(
        "-i", "hosts", "play.yml", "-c", connection, "-e", f"file={play}/file", "-e", "ansible_python_interpreter=/usr/bin/python3",
        directory=play,
        environment={
            **os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"), "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_CALLBACKS_ENABLED": "gpufleet.llm.remote_calls", "REMOTE_CALLS_FILE": "calls.json", **environment,
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((play / "calls.json").read_text())


def test_every_round_trip_counts_for_the_host_that_it_goes_to(play: Path) -> None:
    output, calls = run(play)
    tasks = {entry["task"]: entry["calls"] for entry in calls["one"]["tasks"]}
    copy = tasks.pop("inner : A file that is right already")
    assert copy > 1, "a directory, a look at the file, its mode: one task, several calls"
    assert tasks == {"Loop": 3, "inner : Changed": 1, "Handler": 1}
    assert calls["one"]["roles"] == {"no role": 4, "inner": 1 + copy}
    assert calls["one"]["total"] == 5 + copy
    assert calls["two"]["total"] == calls["one"]["total"] + 1, "and a call that was delegated to it"
    assert "localhost" not in calls, "its connection is local"
    assert f"remote calls: one {5 + copy} (no role 4, inner {1 + copy})\n" in output
    assert f"remote calls: two {6 + copy} (" in output


def test_what_is_sent_counts_too(play: Path) -> None:
    """Without pipelining a module is a directory, a file that is sent, its rights, and at last itself."""
    _output, calls = run(play, ANSIBLE_PIPELINING="false")
    assert {entry["task"]: entry["calls"] for entry in calls["one"]["tasks"]}["inner : Changed"] >= 4


def test_local_connections_are_counted_on_request(play: Path) -> None:
    _output, calls = run(play, connection="local", REMOTE_CALLS_COUNT_LOCAL="1")
    assert calls["one"]["total"] > 5
    assert calls["localhost"]["total"] == 2
