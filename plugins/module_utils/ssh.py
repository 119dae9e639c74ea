# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What sshd does with a configuration, and who can log in then: worked out from what sshd and ssh themselves print."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import ipaddress
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import systemctl

CONFIG = "/etc/ssh/sshd_config"
DROP_IN = "/etc/ssh/sshd_config.d/00-00-vllm-fleet.conf"
SOCKET_DROP_IN = "/etc/systemd/system/ssh.socket.d/zz-vllm-fleet.conf"
INCLUDE = re.compile(r'^\s*include\s+"?/etc/ssh/sshd_config\.d/\*\.conf"?\s*(#.*)?$', re.IGNORECASE)
ED25519, RSA, ECDSA = (f"/etc/ssh/ssh_host_{name}_key" for name in ("ed25519", "rsa", "ecdsa"))
RSA_4096 = "/etc/ssh/ssh_host_rsa_4096_key"
MODULI, LONG_MODULI = "/etc/ssh/moduli", "/etc/ssh/moduli_3072"
# A prime of 3072 bits has 3071 in that column.
MODULUS_BITS = 3071
# Directive of sshd_config -> what `ssh -Q` calls its list.
QUERIES = {
    "KexAlgorithms": "kex",
    "Ciphers": "cipher",
    "MACs": "mac",
    "HostKeyAlgorithms": "key-sig",
    "CASignatureAlgorithms": "key-sig",
    "HostbasedAcceptedAlgorithms": "key-sig",
    "PubkeyAcceptedAlgorithms": "key-sig",
}
# `sshd -T` leaves these out when they are not set; every sshd has them.
UNSHOWN = {"allowusers", "allowgroups", "denyusers", "denygroups"}
# sshd_config takes a word that `sshd -T` shows as another one.
SHOWN_AS = {("permitrootlogin", "prohibit-password"): "without-password"}
# What a Match block of somebody else must not soften without being told.
GUARDED = {
    "passwordauthentication",
    "kbdinteractiveauthentication",
    "permitrootlogin",
    "permitemptypasswords",
    "authenticationmethods",
}
GROUP_EXCHANGE = "diffie-hellman-group-exchange-sha256"

Effective = Mapping[str, Sequence[str]]


def parse_effective(text: str) -> dict[str, list[str]]:
    """What `sshd -T` printed: every directive, in small letters, with its values."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name:
            found.setdefault(name.lower(), []).append(value.strip())
    return found


def shown(name: str, value: str) -> str:
    """A value as `sshd -T` shows it."""
    return SHOWN_AS.get((name.lower(), value), value)


def intersection(wanted: Iterable[str], offered: Iterable[str]) -> list[str]:
    """The wanted algorithms that are there, in the wanted order."""
    there = set(offered)
    return [name for name in wanted if name in there]


def listen_addresses(effective: Effective) -> list[tuple[str, int]]:
    """Addresses and ports, from the lines `listenaddress [::]:22`."""
    found = []
    for value in effective.get("listenaddress", ()):
        address, _, port = value.split(" ")[0].rpartition(":")
        found.append((address.strip("[]"), int(port)))
    return sorted(found)


def listen_ports(effective: Effective) -> list[int]:
    """The ports alone."""
    return sorted({port for _address, port in listen_addresses(effective)})


# ---------------------------------------------------------------------------------------------- configuration files


def directive_lines(text: str) -> list[str]:
    """The lines of a configuration that say something."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def places(name: str, files: Iterable[tuple[str, str]]) -> list[str]:
    """`file:line` of each line that sets a directive, of files given as path and text."""
    pattern = re.compile(rf"^\s*{re.escape(name)}[\s=]", re.IGNORECASE)
    return [
        f"{path}:{number}"
        for path, text in files
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.match(line)
    ]


def softened(files: Iterable[tuple[str, str]]) -> list[str]:
    """Lines inside of Match blocks that set what the role guards: they win over every file for whom they match."""
    found = []
    for path, text in files:
        match = ""
        for number, line in enumerate(text.splitlines(), 1):
            words = re.split(r"[\s=]+", line.strip(), maxsplit=1)
            if words[0].lower() == "match":
                match = "" if words[1:] and words[1].strip().lower() == "all" else line.strip()
            elif match and words[0].lower() in GUARDED:
                found.append(f"{path}:{number} ({match}) says {line.strip()}")
    return found


