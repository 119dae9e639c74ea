"""What the fleets of the end-to-end tests measure is told here, too; and what drills with libraries of others share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]
CLIENTS = Path(__file__).parent / "clients"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "clients"


@pytest.fixture(scope="session")
def node() -> str:
    """A directory with the libraries for Node in it."""
    if not shutil.which("npm"):
        pytest.skip("Node is not here")
    directory = CACHE / "node"
    shutil.copytree(CLIENTS, directory, dirs_exist_ok=True)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=directory, check=True)
    return str(directory)
