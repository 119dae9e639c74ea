"""A hardened server, as those who log in, or must not, meet it. The files after this one, by name, begin with a bare one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from testinfra.host import Host

from tests.network import address_of
from tests.roles import ROOT, applied, changed, environment, host_name, role_command
from tests.ssh_logins import ROLE, SSH, effective, login, unguarded

POLICIES = {"debian12": "Hardened Debian 12 (version 3)", "debian13": "Hardened Debian 13 (version 1)"}


def test_an_independent_audit_passes(host: Host, forgiven: None) -> None:
    policy = POLICIES[host_name(host).rpartition("-")[2]]
    done = subprocess.run(
        [ROOT / ".venv/bin/ssh-audit", "-jj", "-P", policy, address_of(host)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["policy"], told["passed"]) == (policy, True), told


def test_the_audit_can_fail(host: Host, forgiven: None) -> None:
    """The policy of the other release does not pass."""
    (policy,) = (policy for name, policy in POLICIES.items() if not host_name(host).endswith(name))
    done = subprocess.run(
        [ROOT / ".venv/bin/ssh-audit", "-P", policy, address_of(host)], capture_output=True, check=False
    )
    assert done.returncode != 0


def test_only_keys_let_one_in(host: Host, forgiven: None) -> None:
    done = login(host, "-o", "PreferredAuthentications=password,keyboard-interactive", "-v")
    assert done.returncode != 0
    assert "Authentications that can continue: publickey\n" in done.stderr.replace("\r", "")
    assert effective(host, "passwordauthentication") == effective(host, "kbdinteractiveauthentication") == ["no"]


def test_root_does_not_get_in_even_with_a_key(host: Host, forgiven: None) -> None:
    host.check_output("install -d -m 0700 /root/.ssh && cp /home/fleet/.ssh/authorized_keys /root/.ssh/")
    try:
        assert "Permission denied (publickey)" in login(host, user="root").stderr
    finally:
        host.check_output("rm -r /root/.ssh")


def test_nothing_is_forwarded(host: Host) -> None:
    assert "administratively prohibited" in login(host, "-W", "127.0.0.1:22").stderr
    assert effective(host, "allowagentforwarding") == effective(host, "x11forwarding") == ["no"]
    done = login(host, "-o", "ExitOnForwardFailure=yes", "-R", "2345:127.0.0.1:22")
    assert done.returncode != 0 and "remote port forwarding failed" in done.stderr


def test_the_host_shows_two_keys_and_keeps_the_others(host: Host, forgiven: None) -> None:
    done = subprocess.run(
        ["ssh-keyscan", "-t", "ed25519,rsa,ecdsa", address_of(host)], capture_output=True, text=True, check=True
    )
    shown = {line.split()[1]: line.split()[2] for line in done.stdout.splitlines() if not line.startswith("#")}
    assert set(shown) == {"ssh-ed25519", "ssh-rsa"}
    assert shown["ssh-rsa"] == host.check_output("cut -d' ' -f2 /etc/ssh/ssh_host_rsa_4096_key.pub")
    assert shown["ssh-ed25519"] in (SSH / "known_hosts").read_text()
    for name in ("rsa", "ecdsa", "ed25519"):
        assert host.run(f"ssh-keygen -lf /etc/ssh/ssh_host_{name}_key").rc == 0
    assert host.check_output("stat -c %a /etc/ssh/ssh_host_rsa_4096_key") == "600"


def test_the_primes_are_long_and_the_package_has_its_own_file(host: Host) -> None:
    (file,) = effective(host, "modulifile")
    sizes = {int(size) for size in host.check_output(f"awk '{{print $5}}' {file}").split()}
    assert sizes and min(sizes) >= 3071
    assert "/etc/ssh/moduli" not in host.check_output("dpkg --verify openssh-server openssh-client; true")


def test_nothing_waits_to_take_the_change_back(host: Host) -> None:
    assert unguarded(host)
    assert host.check_output("systemctl --failed --no-legend") == ""
    assert "masked" not in host.check_output("systemctl is-enabled ssh.service ssh.socket; true")


def test_a_second_run_makes_one_call(host: Host, tmp_path: Path) -> None:
    counted = {
        "ANSIBLE_CALLBACKS_ENABLED": "gpufleet.llm.remote_calls",
        "REMOTE_CALLS_FILE": str(tmp_path / "calls.json"),
    }
    done = subprocess.run(
        role_command(host, ROLE),
        cwd=ROOT,
        env={**environment(ROLE), **counted},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and not changed(done.stdout), done.stdout
    calls = json.loads((tmp_path / "calls.json").read_text())[host_name(host)]
    assert calls["roles"] == {"gpufleet.llm.host_support": 1, f"gpufleet.llm.{ROLE}": 1}, calls


def test_a_later_file_of_somebody_else_does_not_win(host: Host) -> None:
    file = "/etc/ssh/sshd_config.d/50-cloud-init.conf"
    host.check_output(f"echo 'PasswordAuthentication yes' >{file} && systemctl reload ssh")
    try:
        assert effective(host, "passwordauthentication") == ["no"]
        assert not changed(applied(host, ROLE))
    finally:
        host.check_output(f"rm {file} && systemctl reload ssh")
