"""playbooks/status.yml from its command line to its exit code, on this machine and on hosts that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible import context
from ansible_collections.gpufleet.llm.plugins.action import fleet_status_table

from tests.playbooks import playbook

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]
DEAD = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_ssh_retries": 0}


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """This machine as two hosts, of which one has no such Python, and two hosts that nobody answers for. The first is a host of vLLM without any."""
    variables = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "ansible_become": False,
        "vllm_config_path": str(tmp_path / "etc/vllm"), "vllm_instances": [{"name": "chat", "model": "tiny", "port": 8000}],
    }  # fmt: skip
    broken = {"ansible_python_interpreter": "/nonexistent/python3"}
    groups = {"vllm": {"hosts": {"gpu-1": {}, "gpu-2": broken, "gpu-3": DEAD}}, "gateway": {"hosts": {"gw-1": DEAD}}}
    file = tmp_path / "hosts.yml"
    file.write_text(yaml.safe_dump({"all": {"vars": variables, "children": groups}}))
    return file


def status(inventory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    return playbook("playbooks/status.yml", "-i", inventory, *arguments)


def test_hosts_that_are_down_are_told_and_the_others_shown(inventory: Path) -> None:
    done = status(inventory)
    lines = done.stdout.splitlines()
    assert done.returncode == 2, done.stdout + done.stderr
    first = lines[lines.index("What is not well:") + 1]
    assert first.startswith("- gpu-2, gpu-3, gw-1: cannot be reached: 3 of 4 hosts"), done.stdout
    assert lines[lines.index("What is not well:") + 2].startswith(
        "    ansible gpu-2,gpu-3,gw-1 -m ansible.builtin.ping -i "
    )
    assert "- chat@gpu-1: is in the inventory and not on the host" in lines
    assert "-e status_fail=false ends without an error" in done.stdout
    assert sum(line.startswith(("gpu-2 ", "gpu-3 ", "gw-1 ")) and "no answer" in line for line in lines) == 3


def test_json_goes_to_a_file_and_the_exit_code_is_a_choice(inventory: Path, tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    file.write_text("before")
    done = status(inventory, "-e", "status_format=json", "-e", f"status_file={file}", "-e", "status_fail=false")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert (document["schema"], document["version"], document["well"]) == ("gpufleet.llm.fleet_status", 1, False)
    assert {name: host["reached"] for name, host in document["hosts"].items()} == {
        "gpu-1": True, "gpu-2": False, "gpu-3": False, "gw-1": False,
    }  # fmt: skip
    assert document["hosts"]["gw-1"]["roles"] == ["gateway"]
    assert "What is not well:" in done.stdout
    assert [path.name for path in tmp_path.glob(".status*")] == []


def test_json_is_one_line_of_the_output(inventory: Path) -> None:
    done = status(inventory, "-e", "status_format=json", "--limit", "gpu-1")
    [line] = [line for line in done.stdout.splitlines() if line.startswith('{"schema"')]
    assert list(json.loads(line)["hosts"]) == ["gpu-1"]


def test_a_file_that_cannot_be_written_is_an_error(inventory: Path, tmp_path: Path) -> None:
    done = status(
        inventory, "-e", "status_format=json", "-e", f"status_file={tmp_path}/no/status.json", "-e", "status_fail=false"
    )
    assert done.returncode == 2
    assert "which cannot be written: No such file or directory" in " ".join(done.stdout.split())


def test_groups_that_the_play_does_not_look_at_are_an_error(inventory: Path) -> None:
    """Else nothing would be looked at, and all would be well."""
    done = status(inventory, "-e", "vllm_group=gpus", "-e", "gateway_group=gateways", "-e", "status_fail=false")
    assert done.returncode == 2
    assert "has a host neither in the group gpus nor in gateways" in " ".join((done.stdout + done.stderr).split())


def test_commands_are_those_of_the_place_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "CLIARGS", {"inventory": (str(ROOT / "inventories/prod"), "gpu-1,gpu-2,")})
    monkeypatch.chdir(ROOT)
    expected = "ansible-playbook playbooks/status.yml -i inventories/prod -i gpu-1,gpu-2, --limit {hosts}"
    assert fleet_status_table.command("status", "--limit {hosts}") == expected
    assert fleet_status_table.command("site", "").startswith("ansible-playbook site.yml -i ")
    monkeypatch.chdir(tmp_path)
    assert fleet_status_table.command("status", "").startswith("ansible-playbook gpufleet.llm.status -i ")