def with_drop_in(main: str, others: Iterable[str], own: str, written: str) -> str:
    """
    The main file as sshd would read it with our drop-in in place, which for now is in the file `written`.

    The files that the Include stands for are named one by one, in sshd's order; without an Include ours comes first, as the role adds it.
    """
    included = [f'Include "{written if path == own else path}"' for path in sorted({*others, own})]
    lines = main.splitlines()
    for number, line in enumerate(lines):
        if INCLUDE.match(line):
            return "\n".join([*lines[:number], *included, *lines[number + 1 :]]) + "\n"
    return "\n".join([*included, *lines]) + "\n"


def has_include(main: str) -> bool:
    """Whether the main file reads the drop-ins."""
    return any(INCLUDE.match(line) for line in main.splitlines())


def long_moduli(text: str) -> str:
    """The primes of a moduli file that are long enough, empty when there is none."""
    kept = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 7 and fields[4].isdigit() and int(fields[4]) >= MODULUS_BITS:
            kept.append(line)
    return "".join(f"{line}\n" for line in kept)


@dataclass(frozen=True)
class Difference:
    """A directive that is not as wanted."""

    name: str
    wanted: list[str]
    found: list[str]

    def __str__(self) -> str:
        if "," not in " ".join(self.wanted + self.found):
            return f"{self.name} is {' '.join(self.found) or 'not set'}, wanted is {' '.join(self.wanted)}"
        # lists of algorithms are long, and what goes is what matters
        found, wanted = (",".join(side).split(",") for side in (self.found, self.wanted))
        gone, new = [one for one in found if one not in wanted], [one for one in wanted if one not in found]
        words = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(new)}"] * bool(new)
        return f"{self.name} is to be {' and '.join(words) or 'in another order'}"


def differences(wanted: Mapping[str, Sequence[str]], effective: Effective) -> list[Difference]:
    """The directives whose values are not the wanted ones. Ports are another matter: see listen_ports."""
    wrong = []
    for name, values in wanted.items():
        if name.lower() == "port":
            continue
        right = [shown(name, value) for value in values]
        found = list(effective.get(name.lower(), ()))
        if name.lower() in UNSHOWN:  # one line or many, in any order
            right, found = (sorted(word for value in side for word in value.split()) for side in (right, found))
        if right != found:
            wrong.append(Difference(name, right, found))
    return wrong


# ---------------------------------------------------------------------------------------------------- socket activation


@dataclass(frozen=True)
class Socket:
    """ssh.socket, from `systemctl show`. Where it is in use, systemd listens and not sshd."""

    in_use: bool
    listens: list[tuple[str, int]]

    @property
    def ports(self) -> list[int]:
        """The ports that systemd listens on for sshd."""
        return sorted({port for _address, port in self.listens})


def parse_socket(text: str) -> Socket:
    """The output of `systemctl show ssh.socket`."""
    unit = systemctl.shown(text)[0]
    listens = []
    for value in unit.get("Listen", "").splitlines():
        if found := re.match(r"(?:\[(?P<six>[^\]]*)\]|(?P<four>[0-9.]+)):(?P<port>\d+) \(Stream\)", value):
            listens.append((found["six"] or found["four"], int(found["port"])))
    in_use = unit.get("ActiveState") == "active" or unit.get("UnitFileState") == "enabled"
    return Socket(in_use, sorted(listens))


def socket_lines(addresses: Sequence[tuple[str, int]]) -> list[str]:
    """
    What makes ssh.socket listen where sshd_config says, whatever its unit, Ubuntu's generator or a file from an older release say.

    A bare port listens on IPv6 and IPv4 alike, and on IPv4 alone where the kernel has no IPv6.
    """
    lines = ["ListenStream=", "BindIPv6Only=both"]
    for port in sorted({port for _address, port in addresses}):
        hosts = [address for address, other in addresses if other == port]
        if {"0.0.0.0", "::"} & set(hosts):  # noqa: S104 - this is compared, nothing is bound
            lines.append(f"ListenStream={port}")
        else:
            lines += [f"ListenStream={f'[{address}]' if ':' in address else address}:{port}" for address in hosts]
    return lines


