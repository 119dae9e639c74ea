"""A fleet goes over to TLS between its gateway and its instances, and back, while clients ask it: no request fails. vLLM is the stand-in.

In between: a run that changes nothing, an instance that goes back to a generation without TLS and one that goes forward again, and a certificate
that is renewed. The tests run in this order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.e2e.conftest import FIGURES, ROOT, Done, on, until
from tests.hosts import hosts
from tests.stand_in import fleet as stand_ins
from tests.stand_in.fleet import Fleet

NAME = "drill-tls"
CERTIFICATE = "/etc/ssl/vllm-fleet/fleet/cert.pem"
OF_HOST = "--cacert {0}/ca.pem --cert {0}/cert.pem --key {0}/key.pem".format("/etc/ssl/vllm-fleet/fleet")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """The fleet, deployed without TLS, with agents and their watch."""
    found = stand_ins.up(
        NAME, ROOT / ".cache" / NAME, ["gw1"], ["gpu1", "gpu2"],
        turn_soak_seconds=3,
        vllm_instances=[{"name": "chat", "model": "tiny", "port": 8000, "options": {"max-model-len": 2048}}],
    )  # fmt: skip
    try:
        found.run(check=True)
        yield found
    finally:
        hosts.down(NAME)


def spoken(fleet: Fleet, host: str, *options: str) -> tuple[str, str]:
    """What an instance answers to plain HTTP, and to TLS."""
    ask = "curl -s -m 5 -o /dev/null -w '%{http_code}' "
    address = f"{fleet.addresses[host]}:8000/health"
    return (
        on(host, f"{ask} http://{address}", check=False).strip(),
        on(host, f"{ask} {' '.join(options) or OF_HOST} https://{address}", check=False).strip(),
    )


def answers(host: str) -> bool:
    """Whether the watch of a host has an answer of its instance."""
    return 'vllm_fleet_instance_answers{instance_name="chat"} 1' in on(host, "cat /run/vllm-fleet/watch/watch.prom")


def shows_its_certificate(fleet: Fleet, host: str) -> bool:
    """Whether an instance shows the certificate that its host has now."""
    serial = "openssl x509 -noout -serial"
    shown = on(
        host, f"openssl s_client -connect {fleet.addresses[host]}:8000 </dev/null 2>/dev/null | {serial}", check=False
    )
    return shown == on(host, f"{serial} -in {CERTIFICATE}")


def pid(host: str) -> str:
    return on(host, "systemctl show --property=MainPID --value vllm@chat").strip()


def by_tls(fleet: Fleet) -> dict[str, bool]:
    """The backends in use, and whether the gateway asks each by TLS."""
    state = fleet.state(fleet.gateways[0])
    return {name.partition("@")[2]: one["tls"] for name, one in state.items() if one["use"]}


def changed(done: Done) -> bool:
    return any("changed=" in line and "changed=0" not in line for line in done.output.splitlines())


def test_the_fleet_goes_over_while_clients_ask(fleet: Fleet) -> None:
    one, two = fleet.workers
    assert by_tls(fleet) == {one: False, two: False}
    with fleet.load():
        done = fleet.run(fleet_backend_tls=True, check=True)
    FIGURES["site.yml, to TLS"] = f"{done.seconds:.0f} s"
    assert by_tls(fleet) == {one: True, two: True}
    for host in fleet.workers:
        assert spoken(fleet, host) == ("000", "200"), "not answered without TLS"
        assert spoken(fleet, host, "--insecure")[1] == "000", "nor without a certificate of the fleet"
        on(host, "systemctl is-active vllm-fleet-watch vllm-fleet-agent")


def test_a_second_run_changes_nothing(fleet: Fleet) -> None:
    before = [pid(host) for host in fleet.workers]
    done = fleet.run(check=True)
    assert not changed(done), done.output
    assert [pid(host) for host in fleet.workers] == before


def test_who_watches_and_tells_metrics_asks_by_tls(fleet: Fleet) -> None:
    for host in fleet.workers:
        until("the watch has an answer", partial(answers, host), 20)
        told = on(fleet.gateways[0], f"curl -s -m 5 {OF_HOST} https://{fleet.addresses[host]}:9440/metrics")
        assert 'vllm_fleet_instance_up{instance_name="chat"} 1' in told
    status = fleet.run(playbook="playbooks/status.yml", check=True).output
    assert not any(words in status for words in ("refuses connections", "no answer")), status


def test_a_renewed_certificate_restarts_nobody(fleet: Fleet) -> None:
    """And once more: of a file that was replaced, vLLM sees the first time only."""
    before = [pid(host) for host in fleet.workers]
    with fleet.load():
        for _ in range(2):
            for host in fleet.workers:
                on(host, f"echo damaged >{CERTIFICATE}")
            fleet.run("--tags", "fleet_authority", check=True)
            for host in fleet.workers:
                until("the new one is shown", partial(shows_its_certificate, fleet, host), 10)
    assert [pid(host) for host in fleet.workers] == before


def test_an_instance_goes_back_to_a_generation_without_tls_and_is_let_go(fleet: Fleet) -> None:
    one, two = fleet.workers
    with fleet.load():
        fleet.run("--limit", one, "-e", "fleet_instance=chat", playbook="playbooks/rollback.yml", check=True)
        assert by_tls(fleet) == {one: False, two: True}
        fleet.run("--limit", one, "-e", "fleet_instance=chat", playbook="playbooks/unhold.yml", check=True)
        fleet.run(check=True)
    assert by_tls(fleet) == {one: True, two: True}


def test_the_fleet_goes_back_while_clients_ask(fleet: Fleet) -> None:
    one, two = fleet.workers
    with fleet.load():
        done = fleet.run(fleet_backend_tls=False, check=True)
    FIGURES["site.yml, back from TLS"] = f"{done.seconds:.0f} s"
    assert by_tls(fleet) == {one: False, two: False}
    assert spoken(fleet, one) == ("200", "000")
    # what was may come back
    assert "vllm-fleet" in on(one, "systemctl show --property=SupplementaryGroups --value vllm@chat")
    with fleet.load():
        fleet.run("--limit", one, "-e", "fleet_instance=chat", playbook="playbooks/rollback.yml", check=True)
    assert by_tls(fleet) == {one: True, two: False}
