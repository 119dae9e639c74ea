"""The parts of the role ssh_hardening that act on a host: the look, with recorded programs, and the guard, with a real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import ssh, ssh_look_host
from ansible_collections.gpufleet.llm.plugins.module_utils.ssh_guard_host import Guard, GuardError
from ansible_collections.gpufleet.llm.plugins.modules import ssh_change

from tests.nvidia import Answer

RECORDINGS = Path(__file__).parent / "recordings/ssh"
ME = "root"
MAIN = "Include /etc/ssh/sshd_config.d/*.conf\nUsePAM yes\n"


# ---------------------------------------------------------------------------------------------------------------- the look


class Programs:
    """Stands in for sshd, ssh and systemctl: prints what was recorded, with changes."""

    def __init__(self) -> None:
        self.system = "debian12"
        self.socket = "socket-debian12"
        self.now: dict[str, list[str]] = {}
        self.after: dict[str, list[str]] = {}
        self.broken = ""

    def start(self, command: list[str]) -> Answer:
        if command[0] == "ssh":
            return Answer(True, (RECORDINGS / f"ssh-Q-{command[2]}-{self.system}").read_text())
        if command[0] == "systemctl":
            return Answer(True, (RECORDINGS / self.socket).read_text())
        if self.broken:
            return Answer(False, self.broken)
        changes = self.after if "-f" in command else self.now
        effective = {**ssh.parse_effective((RECORDINGS / f"sshd-T-{self.system}").read_text()), **changes}
        text = "".join(f"{name} {value}\n" for name, values in effective.items() for value in values)
        return Answer(True, text)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """A host with the files of a distribution below tmp_path."""
    fake = Programs()
    monkeypatch.setattr(ssh_look_host, "Program", fake.start)
    monkeypatch.setattr(
        ssh_look_host, "session", lambda: {"user": ME, "address": "192.0.2.7", "server": "192.0.2.1", "port": 22}
    )
    monkeypatch.setattr(ssh_look_host, "listeners", lambda: [(22, "::", "1"), (2222, "::", "2")])
    monkeypatch.setattr(ssh_look_host, "DIRECTORY", tmp_path / "rollback")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **_options: Kept(tmp_path / "tried"))
    for name in ("CONFIG", "DROP_IN", "SOCKET_DROP_IN", "ED25519", "RSA", "ECDSA", "RSA_4096", "MODULI", "LONG_MODULI"):
        monkeypatch.setattr(ssh, name, str(tmp_path / getattr(ssh, name).lstrip("/")))
    Path(ssh.DROP_IN).parent.mkdir(parents=True)
    Path(ssh.CONFIG).write_text(MAIN)
    Path(ssh.MODULI).write_text("2022 2 6 100 2047 2 EE\n2022 2 6 100 3071 2 FF\n")
    for path, kind in ((ssh.ED25519, ["ed25519"]), (ssh.RSA, ["rsa", "-b", "3072"]), (ssh.ECDSA, ["ecdsa"])):
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", path, "-t", *kind], check=True)
    (tmp_path / "authorized").write_text(Path(f"{ssh.ED25519}.pub").read_text())
    fake.now["authorizedkeysfile"] = fake.after["authorizedkeysfile"] = [str(tmp_path / "authorized")]
    return fake


class Kept:
    """A directory that stays."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        self.path.mkdir(exist_ok=True)
        return str(self.path)

    def __exit__(self, *_error: object) -> None:
        return None


def look(**changes: Any) -> dict[str, Any]:
    """One look, with what a small role would want."""
    given = {
        "settings": {"MaxAuthTries": 4, "RequiredRSASize": "3072", "NeverHeardOf": "yes", "AllowGroups": []},
        "algorithms": {"Ciphers": ["aes256-gcm@openssh.com", "of-tomorrow", "aes256-ctr"], "HostKeyAlgorithms": ["ssh-ed25519"]},
        "ports": [22], "host_keys": "strict", "login_users": [], "authorized_keys": [], **changes,
    }  # fmt: skip
    return ssh_look_host.Look(given).run()


def hardened(programs: Programs, **more: list[str]) -> dict[str, list[str]]:
    """What sshd says when the drop-in of that role is in place."""
    programs.after.update(
        maxauthtries=["4"], requiredrsasize=["3072"], ciphers=["aes256-gcm@openssh.com,aes256-ctr"], hostkeyalgorithms=["ssh-ed25519"],
        hostkey=[ssh.ED25519, ssh.RSA_4096], modulifile=[ssh.LONG_MODULI], **more,
    )  # fmt: skip
    return programs.after


