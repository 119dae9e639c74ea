"""The hosts of the scenario by name."""

from __future__ import annotations

import pytest
import testinfra
from testinfra.host import Host


@pytest.fixture(scope="session")
def gateway() -> Host:
    return testinfra.get_host("docker://firewall-gateway")


@pytest.fixture(scope="session")
def inference() -> Host:
    return testinfra.get_host("docker://firewall-inference")


@pytest.fixture(scope="session")
def outsider() -> Host:
    return testinfra.get_host("docker://firewall-outsider")
