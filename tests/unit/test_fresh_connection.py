"""A second connection, the way Ansible comes."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.playbooks import playbook, results, tell

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]


def proved(directory: Path, *options: str, timeout: int = 2, **variables: Any) -> dict[str, Any]:
    """The result of the task."""
    tasks = [
        {"gpufleet.llm.fresh_connection": {"timeout": timeout}, "register": "result", "ignore_errors": True},
        tell("result"),
    ]
    (directory / "play.yml").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    (directory / "hosts.yml").write_text(json.dumps({"all": {"hosts": {"host1": variables}}}))
    done = playbook("-i", directory / "hosts.yml", *options, directory / "play.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = results(done.stdout)
    return dict(result)


def test_what_does_not_go_over_the_network_gets_in(tmp_path: Path) -> None:
    result = proved(tmp_path, ansible_connection="local")
    assert (result["failed"], result["changed"], result["transport"]) == (False, False, "local")
    assert "proves nothing" in result["msg"]


def test_check_mode_connects_to_nothing(tmp_path: Path) -> None:
    assert proved(tmp_path, "--check", ansible_connection="ssh", ansible_host="192.0.2.1")["skipped"]


@pytest.mark.parametrize("listens", [False, True], ids=["nobody-listens", "nobody-answers"])
def test_ssh_that_does_not_get_in_is_a_failure_in_time(tmp_path: Path, listens: bool) -> None:
    """Neither a closed port nor one that swallows everything; and no socket of another connection is asked for."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen(8)
        result = proved(
            tmp_path, ansible_connection="ssh", ansible_host="127.0.0.1", ansible_port=server.getsockname()[1],
            ansible_control_path=str(tmp_path / "socket"),
        )  # fmt: skip
    assert result["failed"]
    assert "A new ssh connection to host1 does not get in: " in result["msg"]
    assert ("timed out" if listens else "Connection refused") in result["msg"]
    assert result["seconds"] < 10
