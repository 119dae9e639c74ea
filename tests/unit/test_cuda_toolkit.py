"""The role cuda_toolkit before it changes anything: the driver that its release needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.playbooks import playbook

FACTS = {
    "gpus": [{"driver": "570.1"}],
    "packages": {},
    "distribution": "Debian",
    "release": "12",
    "architecture": "x86_64",
}


def preflight(path: Path, **variables: Any) -> tuple[int, str]:
    """The role's preflight on a host with the driver 570."""
    tasks = [
        {"ansible.builtin.set_fact": {"gpufleet": FACTS, "cacheable": True}},
        {
            "ansible.builtin.include_role": {
                "name": "gpufleet.llm.cuda_toolkit",
                "tasks_from": "preflight",
                "rolespec_validate": False,
            }
        },
    ]
    known = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "cuda_toolkit_enabled": True}
    play = {"hosts": "all", "gather_facts": False, "vars": {**known, **variables}, "tasks": tasks}
    (path / "play.yml").write_text(yaml.safe_dump([play]))
    done = playbook("-i", "gpu-1,", path / "play.yml")
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("variables", "fails", "told"),
    [
        ({}, True, True),
        ({"cuda_toolkit_driver_floor": "warn"}, False, True),
        ({"cuda_toolkit_driver_floor": "off"}, False, False),
        ({"cuda_toolkit_version": "12.9"}, False, False),
        ({"check_inputs_collect": True, "nvidia_driver_look": {"pending": True}}, False, False),
    ],
)
def test_an_old_driver_is_refused_unless_somebody_knows_better(
    tmp_path: Path, variables: dict[str, Any], fails: bool, told: bool
) -> None:
    status, said = preflight(tmp_path, **variables)
    assert (status != 0) == fails, said
    assert ("the driver is 570.1; CUDA 13 needs 580 or newer" in said) == told, said
