"""What the role ssh_hardening decides, by what real servers print (recordings/ssh) and by the real ssh-keygen."""

from __future__ import annotations

import configparser
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.filter.ssh import ssh_key_problems, ssh_pattern_problems
from ansible_collections.gpufleet.llm.plugins.module_utils import ssh, ssh_known
from jinja2.nativetypes import NativeEnvironment
from ssh_audit.builtin_policies import BUILTIN_POLICIES  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = Path(__file__).parent / "recordings/ssh"
NO_MLKEM = {"mlkem768x25519-sha256"}
# What ssh -Q of a release has not, compared with a recording. Ubuntu's by the release notes of OpenSSH, not recorded.
RELEASES = {
    "Debian-12": ("debian12", set()),
    "Debian-13": ("debian13", set()),
    "Ubuntu-22.04": ("debian12", {"sntrup761x25519-sha512"}),
    "Ubuntu-24.04": ("debian13", {*NO_MLKEM, "sntrup761x25519-sha512"}),
    "Ubuntu-26.04": ("debian13", set()),
}
POLICIES = {
    "Debian-12": "Hardened Debian 12 (version 3)",
    "Debian-13": "Hardened Debian 13 (version 1)",
    "Ubuntu-22.04": "Hardened Ubuntu Server 22.04 LTS (version 6)",
    "Ubuntu-24.04": "Hardened Ubuntu Server 24.04 LTS (version 2)",
    "Ubuntu-26.04": "Hardened Ubuntu Server 26.04 LTS (version 1)",
}


def recorded(name: str) -> str:
    """A recording."""
    return (RECORDINGS / name).read_text()


def role_variables(release: str, **changes: object) -> dict[str, Any]:
    """vars/main.yml as Ansible would read it on a host of that release."""
    role = ROOT / "roles/ssh_hardening"
    distribution, number = release.split("-")
    variables: dict[str, Any] = {
        **yaml.safe_load((role / "defaults/main.yml").read_text()),
        "ansible_facts": {"gpufleet": {"distribution": distribution, "release": number}},
        **changes,
    }
    environment = NativeEnvironment()
    environment.filters["unique"] = lambda values: list(dict.fromkeys(values))
    texts = yaml.safe_load((role / "vars/main.yml").read_text())

    def rendered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rendered(one) for key, one in value.items()}
        if isinstance(value, list):
            return [rendered(one) for one in value]
        return (
            environment.from_string(value.strip()).render(**variables)
            if isinstance(value, str) and "{{" in value
            else value
        )

    # what there is to do, and what is told, go by what a task found
    found = ("__ssh_hardening_told", "__ssh_hardening_over_ssh", "__ssh_hardening_installed")
    for name in texts:
        if name not in found and not name.endswith(("_due", "_nothing_left")):
            variables[name] = rendered(texts[name])
    return variables


def offered(release: str, query: str) -> list[str]:
    """What ssh -Q prints on a release."""
    system, missing = RELEASES[release]
    return [name for name in recorded(f"ssh-Q-{query}-{system}").split() if name not in missing]


# ------------------------------------------------------------------------------------------------------------ algorithms


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_gets_what_its_policy_of_ssh_audit_asks_for(release: str) -> None:
    wanted = role_variables(release)["__ssh_hardening_algorithms"]
    policy = BUILTIN_POLICIES[POLICIES[release]]
    for directive, key in (("KexAlgorithms", "kex"), ("Ciphers", "ciphers"), ("MACs", "macs")):
        got = ssh.intersection(wanted[directive], offered(release, ssh.QUERIES[directive]))
        asked = [name for name in policy[key] if name not in ("kex-strict-s-v00@openssh.com", "ext-info-s")]
        assert got == asked, directive
    keys = ssh.intersection(wanted["HostKeyAlgorithms"], offered(release, "key-sig"))
    assert [name for name in keys if name in policy["host_keys"]] == policy["host_keys"]


@pytest.mark.parametrize("release", RELEASES)
def test_key_exchange_can_be_wider_or_narrower(release: str) -> None:
    def exchange(choice: str) -> list[str]:
        wanted = role_variables(release, ssh_hardening_key_exchange=choice)["__ssh_hardening_algorithms"][
            "KexAlgorithms"
        ]
        return ssh.intersection(wanted, offered(release, "kex"))

    narrow, guide, wide = map(exchange, ("post_quantum", "guide", "compatible"))
    assert set(narrow) <= set(guide) <= set(wide)
    assert narrow and all("sntrup" in name or "mlkem" in name for name in narrow)
    assert "curve25519-sha256" in wide and wide[: len(guide)] == guide


