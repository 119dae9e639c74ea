"""A table is tried, kept or undone, and what is left when a run dies at any point of it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import firewall_host
from ansible_collections.gpufleet.llm.plugins.module_utils.firewall_host import Firewall, FirewallError, Look
from ansible_collections.gpufleet.llm.plugins.module_utils.firewall_obstacles import beside, inside, obstacles

OLD, NEW, LEARN = "old rules\n", "new rules\n", firewall_host.LEARN
TIMER = firewall_host.TIMER


class KilledError(Exception):
    """The run was killed."""


class Host:
    """Stands in for nft and systemd: one table, one timer, one unit, and files that are really there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.table = ""
        self.timer = ""
        self.unit = {"ActiveState": "inactive", "UnitFileState": "disabled"}
        self.others: dict[str, dict[str, str]] = {}
        self.refuses = ""
        self.dies_after: int | None = None
        self.proved = False
        self.firewall = Firewall(self.command, root=root, seconds_to_learn=0)

    def load(self, path: Path) -> None:
        """What `nft -f` does."""
        self.table = path.read_text().removeprefix(firewall_host.REPLACE)

    def fire(self) -> None:
        """The timer's command."""
        assert self.timer
        found = re.fullmatch(r"nft --file (\S+) && rm (\S+)", self.timer)
        assert found and found[1] == found[2]
        self.load(Path(found[1]))
        Path(found[1]).unlink()
        self.timer = ""

    def boot(self) -> None:
        """A reboot: /run is empty, the unit loads its file if it is enabled."""
        self.table = self.timer = ""
        for path in (self.root / "run").rglob("*.*"):
            path.unlink()
        if self.unit["UnitFileState"] == "enabled":
            self.load(self.firewall.boot_file)

    def command(self, command: list[str]) -> tuple[int, str, str]:
        """What a command does, before it is found that the run died."""
        result = self.done(command)
        if self.dies_after is not None:
            if self.dies_after == 0:
                raise KilledError
            self.dies_after -= 1
        return result

    def done(self, command: list[str]) -> tuple[int, str, str]:
        if command[0] == "nft":
            if "--json" in command:
                return 0, "{}", ""
            if "list" in command:
                return (0, self.table, "") if self.table else (1, "", "No such file or directory")
            path = Path(command[-1])
            if self.refuses and self.refuses in path.read_text():
                return 1, "", "syntax error"
            if "--check" not in command:
                self.load(path)
        elif command[0] == "systemd-run":
            assert not self.timer, "the name is taken"
            self.timer = command[-1]
        elif command[1] == "stop":
            self.timer = ""
        elif command[1] == "enable":
            self.unit["UnitFileState"] = "enabled"
        elif command[1] == "reload-or-restart":
            self.unit["ActiveState"] = "active"
            self.load(self.firewall.boot_file)
        elif command[1] == "show":
            units = {firewall_host.UNIT: self.unit, **self.others}
            return (
                0,
                "\n\n".join(
                    f"Id={name}\n" + "\n".join(f"{key}={value}" for key, value in state.items())
                    for name, state in units.items()
                ),
                "",
            )
        else:
            assert command[1] == "reset-failed", command
        return 0, "", ""

    def apply(self, text: str) -> None:
        """What the role does: look, try, prove, keep."""
        self.proved = False
        if not self.firewall.look(text).in_place:
            self.firewall.try_out(text, 60)
            self.proved = True
            self.firewall.keep(text)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_rules_are_tried_kept_and_found_in_place(host: Host) -> None:
    assert host.firewall.look(NEW).reason == "there are no rules yet"
    host.firewall.try_out(NEW, 60)
    assert (host.table, bool(host.timer), host.firewall.boot_file.exists()) == (NEW, True, False)
    assert host.firewall.look(NEW).reason == "an earlier run did not get to its end"
    host.firewall.keep(NEW)
    assert (host.table, host.timer, host.firewall.boot_file.read_text()) == (NEW, "", NEW)
    assert host.firewall.look(NEW).in_place
    host.boot()
    assert host.table == NEW
    assert host.firewall.look(NEW).in_place


def test_what_is_not_as_wanted_is_told(host: Host) -> None:
    host.apply(NEW)
    assert host.firewall.look(OLD).reason == "the rules are other ones"
    host.table += "and one by hand\n"
    assert host.firewall.look(NEW).reason == "the table was changed by somebody else"
    host.table = ""
    assert host.firewall.look(NEW).reason == "the table is not loaded"
    host.table = NEW
    host.unit["UnitFileState"] = "disabled"
    assert host.firewall.look(NEW).reason == "vllm-fleet-firewall.service is not enabled or did not run"
    host.firewall.record.write_text("torn {")
    assert not host.firewall.look(NEW).in_place
    host.apply(NEW)
    assert host.firewall.look(NEW).in_place


