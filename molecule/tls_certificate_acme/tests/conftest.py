"""The hosts of the scenario, and the certificate authority on the first of them."""

from __future__ import annotations

import re

import pytest
import testinfra
from cryptography import x509
from testinfra.host import Host

from tests.network import address_of
from tests.roles import applied

DIRECTORY = "/etc/ssl/vllm-fleet"
UNIT = "vllm-fleet-certificate"


class Authority:
    """Pebble, once as the directory and once as the one for trying, and the name server that both ask."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def asked(self, port: int = 14000) -> list[str]:
        """What one of them was asked since it started."""
        log = self.host.check_output(f"journalctl --output cat --unit pebble@{port}")
        return re.findall(r"((?:GET|HEAD|POST) /\S+) -> calling handler", log)

    def orders(self, port: int = 14000) -> int:
        return self.asked(port).count("POST /order-plz")

    def lead(self, name: str, address: str) -> None:
        """Have a name below `test` lead to an address."""
        self.host.check_output(
            f"knotc zone-begin test && (knotc zone-unset test {name} A || true) && knotc zone-set test {name} 1 A {address} && knotc zone-commit test"
        )


@pytest.fixture(scope="session")
def one() -> Host:
    return testinfra.get_host("docker://tls-certificate-acme-1")


@pytest.fixture(scope="session")
def two() -> Host:
    return testinfra.get_host("docker://tls-certificate-acme-2")


@pytest.fixture(scope="session")
def authority(one: Host) -> Authority:
    return Authority(one)


def served(host: Host) -> x509.Certificate:
    """What a client is shown."""
    shown = host.check_output(
        f"openssl s_client -connect {address_of(host)}:443 -servername llm.test </dev/null 2>/dev/null"
    )
    pem = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", shown, re.DOTALL)
    assert pem, shown
    return x509.load_pem_x509_certificate(pem[0].encode())


def names(certificate: x509.Certificate) -> set[str]:
    """What a certificate is for."""
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {str(entry.value) for entry in extension.value}


def reloads(host: Host) -> int:
    """How often Nginx was reloaded."""
    return int(host.check_output("journalctl --output cat --unit nginx | grep -c '^Reloaded nginx' || true"))


@pytest.fixture(scope="session")
def gateways(one: Host, two: Host) -> list[Host]:
    """Both with the certificate of the authority. The scenario has applied the role, and so they have one with which Nginx starts."""
    both = [one, two]
    for host in both:
        host.check_output("systemctl start nginx")
        first = served(host)
        assert first.issuer == first.subject
    applied(both, "tls_certificate", entry_point="order")
    return both