def test_a_directive_that_is_not_known_is_known_by_its_absence() -> None:
    """RequiredRSASize came with 9.1, PerSourcePenalties with 9.8."""
    twelve, thirteen = (ssh.parse_effective(recorded(f"sshd-T-{system}")) for system in ("debian12", "debian13"))
    assert "requiredrsasize" in twelve and "persourcepenalties" not in twelve
    assert "persourcepenalties" in thirteen
    for name in role_variables("Debian-12")["__ssh_hardening_settings"]:
        assert name.lower() in twelve or name.lower() in ssh.UNSHOWN, name


# --------------------------------------------------------------------------------------------------------- configuration


def test_effective_values_are_read_and_compared() -> None:
    effective = ssh.parse_effective(recorded("sshd-T-debian12"))
    assert effective["hostkey"] == [ssh.RSA, ssh.ECDSA, ssh.ED25519]
    assert ssh.listen_addresses(effective) == [("0.0.0.0", 22), ("::", 22)]
    assert ssh.listen_ports(effective) == [22]
    same = {
        "PermitRootLogin": ["prohibit-password"],
        "MaxAuthTries": ["6"],
        "Port": ["1"],
        "HostKey": effective["hostkey"],
    }
    assert ssh.differences(same, effective) == []
    other = {"MaxAuthTries": ["4"], "AllowUsers": ["a b"], "Ciphers": ["aes256-ctr,new"], "HostKey": [ssh.ED25519]}
    told = [str(difference) for difference in ssh.differences(other, effective)]
    assert told[0] == "MaxAuthTries is 6, wanted is 4"
    assert told[1] == "AllowUsers is not set, wanted is a b"
    assert told[2].startswith("Ciphers is to be without chacha20-poly1305@openssh.com, ") and told[2].endswith(
        " and with new"
    )
    assert ssh.differences({"AllowUsers": ["a b"]}, {"allowusers": ["b", "a"]}) == []
    assert ssh.differences({"AllowUsers": ["a"]}, {"allowusers": ["a", "b"]}) != []
    assert str(ssh.differences({"Ciphers": ["b,a"]}, {"ciphers": ["a,b"]})[0]) == "Ciphers is to be in another order"


def test_the_drop_in_stands_where_sshd_would_read_it() -> None:
    main = "# first\nInclude /etc/ssh/sshd_config.d/*.conf\nUsePAM yes\n"
    others = ["/etc/ssh/sshd_config.d/50-cloud-init.conf", "/etc/ssh/sshd_config.d/00-00-a.conf"]
    text = ssh.with_drop_in(main, others, ssh.DROP_IN, "/run/x/new.conf")
    assert text.splitlines() == [
        "# first",
        'Include "/etc/ssh/sshd_config.d/00-00-a.conf"',
        'Include "/run/x/new.conf"',
        'Include "/etc/ssh/sshd_config.d/50-cloud-init.conf"',
        "UsePAM yes",
    ]
    bare = ssh.with_drop_in("UsePAM yes\n", others[:1], ssh.DROP_IN, "/run/x/new.conf")
    assert bare.splitlines() == ['Include "/run/x/new.conf"', f'Include "{others[0]}"', "UsePAM yes"]
    assert ssh.has_include(main) and not ssh.has_include(
        "# Include /etc/ssh/sshd_config.d/*.conf\nInclude /etc/ssh/else/*\n"
    )


def test_lines_of_others_are_found() -> None:
    files = [
        ("/a", "Port 22\n#Port 23\n  port=24\n"),
        ("/b", "Ports 1\nMatch User bob\n PasswordAuthentication yes\nMatch all\nPermitRootLogin yes\n"),
    ]
    assert ssh.places("Port", files) == ["/a:1", "/a:3"]
    assert ssh.softened(files) == ["/b:3 (Match User bob) says PasswordAuthentication yes"]


def test_only_long_primes_are_kept() -> None:
    head, long, short = (
        "# Time Type Tests Tries Size Generator Modulus",
        "2022 2 6 100 3071 2 FF",
        "2022 2 6 100 2047 2 EE",
    )
    assert ssh.long_moduli(f"{head}\n{short}\n{long}\n") == f"{long}\n"
    assert ssh.long_moduli(f"{head}\n{short}\n") == ""


# ----------------------------------------------------------------------------------------------------- socket activation


