"""The certificate as a client sees it, and what happens when it changes."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from testinfra.host import Host

from tests.certificates import make_pair
from tests.roles import applied, changed, refused

DIRECTORY = "/etc/ssl/vllm-fleet"
Pair = tuple[str, str]


def certificate(host: Host, name: str = "fullchain.pem") -> x509.Certificate:
    """The certificate in a file."""
    return x509.load_pem_x509_certificate(host.file(f"{DIRECTORY}/{name}").content)


def names(host: Host) -> set[str]:
    """What the certificate is for."""
    extension = certificate(host).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {str(entry.value) for entry in extension.value}


def reloads(host: Host) -> int:
    """How often the service was asked to reload."""
    return len(host.run("cat /run/tls-user.reloads").stdout.splitlines())


@pytest.fixture
def as_it_was(host: Host) -> Iterator[None]:
    """Whatever the test changes, the next one finds the scenario's certificate."""
    yield
    applied(host, "tls_certificate")


def test_the_certificate_is_for_its_names_and_a_client_accepts_it(host: Host) -> None:
    assert names(host) == {"llm.test", "other.llm.test", "192.0.2.7"}
    host.check_output(
        f"openssl verify -x509_strict -purpose sslserver -verify_hostname llm.test -CAfile {DIRECTORY}/ca.pem "
        f"{DIRECTORY}/fullchain.pem"
    )
    key = certificate(host).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_the_authority_can_sign_servers_and_no_further_authority(host: Host) -> None:
    authority = certificate(host, "ca.pem")
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)
    assert (authority.not_valid_after_utc - authority.not_valid_before_utc).days in (3649, 3650)


@pytest.mark.parametrize(
    ("name", "mode"), [("fullchain.pem", 0o644), ("privkey.pem", 0o600), ("ca.pem", 0o644), ("ca.key", 0o600)]
)
def test_only_root_reads_the_keys(host: Host, name: str, mode: int) -> None:
    file = host.file(host.check_output(f"realpath {DIRECTORY}/{name}"))
    assert (file.user, file.group, file.mode) == ("root", "root", mode)


def test_two_runs_reloaded_once(host: Host) -> None:
    """The scenario has applied the role twice by now; never-there.service is in the list as well."""
    assert reloads(host) == 1


@pytest.mark.one_host
@pytest.mark.usefixtures("as_it_was")
def test_new_names_are_a_new_certificate_of_the_same_authority(host: Host) -> None:
    before, authority, reloaded = certificate(host), certificate(host, "ca.pem"), reloads(host)
    applied(host, "tls_certificate", tls_certificate_names=["new.test"], tls_certificate_valid_days=90)
    assert names(host) == {"new.test"}
    assert certificate(host).serial_number != before.serial_number
    assert certificate(host, "ca.pem") == authority
    assert reloads(host) == reloaded + 1
    # 90 days are less than a third of 365: it is time to renew
    present = certificate(host)
    applied(host, "tls_certificate", tls_certificate_names=["new.test"], tls_certificate_valid_days=365)
    assert certificate(host).not_valid_after_utc > present.not_valid_after_utc + datetime.timedelta(days=270)


@pytest.mark.one_host
@pytest.mark.usefixtures("as_it_was")
def test_an_authority_of_the_host_alone_is_renewed_for_the_same_key(host: Host) -> None:
    before, served = certificate(host, "ca.pem"), certificate(host)
    host.check_output(
        f"cp {DIRECTORY}/ca.pem /srv/former.pem && openssl x509 -in {DIRECTORY}/ca.pem -signkey {DIRECTORY}/ca.key -days 1000 "
        f"-out /srv/short.pem && cp /srv/short.pem {DIRECTORY}/ca.pem"
    )
    assert changed(applied(host, "tls_certificate", "--check"))
    applied(host, "tls_certificate")
    after = certificate(host, "ca.pem")
    assert (after.subject, after.public_key()) == (before.subject, before.public_key())
    assert (after.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)).days >= 3649
    assert certificate(host) != served
    for authority in (f"{DIRECTORY}/ca.pem", "/srv/short.pem", "/srv/former.pem"):
        host.check_output(f"openssl verify -x509_strict -CAfile {authority} {DIRECTORY}/fullchain.pem")
    assert not changed(applied(host, "tls_certificate"))


def given(pair: Pair, **more: object) -> dict[str, object]:
    """Variables that hand over a pair."""
    return {
        "tls_certificate_source": "files", "tls_certificate_names": ["given.test"],
        "tls_certificate_certificate": pair[0], "tls_certificate_key": pair[1], **more,
    }  # fmt: skip


@pytest.mark.one_host
@pytest.mark.usefixtures("as_it_was")
def test_given_files_are_served_and_the_key_is_not_shown(host: Host, tmp_path: Path) -> None:
    pair, reloaded = make_pair(), reloads(host)
    told = applied(host, "tls_certificate", "--diff", **given(pair))
    assert names(host) == {"given.test"}
    assert host.file(f"{DIRECTORY}/privkey.pem").content_string.strip() == pair[1].strip()
    assert pair[1].splitlines()[1] not in told
    assert host.file(host.check_output(f"realpath {DIRECTORY}/privkey.pem")).mode == 0o600
    assert reloads(host) == reloaded + 1
    # the same by paths on the controller
    for name, text in zip(("certificate", "key"), pair, strict=True):
        (tmp_path / name).write_text(text)
    files = {f"tls_certificate_{name}_file": str(tmp_path / name) for name in ("certificate", "key")}
    applied(host, "tls_certificate", tls_certificate_source="files", tls_certificate_names=["given.test"], **files)
    assert host.file(f"{DIRECTORY}/privkey.pem").content_string.strip() == pair[1].strip()


@pytest.mark.one_host
def test_a_pair_that_cannot_be_served_is_refused_before_anything_changes(host: Host) -> None:
    before, good, other = certificate(host), make_pair(), make_pair()
    for variables, message in (
        (given((good[0], other[1])), "does not belong to the certificate"),
        (given(make_pair(days=-1)), "is valid from"),
        (given(good, tls_certificate_names=["given.test", "more.test"]), "does not cover more.test"),
        (given((good[0], "")), "tls_certificate_key"),
    ):
        output = refused(host, "tls_certificate", "--diff", **variables)
        assert "changed=0" in output
        assert message in output
        assert (
            not variables["tls_certificate_key"] or str(variables["tls_certificate_key"]).splitlines()[1] not in output
        )
    assert certificate(host) == before
