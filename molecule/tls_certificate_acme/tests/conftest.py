"""The hosts of the scenario, and the certificate authority on the first of them."""

from __future__ import annotations

import pytest
import testinfra
from testinfra.host import Host

from tests.acme import SCENARIO, Authority, served
from tests.roles import applied


@pytest.fixture(scope="session")
def one() -> Host:
    return testinfra.get_host("docker://tls-certificate-acme-1")


@pytest.fixture(scope="session")
def two() -> Host:
    return testinfra.get_host("docker://tls-certificate-acme-2")


@pytest.fixture(scope="session")
def authority(one: Host) -> Authority:
    return Authority(one)


@pytest.fixture(scope="session")
def gateways(one: Host, two: Host) -> list[Host]:
    """Both with the certificate of the authority. The scenario has applied the role, and so they have one with which Nginx starts."""
    both = [one, two]
    for host in both:
        host.check_output("systemctl start nginx")
        first = served(host)
        assert first.issuer == first.subject
    applied(both, SCENARIO, entry_point="order")
    return both
