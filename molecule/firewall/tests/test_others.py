"""A host on which something else refuses connections already, as it comes from a cloud or from its administrator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.network import scan
from tests.roles import ROOT, applied, changed, refused

PORTS = [22, 80, 443, 50000]
RULES = Path(ROOT / "tests/unit/recordings/firewall/rules.v4-of-oracle").read_text()


@pytest.fixture
def with_iptables(gateway: Host) -> Iterator[Host]:
    """Rules as Oracle's images have them, loaded at every boot."""
    gateway.check_output(
        "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q iptables-persistent"
    )
    gateway.check_output(f"cat >/etc/iptables/rules.v4 <<'EOF'\n{RULES}EOF")
    gateway.check_output("systemctl enable netfilter-persistent && systemctl restart netfilter-persistent")
    yield gateway
    gateway.check_output("apt-get purge -y -q iptables-persistent netfilter-persistent && nft delete table ip filter")


def test_rules_of_iptables_are_seen_and_opened(with_iptables: Host, outsider: Host) -> None:
    assert scan(outsider, with_iptables, PORTS)["open"] == [22]
    told = refused(with_iptables, "firewall")
    assert (
        "iptables is active on firewall-gateway, and each of two firewalls would have to let a connection pass" in told
    )
    others = "iptables-save | grep -v -e INPUT -e ^# -e '^:'"
    before = with_iptables.check_output(others)
    assert "InstanceServices" in before
    applied(with_iptables, "firewall", firewall_take_over=True)
    for _boot in range(2):
        assert scan(outsider, with_iptables, PORTS)["open"] == [22, 80, 443]
        assert with_iptables.check_output(others) == before
        with_iptables.check_output("systemctl restart netfilter-persistent")
    assert not changed(applied(with_iptables, "firewall"))


def test_a_table_of_an_administrator_is_told(gateway: Host, outsider: Host) -> None:
    rules = "table inet mine { chain in { type filter hook input priority 10; policy drop; tcp dport { 22, 80 } accept; }; }"
    gateway.check_output(f"echo '{rules}' | nft --file -")
    try:
        assert scan(outsider, gateway, PORTS)["open"] == [22, 80]
        told = refused(gateway, "firewall", firewall_take_over=True)
        assert (
            "the table inet mine of firewall-gateway, which is not this role's, refuses what it does not name" in told
        )
        assert "the table inet mine" in applied(gateway, "firewall", firewall_beside="warn")
        assert "the table inet mine" not in applied(gateway, "firewall", firewall_beside="off")
    finally:
        gateway.check_output("nft delete table inet mine")
