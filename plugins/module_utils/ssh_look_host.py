# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the SSH server of a host does, and what it would do with the configuration that is wanted."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import ssh
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.host_sockets import listeners
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Program
from ansible_collections.gpufleet.llm.plugins.module_utils.ssh_guard_host import DIRECTORY

SSHD = "/usr/sbin/sshd"
RUN_DIRECTORY = Path("/run/sshd")
TIMEOUT = 30  # seconds
SHOW_SOCKET = ["systemctl", "show", "ssh.socket", "--property=ActiveState,UnitFileState,Listen"]


class RefusedError(Exception):
    """What a program said when it failed."""


def output(program: Program) -> str:
    """What a program printed."""
    good, text = program.output(TIMEOUT)
    if not good:
        raise RefusedError(" ".join(text.split()))
    return text


@contextlib.contextmanager
def run_directory() -> Iterator[None]:
    """The directory that sshd wants even for a test; systemd makes it only when the service runs."""
    missing = not RUN_DIRECTORY.exists()
    if missing:
        RUN_DIRECTORY.mkdir(mode=0o755)
    try:
        yield
    finally:
        if missing:
            with contextlib.suppress(OSError):
                RUN_DIRECTORY.rmdir()


def session(proc: Path = Path("/proc")) -> dict[str, Any]:
    """The SSH session that this process belongs to: the first of its parents that has one in its environment."""
    process = str(os.getpid())
    while process not in ("", "0", "1"):
        variables = dict(
            entry.partition("=")[::2] for entry in read(f"{proc}/{process}/environ").split("\0") if "=" in entry
        )
        fields = variables.get("SSH_CONNECTION", "").split()
        user = variables.get("LOGNAME") or variables.get("USER") or ""
        # sudo leaves the variable of the session out, some set-ups keep it, but then with the name of the new user
        if len(fields) == 4 and user and not variables.get("SUDO_USER"):
            return {"user": user, "address": fields[0], "server": fields[2], "port": int(fields[3])}
        process = "".join(read(f"{proc}/{process}/stat").rpartition(")")[2].split()[1:2])
    return {}


def login(user: str, came_by: dict[str, Any], ports: Sequence[int]) -> ssh.Login:
    """A user with his groups, as the host resolves them."""
    known = pwd.getpwnam(user)
    groups = []
    for number in os.getgrouplist(user, known.pw_gid):
        with contextlib.suppress(KeyError):
            groups.append(grp.getgrgid(number).gr_name)
    own = came_by if came_by.get("user") == user else {}
    return ssh.Login(user, groups, own.get("address", ""), own.get("server", ""), own.get("port") or ports[0])


def host_keys() -> dict[str, ssh.Key]:
    """The host keys that are on the disk, by path."""
    found = {}
    for path in (ssh.ED25519, ssh.RSA_4096, ssh.RSA, ssh.ECDSA):
        if Path(path).exists():
            text = read(f"{path}.pub")
            if not ssh.parse_key(text):
                with contextlib.suppress(RefusedError):
                    text = output(Program(["ssh-keygen", "-y", "-P", "", "-f", path]))
            if key := ssh.parse_key(text):
                found[path] = key
    return found


