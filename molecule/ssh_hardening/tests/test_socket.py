"""systemd listens for sshd, as on Ubuntu since 22.10: a Debian host with ssh.socket enabled."""

from __future__ import annotations

import pytest
from testinfra.host import Host

from tests.roles import applied, changed, refused
from tests.ssh_logins import ROLE, effective, gets_in, listening, unguarded, wait

testinfra_hosts = ["docker://ssh-hardening-debian13"]
pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(autouse=True)
def socket(host: Host, bare: None) -> None:
    """The socket instead of the service."""
    host.check_output("systemctl disable --now ssh.service && systemctl enable --now ssh.socket")
    assert wait(lambda: gets_in(host), 20)


def listener(host: Host) -> str:
    """Whether systemd listens."""
    return str(host.check_output("systemctl is-active ssh.socket"))


def test_a_hardened_server_behind_the_socket(host: Host) -> None:
    assert changed(applied(host, ROLE))
    assert effective(host, "passwordauthentication") == ["no"]
    assert (listener(host), listening(host)) == ("active", {22})
    assert gets_in(host) and unguarded(host)
    assert not changed(applied(host, ROLE))


def test_the_socket_moves_to_another_port(host: Host) -> None:
    assert changed(applied(host, ROLE, ssh_hardening_ports=[2222]))
    assert (listener(host), listening(host)) == ("active", {22, 2222})
    assert not changed(applied(host, ROLE, ssh_hardening_ports=[2222]))
    assert changed(applied(host, ROLE, ssh_hardening_ports=[2222], ansible_port=2222))
    assert (listener(host), listening(host)) == ("active", {2222})
    assert gets_in(host, 2222) and not gets_in(host, 22) and unguarded(host)
    assert host.check_output("systemctl is-enabled ssh.socket") == "enabled"
    assert "masked" not in host.check_output("systemctl is-enabled ssh.service ssh.socket; true")


def test_a_stale_file_of_an_older_release_does_not_win(host: Host) -> None:
    """What an upgrade from Ubuntu 22.10 leaves behind."""
    host.check_output(
        "mkdir -p /etc/systemd/system/ssh.socket.d && printf '[Socket]\\nListenStream=\\nListenStream=0.0.0.0:22\\nListenStream=0.0.0.0:2222\\n'"
        " >/etc/systemd/system/ssh.socket.d/addresses.conf && systemctl daemon-reload"
        " && systemctl stop ssh.socket ssh.service && systemctl start ssh.socket"
    )
    assert changed(applied(host, ROLE))
    assert listening(host) == {22} and gets_in(host)


def test_a_port_that_a_firewall_closes_is_taken_back(host: Host) -> None:
    host.check_output(
        "printf 'table inet drill {\\n chain input {\\n type filter hook input priority 0\\n tcp dport 2222 drop\\n }\\n}\\n' | nft -f -"
    )
    refused(host, ROLE, ssh_hardening_ports=[2222], ssh_hardening_proof_seconds=6)
    assert (listener(host), listening(host)) == ("active", {22})
    assert gets_in(host) and unguarded(host) and effective(host, "passwordauthentication") == ["yes"]
