"""Hosts as they were before the role, and hosts that have forgotten logins that failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.ssh_logins import BARE, gets_in, wait


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
