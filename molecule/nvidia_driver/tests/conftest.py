"""The hosts of the scenario by name."""

from __future__ import annotations

import pytest
import testinfra
from testinfra.host import Host


@pytest.fixture(scope="session")
def hgx() -> Host:
    return testinfra.get_host("docker://nvidia-driver-hgx")


@pytest.fixture(scope="session")
def one() -> Host:
    return testinfra.get_host("docker://nvidia-driver-one")
