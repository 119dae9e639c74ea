"""What the tests of several scenarios need: the role applied once more to a host under test, or to several, with other variables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest
from testinfra.host import Host

from tests.playbooks import playbook

ROOT = Path(__file__).resolve().parents[1]
Hosts: TypeAlias = "Host | Sequence[Host]"


def host_name(host: Host) -> str:
    """Name of the host under test in the inventory, which is that of its container."""
    name: str = host.backend.hostname
    return name.removeprefix("docker://")


def role_command(host: Hosts, role: str, *options: str, **variables: object) -> list[str]:
    """The command that applies a role to the hosts under test; `options` go to ansible-playbook. Run it in ROOT with environment()."""
    names = [host_name(one) for one in (host if isinstance(host, Sequence) else [host])]
    return [
        "ansible-playbook", "molecule/shared/converge.yml", f"--inventory={ROOT}/molecule/shared/inventory/",
        f"--limit={','.join(names)}", "--extra-vars", json.dumps(variables), *options,
    ]  # fmt: skip


def environment(role: str) -> dict[str, str]:
    """The environment for role_command()."""
    # Molecule asks for colours, which would stand between the words that are looked for.
    settings = {"MOLECULE_SCENARIO_NAME": role, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}
    return {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), **settings}


def apply_role(host: Hosts, role: str, *options: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Apply a role to the hosts under test in a run of its own."""
    _program, *arguments = role_command(host, role, *options, **variables)
    return playbook(*arguments, environment=environment(role))


def applied(host: Hosts, role: str, *options: str, **variables: object) -> str:
    """Apply a role, expect success, and return what Ansible printed."""
    done = apply_role(host, role, *options, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def refused(host: Hosts, role: str, *options: str, **variables: object) -> str:
    """Apply a role, expect a failure, and return what Ansible printed, its line breaks undone."""
    done = apply_role(host, role, *options, **variables)
    assert done.returncode != 0, done.stdout
    return " ".join((done.stdout + done.stderr).split())


def changed(told: str) -> bool:
    """Whether a run changed anything, from what it printed."""
    return re.search(r" changed=[1-9]", told) is not None


def told(said: str, host: Host) -> str:
    """What a run printed about one of its hosts, its line breaks undone."""
    blocks = re.findall(rf"^\w+: \[{re.escape(host_name(host))}\].*(?:\n .*)*", said, re.MULTILINE)
    return " ".join(" ".join(blocks).split())


def until(what: Callable[[], object], seconds: float, complaint: str) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            pytest.fail(complaint)
        time.sleep(0.3)
