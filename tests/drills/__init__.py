"""What takes too long for `make test`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def passes(*arguments: str, **environment: str) -> bool:
    """Run a part of the tests with Python in a process of its own, whose output says how each test went. Returns whether it passed."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode == 0
