"""One state of LuaJIT for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lua.luajit import Lua


@pytest.fixture(scope="module")
def lua() -> Iterator[Lua]:
    """LuaJIT with the modules of the gateway."""
    state = Lua()
    yield state
    state.close()
