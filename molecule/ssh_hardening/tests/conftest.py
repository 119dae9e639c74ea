"""Hosts as they were before the role, and hosts that have forgotten logins that failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.ssh_logins import BARE, gets_in, wait


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave a file to the hosts of its `testinfra_hosts`: by itself, testinfra reads that only where no hosts are named on the command line."""
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        wanted = getattr(getattr(item, "module", None), "testinfra_hosts", None)
        (kept if wanted is None or any(host in item.nodeid for host in wanted) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture
def forgiven(host: Host) -> Iterator[None]:
    """Logins that fail count against this machine (PerSourcePenalties); a new server has forgotten them."""
    yield
    host.check_output("systemctl restart ssh.service")
    assert wait(lambda: gets_in(host), 20)


@pytest.fixture
def bare(host: Host) -> None:
    """The host as it was before the role."""
    host.run(BARE)
    assert wait(lambda: gets_in(host), 20)