class Look:
    """One look at the host."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.problems: list[str] = []
        self.wrong: list[str] = []
        self.save = [ssh.DROP_IN]
        self.moves = False
        self.of_login: dict[str, dict[str, list[str]]] = {}
        self.came_by = session()
        queries = {name: Program(["ssh", "-Q", name]) for name in sorted(set(ssh.QUERIES.values()))}
        effective, socket = Program([SSHD, "-T"]), Program(SHOW_SOCKET)
        self.offered = {name: output(process).split() for name, process in queries.items()}
        self.socket = ssh.parse_socket(output(socket))
        self.main = read(ssh.CONFIG)
        self.others = [
            str(path) for path in sorted(Path(ssh.DROP_IN).parent.glob("*.conf")) if str(path) != ssh.DROP_IN
        ]
        self.files = [(path, read(path)) for path in [*self.others, ssh.CONFIG]]
        try:
            self.effective = ssh.parse_effective(output(effective))
        except RefusedError as error:
            self.effective = {}
            self.problems.append(f"sshd refuses the configuration that the host has now: {error}. Repair that first")
        self.keys = host_keys()
        self.shown, self.make_keys = ssh.host_key_plan(given["host_keys"], self.keys)
        kept = self.came_by.get("port")
        self.ports = [*given["ports"], *([kept] if kept and kept not in given["ports"] else [])]
        self.moduli = ssh.long_moduli(read(ssh.MODULI))

    def wanted(self) -> dict[str, list[str]]:
        """Directives and their values, as this sshd can have them."""
        found = {"Port": [str(port) for port in self.ports], "HostKey": self.shown}
        for name, names in self.given["algorithms"].items():
            there = ssh.intersection(names, self.offered[ssh.QUERIES[name]])
            if name == "KexAlgorithms" and not self.moduli:
                there = [one for one in there if one != ssh.GROUP_EXCHANGE]
            if name == "HostKeyAlgorithms" and ssh.ECDSA in self.shown:
                there.append(self.keys[ssh.ECDSA].kind)
            if not there:
                self.problems.append(f"{name}: this host offers none of {', '.join(names)}")
            found[name] = [",".join(there)]
        for name, value in self.given["settings"].items():
            if name.lower() in self.effective or name.lower() in ssh.UNSHOWN:
                values = [str(one) for one in value] if isinstance(value, list) else [str(value)]
                found.update({name: values} if values else {})
        if self.moduli:
            found["ModuliFile"] = [ssh.LONG_MODULI]
        return found

    def run(self) -> dict[str, Any]:
        """Compare, and try out what is to come when something differs."""
        wanted = self.wanted() if self.effective else {}
        lines = ssh.wanted_lines(wanted)
        add_keys = self.authorized_keys() if self.effective else []
        socket_lines: list[str] = []
        if self.effective:
            socket_lines = self.compare(wanted, lines)
            effective = self.effective
            if self.wrong:
                effective = self.tried(wanted, lines)
            self.logins(effective)
        return {
            "installed": True,
            "good": not (self.wrong or self.problems or DIRECTORY.exists()),
            "differences": self.wrong,
            "problems": self.problems,
            "softened": ssh.softened(self.files),
            "lines": lines,
            "socket": {"in_use": self.socket.in_use, "lines": socket_lines, "moves": self.moves},
            "came_by": self.came_by,
            "ports": self.ports,
            "host_keys": [
                {
                    "path": path,
                    "type": key.kind,
                    "bits": key.bits,
                    "fingerprint": key.fingerprint,
                    "key": key.plain,
                    "offered": path in self.shown,
                }
                for path, key in self.keys.items()
            ],
            "make_keys": self.make_keys,
            "make_moduli": bool(self.moduli) and self.moduli != read(ssh.LONG_MODULI),
            "include": ssh.has_include(self.main),
            "add_keys": add_keys,
            "save": self.save,
            "pending": DIRECTORY.exists(),
        }  # fmt: skip

    def compare(self, wanted: dict[str, list[str]], lines: list[str]) -> list[str]:
        """Note what is not as wanted. Returns the lines for the socket's unit, if it needs any."""
        self.wrong += [str(difference) for difference in ssh.differences(wanted, self.effective)]
        ports = sorted(self.ports)
        if ssh.listen_ports(self.effective) != ports:
            self.wrong.append(
                f"sshd is to listen on {self.shown_ports(ports)}, not {self.shown_ports(ssh.listen_ports(self.effective))}"
            )
        if ssh.directive_lines(read(ssh.DROP_IN)) != lines:
            self.wrong.append(f"{ssh.DROP_IN} is missing or another one")
        if not ssh.has_include(self.main):
            self.wrong.append(f"{ssh.CONFIG} does not read the files in {Path(ssh.DROP_IN).parent}")
            self.save.append(ssh.CONFIG)
        self.wrong += [f"there is no {key['path']}" for key in self.make_keys]
        if self.moduli and self.moduli != read(ssh.LONG_MODULI):
            self.wrong.append(f"{ssh.LONG_MODULI} is missing or out of date")
        socket_lines: list[str] = []
        own = ssh.directive_lines(read(ssh.SOCKET_DROP_IN))
        if self.socket.in_use:
            right = self.socket.ports == ports
            self.moves = not right
            hosts = {address for address, _port in ssh.listen_addresses(self.effective)}
            wanted_sockets = [(host, port) for port in ports for host in sorted(hosts)]
            socket_lines = ssh.socket_lines(wanted_sockets) if own or not right else []
            if not right:
                self.wrong.append(
                    f"ssh.socket is to listen on {self.shown_ports(ports)}, not {self.shown_ports(self.socket.ports)}"
                )
        if (["[Socket]", *socket_lines] if socket_lines else []) != own:
            self.wrong.append(f"{ssh.SOCKET_DROP_IN} is missing or another one")
        if own or socket_lines:
            self.save.append(ssh.SOCKET_DROP_IN)
        deaf = sorted(set(ports) - {port for port, _address, _inode in listeners()})
        if deaf and not self.wrong:
            self.wrong.append(f"nobody listens on {self.shown_ports(deaf)}")
        return socket_lines

    @staticmethod
    def shown_ports(ports: Sequence[int]) -> str:
        """Ports in words."""
        return ("port " if len(ports) == 1 else "ports ") + ", ".join(map(str, ports))

    def tried(self, wanted: dict[str, list[str]], lines: list[str]) -> dict[str, list[str]]:
        """What sshd would do with the new configuration, everybody's files included. What it makes of it otherwise is a problem."""
        with tempfile.TemporaryDirectory(dir="/run", prefix="vllm-fleet-sshd-") as directory:
            written, main = f"{directory}/drop-in.conf", f"{directory}/sshd_config"
            Path(written).write_text("".join(f"{line}\n" for line in lines))
            Path(main).write_text(ssh.with_drop_in(self.main, self.others, ssh.DROP_IN, written))
            try:
                output(Program([SSHD, "-t", "-f", main]))
                effective = ssh.parse_effective(output(Program([SSHD, "-T", "-f", main])))
                self.of_login = {
                    user: ssh.parse_effective(output(Program([SSHD, "-T", "-f", main, "-C", login.connection()])))
                    for user, login in self.known_logins().items()
                }
            except RefusedError as error:
                self.problems.append(f"sshd would refuse the new configuration: {error}")
                return self.effective
        for difference in ssh.differences(wanted, effective):
            where = ", ".join(ssh.places(difference.name, self.files)) or "another file"
            self.problems.append(
                f"{difference.name} would be {' '.join(difference.found)} and not {' '.join(difference.wanted)}, because of {where}; "
                "remove that line"
            )
        if extra := sorted(set(ssh.listen_ports(effective)) - set(self.ports)):
            where = ", ".join(ssh.places("Port", self.files) + ssh.places("ListenAddress", self.files))
            self.problems.append(
                f"sshd would listen on {self.shown_ports(extra)} as well, because ports of all files add up ({where}); remove that line, or add "
                "the port to ssh_hardening_ports"
            )
        if missing := sorted(set(self.ports) - set(ssh.listen_ports(effective))):
            where = ", ".join(ssh.places("ListenAddress", self.files))
            self.problems.append(
                f"sshd would not listen on {self.shown_ports(missing)}, because {where} names other ports; remove the port there"
            )
        return effective

    def known_logins(self) -> dict[str, ssh.Login]:
        """Those who have to be able to log in and are known on the host."""
        found = {}
        for user in self.users():
            with contextlib.suppress(KeyError):
                found[user] = login(user, self.came_by, self.ports)
        return found

    def users(self) -> list[str]:
        """Names of those who have to be able to log in."""
        return list(dict.fromkeys([*([self.came_by["user"]] if self.came_by else []), *self.given["login_users"]]))

    def logins(self, effective: dict[str, list[str]]) -> None:
        """Note whom the configuration would lock out."""
        known = self.known_logins()
        if not self.users():
            self.problems.append(
                "nobody is known whose login has to be kept, because Ansible does not come by SSH; name users in ssh_hardening_login_users"
            )
        for user in self.users():
            if user not in known:
                self.problems.append(f"the user {user}, who has to be able to log in, is unknown on the host")
        if effective is self.effective:
            try:
                self.of_login = {
                    user: ssh.parse_effective(output(Program([SSHD, "-T", "-C", one.connection()])))
                    for user, one in known.items()
                }
            except RefusedError as error:
                self.problems.append(f"sshd refuses the configuration: {error}")
                return
        for user, one in known.items():
            his = self.of_login[user]
            who = (
                f"{user}, as whom Ansible logs in"
                if user == self.came_by.get("user")
                else f"{user} (ssh_hardening_login_users)"
            )
            if reason := ssh.refusal(one, his):
                self.problems.append(f"{who}, could not log in any more: {reason}")
            if reason := ssh.key_problem(one, self.keys_of(user, his, future=True), his):
                self.problems.append(f"{who}, could not log in any more: {reason}")

    # ------------------------------------------------------------------------------------------------- authorised keys

    def keys_of(self, user: str, effective: dict[str, list[str]], future: bool = False) -> list[ssh.Key]:
        """The authorised keys of a user, as they are or as they will be."""
        home = pwd.getpwnam(user).pw_dir
        present = [key for path in ssh.key_files(effective, user, home) for key in ssh.parse_keys(read(path))]
        for entry in self.given["authorized_keys"] if future else []:
            if entry["user"] == user:
                given = [key for line in entry["keys"] if (key := ssh.parse_key(line))]
                names = {key.plain for key in given}
                present = (
                    given if entry.get("exclusive") else [*(key for key in present if key.plain not in names), *given]
                )
        return present

    def authorized_keys(self) -> list[dict[str, Any]]:
        """The entries that are not on the host as they should be."""
        missing = []
        for entry in self.given["authorized_keys"]:
            user = entry["user"]
            try:
                home = pwd.getpwnam(user).pw_dir
            except KeyError:
                self.problems.append(f"ssh_hardening_authorized_keys: there is no user {user} on the host")
                continue
            if not Path(home).is_dir():
                self.problems.append(
                    f"ssh_hardening_authorized_keys: {user} has no home directory yet ({home}), as those of a directory have none before they log in "
                    "for the first time; make it, or leave the keys to the directory (AuthorizedKeysCommand)"
                )
                continue
            path = f"{home}/.ssh/authorized_keys"
            present = {key.plain: key.options for key in ssh.parse_keys(read(path))}
            wanted = {key.plain: key.options for line in entry["keys"] if (key := ssh.parse_key(line))}
            if path not in ssh.key_files(self.effective, user, home):
                self.problems.append(f"ssh_hardening_authorized_keys: sshd does not read {path} (AuthorizedKeysFile)")
            exclusive = bool(entry.get("exclusive"))
            if exclusive and user == self.came_by.get("user") and not set(present) & set(wanted):
                self.problems.append(
                    f"ssh_hardening_authorized_keys: Ansible logs in as {user}, and none of the keys that it can have logged in with is among "
                    "his keys, which are exclusive; add that key"
                )
            if wanted.items() - present.items() or (exclusive and set(present) - set(wanted)):
                missing.append({"user": user, "keys": entry["keys"], "exclusive": exclusive})
                self.wrong.append(f"the authorised keys of {user} are not as wanted")
                self.save.append(path)
        return missing
