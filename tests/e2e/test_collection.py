"""Roles applied by name, on a real host over SSH, from the collection installed offline in an empty directory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import hosts

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"
FLEET = "e2e-collection"
HOST = "e2e-collection-1"
PLAYBOOK = """
- hosts: all
  become: true
  gather_facts: false
  roles:
    - role: gpufleet.llm.base
    - role: gpufleet.llm.firewall
    - role: gpufleet.llm.ssh_hardening
    - role: gpufleet.llm.tls_certificate
      vars:
        tls_certificate_names: [llm.test]
"""


def run(*command: str, cwd: Path) -> str:
    """Run a program as somebody who has only the installed collection and no clone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=cwd,
        env={
            **inherited,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": "collections",
            "ANSIBLE_INJECT_FACT_VARS": "false",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    """One bare host, and how to log in to it."""
    hosts.up(FLEET, {HOST: "debian12"}, ssh=tmp_path / "ssh")
    yield HOST
    hosts.down(FLEET)


def test_roles_from_the_installed_collection(host: str, tmp_path: Path) -> None:
    run("ansible-galaxy", "collection", "build", "--output-path", str(tmp_path), cwd=ROOT)
    (built,) = tmp_path.glob("gpufleet-llm-*.tar.gz")
    run("ansible-galaxy", "collection", "install", "--offline", "-p", "collections", str(built), cwd=tmp_path)
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    # Nothing else is set: no pipelining, and what a role is not told it finds out.
    (tmp_path / "hosts.yml").write_text(
        f"all: {{hosts: {{{host}: {{ansible_ssh_common_args: -F {tmp_path}/ssh/config}}}}}}\n"
    )
    first = run("ansible-playbook", "-i", "hosts.yml", "play.yml", cwd=tmp_path)
    assert "changed=0" not in first
    subject = hosts.docker(
        "exec", host, "openssl", "x509", "-noout", "-checkhost", "llm.test", "-in", "/etc/ssl/vllm-fleet/fullchain.pem"
    )
    assert "does match certificate" in subject
    second = run("ansible-playbook", "-i", "hosts.yml", "play.yml", cwd=tmp_path)
    assert "changed=0" in second