# ------------------------------------------------------------------------------------------------------------------ keys


@dataclass(frozen=True)
class Key:
    """A public key, as a line of authorized_keys or of a .pub file has it."""

    kind: str
    text: str
    bits: int
    options: str = ""

    @property
    def fingerprint(self) -> str:
        """As ssh-keygen -l shows it."""
        digest = hashlib.sha256(base64.b64decode(self.text)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @property
    def plain(self) -> str:
        """What two lines with the same key have in common."""
        return f"{self.kind} {self.text}"


def _strings(blob: bytes) -> list[bytes]:
    """The fields of a key."""
    found = []
    while blob:
        (length,) = struct.unpack(">I", blob[:4])
        if len(blob) < 4 + length:
            raise ValueError("cut off")
        found.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return found


KEY = re.compile(r"(?:^|\s)((?:ssh|ecdsa|sk)-[\w@.-]+)\s+([A-Za-z0-9+/]{40,}={0,3})(?:\s|$)")


def parse_key(line: str) -> Key | None:
    """A key and the options before it, or nothing."""
    if line.lstrip().startswith("#"):
        return None
    for found in KEY.finditer(line):
        options = line[: found.start()].strip()
        quotes = options.replace('\\"', "")
        if quotes.count('"') % 2 or " " in re.sub(r'"[^"]*"', "", quotes):
            continue  # it is in the quotes of an option
        with contextlib.suppress(ValueError, struct.error, binascii.Error, UnicodeDecodeError):
            fields = _strings(base64.b64decode(found[2], validate=True))
            if fields[0].decode() == found[1]:
                bits = int.from_bytes(fields[2], "big").bit_length() if found[1] == "ssh-rsa" else 256
                return Key(found[1], found[2], bits, options)
    return None


def parse_keys(text: str) -> list[Key]:
    """All keys of a file."""
    return [key for line in text.splitlines() if (key := parse_key(line))]


def unusable(key: Key, effective: Effective) -> str:
    """Why nobody can work with this key under this configuration, or nothing."""
    accepted = set(",".join(effective.get("pubkeyacceptedalgorithms", ())).split(","))
    needed = {"rsa-sha2-512", "rsa-sha2-256"} if key.kind == "ssh-rsa" else {key.kind}
    if not accepted & needed:
        return f"its algorithm {key.kind} is not accepted"
    shortest = int((effective.get("requiredrsasize") or ["0"])[0])
    if key.kind == "ssh-rsa" and key.bits < shortest:
        return f"an RSA key of {key.bits} bits is too short, {shortest} are required"
    if re.search(r'(^|,)command="', key.options):
        return "it may only run one command"
    return ""


# ---------------------------------------------------------------------------------------------------------------- logins


@dataclass(frozen=True)
class Login:
    """A user who has to be able to log in, and from where he comes as far as that is known."""

    user: str
    groups: Sequence[str]
    address: str = ""
    server: str = ""
    port: int = 22

    def connection(self) -> str:
        """What `sshd -T -C` is told."""
        address = self.address or "127.0.0.1"
        return f"user={self.user},host={address},addr={address},laddr={self.server or '127.0.0.1'},lport={self.port}"


def glob_match(pattern: str, text: str) -> bool:
    """sshd's patterns: `*` and `?`."""
    expression = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.fullmatch(expression, text) is not None


def _user_matches(pattern: str, login: Login) -> bool:
    user, at, host = pattern.partition("@")
    if not glob_match(user, login.user):
        return False
    if not at or not login.address:
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(login.address) in ipaddress.ip_network(host, strict=False)
    return glob_match(host, login.address)


def _words(effective: Effective, name: str) -> list[str]:
    return [word for value in effective.get(name, ()) for word in value.split()]


def _group_of(login: Login, patterns: Sequence[str]) -> bool:
    if any(glob_match(pattern[1:], group) for pattern in patterns if pattern.startswith("!") for group in login.groups):
        return False
    return any(glob_match(pattern, group) for pattern in patterns for group in login.groups)


def refusal(login: Login, effective: Effective) -> str:
    """Why sshd would not let somebody in under this configuration (`sshd -T -C` for him), or nothing."""
    groups = ", ".join(login.groups) or "none"
    allowed, denied = _words(effective, "allowusers"), _words(effective, "denyusers")
    if any(_user_matches(pattern, login) for pattern in denied):
        return f"DenyUsers ({' '.join(denied)}) is for {login.user}"
    if allowed and not any(_user_matches(pattern, login) for pattern in allowed):
        return f"AllowUsers ({' '.join(allowed)}) has no {login.user}"
    allowed, denied = _words(effective, "allowgroups"), _words(effective, "denygroups")
    if denied and _group_of(login, denied):
        return f"DenyGroups ({' '.join(denied)}) is for a group of {login.user} ({groups})"
    if allowed and not _group_of(login, allowed):
        return f"AllowGroups ({' '.join(allowed)}) has no group of {login.user}, whose groups are: {groups}"
    root = (effective.get("permitrootlogin") or ["no"])[0]
    if login.user == "root" and root not in ("yes", "without-password", "prohibit-password"):
        return f"PermitRootLogin is {root}"
    methods = _words(effective, "authenticationmethods") or ["any"]
    if not {"any", "publickey"} & {method.partition(":")[0] for method in methods}:
        return f"AuthenticationMethods ({' '.join(methods)}) asks for more than a key"
    return ""


def key_problem(login: Login, keys: Sequence[Key], effective: Effective) -> str:
    """Why somebody has no key to log in with, or nothing. Authorities and commands are left to the login that is really tried."""
    elsewhere = (
        (effective.get("trustedusercakeys") or ["none"])[0],
        (effective.get("authorizedkeyscommand") or ["none"])[0],
    )
    if set(elsewhere) != {"none"} or any("cert-authority" in key.options for key in keys):
        return ""
    if not keys:
        where = " ".join(effective.get("authorizedkeysfile", ()))
        return f"{login.user} has no authorised key on the host ({where}); put one there, for example by ssh_hardening_authorized_keys"
    reasons = [unusable(key, effective) for key in keys]
    if all(reasons):
        return f"none of the authorised keys of {login.user} can be used: " + "; ".join(
            f"{key.fingerprint}: {reason}" for key, reason in zip(keys, reasons, strict=True)
        )
    return ""


def key_files(effective: Effective, user: str, home: str) -> list[str]:
    """Where sshd looks for the keys of a user."""
    found = []
    for word in _words(effective, "authorizedkeysfile"):
        path = word.replace("%h", home).replace("%u", user).replace("%%", "%")
        if path != "none":
            found.append(path if path.startswith("/") else f"{home}/{path}")
    return found


# -------------------------------------------------------------------------------------------------- what is asked for


def host_key_plan(mode: str, there: Mapping[str, Key]) -> tuple[list[str], list[dict[str, Any]]]:
    """
    The files of the keys that the host shows, and those of them that have to be made, by the keys that are there.

    A second RSA key is never the one that a client is shown, but clients that know the host by another one learn it (UpdateHostKeys).
    """
    old = there.get(RSA)
    rsa = RSA if old and old.bits == 4096 else RSA_4096
    offered = [ED25519, rsa]
    if mode == "compatible":
        offered = [ED25519, *(path for path in (RSA, ECDSA) if path in there), *([RSA_4096] if rsa == RSA_4096 else [])]
    kinds = {ED25519: {"type": "ed25519", "bits": 0}, RSA_4096: {"type": "rsa", "bits": 4096}}
    return offered, [{"path": path, **kinds[path]} for path in offered if path not in there and path in kinds]


def wanted_lines(wanted: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines of the drop-in."""
    return [f"{name} {value}" for name, values in wanted.items() for value in values]