def test_sockets_are_data() -> None:
    ubuntu, debian = (ssh.parse_socket(recorded(f"socket-{system}")) for system in ("ubuntu2404", "debian12"))
    assert (ubuntu.in_use, ubuntu.ports, ubuntu.listens) == (True, [22], [("0.0.0.0", 22), ("::", 22)])
    assert (debian.in_use, debian.ports) == (False, [22])
    assert ssh.parse_socket("ActiveState=inactive\nUnitFileState=\n") == ssh.Socket(False, [])


def test_the_socket_listens_where_sshd_would() -> None:
    both = [("0.0.0.0", 22), ("0.0.0.0", 2222), ("::", 22), ("::", 2222)]
    assert ssh.socket_lines(both) == ["ListenStream=", "BindIPv6Only=both", "ListenStream=22", "ListenStream=2222"]
    assert ssh.socket_lines([("10.0.0.1", 22), ("fd00::1", 22)])[2:] == [
        "ListenStream=10.0.0.1:22",
        "ListenStream=[fd00::1]:22",
    ]


def test_the_file_for_the_socket_comes_after_what_ubuntu_generates() -> None:
    """systemd reads drop-ins by their names, wherever they are; an empty ListenStream forgets those before it."""
    assert ssh.SOCKET_DROP_IN.rpartition("/")[2] > "addresses.conf"
    generated = [line for line in ssh.directive_lines(recorded("addresses.conf-ubuntu2404")) if "=" in line]
    assert generated[-1] == "ListenStream=[::]:2222"
    assert ssh.socket_lines([("::", 22)])[0] == "ListenStream="


# ------------------------------------------------------------------------------------------------------------------ keys