def in_place(programs: Programs) -> None:
    """The change has been made."""
    found = look()
    Path(ssh.DROP_IN).write_text("# ours\n" + "".join(f"{line}\n" for line in found["lines"]))
    Path(ssh.LONG_MODULI).write_text("2022 2 6 100 3071 2 FF\n")
    for end in ("", ".pub"):
        shutil.copy(f"{ssh.RSA}{end}", f"{ssh.RSA_4096}{end}")
    programs.now.update(programs.after)


def test_a_bare_host(programs: Programs) -> None:
    hardened(programs)
    found = look()
    assert not found["good"] and found["problems"] == []
    assert found["lines"] == [
        "Port 22", f"HostKey {ssh.ED25519}", f"HostKey {ssh.RSA_4096}", "Ciphers aes256-gcm@openssh.com,aes256-ctr",
        "HostKeyAlgorithms ssh-ed25519", "MaxAuthTries 4", "RequiredRSASize 3072", f"ModuliFile {ssh.LONG_MODULI}",
    ]  # fmt: skip
    assert [key["path"] for key in found["make_keys"]] == [ssh.RSA_4096] and found["make_moduli"]
    assert found["save"] == [ssh.DROP_IN]
    assert "MaxAuthTries is 6, wanted is 4" in found["differences"]
    assert {key["path"]: key["offered"] for key in found["host_keys"]} == {
        ssh.ED25519: True,
        ssh.RSA: False,
        ssh.ECDSA: False,
    }


def test_a_host_that_is_right(programs: Programs, tmp_path: Path) -> None:
    hardened(programs)
    in_place(programs)
    found = look()
    assert (found["good"], found["differences"], found["problems"]) == (True, [], [])
    (tmp_path / "rollback").mkdir()
    found = look()
    assert (found["good"], found["pending"], found["differences"]) == (False, True, [])


