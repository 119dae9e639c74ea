#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""A change of SSH that is taken back by itself unless it is proved."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ssh_change
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Watches over a change of SSH, and has sshd take it over
description:
  - V(armed) remembers files and starts a timer on the host that puts them back. V(reloaded) has sshd, or the socket that systemd listens on for
    it, take over its configuration, and waits until it has. V(proved) stops the timer, V(undone) puts the files back now.
  - A reboot before the proof takes the change back as well.
options:
  state:
    description: What to do.
    type: str
    choices: [armed, reloaded, proved, undone]
    required: true
  save:
    description: Files that the change touches, for V(armed). Those that are not there are removed when the change is taken back.
    type: list
    elements: str
    default: []
  seconds:
    description: After how many seconds the change is taken back, for V(armed).
    type: int
    default: 180
  socket:
    description: Whether systemd listens for sshd, for V(reloaded).
    type: bool
    default: false
  moves:
    description: Whether systemd has to listen elsewhere, for V(armed) and V(reloaded).
    type: bool
    default: false
  ports:
    description: Ports that have to listen, for V(reloaded).
    type: list
    elements: int
    default: []
  make_keys:
    description: Host keys to make, for V(armed), each with C(path), C(type) and C(bits). A file that is there is never written.
    type: list
    elements: dict
    default: []
  enable:
    description: Whether the server is to start with the host from now on, for V(proved).
    type: bool
    default: false
  make_moduli:
    description: Whether to write the file of long moduli, for V(armed).
    type: bool
    default: false
attributes:
  check_mode:
    description: Does nothing.
    support: none
"""

EXAMPLES = r"""
- name: The host takes the change back by itself unless it is proved
  gpufleet.llm.ssh_change:
    state: armed
    save: [/etc/ssh/sshd_config.d/00-00-vllm-fleet.conf]
    seconds: 180
"""

RETURN = r"""
host_keys:
  description: The public keys that were made, with V(armed).
  returned: when state is armed
  type: list
  elements: str
undone:
  description: Whether something was taken back.
  returned: when state is undone
  type: bool
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import ssh
from ansible_collections.gpufleet.llm.plugins.module_utils.host_sockets import listeners
from ansible_collections.gpufleet.llm.plugins.module_utils.ssh_guard_host import Guard, GuardError, command

# Seconds that sshd may take to listen again, and that are waited for a sign that it has read its files.
LISTEN_SECONDS, READ_SECONDS = 15.0, 5.0


def make_key(path: str, kind: str, bits: int) -> str:
    """A host key, made beside its place: half of one never has its name. Returns the public part."""
    aside = f"{path}.{os.getpid()}"
    size = ["-b", str(bits)] if bits else []
    command("ssh-keygen", "-q", "-t", kind, *size, "-N", "", "-C", f"root@{os.uname().nodename}", "-f", aside)
    Path(f"{aside}.pub").rename(f"{path}.pub")
    os.link(aside, path)  # unlike a rename it does not replace what is there
    Path(aside).unlink()
    return Path(f"{path}.pub").read_text().strip()


def write_moduli() -> None:
    """The primes that are long enough, in a file of their own: the package's file stays as it is, so that it can be upgraded."""
    aside = Path(f"{ssh.LONG_MODULI}.new")
    if text := ssh.long_moduli(Path(ssh.MODULI).read_text()):
        aside.write_text(text)
        aside.chmod(0o644)
        aside.rename(ssh.LONG_MODULI)


def sshd_traces() -> tuple[str, Any]:
    """What changes when sshd begins anew: its place in memory, or its sockets where that cannot be seen."""
    pid = command("systemctl", "show", "ssh.service", "--property=MainPID", "--value", check=False).stdout.strip()
    try:
        memory = Path(f"/proc/{pid}/auxv").read_bytes() if pid not in ("", "0") else b""
    except OSError:
        memory = b""
    return pid, memory or {inode for _port, _address, inode in listeners()}


def wait_until(holds: Any, seconds: float) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def is_active(unit: str) -> bool:
    """Whether a unit runs."""
    return command("systemctl", "is-active", "--quiet", unit, check=False).returncode == 0


def reload(socket: bool, moves: bool, ports: Sequence[int]) -> None:
    """Have the configuration taken over. Sessions that are open stay open."""
    if socket:
        # Behind a socket a reload ends sshd ("Cannot bind any address", 10.0). Stopping ends the listener alone (KillMode=process), the next
        # connection starts it anew, and systemd goes on listening, unless it is to listen elsewhere.
        command("systemctl", "daemon-reload")
        command("systemctl", "stop", *(["ssh.socket"] if moves else []), "ssh.service")
        command("systemctl", "start", "ssh.socket")
    elif is_active("ssh.service"):
        before = sshd_traces()
        command("systemctl", "reload", "ssh.service")
        # The reload only sends a signal. Until sshd has heeded it, whoever asks meets the old configuration.
        wait_until(lambda: sshd_traces() != before, READ_SECONDS)
    else:
        command("systemctl", "start", "ssh.service")
    wanted = set(ports)
    if not wait_until(lambda: wanted <= {port for port, _address, _inode in listeners()}, LISTEN_SECONDS):
        deaf = sorted(wanted - {port for port, _address, _inode in listeners()})
        raise GuardError(
            f"sshd does not listen on {', '.join(map(str, deaf))} after it was reloaded; see journalctl -u ssh.service -u ssh.socket"
        )


ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["armed", "reloaded", "proved", "undone"], "required": True},
    "save": {"type": "list", "elements": "str", "default": []},
    "seconds": {"type": "int", "default": 180},
    "socket": {"type": "bool", "default": False},
    "moves": {"type": "bool", "default": False},
    "ports": {"type": "list", "elements": "int", "default": []},
    "make_keys": {"type": "list", "elements": "dict", "default": [], "no_log": False},
    "make_moduli": {"type": "bool", "default": False},
    "enable": {"type": "bool", "default": False},
}


def main() -> None:
    """Do what the state asks for."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS)
    given, guard = module.params, Guard()
    try:
        if given["state"] == "armed":
            Path("/run/sshd").mkdir(
                mode=0o755, exist_ok=True
            )  # `sshd -t` wants it, also where the service does not run
            made = [make_key(key["path"], key["type"], int(key["bits"])) for key in given["make_keys"]]
            if given["make_moduli"]:
                write_moduli()
            guard.arm(given["save"], given["seconds"], given["moves"])
            module.exit_json(changed=True, host_keys=made)
        if given["state"] == "reloaded":
            reload(given["socket"], given["moves"], given["ports"])
            module.exit_json(changed=True)
        if given["state"] == "proved":
            if not guard.prove():
                module.fail_json(
                    msg="The proof came too late: the host has taken the change back already. ssh_hardening_rollback_seconds may be too short"
                )
            if given["enable"]:
                # Without a reload: systemd 257 forgets that the service runs when its alias sshd.service comes back meanwhile.
                command("systemctl", "enable", "--no-reload", "--quiet", "ssh.service")
            module.exit_json(changed=given["enable"])
        module.exit_json(changed=True, undone=guard.undo())
    except (GuardError, OSError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
