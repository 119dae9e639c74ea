"""A repository is trusted by the fingerprint of its key; other files that name it are found; holds are read and set."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import apt_host, openpgp
from ansible_collections.gpufleet.llm.plugins.module_utils.apt_host import Apt, AptError

KEY_PATH = "/etc/apt/keyrings/vendor.asc"


def packet(kind: int, content: bytes, new: bool = False) -> bytes:
    """A packet in the old or in the new format."""
    if new:
        return bytes([0xC0 | kind, 255]) + len(content).to_bytes(4, "big") + content
    return bytes([0x80 | kind << 2 | 1]) + len(content).to_bytes(2, "big") + content


def key(name: str, new: bool = False) -> tuple[bytes, str]:
    """Something that has the shape of a public key with a user id and a signature, and its fingerprint."""
    content = b"\x04" + b"\0\0\0\0\x01" + name.encode() * 20
    wanted = hashlib.sha1(b"\x99" + len(content).to_bytes(2, "big") + content).hexdigest().upper()  # noqa: S324
    return packet(6, content, new) + packet(13, b"a name") + packet(2, b"signed") + packet(14, b"\x04sub"), wanted


def armoured(data: bytes) -> bytes:
    text = base64.encodebytes(data).decode()
    return f"-----BEGIN PGP PUBLIC KEY BLOCK-----\nComment: x\n\n{text}=AbCd\n-----END PGP PUBLIC KEY BLOCK-----\n".encode()


VENDOR, FINGERPRINT = key("vendor")
OTHER, OTHER_FINGERPRINT = key("other", new=True)


def test_fingerprints_of_keys_armoured_or_not_in_either_format() -> None:
    assert openpgp.fingerprints(VENDOR) == [FINGERPRINT]
    assert openpgp.fingerprints(armoured(VENDOR)) == [FINGERPRINT]
    assert openpgp.fingerprints(armoured(OTHER).replace(b"\n", b"\r\n")) == [OTHER_FINGERPRINT]
    assert openpgp.fingerprints(armoured(VENDOR) + armoured(OTHER)) == [FINGERPRINT, OTHER_FINGERPRINT]


@pytest.mark.skipif(not shutil.which("gpg"), reason="gpg is the judge")
@pytest.mark.parametrize("kind", ["ed25519", "rsa2048"])
def test_gpg_says_the_same(tmp_path: Path, kind: str) -> None:
    def gpg(*arguments: str) -> bytes:
        command = ["gpg", "--homedir", str(tmp_path), "--batch", "--quiet", *arguments]
        return subprocess.run(command, check=True, capture_output=True).stdout

    tmp_path.chmod(0o700)
    gpg("--passphrase", "", "--quick-gen-key", "test <test@example.com>", kind, "default", "never")
    told = gpg("--with-colons", "--list-keys").decode()
    wanted = next(line.split(":")[9] for line in told.splitlines() if line.startswith("fpr:"))
    assert openpgp.fingerprints(gpg("--armor", "--export")) == [wanted]
    assert openpgp.fingerprints(gpg("--export")) == [wanted]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it holds no OpenPGP public key"),
        (b"<html>Please log in</html>", "it holds no OpenPGP public key"),
        (b"-----BEGIN PGP MESSAGE-----\n\nAAAA\n-----END PGP MESSAGE-----\n", "it holds no OpenPGP public key"),
        (armoured(VENDOR).replace(b"\n\n", b"\n\n!"), "its ASCII armour is broken"),
        (b"and more\n" + armoured(VENDOR), "it holds something beside keys"),
        (VENDOR[:-3], "it ends too early"),
        (VENDOR[:60], "it ends too early"),
        (VENDOR + b"junk", "it is no sequence of OpenPGP packets"),
        (VENDOR + packet(5, b"secret"), r"no part of a public key \(packet 5\)"),
        (packet(6, b"\x06new"), "key of version 6, and only version 4"),
        (packet(13, b"a name"), "it holds no OpenPGP public key"),
        (OTHER, f"it holds the key {OTHER_FINGERPRINT}, and {FINGERPRINT} was expected"),
        # every key of the file is trusted by apt, not only the first
        (VENDOR + OTHER, f"it holds the key {OTHER_FINGERPRINT}, and {FINGERPRINT} was expected"),
    ],
)
def test_what_is_not_the_expected_key_is_refused(data: bytes, reason: str) -> None:
    assert re.search(reason, openpgp.problem(data, [FINGERPRINT]))


def test_fingerprints_are_taken_as_people_write_them() -> None:
    spaced = " ".join(FINGERPRINT[at : at + 4] for at in range(0, 40, 4)).lower()
    assert openpgp.problem(VENDOR, [spaced]) == ""


class Host:
    """Files that are really there, and commands that are noted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commands: list[list[str]] = []
        self.answers: dict[str, tuple[int, str, str]] = {}
        self.served: dict[str, bytes] = {}
        self.apt = Apt(self.command, root=root, fetch=self.served.__getitem__)

    def command(self, command: list[str]) -> tuple[int, str, str]:
        self.commands.append(command)
        return self.answers.get(command[0], (0, "", ""))

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def place(self, **given: Any) -> None:
        options = {"key_path": KEY_PATH, "key": "", "key_url": "", "key_fingerprints": [FINGERPRINT]}
        self.apt.place_key({**options, **given})

    def look(self, **given: Any) -> dict[str, Any]:
        options: dict[str, Any] = {
            "key_path": "", "key_fingerprints": [FINGERPRINT], "repositories": ["vendor.example/"],
            "own_files": ["/etc/apt/sources.list.d/vendor.sources"], "packages": ["engine", "engine-cli"], "available": False,
        }  # fmt: skip
        return self.apt.look({**options, **given})


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_key_is_fetched_checked_and_put_in_place(host: Host) -> None:
    assert host.look(key_path=KEY_PATH)["key_problem"] == "it is not there"
    host.served["https://vendor.example/key"] = armoured(VENDOR)
    host.place(key_url="https://vendor.example/key")
    assert host.look(key_path=KEY_PATH)["key_problem"] == ""
    assert (host.root / KEY_PATH[1:]).stat().st_mode & 0o777 == 0o644
    host.place(key=armoured(VENDOR).decode())
    assert [path.name for path in (host.root / "etc/apt/keyrings").iterdir()] == ["vendor.asc"]
    (host.root / KEY_PATH[1:]).write_bytes(OTHER)
    assert "was expected" in host.look(key_path=KEY_PATH)["key_problem"]


