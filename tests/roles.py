"""What the tests of several scenarios need: the role applied once more to the host under test, with other variables."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[1]


def host_name(host: Host) -> str:
    """Name of the host under test in the inventory, which is that of its container."""
    name: str = host.backend.hostname
    return name.removeprefix("docker://")


def role_command(host: Host, role: str, *options: str, **variables: object) -> list[str]:
    """The command that applies a role to the host under test; `options` go to ansible-playbook. Run it in ROOT with environment()."""
    return [
        "ansible-playbook", "molecule/shared/converge.yml", f"--inventory={ROOT}/molecule/shared/inventory/",
        f"--limit={host_name(host)}", "--extra-vars", json.dumps(variables), *options,
    ]  # fmt: skip


def environment(role: str) -> dict[str, str]:
    """The environment for role_command()."""
    # Molecule asks for colours, which would stand between the words that are looked for.
    return {**os.environ, "MOLECULE_SCENARIO_NAME": role, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}


def apply_role(host: Host, role: str, *options: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Apply a role to the host under test in a run of its own."""
    command = role_command(host, role, *options, **variables)
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, env=environment(role))


def applied(host: Host, role: str, *options: str, **variables: object) -> str:
    """Apply a role, expect success, and return what Ansible printed."""
    done = apply_role(host, role, *options, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def refused(host: Host, role: str, *options: str, **variables: object) -> str:
    """Apply a role, expect a failure, and return what Ansible printed, its line breaks undone."""
    done = apply_role(host, role, *options, **variables)
    assert done.returncode != 0, done.stdout
    return " ".join((done.stdout + done.stderr).split())


def changed(told: str) -> bool:
    """Whether a run changed anything, from what it printed."""
    return re.search(r" changed=[1-9]", told) is not None
