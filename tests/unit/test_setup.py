"""Which Python tools/setup.sh takes for the controller."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """Programs called python that say which version they are, in the places where setup.sh looks for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has("bin/uv", f"echo {path}/uv")

    def has(self, program: str, command: str) -> None:
        file = self.path / program
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{command}\n")
        file.chmod(0o755)

    def found(self, *wanted: str) -> str:
        """What find_python says, with the path relative to this machine."""
        (function,) = re.findall(r"^find_python\(\).*?^}$", (ROOT / "tools/setup.sh").read_text(), re.M | re.S)
        program = f'set -euo pipefail; uv=uv probe=x\n{function}\nread -r version python < <(find_python "$@") || version=none\n'
        done = subprocess.run(
            ["bash", "-c", f'{program}echo "$version $python"', "bash", *wanted],
            env={"PATH": f"{self.path}/bin:{os.defpath}", "PYENV_ROOT": str(self.path / "pyenv")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.strip().replace(f"{self.path}/", "")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_one_that_runs_wherever_it_is(machine: Machine) -> None:
    """A shim of pyenv may be there without the Python that it stands for."""
    machine.has("bin/python3.9", 'echo "3.9 $0"')
    assert machine.found("3.9") == "3.9 bin/python3.9"
    machine.has("bin/python3.8", "echo 'pyenv: python3.8: command not found' >&2; exit 127")
    assert machine.found("3.8", "3.9") == "3.9 bin/python3.9"
    machine.has("pyenv/versions/3.8.20/bin/python3", 'echo "3.8 $0"')
    assert machine.found("3.8", "3.9") == "3.8 pyenv/versions/3.8.20/bin/python3"
    machine.has("uv/cpython-3.7.9-linux/bin/python3", 'echo "3.7 $0"')
    assert machine.found("3.7", "3.8", "3.9") == "3.7 uv/cpython-3.7.9-linux/bin/python3"


def test_what_is_on_the_path_comes_before_the_same_version_elsewhere(machine: Machine) -> None:
    machine.has("pyenv/versions/3.9.1/bin/python3", 'echo "3.9 $0"')
    machine.has("bin/python3", 'echo "3.9 $0"')
    assert machine.found("3.9") == "3.9 bin/python3"


def test_a_version_that_is_nowhere_is_left_to_uv(machine: Machine) -> None:
    assert machine.found("3.5") == "none"
    machine.has("bin/python3.50", 'echo "3.50 $0"')
    assert machine.found("3.5") == "none"