@pytest.mark.parametrize("before", ["", OLD])
def test_undone_by_hand_by_the_timer_and_by_a_reboot(host: Host, before: str) -> None:
    if before:
        host.apply(before)
    for undo in (host.firewall.undo, host.fire, host.boot):
        host.firewall.try_out(NEW, 60)
        undo()
        assert (host.table, host.timer) == (before, "")
        assert not host.firewall.undo()
    assert host.firewall.look(before).in_place or not before


def test_the_rules_of_before_come_back_as_they_were_written(host: Host) -> None:
    """nft 1.0.6 does not read all that it lists: a set of ports of `ct original proto-dst` comes out as [invalid type]."""
    host.apply(OLD)
    host.table = host.refuses = "proto-dst { 0x50 [invalid type], 0x1bb [invalid type] }"
    host.firewall.try_out(NEW, 60)
    host.fire()
    assert host.table == OLD


def test_rules_that_the_timer_undid_are_not_kept(host: Host) -> None:
    host.apply(OLD)
    host.firewall.try_out(NEW, 60)
    host.fire()
    with pytest.raises(FirewallError, match="raise firewall_rollback_seconds"):
        host.firewall.keep(NEW)
    assert host.firewall.boot_file.read_text() == host.table == OLD


def test_rules_that_nft_refuses_change_nothing(host: Host) -> None:
    host.apply(OLD)
    host.refuses = NEW
    with pytest.raises(FirewallError, match=r"nft --check --file .* failed: syntax error"):
        host.firewall.try_out(NEW, 60)
    assert (host.table, host.timer) == (OLD, "")
    assert host.firewall.look(OLD).in_place


@pytest.mark.parametrize("before", ["", OLD])
def test_a_run_that_dies_anywhere_leaves_no_unproved_rules_for_good(tmp_path: Path, before: str) -> None:
    """Killed after each command in turn: the timer or a reboot leads back, and the next run converges."""
    for number in range(100):
        for way in ("timer", "boot", "next run"):
            host = Host(tmp_path / f"{number}-{way.replace(' ', '-')}")
            if before:
                host.apply(before)
            host.dies_after = number
            try:
                host.apply(NEW)
                died = False
            except KilledError:
                died = True
            host.dies_after = None
            if way == "timer" and host.timer:
                host.fire()
            elif way == "boot":
                host.boot()
            if way != "next run" and not host.proved:
                # the table that only counts connections refuses none
                assert host.table in (before, LEARN), f"unproved rules are loaded after command {number}"
            host.apply(NEW)
            assert host.firewall.look(NEW).in_place, number
            assert (host.table, host.timer) == (NEW, "")
        if not died:
            break
    else:
        pytest.fail("it never came to its end")
    assert number > 8


def test_units_and_files_of_other_firewalls(host: Host) -> None:
    assert (host.firewall.look(NEW).others, host.firewall.look(NEW).flushes) == ([], False)
    ufw = host.root / "etc/ufw/ufw.conf"
    ufw.parent.mkdir(parents=True)
    ufw.write_text("# ENABLED=yes\nENABLED=no\n")
    # ufw's unit is enabled and active on every Ubuntu, whether ufw does anything or not
    host.others = {"ufw.service": {"ActiveState": "active", "UnitFileState": "enabled"}}
    assert host.firewall.look(NEW).others == []
    ufw.write_text("ENABLED=yes\nLOGLEVEL=low\n")
    host.others = {"firewalld.service": {"ActiveState": "inactive", "UnitFileState": "enabled"}}
    assert host.firewall.look(NEW).others == ["ufw", "firewalld"]
    conf = host.root / "etc/nftables.conf"
    conf.write_text("#!/usr/sbin/nft -f\n\nflush ruleset\n")
    assert not host.firewall.look(NEW).flushes
    host.others = {"nftables.service": {"ActiveState": "inactive", "UnitFileState": "enabled"}}
    assert host.firewall.look(NEW).flushes
    conf.write_text("# flush ruleset\n")
    assert not host.firewall.look(NEW).flushes


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """/proc of this process, called by sudo, called by sshd's shell."""
    for number, parent, entries in ((os.getpid(), 71, "A=b"), (71, 70, "SUDO_USER=me"), (70, 1, "")):
        (tmp_path / f"proc/{number}").mkdir(parents=True)
        (tmp_path / f"proc/{number}/environ").write_text(entries.replace(" ", "\0"))
        (tmp_path / f"proc/{number}/stat").write_text(f"{number} (a) b) S {parent} 0 0")
    return tmp_path / "proc"


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("", None),
        ("SSH_CONNECTION=torn", None),
        ("SSH_CONNECTION=198.51.100.7 50000 10.0.0.1 22", ("198.51.100.7", 22)),
        ("SSH_CONNECTION=fe80::1%eth0 50000 fe80::2%eth0 2222", ("fe80::1", 2222)),
        # tunnels: SSM and port forwardings end on the host itself, whose own connections no rule shuts out
        ("SSH_CONNECTION=127.0.0.1 50000 127.0.0.1 22", None),
        ("SSH_CONNECTION=::1 50000 ::1 22", None),
        ("SSH_CONNECTION=::ffff:127.0.0.1 50000 ::ffff:127.0.0.1 22", None),
        ("SSH_CONNECTION=10.0.0.1 50000 10.0.0.1 22", None),
    ],
)
def test_the_connection_is_found_behind_sudo(proc: Path, variable: str, expected: Any) -> None:
    (proc / "70/environ").write_text(f"B=c\0{variable}\0")
    assert Firewall(lambda command: (0, "", ""), proc=proc).client() == expected


