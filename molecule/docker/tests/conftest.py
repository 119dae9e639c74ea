"""The hosts of the scenario by name."""

from __future__ import annotations

import pytest
import testinfra
from testinfra.host import Host


@pytest.fixture(scope="session")
def archive() -> Host:
    return testinfra.get_host("docker://docker-archive")


@pytest.fixture(scope="session")
def vendor() -> Host:
    return testinfra.get_host("docker://docker-vendor")