def test_ports_are_added_first_and_go_when_nobody_comes_by_them(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardened(programs)
    in_place(programs)
    programs.after["listenaddress"] = ["[::]:22", "0.0.0.0:22", "[::]:2222", "0.0.0.0:2222"]
    found = look(ports=[2222])
    assert found["problems"] == [] and found["ports"] == [2222, 22]
    assert found["differences"][0] == "sshd is to listen on ports 22, 2222, not port 22"
    programs.now.update(programs.after)
    programs.after["listenaddress"] = ["[::]:2222", "0.0.0.0:2222"]
    monkeypatch.setattr(
        ssh_look_host, "session", lambda: {"user": ME, "address": "192.0.2.7", "server": "192.0.2.1", "port": 2222}
    )
    found = look(ports=[2222])
    assert found["problems"] == [] and found["ports"] == [2222]
    assert found["differences"][0] == "sshd is to listen on port 2222, not ports 22, 2222"


def test_files_of_others_that_say_something_else_are_named(programs: Programs) -> None:
    hardened(programs, listenaddress=["[::]:22", "0.0.0.0:22", "[::]:2022", "0.0.0.0:2022"])
    programs.after["maxauthtries"] = ["20"]
    other = Path(ssh.DROP_IN).parent / "50-other.conf"
    other.write_text("UseDNS no\nPort 2022\n")
    Path(ssh.CONFIG).write_text("MaxAuthTries 20\n" + MAIN)
    problems = look()["problems"]
    assert f"MaxAuthTries would be 20 and not 4, because of {ssh.CONFIG}:1; remove that line" in problems
    (ports,) = [problem for problem in problems if "2022" in problem]
    assert "listen on port 2022 as well" in ports and f"{other}:2" in ports
    tried = (Path(ssh.CONFIG).parents[2] / "tried/sshd_config").read_text()
    assert tried.index("MaxAuthTries") < tried.index("drop-in.conf") < tried.index("50-other.conf")


def test_a_broken_configuration_is_told(programs: Programs) -> None:
    programs.broken = "/etc/ssh/sshd_config.d/50-x.conf: line 2: Bad configuration option: Foo"
    found = look()
    assert not found["good"]
    assert found["problems"] == [
        f"sshd refuses the configuration that the host has now: {programs.broken}. Repair that first"
    ]


def test_who_would_be_locked_out(programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hardened(programs, permitrootlogin=["no"])
    assert look()["problems"] == ["root, as whom Ansible logs in, could not log in any more: PermitRootLogin is no"]
    programs.after["permitrootlogin"] = ["without-password"]
    assert look()["problems"] == []
    (tmp_path / "authorized").write_text("")
    assert "root has no authorised key on the host" in look()["problems"][0]
    added = [{"user": ME, "keys": [Path(f"{ssh.ED25519}.pub").read_text()], "exclusive": False}]
    assert [problem for problem in look(authorized_keys=added)["problems"] if "no authorised key" in problem] == []
    assert "the user nobody-there, who has to be able" in look(login_users=["nobody-there"])["problems"][0]
    monkeypatch.setattr(ssh_look_host, "session", dict)
    assert "nobody is known whose login has to be kept" in look()["problems"][0]


def test_a_socket_gets_a_file_only_when_it_needs_one(programs: Programs) -> None:
    hardened(programs)
    programs.socket = "socket-ubuntu2404"
    in_place(programs)
    found = look()
    assert found["good"] and found["socket"] == {"in_use": True, "lines": [], "moves": False}
    programs.after["listenaddress"] = ["[::]:22", "0.0.0.0:22", "[::]:2222", "0.0.0.0:2222"]
    found = look(ports=[22, 2222])
    assert found["socket"]["moves"] and found["socket"]["lines"][2:] == ["ListenStream=22", "ListenStream=2222"]
    assert ssh.SOCKET_DROP_IN in found["save"]


def test_without_long_primes_there_is_no_group_exchange(programs: Programs) -> None:
    Path(ssh.MODULI).write_text("2022 2 6 100 2047 2 EE\n")
    found = look(algorithms={"KexAlgorithms": ["curve25519-sha256", ssh.GROUP_EXCHANGE]})
    assert "KexAlgorithms curve25519-sha256" in found["lines"] and not found["make_moduli"]


def test_an_algorithm_list_that_would_be_empty(programs: Programs) -> None:
    problems = look(algorithms={"MACs": ["of-tomorrow"]})["problems"]
    assert "MACs: this host offers none of of-tomorrow" in problems


def test_the_session_is_found_among_the_parents(tmp_path: Path) -> None:
    def process(number: int | str, parent: int, **variables: str) -> None:
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "stat").write_text(f"{number} (a (strange) name) S {parent} 1 1")
        (directory / "environ").write_text("\0".join(f"{name}={value}" for name, value in variables.items()))

    process(
        os.getpid(), 70, SUDO_USER="fleet", USER="root", SSH_CONNECTION="1 2 3 4"
    )  # sudo that keeps it, with another name
    process(70, 60, LOGNAME="fleet", SSH_CONNECTION="192.0.2.7 50000 192.0.2.1 2222")
    assert ssh_look_host.session(tmp_path) == {
        "user": "fleet",
        "address": "192.0.2.7",
        "server": "192.0.2.1",
        "port": 2222,
    }
    (tmp_path / "70/environ").write_text("LOGNAME=fleet")
    process(60, 1)
    assert ssh_look_host.session(tmp_path) == {}


# --------------------------------------------------------------------------------------------------------------- the guard


class Host:
    """Files below a directory, a guard that watches over them, and a systemctl that only notes what it was told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.told: list[str] = []
        self.active = "inactive"
        self.runs = "ssh.service"
        programs = root / "bin"
        programs.mkdir()
        for name in ("systemctl", "logger"):
            (programs / name).write_text(
                f'#!/bin/sh\necho {name} "$@" >>{root}/log\n[ "$2" != is-active ] || [ "$3" = $ACTIVE ]\n'
            )
            (programs / name).chmod(0o755)
        self.path = f"{programs}:{os.environ['PATH']}"
        self.guard = Guard(root / "guard", root / "etc/x.service", root / "etc/wants/x.service", self.run)
        (root / "etc").mkdir()
        self.kept, self.new = root / "etc/kept.conf", root / "etc/new.conf"
        self.kept.write_text("before\n")
        self.kept.chmod(0o640)

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        self.told.append(" ".join(words))
        if words[0] == "/bin/sh":
            return subprocess.run(
                words, env={"PATH": self.path, "ACTIVE": self.runs}, capture_output=True, text=True, check=check
            )
        return subprocess.CompletedProcess(words, 0, f"{self.active}\n", "")

    def change(self) -> None:
        self.guard.arm([str(self.kept), str(self.new)], 60, moves=False)
        self.kept.write_text("after\n")
        self.new.write_text("after\n")

    def log(self) -> str:
        return (self.root / "log").read_text()

    def left(self) -> list[str]:
        return sorted(path.name for path in self.root.rglob("*") if "guard" in path.name or path.name == "x.service")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with a file that a change touches, and one that it adds."""
    return Host(tmp_path)


def test_what_is_undone_is_as_it_was(host: Host) -> None:
    host.change()
    assert any(told.startswith("systemd-run") and "--on-active=60" in told for told in host.told)
    assert host.left() == ["guard", "x.service", "x.service"]
    assert host.guard.undo()
    assert host.kept.read_text() == "before\n" and not host.new.exists()
    assert host.kept.stat().st_mode & 0o777 == 0o640
    assert "systemctl reload ssh.service" in host.log() and "restart" not in host.log()
    assert host.left() == []
    assert not host.guard.undo()


def test_what_is_proved_stays(host: Host) -> None:
    host.change()
    assert host.guard.prove()
    assert (host.kept.read_text(), host.new.read_text(), host.left()) == ("after\n", "after\n", [])
    assert not host.guard.undo() and host.kept.read_text() == "after\n"


def test_a_proof_that_comes_too_late_is_none(host: Host) -> None:
    host.change()
    subprocess.run(
        ["/bin/sh", host.guard.directory / "script"], env={"PATH": host.path, "ACTIVE": host.runs}, check=True
    )
    assert not host.guard.prove()
    assert host.kept.read_text() == "before\n"


def test_a_second_change_remembers_what_was_proved_last(host: Host) -> None:
    host.change()
    host.guard.arm([str(host.kept)], 60, moves=False)
    host.kept.write_text("after that\n")
    assert host.guard.undo()
    assert host.kept.read_text() == "before\n" and not host.new.exists()


def test_a_script_that_died_is_run_again(host: Host) -> None:
    host.change()
    host.guard.directory.rename(host.guard.undoing)
    host.guard.arm([str(host.kept)], 60, moves=False)
    assert host.kept.read_text() == "before\n"
    assert (host.guard.directory / "0").read_text() == "before\n"


def test_a_script_that_runs_is_waited_for(host: Host) -> None:
    host.change()
    host.guard.directory.rename(host.guard.undoing)
    host.active = "active"
    with pytest.raises(GuardError, match="still being taken back"):
        host.guard.wait_for_undoing(0.3)
    assert not any(told.startswith("/bin/sh") for told in host.told)


def test_remembering_that_was_interrupted_is_begun_anew(host: Host) -> None:
    host.guard.directory.mkdir()
    (host.guard.directory / "0").write_text("half a file")
    host.change()
    host.guard.undo()
    assert host.kept.read_text() == "before\n"


def test_a_socket_is_stopped_and_started(host: Host) -> None:
    host.guard.arm([], 60, moves=True)
    host.guard.undo()
    assert "systemctl stop ssh.socket ssh.service\nsystemctl start ssh.socket\n" in host.log()


def test_behind_a_socket_nothing_is_reloaded(host: Host) -> None:
    host.runs = "ssh.socket"
    host.change()
    host.guard.undo()
    assert "systemctl stop ssh.service\n" in host.log() and "reload ssh" not in host.log()


def test_at_boot_nothing_is_reloaded(host: Host) -> None:
    host.change()
    subprocess.run(
        ["/bin/sh", host.guard.directory / "script", "boot"], env={"PATH": host.path, "ACTIVE": host.runs}, check=True
    )
    assert host.kept.read_text() == "before\n" and "reload ssh" not in host.log()


# ---------------------------------------------------------------------------------------------------------------- the rest


def test_a_host_key_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "key"
    public = ssh_change.make_key(str(path), "ed25519", 0)
    assert public.startswith("ssh-ed25519 ") and path.stat().st_mode & 0o777 == 0o600
    before = path.read_text()
    with pytest.raises(FileExistsError):
        ssh_change.make_key(str(path), "ed25519", 0)
    assert path.read_text() == before


def test_waiting_has_an_end() -> None:
    answers = iter([False, False, True])
    asked: Callable[[], bool] = lambda: next(answers)  # noqa: E731
    assert ssh_change.wait_until(asked, 5)
    assert not ssh_change.wait_until(lambda: False, 0.1)
