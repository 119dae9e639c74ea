"""A certificate by ACME, from the real Pebble, for two gateways with one name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from testinfra.host import Host

from tests.acme import DIRECTORY, NOWHERE, SCENARIO, UNIT, Authority, account_of, names, reloads, served
from tests.certificates import make_pair
from tests.network import address_of
from tests.playbooks import playbook
from tests.roles import applied, apply_role, changed, environment, refused, role_command

RENEWAL = f"{DIRECTORY}/acme/renewal/vllm-fleet.conf"


def order(hosts: Host | list[Host], **variables: object) -> str:
    """Apply the role, and order, in one run as the play of the gateways does."""
    _program, _converge, *arguments = role_command(hosts, SCENARIO, **variables)
    done = playbook("molecule/tls_certificate_acme/both.yml", *arguments, environment=environment(SCENARIO))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def as_it_was(gateways: list[Host]) -> Iterator[None]:
    """Whatever the test changes, the next one finds the scenario's certificate."""
    yield
    order(gateways)


def test_each_gateway_has_a_certificate_of_its_own(gateways: list[Host], authority: Authority) -> None:
    """The name leads to the first one alone, so what the second one was asked came by the first."""
    found = [served(host) for host in gateways]
    for host, certificate in zip(gateways, found, strict=True):
        assert names(certificate) == {"llm.test", "other.llm.test"}
        assert "Pebble Intermediate" in certificate.issuer.rfc4514_string()
        assert reloads(host) == 1
        assert host.file(host.check_output(f"realpath {DIRECTORY}/privkey.pem")).mode == 0o600
    assert found[0].serial_number != found[1].serial_number
    # tried first, each once
    assert authority.orders(14001) == authority.orders() == 2


def test_what_is_no_challenge_or_nobodys_is_not_found(gateways: list[Host]) -> None:
    for host in gateways:
        base = f"http://{address_of(host)}/.well-known/acme-challenge"
        for path in ("a" * 43, "../../etc/passwd", "short", "a" * 43 + "/b"):
            status = host.check_output(
                f"curl -s -o /dev/null -w '%{{http_code}}' --path-as-is -H 'Host: llm.test' {base}/{path}"
            )
            assert status == ("404" if path == "a" * 43 else "308"), path


def test_a_second_run_changes_nothing_and_asks_nobody(gateways: list[Host], authority: Authority) -> None:
    asked = authority.asked(), authority.asked(14001)
    assert not changed(order(gateways))
    assert (authority.asked(), authority.asked(14001)) == asked


def test_before_its_time_the_timer_changes_nothing(gateways: list[Host]) -> None:
    for host in gateways:
        before, reloaded = served(host), reloads(host)
        host.check_output(f"systemctl start {UNIT}.service")
        assert (served(host), reloads(host)) == (before, reloaded)


@pytest.mark.usefixtures("gateways")
def test_the_timer_runs_twice_a_day_in_a_sandbox(one: Host) -> None:
    assert one.service(f"{UNIT}.timer").is_enabled
    shown = one.check_output(
        f"systemctl show {UNIT}.timer --property NextElapseUSecRealtime,RandomizedDelayUSec,TimersCalendar"
    )
    assert "00/12:00:00" in shown
    assert "RandomizedDelayUSec=11h" in shown
    score = one.check_output(f"systemd-analyze security {UNIT}.service --no-pager | tail -1")
    assert float(re.findall(r"([0-9.]+) [A-Z]+", score)[0]) <= 2.0, score


def test_a_renewal_is_served_and_keeps_the_account(gateways: list[Host]) -> None:
    """certbot is told that a certificate of 90 days is due 100 days before its end."""
    for host in gateways:
        before, reloaded = served(host), reloads(host)
        account = account_of(host)
        host.check_output(f"sed -i '1i renew_before_expiry = 100 days' {RENEWAL}")
        host.check_output(f"systemctl start {UNIT}.service")
        host.check_output(f"sed -i '/^renew_before_expiry/d' {RENEWAL}")
        after = served(host)
        assert after.serial_number != before.serial_number
        assert names(after) == names(before)
        assert reloads(host) == reloaded + 1
        assert account_of(host) == account
        assert host.file(f"{DIRECTORY}/acme").mode == 0o700
    assert not changed(order(gateways))


@pytest.mark.usefixtures("as_it_was")
def test_another_kind_of_key_is_another_order(gateways: list[Host], authority: Authority) -> None:
    host, orders = gateways[0], authority.orders()
    assert changed(order(host, tls_certificate_acme_key_type="rsa"))
    key = served(host).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    assert authority.orders() == orders + 1
    assert not changed(order(host, tls_certificate_acme_key_type="rsa"))


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("forbidden.test", 1, "issuance is forbidden by policy"),
        ("untried.test", 0, "the dry run at https://"),
        ("astray.test", 0, "no route to host"),
    ],
)
@pytest.mark.usefixtures("as_it_was")
def test_why_there_is_no_certificate(
    gateways: list[Host], authority: Authority, name: str, asked: int, reason: str
) -> None:
    host = gateways[0]
    authority.lead("astray", NOWHERE)
    before, orders = served(host), authority.orders()
    applied(host, SCENARIO, tls_certificate_names=["llm.test", name])
    told = refused(host, SCENARIO, entry_point="order", tls_certificate_names=["llm.test", name])
    assert f"gave no certificate for llm.test, {name}:" in told
    assert reason in told
    assert authority.orders() == orders + asked
    assert served(host) == before


