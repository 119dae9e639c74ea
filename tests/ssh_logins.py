"""What the tests of the role ssh_hardening need: logins that have nothing to do with Ansible's, and what a host says of SSH."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from testinfra.host import Host

from tests.roles import ROOT, host_name

SSH = ROOT / ".cache/molecule-ssh_hardening"  # made by tests/hosts/hosts.py
ROLE = "ssh_hardening"
DROP_IN = "/etc/ssh/sshd_config.d/00-00-vllm-fleet.conf"
GUARD = "/var/lib/vllm-fleet/ssh-rollback"
UNIT = "vllm-fleet-ssh-rollback"
# The server as the distribution has it: nothing of the role, of a drill or of a penalty is left. Sessions end.
BARE = f"""
systemctl stop {UNIT}.timer 2>/dev/null
nft delete table inet drill 2>/dev/null
rm -rf /var/lib/vllm-fleet/tree/ssh_hardening {GUARD} {GUARD}.undoing /etc/systemd/system/ssh.socket.d
rm -f /etc/ssh/sshd_config.d/*.conf /etc/systemd/system/{UNIT}* /etc/systemd/system/*.wants/{UNIT}*
systemctl daemon-reload
systemctl disable --now ssh.socket ssh.service 2>/dev/null
systemctl enable --now ssh.service 2>/dev/null
"""


def login(
    host: Host, *options: str, user: str = "fleet", port: int = 22, command: str = "true"
) -> subprocess.CompletedProcess[str]:
    """A login of its own, by the key of the scenario unless the options say otherwise."""
    words = [
        "ssh", "-F", str(SSH / "config"), *options, "-o", "ControlPath=none", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
        "-i", str(SSH / "id_ed25519"), "-p", str(port), f"{user}@{host_name(host)}", command,
    ]  # fmt: skip
    return subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def gets_in(host: Host, port: int = 22) -> bool:
    """Whether a new login works."""
    return login(host, port=port).returncode == 0


def effective(host: Host, name: str, user: str = "fleet") -> list[str]:
    """What sshd says of a directive."""
    lines = host.check_output(f"sshd -T -C user={user},host=x,addr=192.0.2.1,laddr=192.0.2.2,lport=22").splitlines()
    return [line.partition(" ")[2] for line in lines if line.split()[0] == name]


def listening(host: Host) -> set[int]:
    """The ports of SSH that are open on the host."""
    lines = host.check_output("ss -ltnH").splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in lines} & {22, 2222}


def unguarded(host: Host) -> bool:
    """Whether nothing waits to take a change back."""
    left = host.check_output(
        f"ls -d {GUARD}* /etc/systemd/system/{UNIT}* /etc/systemd/system/*.wants/{UNIT}* 2>/dev/null; true"
    )
    return left == "" and "active" not in host.run(f"systemctl is-active {UNIT}.timer").stdout.replace("inactive", "")


def wait(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.3)
    return True