def test_a_wrong_key_leaves_the_old_one(host: Host) -> None:
    host.place(key=armoured(VENDOR).decode())
    host.served["https://vendor.example/key"] = armoured(OTHER)
    with pytest.raises(
        AptError, match=r"https://vendor\.example/key is not the key of this repository: it holds the key"
    ):
        host.place(key_url="https://vendor.example/key")
    with pytest.raises(AptError, match="the content that was given is not the key"):
        host.place(key="hello")
    assert host.look(key_path=KEY_PATH)["key_problem"] == ""


def test_a_package_that_brings_the_key_is_known_by_its_sha256(host: Host) -> None:
    """As NVIDIA's cuda-keyring; it comes by the same way, and so by the proxy of the fleet."""
    right = {"key_sha256": hashlib.sha256(b"a package").hexdigest()}
    host.served["https://vendor.example/keyring.deb"] = b"another one"
    with pytest.raises(AptError, match=f"its SHA-256 is [0-9a-f]{{64}}, and {right['key_sha256']} was expected"):
        host.place(key_url="https://vendor.example/keyring.deb", **right)
    host.served["https://vendor.example/keyring.deb"] = b"a package"
    host.place(key_url="https://vendor.example/keyring.deb", **right)
    assert host.look(key_path=KEY_PATH, **right)["key_problem"] == ""


def test_the_key_of_each_repository_that_the_host_names(host: Host) -> None:
    """A second entry for one of them with another key, or with none, would make every call of apt fail."""
    host.write("etc/apt/sources.list", "deb http://old.example/debian/ stable main\n# deb http://off.example x y\n")
    host.write(
        "etc/apt/sources.list.d/one.list", "deb [arch=amd64 signed-by=/etc/k.gpg] https://one.example/ubuntu x main\n"
    )
    host.write(
        "etc/apt/sources.list.d/debian.sources",
        "Types: deb\nURIs: http://a.example/debian\n http://b.example/debian/\nSuites: x\nSigned-By: /usr/share/keyrings/d.gpg\n",
    )
    assert host.apt.signed_by() == {
        "http://old.example/debian": "",
        "https://one.example/ubuntu": "/etc/k.gpg",
        "http://a.example/debian": "/usr/share/keyrings/d.gpg",
        "http://b.example/debian": "/usr/share/keyrings/d.gpg",
    }
    assert "http://a.example/debian" not in host.apt.signed_by(["/etc/apt/sources.list.d/debian.sources"])


