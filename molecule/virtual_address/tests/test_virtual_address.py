"""Two gateways with one address, as a client sees it that asks all the time, each time by a connection of its own."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import testinfra
from ansible_collections.gpufleet.llm.plugins.module_utils import firewall
from testinfra.host import Host

from tests.network import address_of
from tests.roles import applied, changed, host_name, refused, until
from tests.unit.test_firewall import DEFAULTS

ROLE = "virtual_address"
LEAVE = "/var/lib/vllm-fleet-address/leave"


@pytest.fixture(scope="session")
def one() -> Host:
    return testinfra.get_host("docker://virtual-address-1")


@pytest.fixture(scope="session")
def two() -> Host:
    return testinfra.get_host("docker://virtual-address-2")


@pytest.fixture(scope="session")
def address(one: Host) -> str:
    return address_of(one).rpartition(".")[0] + ".200"


def has(host: Host, address: str) -> bool:
    return bool(host.check_output(f"ip -brief address show to {address}"))


class Client:
    """Asks over the address until it is stopped, and counts: the hosts that answered, and what failed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.answers: Counter[str] = Counter()
        self.failures: list[tuple[float, str]] = []
        self.going = True
        self.thread = threading.Thread(target=self.ask)

    def ask(self) -> None:
        tls = ssl.create_default_context()
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        while self.going:
            connection = http.client.HTTPSConnection(self.address, timeout=1, context=tls)
            try:
                connection.request("GET", "/healthz", headers={"Host": "llm.test"})
                self.answers[connection.getresponse().read().decode()] += 1
            except OSError as problem:
                self.failures.append((time.monotonic(), str(problem)))
            finally:
                connection.close()
            time.sleep(0.02)

    def __enter__(self) -> Client:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.going = False
        self.thread.join()
        said = sorted({text for _, text in self.failures})
        print(f"answers {dict(self.answers)}, failures {len(self.failures)} in {self.outage():.1f} s: {said}")

    def outage(self) -> float:
        """Seconds from the first failure to the last."""
        return self.failures[-1][0] - self.failures[0][0] if self.failures else 0.0


@pytest.fixture(autouse=True)
def at_home(one: Host, two: Host, address: str) -> Iterator[None]:
    """Before each test the first gateway has the address, and both are well."""
    for host in (one, two):
        host.check_output("nft list tables | grep -q vllm_fleet && nft delete table inet vllm_fleet || true")
        host.check_output("systemctl start nginx keepalived")
        host.check_output(f"echo 0 >{LEAVE}")
    until(lambda: has(one, address) and not has(two, address), 30, "the first gateway did not get the address back")
    yield


def test_the_first_gateway_has_the_address_and_its_unit_has_few_rights(one: Host, two: Host, address: str) -> None:
    with Client(address) as client:
        time.sleep(1)
    assert set(client.answers) == {host_name(one)}
    assert client.failures == []
    assert two.service("keepalived").is_enabled


def test_a_gateway_that_dies_loses_it_within_seconds(one: Host, two: Host, address: str) -> None:
    with Client(address) as client:
        time.sleep(0.5)
        one.check_output("systemctl kill --signal KILL nginx; systemctl stop nginx")
        until(lambda: has(two, address), 10, "the second gateway did not take the address")
        time.sleep(1)
        assert client.answers[host_name(two)] > 0
        outage, taken = client.outage(), len(client.failures)
        one.check_output("systemctl start nginx")
        until(lambda: has(one, address) and not has(two, address), 20, "the first gateway did not take it back")
        time.sleep(1)
    print(f"outage {outage:.1f} s, {taken} failures")
    assert 0 < outage < 8
    # it takes the address back when it answers again; what is under way at that moment is cut
    assert len(client.failures) <= taken + 1, client.failures


def test_a_planned_stop_refuses_nobody(one: Host, two: Host, address: str) -> None:
    """The entry points that a turn uses. At each of the two moves a connection may be under way, and is cut."""
    with Client(address) as client:
        time.sleep(0.5)
        applied(one, ROLE, entry_point="leave")
        assert has(two, address) and not has(one, address)
        one.check_output("systemctl stop nginx")
        time.sleep(3)
        assert has(two, address)
        one.check_output("systemctl start nginx")
        time.sleep(8)
        assert has(two, address), "it came back without having been told to"
        applied(one, ROLE, entry_point="come_back")
        until(lambda: has(one, address) and not has(two, address), 20, "the first gateway did not take it back")
        time.sleep(1)
    assert set(client.answers) == {host_name(one), host_name(two)}
    assert len(client.failures) <= 2
    assert [text for _, text in client.failures if "refused" in text or "unreachable" in text] == []


