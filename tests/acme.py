"""A certificate authority with ACME for tests, the real Pebble, and what its clients have of it."""

from __future__ import annotations

import re

from cryptography import x509
from testinfra.host import Host

from tests.network import address_of

DIRECTORY = "/etc/ssl/vllm-fleet"
UNIT = "vllm-fleet-certificate"
SCENARIO = "tls_certificate_acme"

NOWHERE = "192.0.2.1"  # to which the first host has no route


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


def account_of(host: Host) -> str:
    """The key of the account at the directory, as its hash."""
    told: str = host.check_output(f"cat {DIRECTORY}/acme/accounts/*:14000/dir/*/private_key.json | sha256sum")
    return told
