"""Certificates for tests."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID


def make_pair(days: int = 30, name: str = "given.test", *also: str, rsa_bits: int = 0) -> tuple[str, str]:
    """A certificate that signs itself, valid for so many days from now, and its key; both PEM. `also`: further names. With `rsa_bits` it is RSA."""
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = (
        rsa.generate_private_key(65537, rsa_bits) if rsa_bits else ec.generate_private_key(ec.SECP256R1())
    )
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    begin = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=60)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=60 + days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in (name, *also)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    return signed.public_bytes(pem).decode(), text


class Authority:
    """A certificate authority as the fleet has one, and what it signs."""

    def __init__(self, certificate: str = "", key: str = "", name: str = "Test CA", days: int = 3650) -> None:
        if key:
            read = serialization.load_pem_private_key(key.encode(), None)
            assert isinstance(read, ec.EllipticCurvePrivateKey)
            self.key = read
            self.certificate = x509.load_pem_x509_certificate(certificate.encode())
            return
        self.key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.timezone.utc)
        self.certificate = (
            x509.CertificateBuilder(subject, subject, self.key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(False, False, False, False, False, True, True, False, False),
                critical=True,
            )
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> str:
        """Its certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def key_pem(self) -> str:
        """Its key."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def sign(
        self, name: str, address: str = "127.0.0.1", days: int = 30, client: bool = True, names: Sequence[str] = ()
    ) -> tuple[str, str]:
        """A certificate for a host and its key, both PEM; without `client` it is for a server and nothing else. `names`: what clients call it."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if client else [])]
        called = [x509.IPAddress(ipaddress.ip_address(address)), *map(x509.DNSName, names)]
        begin = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=60)
        signed = (
            x509.CertificateBuilder(
                self.certificate.subject,
                x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
                key.public_key(),
                x509.random_serial_number(),
            )
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=60 + days))
            .add_extension(x509.SubjectAlternativeName(called), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
        return signed.public_bytes(pem).decode(), text