def test_what_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(VENDOR)
    assert apt_host.fetched(f"file://{tmp_path}/key") == VENDOR
    with pytest.raises(AptError, match=r"file:///nowhere/key cannot be fetched: .*No such file"):
        apt_host.fetched("file:///nowhere/key")
    with pytest.raises(AptError, match="ftp://x/key is no address of a key"):
        apt_host.fetched("ftp://x/key")


def test_other_files_that_name_the_repository_are_found_and_disabled(host: Host) -> None:
    files = {
        "etc/apt/sources.list": "deb http://deb.example/debian stable main\n",
        "etc/apt/sources.list.d/vendor.sources": "Types: deb\nURIs: https://vendor.example/deb\nSuites: x\n",
        "etc/apt/sources.list.d/old.list": "# old\ndeb [signed-by=/x] https://vendor.example/deb x stable\n#deb https://a b\n",
        "etc/apt/sources.list.d/old.sources": "# x\nTypes: deb\nURIs: https://vendor.example/deb\n\nEnabled: no\nURIs: https://b/\n",
        "etc/apt/sources.list.d/both.list": "deb https://vendor.example/deb x stable\ndeb https://else.example/ x main\n",
        "etc/apt/sources.list.d/off.list": "# deb https://vendor.example/deb x stable\n",
        "etc/apt/sources.list.d/off.sources": "Enabled: no\nURIs: https://vendor.example/deb\n",
        "etc/apt/sources.list.d/gone.list.disabled": "deb https://vendor.example/deb x stable\n",
    }
    for path, text in files.items():
        host.write(path, text)
    look = host.look()
    assert look["foreign"] == ["/etc/apt/sources.list.d/old.list", "/etc/apt/sources.list.d/old.sources"]
    assert look["mixed"] == ["/etc/apt/sources.list.d/both.list"]
    host.write("etc/apt/sources.list", "deb https://vendor.example/deb x stable\n")
    assert host.look()["mixed"] == ["/etc/apt/sources.list", "/etc/apt/sources.list.d/both.list"]
    host.apt.disable(look["foreign"])
    assert host.look()["foreign"] == []
    assert (host.root / "etc/apt/sources.list.d/old.list.disabled").exists()


def test_holds_are_read_and_set(host: Host) -> None:
    host.write(
        "var/lib/dpkg/status",
        "Package: engine\nStatus: hold ok installed\nVersion: 1\n\nPackage: engine-cli\nStatus: install ok installed\n\n"
        "Package: other\nStatus: hold ok installed\n",
    )
    assert host.look()["held"] == ["engine"]
    host.write("var/lib/dpkg/updates/0001", "Package: engine-cli\nStatus: hold ok installed\n")
    assert host.look()["held"] == ["engine", "engine-cli"]
    host.apt.mark("hold", ["engine"])
    assert host.commands == [["apt-mark", "hold", "engine"]]
    host.answers["apt-mark"] = (100, "", "E: no such package\n")
    with pytest.raises(AptError, match="`apt-mark unhold x` failed: E: no such package"):
        host.apt.mark("unhold", ["x"])


def test_a_hold_waits_for_another_apt(host: Host) -> None:
    locked = (
        100,
        "",
        "dpkg: error: dpkg frontend lock was locked by another process with pid 1\nE: Executing dpkg failed.\n",
    )
    answers = [locked, locked, (0, "engine set on hold.\n", "")]
    host.apt.command, host.apt.pause = lambda command: answers.pop(0), 0
    host.apt.mark("hold", ["engine"])
    assert answers == []
    host.apt.command, host.apt.seconds_to_wait = lambda command: locked, 0
    with pytest.raises(AptError, match="frontend lock was locked by another process"):
        host.apt.mark("hold", ["engine"])


def test_apt_is_asked_what_can_be_had_only_when_it_is_needed(host: Host) -> None:
    host.answers["apt-cache"] = (
        0,
        "engine:\n  Candidate: 2\n  Version table:\n     2 500\n        500 https://x y\n",
        "",
    )
    assert host.look()["available"] == {}
    assert host.commands == []
    assert host.look(available=True)["available"] == {"engine": {"candidate": "2", "versions": ["2"]}}
    assert host.commands == [["apt-cache", "policy", "engine", "engine-cli"]]
    host.answers["apt-cache"] = (100, "", "E: broken")
    assert host.look(available=True)["available"] == {}


def test_json_of_unknown_origin() -> None:
    assert [apt_host.loaded(text) for text in ('{"a": 1}', "", "[1]", "{")] == [{"a": 1}, {}, {}, {}]
