"""What all tests of the gateway as a process share."""

from __future__ import annotations

import shutil

import pytest

PACKAGES = "nginx libnginx-mod-http-lua lua-cjson lua-nginx-string"


@pytest.fixture(scope="session", autouse=True)
def nginx() -> None:
    """Nginx with its Lua module, as a gateway has it."""
    if not shutil.which("nginx"):
        pytest.fail(f"Nginx is not here: apt-get install {PACKAGES}")
