"""What all tests of the gateway as a process share."""

from __future__ import annotations

import pytest

from tests.hosts.hosts import install

PACKAGES = ["nginx", "libnginx-mod-http-lua", "lua-cjson", "lua-nginx-string"]


@pytest.fixture(scope="session", autouse=True)
def nginx() -> None:
    """Nginx with its Lua module, as a gateway has it."""
    install("nginx", *PACKAGES, start=False)
