"""Judges the gateway's Lua files by luacheck, which is Debian's and is installed when it is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.hosts.hosts import install

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    install("luacheck", "lua-check")
    command = ["luacheck", "--config", ".config/luacheckrc", "--no-color", "roles/gateway/files/lua", "tests/lua"]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)
