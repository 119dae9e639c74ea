# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""One nftables table of a host: looked at, tried under a timer that would undo it, kept.

Nothing at rest changes while new rules are only tried: the file that is loaded at boot is written when they have been proved. So a timer that
fires and a host that reboots both lead back to the rules of before.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ansible_collections.gpufleet.llm.plugins.module_utils import systemctl
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.firewall_others_host import FIREWALLD, PERSISTENT, Others
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Command

TABLE = ("inet", "vllm_fleet")
UNIT = "vllm-fleet-firewall.service"
TIMER = "vllm-fleet-firewall-rollback"
BOOT_FILE = "/etc/vllm-fleet/firewall.nft"
RECORD = "/var/lib/vllm-fleet/firewall.json"
REPLACE = "table inet vllm_fleet\ndelete table inet vllm_fleet\n"
# Loads the tables of an administrator.
NFTABLES = "nftables.service"
# Counts connections without refusing any.
LEARN = """\
table inet vllm_fleet {
	chain input { type filter hook input priority filter; policy accept; ct state established accept; }
	chain output { type filter hook output priority filter; policy accept; ct state established accept; }
	chain forward { type filter hook forward priority filter; policy accept; ct state established accept; }
}
"""
LEARN_SECONDS = 3


class FirewallError(Exception):
    """What went wrong, in words for the operator."""


def digest(text: str) -> str:
    """A text by its hash."""
    return hashlib.sha256(text.encode()).hexdigest()


def from_itself(address: str, server: str) -> bool:
    """Whether a connection comes from the host that it arrived at."""
    found = ipaddress.ip_address(address)
    return address == server or (getattr(found, "ipv4_mapped", None) or found).is_loopback


@dataclass
class Look:
    """What was found."""

    in_place: bool  # everything is as wanted, now and after a boot
    reason: str  # what is not
    unfinished: bool  # an earlier run did not get to its end
    others: list[str]  # other firewalls that are active and can be switched off or opened
    tables: list[str]  # of nftables, that refuse what they do not name
    flushes: bool  # nftables.service would delete everybody's tables
    boot_text: str  # what is loaded at boot