@pytest.mark.usefixtures("as_it_was")
def test_a_certificate_that_nobody_renewed_is_a_failure(gateways: list[Host], authority: Authority) -> None:
    """With less than a quarter of its life left, while the name leads elsewhere."""
    host = gateways[1]
    pair = host.check_output(f"basename $(readlink {DIRECTORY}/current)")

    def in_use(days: int) -> None:
        for name, text in zip(
            ("fullchain.pem", "privkey.pem"), make_pair(days, "llm.test", "other.llm.test"), strict=True
        ):
            host.check_output(f"cat >{DIRECTORY}/pairs/{pair}/{name} <<'.'\n{text}\n.")

    host.check_output(f"sed -i '1i renew_before_expiry = 100 days' {RENEWAL}")
    authority.lead("llm", NOWHERE)
    try:
        in_use(22)  # of 82
        assert not changed(applied(host, SCENARIO, entry_point="order"))
        in_use(18)  # of 78
        told = refused(host, SCENARIO, entry_point="order")
        assert "gave no certificate for llm.test, other.llm.test: llm.test: " in told
        assert "no route to host" in told
    finally:
        authority.lead("llm", address_of(authority.host))
        host.check_output(f"sed -i '/^renew_before_expiry/d' {RENEWAL}")


@pytest.mark.usefixtures("as_it_was")
def test_by_dns_no_port_is_needed(gateways: list[Host], authority: Authority) -> None:
    """The real plugin for RFC 2136 with the real Knot DNS; the name itself leads nowhere."""
    host = gateways[1]
    authority.lead("dns", NOWHERE)
    secret = "c2VjcmV0LW9mLXRoZS1zY2VuYXJpby0wMTIzNDU2Nzg="  # noqa: S105 -- of prepare_authority.yml
    given = {
        "server": address_of(authority.host),
        "port": 8053,
        "name": "acme.",
        "secret": secret,
        "algorithm": "HMAC-SHA256",
    }
    variables = {
        "tls_certificate_names": ["dns.test"],
        "tls_certificate_acme_dns_plugin": "rfc2136",
        "tls_certificate_acme_dns_credentials": "\n".join(
            f"dns_rfc2136_{name} = {value}" for name, value in given.items()
        ),
        "tls_certificate_acme_dns_propagation_seconds": 1,
    }
    told = applied(host, SCENARIO, "--diff", **variables)
    assert secret not in told
    assert host.file(f"{DIRECTORY}/acme/dns").mode == 0o600
    applied(host, SCENARIO, entry_point="order", **variables)
    assert names(served(host)) == {"dns.test"}
    assert not changed(order(host, **variables))


@pytest.mark.usefixtures("as_it_was")
def test_another_source_ends_the_timer_and_keeps_the_account(gateways: list[Host], authority: Authority) -> None:
    host = gateways[0]
    pair, account = make_pair(), account_of(host)
    given = {"tls_certificate_source": "files", "tls_certificate_names": ["given.test"]}
    applied(host, SCENARIO, **given, tls_certificate_certificate=pair[0], tls_certificate_key=pair[1])
    assert names(served(host)) == {"given.test"}
    assert not host.service(f"{UNIT}.timer").is_running
    assert not host.file(f"/etc/systemd/system/{UNIT}.service").exists
    accounts = [entry for entry in authority.asked() if entry.endswith("/sign-me-up")]
    order(host)
    assert account_of(host) == account
    assert [entry for entry in authority.asked() if entry.endswith("/sign-me-up")] == accounts
    assert names(served(host)) == {"llm.test", "other.llm.test"}


def test_mistakes_are_refused_before_anything_changes(one: Host) -> None:
    for variables, message in (
        ({"tls_certificate_acme_agree_to_terms": False}, "tls_certificate_acme_agree_to_terms is not true"),
        ({"tls_certificate_acme_directory": "http://ca.test"}, "tls_certificate_acme_directory is 'http://ca.test'"),
        ({"tls_certificate_acme_dns_plugin": "nowhere"}, "tls_certificate_acme_dns_requirements"),
        ({"tls_certificate_acme_eab_key_id": "kid"}, "one is set"),
    ):
        told = refused(one, SCENARIO, **variables)
        assert message in told
        assert "changed=0" in told


def test_secrets_are_not_shown(one: Host) -> None:
    secrets = {
        "tls_certificate_acme_eab_key_id": "kid",
        "tls_certificate_acme_eab_key": "c2VjcmV0LW9mLXRoZS1hdXRob3JpdHk",
    }
    done = apply_role(one, SCENARIO, "--check", "--diff", **secrets)
    assert done.returncode == 0
    assert "certbot.ini" in done.stdout
    assert secrets["tls_certificate_acme_eab_key"] not in done.stdout + done.stderr
    assert json.dumps(secrets["tls_certificate_acme_eab_key"]) not in done.stdout
