"""Everything that could lock one out, each tried on a server that the role has not touched. In the end the old way in always works."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.hosts import hosts
from tests.network import address_of
from tests.roles import ROOT, applied, changed, environment, host_name, refused, role_command
from tests.ssh_logins import DROP_IN, GUARD, ROLE, SSH, UNIT, effective, gets_in, listening, unguarded, wait

testinfra_hosts = ["docker://ssh-hardening-debian12"]
pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture
def closed_port(host: Host, bare: None) -> Iterator[None]:
    """A firewall that lets nobody in by port 2222."""
    host.check_output(
        "printf 'table inet drill {\\n chain input {\\n type filter hook input priority 0\\n tcp dport 2222 drop\\n }\\n}\\n' | nft -f -"
    )
    yield
    host.run("nft delete table inet drill")


def is_untouched(host: Host) -> bool:
    """Whether the server is the one of the distribution, and a new login works."""
    return (
        gets_in(host)
        and listening(host) == {22}
        and effective(host, "passwordauthentication") == ["yes"]
        and not host.file(DROP_IN).exists
        and unguarded(host)
    )


def test_a_user_without_a_key_is_not_locked_out(host: Host) -> None:
    host.check_output("useradd --create-home keyless")
    try:
        said = refused(host, ROLE, ssh_hardening_login_users=["keyless"])
        assert (
            "Nothing has been changed. keyless (ssh_hardening_login_users), could not log in any more: keyless has no authorised key"
            in said
        )
        assert is_untouched(host)
    finally:
        host.check_output("userdel --remove keyless")


def test_who_logs_in_with_a_password_is_not_locked_out(host: Host) -> None:
    """Ansible itself has no key for this user."""
    password = secrets.token_hex(8)
    host.check_output(
        "useradd --create-home --shell /bin/bash worded"
        f" && echo 'worded:{password}' | chpasswd && echo 'worded ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/worded"
    )
    way = {"ansible_user": "worded", "ansible_password": password, "ansible_ssh_password_mechanism": "ssh_askpass"}
    try:
        said = refused(host, ROLE, **way)
        assert "worded, as whom Ansible logs in, could not log in any more: worded has no authorised key" in said
        assert is_untouched(host)
        # a key that is not the one of this machine: only a login that is really tried can tell
        host.check_output(
            "install -d -m 0700 -o worded /home/worded/.ssh"
            " && install -m 0600 -o worded /etc/ssh/ssh_host_ed25519_key.pub /home/worded/.ssh/authorized_keys"
        )
        said = refused(host, ROLE, **way)
        assert (
            "No login with a key alone works now, and after the change nothing else does" in said
            and "Permission denied" in said
        )
        assert is_untouched(host)
    finally:
        host.run("pkill -u worded; sleep 1; userdel --remove worded; rm /etc/sudoers.d/worded")


@pytest.mark.parametrize("name", ["groups", "users"])
def test_a_list_without_the_login_is_refused(host: Host, name: str) -> None:
    said = refused(host, ROLE, **{f"ssh_hardening_allow_{name}": ["root", "nobody"]})
    assert "Nothing has been changed. fleet, as whom Ansible logs in, could not log in any more: Allow" in said
    assert is_untouched(host)


def test_a_list_with_a_group_of_the_login_is_right(host: Host) -> None:
    assert changed(applied(host, ROLE, ssh_hardening_allow_groups=["root", "fle?t"]))
    assert effective(host, "allowgroups") == ["root", "fle?t"] or effective(host, "allowgroups") == ["root fle?t"]
    assert gets_in(host)


@pytest.mark.usefixtures("closed_port")
def test_a_port_that_a_firewall_closes_is_taken_back_at_once(host: Host) -> None:
    said = refused(host, ROLE, ssh_hardening_ports=[2222], ssh_hardening_proof_seconds=6)
    assert "No new login works after the change (port 2222)" in said
    assert "does a firewall between here and the host close port 2222?" in said
    assert "is as it was before this run" in said
    assert is_untouched(host)


@pytest.mark.usefixtures("closed_port")
def test_a_run_that_is_killed_before_the_proof_is_taken_back_by_the_host(host: Host) -> None:
    started = killed_before_the_proof(host, seconds=30)
    assert started and not unguarded(host) and effective(host, "passwordauthentication") == ["no"]
    assert wait(lambda: is_untouched(host), 60)
    assert "a change of SSH was not proved: the former state is back" in host.check_output(
        f"journalctl -t {UNIT} --no-pager"
    )
    # the next one converges
    host.check_output("nft delete table inet drill")
    assert changed(applied(host, ROLE, ssh_hardening_ports=[2222]))
    assert gets_in(host, 2222) and unguarded(host) and effective(host, "passwordauthentication") == ["no"]


@pytest.mark.usefixtures("closed_port")
def test_a_run_that_comes_before_the_host_takes_it_back_goes_on_from_what_was_proved(host: Host) -> None:
    assert killed_before_the_proof(host, seconds=600)
    refused(host, ROLE, ssh_hardening_ports=[2222], ssh_hardening_proof_seconds=6)
    assert is_untouched(host)


@pytest.mark.usefixtures("closed_port")
def test_a_reboot_before_the_proof_takes_it_back(host: Host) -> None:
    assert killed_before_the_proof(host, seconds=600)
    hosts.docker("restart", "--time=1", host_name(host))
    assert wait(lambda: is_untouched(host), 60), host.run(
        f"systemctl list-jobs; journalctl -b -u {UNIT}-at-boot --no-pager; ls {GUARD}*"
    ).stdout


def killed_before_the_proof(host: Host, seconds: int) -> bool:
    """Start a run whose proof cannot succeed, and kill it when the change is in use. Whether it was."""
    command = role_command(
        host, ROLE, ssh_hardening_ports=[2222], ssh_hardening_rollback_seconds=seconds, ssh_hardening_proof_seconds=8
    )
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(ROLE),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        in_use = wait(lambda: listening(host) == {22, 2222}, 60)
        os.killpg(process.pid, signal.SIGKILL)
    return in_use


def test_a_broken_file_of_somebody_else_is_named(host: Host) -> None:
    host.check_output("printf 'UseDNS no\\nPermitRootLogni no\\n' >/etc/ssh/sshd_config.d/50-broken.conf")
    said = refused(host, ROLE)
    assert "Nothing has been changed. sshd refuses the configuration that the host has now" in said
    assert "/etc/ssh/sshd_config.d/50-broken.conf" in said and "PermitRootLogni" in said
    host.check_output("rm /etc/ssh/sshd_config.d/50-broken.conf")
    assert is_untouched(host)


def test_a_port_of_somebody_else_is_named(host: Host) -> None:
    """Ports of all files add up."""
    host.check_output("echo 'Port 2022' >/etc/ssh/sshd_config.d/50-other.conf")
    said = refused(host, ROLE)
    assert "sshd would listen on port 2022 as well" in said and "/etc/ssh/sshd_config.d/50-other.conf:1" in said
    host.check_output("rm /etc/ssh/sshd_config.d/50-other.conf")
    assert is_untouched(host)


def test_a_line_that_comes_before_all_files_is_named(host: Host) -> None:
    host.check_output("cp -p /etc/ssh/sshd_config /tmp/kept && sed -i '1i MaxAuthTries 20' /etc/ssh/sshd_config")
    try:
        said = refused(host, ROLE)
        assert "MaxAuthTries would be 20 and not 4, because of /etc/ssh/sshd_config:1" in said
        assert is_untouched(host)
    finally:
        host.check_output("mv /tmp/kept /etc/ssh/sshd_config")


def test_a_configuration_that_reads_no_other_files_gets_to_read_them(host: Host) -> None:
    host.check_output("cp -p /etc/ssh/sshd_config /tmp/kept && sed -i '/^Include/d' /etc/ssh/sshd_config")
    try:
        assert changed(applied(host, ROLE))
        assert effective(host, "passwordauthentication") == ["no"] and not changed(applied(host, ROLE))
    finally:
        host.check_output("mv /tmp/kept /etc/ssh/sshd_config")


def test_a_controller_that_knows_another_key_is_told(host: Host) -> None:
    known = SSH / "known_hosts"
    kept = known.read_text()
    place = address_of(host)
    ecdsa, ed25519 = (
        host.check_output(f"cut -d' ' -f1,2 /etc/ssh/ssh_host_{kind}_key.pub") for kind in ("ecdsa", "ed25519")
    )
    try:
        known.write_text(f"{place} {ecdsa}\n")
        assert gets_in(host)
        said = refused(host, ROLE)
        assert "by a key of the type ecdsa-sha2-nistp256 only, which the host would not show any more" in said
        assert f"`{place} {ed25519}`" in said
        assert is_untouched(host)
        assert changed(applied(host, ROLE, ssh_hardening_host_keys="compatible"))
        assert gets_in(host)
    finally:
        known.write_text(kept)


def test_root_as_the_only_login_is_kept(host: Host) -> None:
    """Many GPU clouds have no other user."""
    host.check_output(
        "install -d -m 0700 /root/.ssh && cp /home/fleet/.ssh/authorized_keys /root/.ssh/ && chown -R root: /root/.ssh"
    )
    try:
        said = refused(host, ROLE, ansible_user="root")
        assert "root, as whom Ansible logs in, could not log in any more: PermitRootLogin is no" in said
        assert is_untouched(host)
        assert changed(applied(host, ROLE, ansible_user="root", ssh_hardening_permit_root_login="prohibit-password"))
        assert effective(host, "permitrootlogin", "root") == ["without-password"]
    finally:
        host.check_output("rm -r /root/.ssh")


def test_through_the_engine_a_login_has_to_be_named(host: Host) -> None:
    """Where Ansible does not come by SSH, the host proves what it can itself."""
    way = {"ansible_connection": "community.docker.docker", "ansible_user": "root", "ansible_become": False}
    said = refused(host, ROLE, **way)
    assert "name at least one user in ssh_hardening_login_users" in said
    assert is_untouched(host)
    assert changed(applied(host, ROLE, **way, ssh_hardening_login_users=["fleet"]))
    assert gets_in(host) and unguarded(host)