@dataclass
class Firewall:
    """The table of this host."""

    command: Command
    root: Path = Path("/")
    proc: Path = Path("/proc")
    seconds_to_learn: float = LEARN_SECONDS
    boot_file: Path = field(init=False)
    record: Path = field(init=False)
    previous: Path = field(init=False)
    tried: Path = field(init=False)

    def __post_init__(self) -> None:
        self.boot_file = self.root / BOOT_FILE[1:]
        self.record = self.root / RECORD[1:]
        # There while rules are loaded that nobody has proved.
        self.previous = self.root / "run/vllm-fleet/firewall/previous.nft"
        self.tried = self.root / "run/vllm-fleet/firewall/tried.nft"

    # --- looking

    def listed(self) -> str:
        """The table as the kernel has it, empty when there is none."""
        status, output, _ = self.command(["nft", "--stateless", "list", "table", *TABLE])
        return output if status == 0 else ""

    def look(self, text: str) -> Look:
        """Compare what is there with what is wanted."""
        units = self.units([UNIT, FIREWALLD, PERSISTENT, NFTABLES])
        boot_text = read(self.boot_file)
        unfinished = self.previous.exists()
        listed = self.listed()
        try:
            record = json.loads(read(self.record) or "{}")
        except ValueError:
            record = {}
        reason = ""
        if unfinished:
            reason = "an earlier run did not get to its end"
        elif boot_text != text:
            reason = "the rules are other ones" if boot_text else "there are no rules yet"
        elif record != {"rules": digest(text), "listed": digest(listed)}:
            reason = "the table was changed by somebody else" if listed else "the table is not loaded"
        elif units.get(UNIT) != ("active", "enabled"):
            reason = f"{UNIT} is not enabled or did not run"
        others, tables = Others(self.command, TABLE, self.root, self.proc).look(units)
        return Look(
            in_place=not reason,
            reason=reason,
            unfinished=unfinished,
            others=others,
            tables=tables,
            flushes=(units.get(NFTABLES, ("", ""))[0] == "active" or units.get(NFTABLES, ("", ""))[1] == "enabled")
            and any(
                line.split() == ["flush", "ruleset"]
                for line in read(self.root / "etc/nftables.conf").replace(";", "").splitlines()
            ),
            boot_text=boot_text,
        )

    def units(self, names: Sequence[str]) -> dict[str, tuple[str, str]]:
        """State of units: active or not, enabled or not."""
        _, output, _ = self.command(["systemctl", "show", "--property=Id,ActiveState,UnitFileState", *names])
        found = systemctl.by_unit(output)
        return {name: (unit.get("ActiveState", ""), unit.get("UnitFileState", "")) for name, unit in found.items()}

    def client(self) -> tuple[str, int] | None:
        """Address that this run's SSH connection comes from, and the port at which it arrived; nothing without SSH, or by a tunnel.

        What a tunnel brings (SSM, a port forwarding) comes from the host itself, which no rule shuts out.
        sudo takes the variable away, so those that called this process are asked, too.
        """
        process = os.getpid()
        while process > 1:
            for entry in self.bytes(f"{process}/environ").split(b"\0"):
                name, _, value = entry.decode(errors="replace").partition("=")
                if name == "SSH_CONNECTION" and len(words := value.split()) == 4:
                    address = words[0].partition("%")[0]
                    return None if from_itself(address, words[2].partition("%")[0]) else (address, int(words[3]))
            state = self.bytes(f"{process}/stat").decode(errors="replace").rpartition(")")[2].split()
            process = int(state[1]) if len(state) > 1 else 0
        return None

    def bytes(self, name: str) -> bytes:
        """A file of /proc; empty when it cannot be read."""
        try:
            return (self.proc / name).read_bytes()
        except OSError:
            return b""

    def uplinks(self) -> list[str]:
        """Interfaces that lead out of the host: those with a default route, and bridges over a real device."""
        found = set()
        for line in read(self.proc / "net/route").splitlines()[1:]:
            words = line.split()
            if len(words) > 7 and words[1] == words[7] == "00000000":
                found.add(words[0])
        for line in read(self.proc / "net/ipv6_route").splitlines():
            words = line.split()
            if len(words) > 9 and words[0] == "0" * 32 and words[1] == "00" and words[9] != "lo":
                found.add(words[9])
        interfaces = self.root / "sys/class/net"
        for member in interfaces.glob("*/brif/*"):
            if (interfaces / member.name / "device").exists():
                found.add(member.parents[1].name)
        return sorted(found)

    # --- changing

    def run(self, *command: str) -> str:
        """Run a command that has to succeed."""
        status, output, error = self.command(list(command))
        if status:
            raise FirewallError(
                f"`{' '.join(command)}` failed: {(error or output).strip() or f'it ended with {status}'}"
            )
        return output

    def try_out(self, text: str, seconds: int) -> None:
        """Load rules, with a timer that brings those of before back."""
        self.undo()
        write(self.tried, text)
        self.run("nft", "--check", "--file", str(self.tried))
        before = self.listed()
        restore = self.previous.with_name("restore.nft")
        # Those of before as they were written: nft 1.0.6 does not read all that it lists (`ct original proto-dst { 80, 443 }`).
        write(restore, (before and read(self.boot_file)) or REPLACE + before)
        self.run("nft", "--check", "--file", str(restore))
        restore.replace(self.previous)
        # what a timer of before left behind would keep the name
        self.command(["systemctl", "stop", f"{TIMER}.timer", f"{TIMER}.service"])
        self.command(["systemctl", "reset-failed", f"{TIMER}.timer", f"{TIMER}.service"])
        try:
            if not before:
                self.learn()
            self.run(
                "systemd-run", "--quiet", f"--unit={TIMER}", f"--on-active={seconds}", "--timer-property=AccuracySec=100ms",
                "--description=The firewall rules of before come back", "/bin/sh", "-c",
                f"nft --file {self.previous} && rm {self.previous}",
            )  # fmt: skip
            self.run("nft", "--file", str(self.tried))
        except FirewallError:
            self.undo()
            raise
        write(self.tried.with_suffix(".json"), json.dumps({"rules": digest(text), "listed": digest(self.listed())}))

    def learn(self) -> None:
        """Let the kernel see the connections that are open.

        It counts connections only while some rule asks for it. One from here to elsewhere that was open before would look like a new one
        from there, and be refused: the answers that a gateway is streaming would break off.
        """
        write(self.tried.with_name("learn.nft"), REPLACE + LEARN)
        self.run("nft", "--file", str(self.tried.with_name("learn.nft")))
        time.sleep(self.seconds_to_learn)

    def keep(self, text: str) -> None:
        """Stop the timer, and load the rules at every boot from now on."""
        record = read(self.tried.with_suffix(".json"))
        self.command(["systemctl", "stop", f"{TIMER}.timer", f"{TIMER}.service"])
        now = json.dumps({"rules": digest(text), "listed": digest(self.listed())})
        if not self.previous.exists() or record != now:
            raise FirewallError(
                "the rules were undone by their timer, or changed by somebody else, before they had been proved; "
                "with a slow connection, raise firewall_rollback_seconds"
            )
        write(self.boot_file, text, durable=True)
        self.run("systemctl", "enable", "--quiet", UNIT)
        # Loads the very same rules from that file: what happens at boot has happened once.
        self.run("systemctl", "reload-or-restart", UNIT)
        write(self.record, json.dumps({"rules": digest(text), "listed": digest(self.listed())}), durable=True)
        self.previous.unlink()

    def undo(self) -> bool:
        """Bring the rules of before back, now. Whether there was anything to undo."""
        if not self.previous.exists():
            return False
        # the timer goes on until they are back
        self.run("nft", "--file", str(self.previous))
        self.command(["systemctl", "stop", f"{TIMER}.timer", f"{TIMER}.service"])
        self.previous.unlink(missing_ok=True)
        return True

    def take_over(self) -> None:
        """Open what iptables closes. What can be switched off as a whole is for its own program."""
        if failed := Others(self.command, TABLE, self.root, self.proc).open(self.units([PERSISTENT])):
            raise FirewallError(f"iptables could not be opened: `{'`, `'.join(failed)}` failed")
