"""What the tests of all scenarios share."""

from __future__ import annotations

import os

import pytest

# For the drills: every test on every host of its scenario.
MATRIX = os.environ.get("MATRIX", "") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "one_host: nothing in it differs between the hosts of the scenario: the first one will do"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave a file to the hosts of its `testinfra_hosts`, and a test that is marked `one_host` to the first one.

    By itself, testinfra reads `testinfra_hosts` only where no hosts are named on the command line.
    """
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    first: dict[object, object] = {}  # test function -> the host that it was first seen with
    for item in items:
        wanted = getattr(getattr(item, "module", None), "testinfra_hosts", None)
        here = wanted is None or any(host.partition("://")[2] in item.nodeid for host in wanted)
        if here and item.get_closest_marker("one_host") and not MATRIX:
            host = item.callspec.params["_testinfra_host"]  # type: ignore[attr-defined]
            here = first.setdefault(item.function, host) is host  # type: ignore[attr-defined]
        (kept if here else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