def make_key(path: Path, kind: str, bits: int = 0) -> str:
    """A key, and its public line."""
    size = ["-b", str(bits)] if bits else []
    subprocess.run(["ssh-keygen", "-q", "-t", kind, *size, "-N", "", "-C", "some body", "-f", str(path)], check=True)
    return Path(f"{path}.pub").read_text().strip()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Public keys by name."""
    directory = tmp_path_factory.mktemp("keys")
    kinds = {"ed25519": ("ed25519", 0), "ecdsa": ("ecdsa", 256), "short": ("rsa", 2048), "long": ("rsa", 3072)}
    return {name: make_key(directory / name, *kind) for name, kind in kinds.items()}


HARD = {
    "pubkeyacceptedalgorithms": ["ssh-ed25519,rsa-sha2-512"],
    "requiredrsasize": ["3072"],
    "authorizedkeysfile": [".ssh/authorized_keys"],
}


def test_keys_are_read_as_ssh_keygen_reads_them(keys: dict[str, str], tmp_path: Path) -> None:
    for name, line in keys.items():
        key = ssh.parse_key(line)
        assert key
        (tmp_path / name).write_text(line)
        told = subprocess.run(
            ["ssh-keygen", "-lf", tmp_path / name], capture_output=True, text=True, check=True
        ).stdout.split()
        assert [str(key.bits), key.fingerprint] == told[:2]
    quoted = f'from="10.0.0.0/8",command="echo \\"{keys["long"]}\\"" {keys["ed25519"]}'
    found = ssh.parse_key(quoted)
    assert found and found.kind == "ssh-ed25519" and found.options.startswith('from="10')
    for wrong in (
        "",
        "# " + keys["ed25519"],
        "ssh-ed25519 AAAA",
        keys["ed25519"].replace("ssh-ed25519 ", "ssh-rsa "),
        keys["long"][:200],
    ):
        assert ssh.parse_key(wrong) is None, wrong


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("ed25519", "", ""),
        ("ed25519", 'from="192.0.2.0/24" ', ""),
        ("long", "", ""),
        ("short", "", "an RSA key of 2048 bits is too short, 3072 are required"),
        ("ecdsa", "", "its algorithm ecdsa-sha2-nistp256 is not accepted"),
        ("ed25519", 'no-pty,command="echo Please login as ubuntu" ', "it may only run one command"),
    ],
)
def test_which_keys_can_be_used(keys: dict[str, str], name: str, options: str, reason: str) -> None:
    key = ssh.parse_key(options + keys[name])
    assert key and ssh.unusable(key, HARD) == reason


def test_a_user_needs_one_key_that_can_be_used(keys: dict[str, str]) -> None:
    login = ssh.Login("fleet", ["fleet"])
    short, good = ssh.parse_keys(keys["short"]), ssh.parse_keys(keys["ed25519"])
    assert ssh.key_problem(login, short + good, HARD) == ""
    assert "fleet has no authorised key on the host (.ssh/authorized_keys)" in ssh.key_problem(login, [], HARD)
    assert "none of the authorised keys of fleet can be used: SHA256:" in ssh.key_problem(login, short, HARD)
    assert ssh.key_problem(login, [], {**HARD, "authorizedkeyscommand": ["/usr/bin/sss_ssh_authorizedkeys"]}) == ""
    assert ssh.key_problem(login, [], {**HARD, "trustedusercakeys": ["/etc/ssh/ca.pub"]}) == ""


def test_where_the_keys_of_a_user_are() -> None:
    effective = {"authorizedkeysfile": [".ssh/authorized_keys /etc/ssh/keys/%u %h/x none"]}
    assert ssh.key_files(effective, "fleet", "/home/fleet") == [
        "/home/fleet/.ssh/authorized_keys",
        "/etc/ssh/keys/fleet",
        "/home/fleet/x",
    ]


# ---------------------------------------------------------------------------------------------------------------- logins


@pytest.mark.parametrize(
    ("effective", "reason"),
    [
        ({}, ""),
        ({"allowusers": ["root fle*"]}, ""),
        ({"allowusers": ["root", "fleet"]}, ""),
        ({"allowusers": ["root nobody"]}, "AllowUsers (root nobody) has no fleet"),
        ({"allowusers": ["fleet@192.0.2.0/24"]}, ""),
        ({"allowusers": ["fleet@198.51.100.*"]}, "AllowUsers (fleet@198.51.100.*) has no fleet"),
        ({"denyusers": ["fl?et"]}, "DenyUsers (fl?et) is for fleet"),
        ({"allowgroups": ["sudo"]}, ""),
        ({"allowgroups": ["ssh"]}, "AllowGroups (ssh) has no group of fleet, whose groups are: fleet, sudo"),
        ({"allowgroups": ["*", "!sudo"]}, "AllowGroups (* !sudo) has no group of fleet, whose groups are: fleet, sudo"),
        ({"denygroups": ["su*"]}, "DenyGroups (su*) is for a group of fleet (fleet, sudo)"),
        ({"authenticationmethods": ["publickey,password publickey"]}, ""),
        ({"authenticationmethods": ["publickey,keyboard-interactive"]}, "AuthenticationMethods (publickey,keyboard-interactive) asks for more than a key"),
        ({"permitrootlogin": ["no"]}, ""),
    ],
)  # fmt: skip
def test_who_gets_in(effective: Mapping[str, list[str]], reason: str) -> None:
    assert ssh.refusal(ssh.Login("fleet", ["fleet", "sudo"], "192.0.2.7"), effective) == reason


@pytest.mark.parametrize(
    ("value", "gets_in"), [("yes", True), ("without-password", True), ("no", False), ("forced-commands-only", False)]
)
def test_whether_root_gets_in(value: str, gets_in: bool) -> None:
    assert (ssh.refusal(ssh.Login("root", ["root"]), {"permitrootlogin": [value]}) == "") is gets_in


def test_which_host_keys_are_shown(keys: dict[str, str]) -> None:
    made = {name: key for name, line in keys.items() if (key := ssh.parse_key(line))}
    there = {ssh.ED25519: made["ed25519"], ssh.RSA: made["long"], ssh.ECDSA: made["ecdsa"]}
    new = [{"path": ssh.RSA_4096, "type": "rsa", "bits": 4096}]
    assert ssh.host_key_plan("strict", there) == ([ssh.ED25519, ssh.RSA_4096], new)
    assert ssh.host_key_plan("compatible", there) == ([ssh.ED25519, ssh.RSA, ssh.ECDSA, ssh.RSA_4096], new)
    assert ssh.host_key_plan("strict", {**there, ssh.RSA_4096: made["long"]}) == ([ssh.ED25519, ssh.RSA_4096], [])
    large = ssh.Key("ssh-rsa", made["long"].text, 4096)
    assert ssh.host_key_plan("strict", {**there, ssh.RSA: large}) == ([ssh.ED25519, ssh.RSA], [])
    assert ssh.host_key_plan("compatible", {**there, ssh.RSA: large}) == ([ssh.ED25519, ssh.RSA, ssh.ECDSA], [])
    assert ssh.host_key_plan("strict", {})[1][0] == {"path": ssh.ED25519, "type": "ed25519", "bits": 0}


# ------------------------------------------------------------------------------------------------------- the controller


def test_what_the_controller_knows(keys: dict[str, str], tmp_path: Path) -> None:
    """By the real ssh and ssh-keygen of this machine."""
    known = tmp_path / "known_hosts"
    plain = {name: " ".join(line.split()[:2]) for name, line in keys.items()}
    known.write_text(f"gpu1.example.com {plain['ecdsa']}\n@revoked * {plain['short']}\n")
    options = [
        "-o",
        f"UserKnownHostsFile={known}",
        "-o",
        "GlobalKnownHostsFile=none",
        "-o",
        "Port=2222",
        "-o",
        "HostName=gpu1.example.com",
    ]
    done = subprocess.run(["ssh", "-F", "none", "-G", *options, "gpu1"], capture_output=True, text=True, check=True)
    settings = ssh_known.parse_settings(done.stdout)
    assert (settings.host, settings.port, settings.known_hosts) == ("gpu1.example.com", 2222, [str(known)])
    assert settings.names == ["[gpu1.example.com]:2222", "gpu1.example.com"] and not settings.other_sources
    found = subprocess.run(
        ["ssh-keygen", "-F", settings.names[1], "-f", known], capture_output=True, text=True, check=False
    )
    known_keys = dict.fromkeys(ssh_known.parse_known(found.stdout), str(known))
    assert list(known_keys) == [plain["ecdsa"]]

    said = ssh_known.problem(settings, [plain["ed25519"]], known_keys)
    assert (
        "by a key of the type ecdsa-sha2-nistp256 only" in said
        and f"`[gpu1.example.com]:2222 {plain['ed25519']}`" in said
    )
    assert ssh_known.problem(settings, [plain["ed25519"], plain["ecdsa"]], known_keys) == ""
    for strict in ("accept-new", "false"):
        assert ssh_known.problem(ssh_known.Settings("h", 22, strict), [plain["ed25519"]], known_keys) == ""
    assert ssh_known.problem(settings, [plain["ed25519"]], {f"@cert-authority {plain['long']}": "f"}) == ""


@pytest.mark.parametrize(
    ("said", "final", "hint"),
    [
        ("ssh: connect to host h port 2222: Connection timed out", False, "does a firewall"),
        ("ssh: connect to host h port 2222: Connection refused", False, "nobody listens there"),
        ("fleet@h: Permission denied (publickey).", True, "does not accept the key"),
        ("Unable to negotiate with h port 22: no matching key exchange method found.", True, "too old"),
        ("Host key verification failed.", True, "does not know the key"),
        ("kex_exchange_identification: read: Connection reset by peer", False, ""),
    ],
)
def test_what_ssh_said_is_explained(said: str, final: bool, hint: str) -> None:
    assert ssh_known.is_final(said) is final
    told = ssh_known.explained(said, 2222)
    assert told.startswith(said) and hint in told and (bool(hint) or told == said)


# ---------------------------------------------------------------------------------------------------------------- inputs


def test_lists_of_names_are_checked() -> None:
    assert ssh_pattern_problems(["fleet", "admin-*", "a?b@10.0.0.0/8", "DOM\\user"], "x") == []
    for wrong in ("two words", "", "a#b", 'a"', 7, None):
        (problem,) = ssh_pattern_problems([wrong], "ssh_hardening_allow_users")
        assert problem.startswith(f"ssh_hardening_allow_users has {wrong!r}; it takes one name or pattern")


def test_authorised_keys_are_checked_and_never_told(keys: dict[str, str]) -> None:
    assert ssh_key_problems([{"user": "fleet", "keys": [keys["ed25519"], f"no-pty {keys['long']}"]}]) == []
    secret = "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0"
    wrong = [
        {"user": "fleet", "keys": [secret, "ssh-rsa"]},
        {"user": "a b", "keys": []},
        {"user": "fleet", "keys": [keys["long"]]},
    ]
    told = " ".join(ssh_key_problems(wrong))
    for words in (
        "[0] (fleet): keys[0] is a private key", "[0] (fleet): keys[1] is no public key", "[1] (a b): user must be", "[1] (a b): keys is empty",
        "names fleet twice",
    ):  # fmt: skip
        assert words in told
    assert "c2VjcmV0" not in told


def test_the_recordings_are_those_of_the_programs_of_this_machine() -> None:
    """Where this machine is a Debian 12, its ssh prints what was recorded."""
    version = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr
    if "9.2p1 Debian" not in version:
        pytest.skip(f"another release: {version.strip()}")
    for query in set(ssh.QUERIES.values()):
        printed = subprocess.run(["ssh", "-Q", query], capture_output=True, text=True, check=True).stdout
        assert set(printed.split()) == set(recorded(f"ssh-Q-{query}-debian12").split())


def test_a_connection_that_was_turned_away_comes_again() -> None:
    """As sshd does with those that are too many, a bastion's for example."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "ansible.cfg")
    assert int(settings["ssh_connection"]["retries"]) >= 1