def test_who_is_connected_hears_at_once_that_the_address_has_moved(one: Host, two: Host, address: str) -> None:
    """The gateway that had it cannot answer any more, and a client that waits for the rest of a stream says nothing by itself."""
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    with tls.wrap_socket(socket.create_connection((address, 443), 5)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")  # half of a question, which Nginx waits for a minute for
        applied(one, ROLE, entry_point="leave")
        connection.settimeout(3)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert not has(one, address), "also not on loopback, where it was for a moment"
    applied(one, ROLE, entry_point="come_back")


def test_a_new_unit_of_keepalived_refuses_nobody(one: Host, two: Host, address: str) -> None:
    """The role restarts it on both gateways in one run: the one that has the address gives it up before."""
    processes = [host.check_output("systemctl show --property=MainPID --value keepalived") for host in (one, two)]
    for host in (one, two):
        host.check_output("echo '# of before' >>/etc/systemd/system/keepalived.service.d/50-vllm-fleet.conf")
    with Client(address) as client:
        applied([one, two], ROLE)
        until(lambda: has(one, address) and not has(two, address), 20, "the first gateway did not take it back")
        time.sleep(1)
    for host, before in zip((one, two), processes, strict=True):
        assert host.check_output("systemctl show --property=MainPID --value keepalived") != before
    assert client.answers[host_name(two)] > 0
    assert len(client.failures) <= 2
    assert [text for _, text in client.failures if "refused" in text or "unreachable" in text] == []


def test_what_stops_keepalived_moves_it_in_less_than_two_seconds(one: Host, two: Host, address: str) -> None:
    """As a reboot does that nobody planned."""
    with Client(address) as client:
        time.sleep(0.5)
        one.check_output("systemctl stop keepalived")
        until(lambda: has(two, address), 10, "the second gateway did not take the address")
        time.sleep(1)
    assert not has(one, address)
    assert client.outage() < 2


def test_when_none_answers_the_address_stays(one: Host, two: Host, address: str) -> None:
    for host in (one, two):
        host.check_output("systemctl stop nginx")
    time.sleep(6)
    assert [has(host, address) for host in (one, two)].count(True) == 1


def rules(one: Host, two: Host, host: Host, virtual_address: str) -> str:
    """The table of the role firewall for one of them."""
    hostvars = {host_name(each): {"fleet_address": address_of(each)} for each in (one, two)}
    settings = {**DEFAULTS, "gateways": list(hostvars), "vllm_hosts": [], "virtual_address": virtual_address}
    return firewall.ruleset(hostvars, host_name(host), settings)


def load(host: Host, table: str) -> None:
    """Load a table, and forget which connections there were."""
    host.check_output(f"nft -f - <<'.'\n{table}\n.")
    host.check_output("conntrack --flush 2>/dev/null || true")


def taken(host: Host) -> int:
    """How often a host took the address."""
    return int(host.check_output("journalctl --output cat --unit keepalived | grep -c 'Entering MASTER STATE' || true"))


def test_the_firewall_lets_the_gateways_hear_each_other(one: Host, two: Host, address: str) -> None:
    for host in (one, two):
        load(host, rules(one, two, host, address))
    before = taken(two)
    time.sleep(8)
    assert (has(one, address), has(two, address), taken(two)) == (True, False, before)
    one.check_output("systemctl stop nginx")
    until(lambda: has(two, address) and not has(one, address), 15, "the second gateway did not take the address")
    one.check_output("systemctl start nginx")
    until(lambda: has(one, address) and not has(two, address), 20, "the first gateway did not take it back")
    # As it is in an inventory without an address: the second gateway hears nothing any more.
    before = taken(two)
    load(two, rules(one, two, two, ""))
    until(lambda: taken(two) > before, 15, "without the rule nothing is different")


def test_it_goes_when_it_is_not_asked_for_any_more(one: Host, address: str) -> None:
    assert changed(applied(one, ROLE, virtual_address_ip=""))
    assert not has(one, address)
    assert not one.service("keepalived").is_running
    assert not changed(applied(one, ROLE, virtual_address_ip=""))
    assert changed(applied(one, ROLE))
    until(lambda: has(one, address), 20, "the address is not back")


def test_mistakes_are_refused_before_anything_changes(one: Host, two: Host) -> None:
    for variables, message in (
        ({"virtual_address_ip": "llm.test"}, "virtual_address_ip is 'llm.test'"),
        ({"virtual_address_ip": "203.0.113.9"}, "which is in no network of the host"),
        ({"virtual_address_ip": address_of(two)}, "which is fleet_address of virtual-address-2"),
        ({"virtual_address_interface": "eth7"}, "virtual_address_interface is eth7"),
        ({"virtual_address_router_id": 256}, "virtual_address_router_id is 256"),
        ({"virtual_address_gateway_group": "tls_certificate"}, "the inventory has tls-certificate"),
        ({"gateway_server_names": ["192.0.2.9"]}, "gateway_server_names has neither"),
    ):
        told = refused(one, ROLE, **variables)
        assert message in told, told
        assert "changed=0" in told
