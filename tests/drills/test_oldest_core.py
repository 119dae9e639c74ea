"""All unit tests and a scenario on the oldest ansible-core that is supported, 2.19 on Python 3.11. Its short form: the job `unit oldest core`.

By hand, as root (twenty minutes on two cores):

    .venv/bin/pytest tests/drills/test_oldest_core.py -s
"""

from __future__ import annotations

import os
import subprocess

import pytest

from tests import run


@pytest.fixture(scope="module")
def python() -> str:
    """Python of the environment that has it."""
    subprocess.run(["tools/setup.sh"], cwd=run.ROOT, env={**os.environ, **run.OLDEST}, check=True)
    python = run.ROOT / run.OLDEST["SETUP_VENV"] / "bin/python"
    program = "from ansible.release import __version__; print(__version__)"
    version = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout
    assert version.startswith("2.19."), version
    return str(python)


@pytest.mark.parametrize("arguments", [["unit"], ["molecule", "uv"]], ids=" ".join)
def test_it_passes_on_the_oldest_core(python: str, arguments: list[str]) -> None:
    assert subprocess.run([python, "tests/run.py", *arguments], cwd=run.ROOT, check=False).returncode == 0