def test_interfaces_that_lead_out(proc: Path, tmp_path: Path) -> None:
    (proc / "net").mkdir()
    (proc / "net/route").write_text(
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "br-uplink\t00000000\t010013AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    none = "0" * 32
    (proc / "net/ipv6_route").write_text(
        f"{none} 00 {none} 00 {none} ffffffff 00000001 00000000 00200200       lo\n"
        f"{none} 00 {none} 00 fd000000000000000000000000000001 00000400 00000001 00000000 00000003     eth6\n"
        f"fd{'0' * 30} 40 {none} 00 {none} 00000100 00000001 00000000 00000001     eth7\n"
    )
    # a bridge over a real network card, and one over the interface of a container
    for bridge, member in (("br-lan", "eno1"), ("br-0123456789ab", "veth1")):
        (tmp_path / f"sys/class/net/{bridge}/brif/{member}").mkdir(parents=True)
        (tmp_path / f"sys/class/net/{member}").mkdir()
    (tmp_path / "sys/class/net/eno1/device").mkdir()
    assert Firewall(lambda command: (0, "", ""), root=tmp_path, proc=proc).uplinks() == ["br-lan", "br-uplink", "eth6"]


GIVEN: dict[str, Any] = {
    "admin_networks": ["10.0.0.0/8", "fd00::/8"], "ssh_ports": [22], "take_over": False, "container_interfaces": ["docker0", "br-*"],
}  # fmt: skip


def found(client: tuple[str, int] | None = None, uplinks: tuple[str, ...] = (), **given: Any) -> list[str]:
    """What stands in the way."""
    return obstacles("gw1", client, uplinks, {**GIVEN, **given})


def other(*others: str, tables: tuple[str, ...] = (), take_over: bool = False) -> list[str]:
    """What is said of other firewalls."""
    look = Look(False, "", False, others=list(others), tables=list(tables), flushes=False, boot_text="")
    return beside("gw1", look, take_over)


def test_what_stands_in_the_way() -> None:
    assert found() == found(("10.9.8.7", 22)) == found(("fd00::1", 22)) == found(uplinks=("eth0",)) == []
    assert found(("198.51.100.7", 22)) == [
        "Ansible reaches gw1 from 198.51.100.7, which is not in firewall_admin_networks (10.0.0.0/8, fd00::/8): these rules would lock it out; "
        "add 198.51.100.7, or the network that it belongs to"
    ]
    assert found(("10.0.0.1", 2222)) == [
        "Ansible reaches gw1 at port 2222, which is not in firewall_ssh_ports (22): these rules would lock it out; add 2222, and take it out "
        "again in a later run, when Ansible uses another one"
    ]
    assert other("ufw", "firewalld") == [
        "ufw and firewalld are active on gw1, and each of two firewalls would have to let a connection pass; with firewall_take_over: true "
        "this role switches it off "
        "as soon as its own rules have been proved"
    ]
    assert other("ufw", take_over=True) == other() == []
    (told,) = other("ufw", tables=("inet theirs",), take_over=True)
    assert "the table inet theirs of gw1, which is not this role's, refuses what it does not name" in told
    assert "firewall_beside: warn" in told
    assert found(uplinks=("br-lan", "eth0")) == [
        "firewall_container_interfaces has br-*, but br-lan leads out of gw1: what comes in there would reach containers unchecked; name the "
        "interfaces of containers more exactly"
    ]


def test_addresses_of_one_family_are_not_in_networks_of_the_other() -> None:
    assert inside("10.0.0.1", ["::/0", "10.0.0.1"])
    assert not inside("::1", ["0.0.0.0/0"])


def test_what_is_written_is_for_root_only(host: Host) -> None:
    host.apply(NEW)
    assert host.firewall.boot_file.stat().st_mode & 0o777 == 0o600
    assert json.loads(host.firewall.record.read_text()).keys() == {"rules", "listed"}
    assert [path.name for path in host.root.rglob("*.new")] == []
