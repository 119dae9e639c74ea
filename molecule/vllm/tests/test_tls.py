"""An instance that speaks TLS: who is answered, who reads the key, a renewed certificate, and the way there and back. With the stand-in for vLLM.

Begins and ends with the instance `chat` alone, on loopback. The tests run in this order.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from testinfra.host import Host

from tests.network import address_of
from tests.roles import ROOT, applied, changed, host_name, refused, until
from tests.served import ask, generation, main_pid

testinfra_hosts = ["docker://vllm-debian13"]

CHAT, _OTHER = yaml.safe_load((ROOT / "molecule/shared/inventory/group_vars/vllm_stand_in.yml").read_text())[
    "vllm_instances"
]
CERTIFICATES = "/etc/ssl/vllm-fleet/fleet"
PLAIN: dict[str, Any] = {"vllm_instances": [CHAT]}
WITH_ONE = f"--cert {CERTIFICATES}/cert.pem --key {CERTIFICATES}/key.pem"


@pytest.fixture
def secured(host: Host) -> dict[str, Any]:
    """The variables of a host whose instances speak TLS."""
    return {**PLAIN, "vllm_bind_address": "", "fleet_address": address_of(host), "fleet_backend_tls": True}


def certify(host: Host, secured: dict[str, Any]) -> str:
    """Give the host a certificate of the fleet."""
    return applied(
        host, "vllm", **secured, role_under_test="fleet_authority", fleet_authority_host=host_name(host)
    )  # fmt: skip


def health(host: Host, certificate: str = WITH_ONE, scheme: str = "https") -> str:
    """The status of an answer to a question that needs no key; 000 where none comes."""
    url = f"{scheme}://{address_of(host)}:8000/health"
    asked = f"curl -s -m 5 -o /dev/null -w '%{{http_code}}' --cacert {CERTIFICATES}/ca.pem {certificate} {url}"
    return str(host.run(asked).stdout)


def test_what_cannot_be_is_refused_before_anything_changes(host: Host, secured: dict[str, Any]) -> None:
    before = main_pid(host, "chat")
    said = refused(host, "vllm", **{**secured, "vllm_bind_address": "127.0.0.1"})
    assert "vllm_bind_address is 127.0.0.1, but with fleet_backend_tls instances listen at fleet_address" in said
    said = refused(host, "vllm", **{**secured, "vllm_instances": [{**CHAT, "options": {"ssl-certfile": "/etc/a.pem"}}]})
    assert "option 'ssl-certfile' cannot be set here: it comes from fleet_backend_tls" in said
    said = refused(host, "vllm", **secured)
    assert "has no certificate of the fleet's authority in /etc/ssl/vllm-fleet/fleet" in said
    assert main_pid(host, "chat") == before
    assert ask(host, model="tiny")[0] == 200


def test_an_instance_answers_who_shows_a_certificate_of_the_fleet(host: Host, secured: dict[str, Any]) -> None:
    certify(host, secured)
    assert "+ssl-cert-reqs: 2" in applied(host, "vllm", "--check", "--diff", **secured)
    applied(host, "vllm", **secured)
    assert (health(host), health(host, certificate=""), health(host, scheme="http")) == ("200", "000", "000")
    assert not changed(applied(host, "vllm", **secured))


def test_only_its_processes_read_the_key_of_the_host(host: Host) -> None:
    reads = f"head -c 1 {CERTIFICATES}/key.pem"
    assert host.run(f"runuser -u nobody -- {reads}").rc != 0
    assert host.run(f"runuser -u vllm -- {reads}").rc != 0, "as a process of its unit, and not as the user"
    group = host.check_output("getent group vllm-fleet | cut -d : -f 3")
    assert group in host.check_output("grep ^Groups: /proc/%s/status", str(main_pid(host, "chat"))).split()


def test_a_renewed_certificate_is_shown_and_restarts_nobody(host: Host, secured: dict[str, Any]) -> None:
    before, inode = main_pid(host, "chat"), host.check_output(f"stat -c %i {CERTIFICATES}/cert.pem")
    serial, shown = (
        "openssl x509 -noout -serial",
        f"openssl s_client -connect {address_of(host)}:8000 </dev/null 2>/dev/null",
    )
    serials = []
    for _ in range(2):
        host.check_output(f"echo damaged >{CERTIFICATES}/cert.pem")
        certify(host, secured)
        serials.append(host.check_output(f"{serial} -in {CERTIFICATES}/cert.pem"))
        until(lambda: host.run(f"{shown} | {serial}").stdout.strip() == serials[-1], 10, "the former one is shown")
    assert len(set(serials)) == 2
    assert host.check_output(f"stat -c %i {CERTIFICATES}/cert.pem") == inode
    assert main_pid(host, "chat") == before


def test_it_goes_back_and_what_was_may_come_again(host: Host, secured: dict[str, Any]) -> None:
    current = generation(host, "chat")
    applied(host, "vllm", **PLAIN)
    assert ask(host, model="tiny")[0] == 200
    assert host.check_output("systemctl show --property=SupplementaryGroups --value vllm@chat") == "vllm-fleet"
    host.check_output("ln -sfn /etc/vllm/chat/%s /etc/vllm/chat/current && systemctl restart vllm@chat", current)
    until(lambda: health(host) == "200", 20, "the generation with TLS does not answer")
    applied(host, "vllm", **PLAIN)
    assert ask(host, model="tiny")[0] == 200
    assert not changed(applied(host, "vllm", **PLAIN))
