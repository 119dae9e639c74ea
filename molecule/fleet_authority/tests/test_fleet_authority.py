"""One authority for two hosts: who has its key, what it signs, and what happens when a host, or the authority, is not there."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import pytest
import testinfra
from cryptography import x509
from testinfra.host import Host

from tests.certificates import Authority
from tests.network import address_of
from tests.roles import applied, changed, host_name, refused

ROLE = "fleet_authority"
# As docs/security.md has it.
RENEW = (
    "openssl x509 -in {directory}/ca.pem -signkey {directory}/ca.key -set_serial 0x$(openssl rand -hex 16) -days 3650"
)
FLEET, AUTHORITY = "/etc/ssl/vllm-fleet/fleet", "/etc/ssl/vllm-fleet/authority"


@pytest.fixture(scope="session")
def signer() -> Host:
    return testinfra.get_host("docker://fleet-authority-gateway")


@pytest.fixture(scope="session")
def other() -> Host:
    return testinfra.get_host("docker://fleet-authority-host")


def certificate(host: Host, path: str = f"{FLEET}/cert.pem") -> x509.Certificate:
    """The certificate in a file."""
    return x509.load_pem_x509_certificate(host.file(path).content)


@pytest.fixture
def as_it_was(signer: Host, other: Host) -> Iterator[None]:
    """Whatever a test breaks, the next one finds the two hosts with certificates of the authority that was made first."""
    both = (signer, other)
    for host in both:
        host.check_output("rm -rf /srv/before && cp -a /etc/ssl/vllm-fleet /srv/before")
    yield
    for host in both:
        host.check_output("rm -rf /etc/ssl/vllm-fleet && cp -a /srv/before /etc/ssl/vllm-fleet")


def test_each_host_has_a_certificate_for_its_name_and_address(host: Host) -> None:
    found = certificate(host)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(name.value) for name in names} == {host_name(host), address_of(host)}
    assert found.subject.rfc4514_string() == f"CN={host_name(host)}"
    for purpose in ("sslserver", "sslclient"):
        host.check_output(f"openssl verify -x509_strict -purpose {purpose} -CAfile {FLEET}/ca.pem {FLEET}/cert.pem")
    assert 364 <= (found.not_valid_after_utc - found.not_valid_before_utc).days <= 366


def test_the_key_is_the_hosts_own_and_closed(signer: Host, other: Host) -> None:
    for host in (signer, other):
        key = host.file(f"{FLEET}/key.pem")
        assert (key.user, key.group, key.mode) == ("root", "vllm-fleet", 0o640)
        assert host.run(f"runuser --user nobody -- cat {FLEET}/key.pem").rc != 0
        host.check_output(f"runuser --user nobody -- cat {FLEET}/ca.pem {FLEET}/cert.pem")
    assert signer.file(f"{FLEET}/key.pem").content != other.file(f"{FLEET}/key.pem").content


def test_one_host_alone_has_the_authority(signer: Host, other: Host) -> None:
    assert not other.file(AUTHORITY).exists
    assert signer.file(AUTHORITY).mode == 0o700
    assert signer.file(f"{AUTHORITY}/ca.key").mode == 0o600
    assert signer.file(f"{AUTHORITY}/ca.pem").content == other.file(f"{FLEET}/ca.pem").content
    found = certificate(signer, f"{AUTHORITY}/ca.pem")
    constraints = found.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)


@pytest.mark.usefixtures("as_it_was")
def test_a_host_whose_certificate_is_good_needs_nobody(signer: Host, other: Host) -> None:
    gone = {"fleet_authority_host": "gw-1"}  # of the inventory, and never there
    assert not changed(applied(other, ROLE, **gone))
    other.check_output(f"rm {FLEET}/cert.pem")
    said = refused(other, ROLE, **gone)
    assert "needs a certificate (there is no cert.pem), which gw-1 signs (fleet_authority_host), and that host cannot be reached" in said  # fmt: skip
    # the one that has it need not be in the run
    before = signer.file(f"{FLEET}/cert.pem").content
    assert changed(applied(other, ROLE))
    assert signer.file(f"{FLEET}/cert.pem").content == before


@pytest.mark.usefixtures("as_it_was")
def test_it_is_renewed_when_less_than_a_third_is_left(other: Host) -> None:
    applied(other, ROLE, fleet_authority_valid_days=30)
    before, key = certificate(other), other.file(f"{FLEET}/key.pem").content
    assert not changed(applied(other, ROLE, fleet_authority_valid_days=30))
    assert certificate(other) == before  # hundreds of days are left
    other.check_output(f"rm {FLEET}/cert.pem")
    applied(other, ROLE, fleet_authority_valid_days=30)
    short = certificate(other)
    told = applied(other, ROLE, "--check", fleet_authority_valid_days=365)
    assert "the certificate is valid for 30 days" in " ".join(told.split())
    assert certificate(other) == short
    applied(other, ROLE, fleet_authority_valid_days=365)
    assert certificate(other).not_valid_after_utc > short.not_valid_after_utc + datetime.timedelta(days=300)
    assert other.file(f"{FLEET}/key.pem").content == key


@pytest.mark.usefixtures("as_it_was")
def test_two_gateways_with_authorities_of_their_own_come_to_have_one(signer: Host, other: Host) -> None:
    """That of the first one: its clients notice nothing. Those of the second one need its ca.pem, which they can be given before."""
    both = [signer, other]
    own = {"role_under_test": "tls_certificate", "tls_certificate_names": ["llm.test"]}
    for host in both:
        host.check_output("rm -r /etc/ssl/vllm-fleet")
    applied(both, ROLE, **own)
    place = "/etc/ssl/vllm-fleet"
    first, second = (host.file(f"{place}/ca.pem").content for host in both)
    served = certificate(signer, f"{place}/fullchain.pem")
    assert first != second
    # now as site.yml does it: the authority of the fleet, then the certificates of the gateways
    applied(both, ROLE)
    assert signer.file(f"{AUTHORITY}/ca.pem").content == first
    assert not signer.file(f"{place}/ca.key").exists
    for host in both:
        assert host.file(f"{FLEET}/ca.pem").content == first
    applied(both, ROLE, **own)
    assert certificate(signer, f"{place}/fullchain.pem") == served
    for host in both:
        assert host.file(f"{place}/ca.pem").content == first
        host.check_output(
            f"openssl verify -x509_strict -purpose sslserver -verify_hostname llm.test -CAfile {place}/ca.pem {place}/fullchain.pem"
        )
        # it says nothing of the fleet: an agent does not take it for a gateway's
        assert host.run(f"openssl verify -purpose sslclient -CAfile {place}/ca.pem {place}/fullchain.pem").rc != 0
        assert not host.file(f"{place}/ca.key").exists
    assert not changed(applied(both, ROLE))
    assert not changed(applied(both, ROLE, **own))
    # new names of a gateway that is alone in the run
    own["tls_certificate_names"] = ["new.test"]
    assert changed(applied(other, ROLE, "--check", **own))
    applied(other, ROLE, **own)
    other.check_output(f"openssl verify -verify_hostname new.test -CAfile {place}/ca.pem {place}/fullchain.pem")


@pytest.mark.usefixtures("as_it_was")
def test_there_is_never_a_second_authority(signer: Host, other: Host) -> None:
    """Another host comes first in the inventory, and knows nothing of the authority."""
    before = other.file(f"{FLEET}/ca.pem").content
    other.check_output(f"rm {FLEET}/cert.pem")
    said = refused([signer, other], ROLE, fleet_authority_host="fleet-authority-host")
    assert "fleet-authority-host is to have the authority of the fleet" in said
    assert other.file(f"{FLEET}/ca.pem").content == before
    assert not other.file(f"{AUTHORITY}/ca.key").exists


def give(host: Host, authority: Authority) -> None:
    """Let a host have an authority, as if it had been made there."""
    host.check_output(
        f"cat >{AUTHORITY}/ca.pem <<'END'\n{authority.pem}END\ncat >{AUTHORITY}/ca.key <<'END'\n{authority.key_pem}END"
    )


def verified(host: Host, ca: str, file: str = f"{FLEET}/cert.pem") -> bool:
    """Whether who trusts `ca` and nothing else accepts a certificate of a host."""
    status: int = host.run(f"openssl verify -x509_strict -CAfile /dev/stdin {file} <<'END'\n{ca}END").rc
    return status == 0


@pytest.mark.usefixtures("as_it_was")
def test_an_authority_that_ends_soon_is_renewed_for_the_same_key_and_name(signer: Host, other: Host) -> None:
    """What it signed stays good, and who has its former certificate goes on."""
    both, place = [signer, other], "/etc/ssl/vllm-fleet"
    old = Authority(name="Old", days=1000)
    give(signer, old)
    own = {"role_under_test": "tls_certificate", "tls_certificate_names": ["llm.test"]}
    told = applied(both, ROLE, "--check", "--diff")
    assert "its authority ends soon" in " ".join(told.split())
    assert certificate(signer, f"{AUTHORITY}/ca.pem") == old.certificate
    signed, _key = old.sign("gpu-9")
    applied(both, ROLE)
    applied(both, ROLE, **own)
    new = certificate(signer, f"{AUTHORITY}/ca.pem")
    assert (new.subject, new.public_key()) == (old.certificate.subject, old.certificate.public_key())
    assert new.serial_number != old.certificate.serial_number
    identifier = x509.SubjectKeyIdentifier
    assert (
        new.extensions.get_extension_for_class(identifier).value
        == old.certificate.extensions.get_extension_for_class(identifier).value
    )
    assert (new.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)).days >= 3649
    text = signer.file(f"{AUTHORITY}/ca.pem").content_string
    for host in both:
        assert host.file(f"{FLEET}/ca.pem").content_string == host.file(f"{place}/ca.pem").content_string == text
        host.check_output(f"cat >/srv/before.pem <<'END'\n{signed}END")
        for ca in (old.pem, text):
            for file in (f"{FLEET}/cert.pem", f"{place}/fullchain.pem", "/srv/before.pem"):
                assert verified(host, ca, file), (host_name(host), file)
    assert not changed(applied(both, ROLE))
    assert not changed(applied(both, ROLE, **own))
    assert signer.file(f"{AUTHORITY}/ca.pem").content_string == text


@pytest.mark.usefixtures("as_it_was")
def test_a_host_alone_has_the_authority_renewed_that_signs_for_it(signer: Host, other: Host) -> None:
    old = Authority(name="Old", days=100)
    give(signer, old)
    other.check_output(f"rm {FLEET}/cert.pem")
    applied(other, ROLE)
    assert (certificate(other).not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)).days >= 364
    assert verified(other, old.pem)
    assert changed(applied([signer, other], ROLE))
    assert not changed(applied([signer, other], ROLE))


@pytest.mark.usefixtures("as_it_was")
def test_a_fleet_goes_over_to_another_authority(signer: Host, other: Host) -> None:
    """As docs/security.md says it. Between two steps everybody trusts everybody, and a client that has been given both does."""
    both, place = [signer, other], "/etc/ssl/vllm-fleet"
    own = {"role_under_test": "tls_certificate", "tls_certificate_names": ["llm.test"]}
    applied(both, ROLE, **own)
    former = signer.file(f"{AUTHORITY}/ca.pem").content_string
    # the same with the authority where it was: a mistake, told as that
    assert "fleet_authority_former is the authority that" in refused(both, ROLE, fleet_authority_former=former)
    # 1: site.yml --tags fleet_authority
    signer.check_output(f"mv {AUTHORITY} /srv/authority-former-$(date +%N)")
    step = {"fleet_authority_former": former, "fleet_authority_name": "Second"}
    applied(both, ROLE, **step)
    second = signer.file(f"{AUTHORITY}/ca.pem").content_string
    assert second != former
    for host in both:
        assert host.file(f"{FLEET}/ca.pem").content_string == f"{second}{former}"
        assert (verified(host, second), verified(host, former)) == (True, False)
        assert verified(host, former, f"{place}/fullchain.pem"), "clients have not been given the new one yet"
    assert not changed(applied(both, ROLE, **step))
    # a run that died between the two files of a host is finished by the next one
    other.check_output(f"cp -p /srv/before/fleet/cert.pem /srv/before/fleet/key.pem {FLEET}/")
    assert changed(applied(both, ROLE, **step))
    assert verified(other, second)
    # 2: site.yml
    applied(both, ROLE, **own)
    for host in both:
        assert (verified(host, second, f"{place}/fullchain.pem"), verified(host, former, f"{place}/fullchain.pem")) == (
            True,
            False,
        )
        assert host.file(f"{place}/ca.pem").content_string == f"{second}{former}"
    # 3: without fleet_authority_former
    for more in ({}, own):
        assert changed(applied(both, ROLE, **more))
        assert not changed(applied(both, ROLE, **more))
    for host in both:
        for file in (f"{FLEET}/ca.pem", f"{place}/ca.pem"):
            assert host.file(file).content_string == second
        assert verified(host, second)


@pytest.mark.usefixtures("as_it_was")
def test_an_authority_without_its_key_is_told(signer: Host, other: Host) -> None:
    signer.check_output(f"rm {AUTHORITY}/ca.key")
    other.check_output(f"rm {FLEET}/cert.pem")
    before = signer.file(f"{AUTHORITY}/ca.pem").content
    said = refused(other, ROLE)
    assert "has ca.pem and no ca.key" in said
    assert signer.file(f"{AUTHORITY}/ca.pem").content == before


@pytest.mark.usefixtures("as_it_was")
def test_a_new_authority_reaches_every_host(signer: Host, other: Host) -> None:
    give(signer, Authority(name="Mine"))
    applied([signer, other], ROLE)
    for host in (signer, other):
        assert certificate(host).issuer.rfc4514_string() == "CN=Mine"
    assert not changed(applied([signer, other], ROLE))


@pytest.mark.usefixtures("as_it_was")
def test_with_an_authority_of_the_vault_no_host_has_the_key(signer: Host, other: Host) -> None:
    mine = Authority(name="From the vault")
    given = {"fleet_authority_certificate": mine.pem, "fleet_authority_key": mine.key_pem, "fleet_authority_host": "gw-1"}  # fmt: skip
    said = applied([signer, other], ROLE, "--diff", "-vvv", **given)
    for host in (signer, other):
        assert certificate(host).issuer.rfc4514_string() == "CN=From the vault"
        host.check_output(f"openssl verify -CAfile {FLEET}/ca.pem {FLEET}/cert.pem")
    secret = mine.key_pem.splitlines()[1]
    assert signer.run(f"grep --recursive --files-with-matches {secret} /etc /root /tmp /var").rc == 1
    assert secret not in said
    assert not changed(applied([signer, other], ROLE, **given))


@pytest.mark.usefixtures("as_it_was")
def test_an_authority_of_the_vault_that_ends_soon_signs_until_then_and_is_told(signer: Host, other: Host) -> None:
    both, warning = [signer, other], "and what it signs ends with it"
    mine = Authority(name="From the vault", days=60)
    given = {"fleet_authority_certificate": mine.pem, "fleet_authority_key": mine.key_pem}
    assert warning in " ".join(applied(both, ROLE, **given).split())
    for host in both:
        assert certificate(host).not_valid_after_utc == mine.certificate.not_valid_after_utc
    said = applied(both, ROLE, **given)
    assert not changed(said)
    assert warning in " ".join(said.split())
    # the command of docs/security.md: a new certificate for the same key
    for name, text in (("ca.pem", mine.pem), ("ca.key", mine.key_pem)):
        signer.check_output(f"cat >/srv/{name} <<'END'\n{text}END")
    renewed = signer.check_output(RENEW.format(directory="/srv")) + "\n"
    given["fleet_authority_certificate"] = renewed
    said = applied(both, ROLE, **given)
    assert warning not in " ".join(said.split())
    for host in both:
        assert host.file(f"{FLEET}/ca.pem").content_string == renewed
        assert (verified(host, mine.pem), verified(host, renewed)) == (True, True)
        assert (certificate(host).not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)).days >= 364
    assert not changed(applied(both, ROLE, **given))


@pytest.mark.one_host
def test_bad_input_is_refused_before_anything_changes(host: Host) -> None:
    mine = Authority()
    certificate_of_a_host = mine.sign("gpu-1")
    for variables, message in (
        ({"fleet_authority_certificate": mine.pem}, "both have to be given"),
        ({"fleet_authority_certificate": mine.pem, "fleet_authority_key": Authority().key_pem}, "fleet_authority_key does not belong"),
        (dict(zip(("fleet_authority_certificate", "fleet_authority_key"), certificate_of_a_host, strict=True)), "not that of an authority"),
        ({"fleet_authority_certificate": mine.pem, "fleet_authority_key": mine.key_pem, "fleet_authority_former": mine.pem},
         "fleet_authority_former is fleet_authority_certificate itself"),
        ({"fleet_authority_former": mine.key_pem}, "fleet_authority_former must be the certificate of an authority"),
        ({"fleet_authority_valid_days": 10}, "fleet_authority_valid_days is 10"),
        ({"fleet_authority_host": "nobody"}, "fleet_authority_host is nobody"),
        ({"fleet_address": "somewhere"}, "fleet_address is 'somewhere'"),
    ):  # fmt: skip
        said = refused(host, ROLE, **variables)
        assert message in said
        assert "changed=0" in said
