"""A hardened server whose variables change, there and back. One host does: what differs between releases is in the other files."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.network import address_of
from tests.roles import applied, changed, refused
from tests.ssh_logins import ROLE, SSH, gets_in, listening, login, unguarded

testinfra_hosts = ["docker://ssh-hardening-debian12"]


def test_authorised_keys_come_and_go(host: Host, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "other", "-f", tmp_path / "other"], check=True)
    other, own = (tmp_path / "other.pub").read_text().strip(), (SSH / "id_ed25519.pub").read_text().strip()
    with_other = ("-o", "IdentitiesOnly=yes", "-i", str(tmp_path / "other"))
    added = {"ssh_hardening_authorized_keys": [{"user": "fleet", "keys": [other]}]}
    assert changed(applied(host, ROLE, **added))
    assert not changed(applied(host, ROLE, **added))
    assert "Offering public key" in (done := login(host, *with_other, "-v")).stderr and done.returncode == 0

    # the key that Ansible logs in with is not among these: no key of the two would be left, or the proof fails and all is taken back
    third = host.check_output("cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub")
    said = refused(host, ROLE, ssh_hardening_authorized_keys=[{"user": "fleet", "keys": [third], "exclusive": True}])
    assert "none of the keys that it can have logged in with is among his keys" in said
    said = refused(host, ROLE, ssh_hardening_authorized_keys=[{"user": "fleet", "keys": [other], "exclusive": True}])
    assert "Permission denied" in said and "is as it was before this run" in said
    assert gets_in(host) and unguarded(host)

    assert changed(
        applied(host, ROLE, ssh_hardening_authorized_keys=[{"user": "fleet", "keys": [own], "exclusive": True}])
    )
    assert host.check_output("cat /home/fleet/.ssh/authorized_keys | grep -c ssh-ed25519") == "1"
    assert gets_in(host) and unguarded(host)


def at_once(host: Host, number: int) -> int:
    """How many of so many connections, which are all open and have not logged in, are greeted by sshd."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(number):
            one = stack.enter_context(socket.create_connection((address_of(host), 22), 10))
            one.settimeout(10)
            found.append(one)
        return sum(connection.recv(8).startswith(b"SSH-2.0-") for connection in found)


def test_a_bastion_lets_others_through(host: Host) -> None:
    try:
        assert at_once(host, 50) == 10
        applied(host, ROLE, ssh_hardening_bastion=True, ssh_hardening_bastion_connections=60)
        # as many as Ansible opens: one for each host
        assert at_once(host, 50) == 50
        done = login(host, "-W", "127.0.0.1:22")
        assert done.stdout.startswith("SSH-2.0-") and "prohibited" not in done.stderr
    finally:
        applied(host, ROLE)
    assert "administratively prohibited" in login(host, "-W", "127.0.0.1:22").stderr


def test_old_host_keys_can_still_be_shown(host: Host, forgiven: None) -> None:
    try:
        applied(host, ROLE, ssh_hardening_host_keys="compatible")
        done = subprocess.run(
            ["ssh-keyscan", "-t", "ecdsa,rsa", address_of(host)], capture_output=True, text=True, check=True
        )
        for name in ("ecdsa", "rsa"):
            assert host.check_output(f"cut -d' ' -f2 /etc/ssh/ssh_host_{name}_key.pub") in done.stdout
    finally:
        applied(host, ROLE)


def test_the_port_moves_when_a_run_comes_in_by_the_new_one(host: Host) -> None:
    try:
        said = applied(host, ROLE, ssh_hardening_ports=[2222])
        assert "Port 22 stays open because this run came in by it" in " ".join(said.split())
        assert listening(host) == {22, 2222} and gets_in(host, 2222)
        assert not changed(applied(host, ROLE, ssh_hardening_ports=[2222]))
        assert changed(applied(host, ROLE, ssh_hardening_ports=[2222], ansible_port=2222))
        assert listening(host) == {2222} and gets_in(host, 2222)
        assert not changed(applied(host, ROLE, ssh_hardening_ports=[2222], ansible_port=2222))
    finally:
        port = 2222 if 22 not in listening(host) else 22
        applied(host, ROLE, ansible_port=port)
        applied(host, ROLE)
    assert listening(host) == {22} and gets_in(host)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ssh_hardening_ports": []}, "ssh_hardening_ports is empty; name at least one port"),
        ({"ssh_hardening_ports": [0]}, "ports are whole numbers between 1 and 65535"),
        ({"ssh_hardening_ports": [22, 22]}, "name each port once"),
        ({"ssh_hardening_permit_root_login": True}, "must be one of: no, prohibit-password, forced-commands-only"),
        ({"ssh_hardening_allow_users": ["fleet root"]}, "ssh_hardening_allow_users has 'fleet root'; it takes one name or pattern"),
        ({"ssh_hardening_max_startups": "10"}, "it is start:percent:full"),
        ({"ssh_hardening_rollback_seconds": 20}, "ssh_hardening_rollback_seconds is 20; the proof may take"),
        ({"ssh_hardening_authorized_keys": [{"user": "fleet", "keys": ["AAAA"]}]}, "keys[0] is no public key"),
        ({"ssh_hardening_authorized_keys": [{"user": "fleet", "keys": ["-----BEGIN OPENSSH PRIVATE KEY-----"]}]}, "is a private key"),
        ({"ssh_hardening_host_key": "strict"}, "ssh_hardening_host_key is not a variable of the role ssh_hardening; did you mean"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_inputs_that_cannot_be_right_are_refused(host: Host, wrong: dict[str, object], words: str) -> None:
    before = host.check_output("cat /etc/ssh/sshd_config.d/*")
    said = refused(host, ROLE, **wrong)
    assert words in said
    assert host.check_output("cat /etc/ssh/sshd_config.d/*") == before
