"""What the host's program does with certbot's work; certbot itself is played by a script, the real one is in molecule/tls_certificate_acme."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.test_frame import load_module

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/tls_certificate/templates/usr/local/lib/vllm-fleet/certificate.py"
# Writes down how it was called, and writes the pair that a test wants; or fails with the text that one wants.
CERTBOT = """\
#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >>calls
for word in $(cat fails 2>/dev/null); do case "$*" in *"$word"*) cat said; exit 1;; esac; done
case "$*" in *--dry-run*) exit 0;; esac
mkdir -p live && cp next/* live/
"""
# As certbot 5.8 printed them.
REFUSED = """\
Account registered.
Requesting a certificate for a.test

Certbot failed to authenticate some domains (authenticator: webroot). The Certificate Authority reported these problems:
  Identifier: a.test
  Type:   connection
  Detail: Get "http://a.test/": dial tcp 127.0.0.1:80: connect: connection refused

Hint: The Certificate Authority failed to download the temporary challenge files created by Certbot.

Some challenges have failed.
Ask for help or search for solutions at https://community.letsencrypt.org. See the logfile /l or re-run Certbot with -v for more details.
"""
POLICY = """\
Saving debug log to /tmp/acme/l/letsencrypt.log
Requesting a certificate for blocked.test
An unexpected error occurred:
Order included an identifier for which issuance is forbidden by policy: "blocked.test"
Ask for help or search for solutions at https://community.letsencrypt.org. See the logfile /l or re-run Certbot with -v for more details.
"""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_module(PROGRAM)


class Place:
    """A host with a certbot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = path / "tls"
        for name in ("tls", "state", "next"):
            (path / name).mkdir()
        (path / "certbot").write_text(CERTBOT)
        (path / "certbot").chmod(0o755)
        self.certbot_has("first")
        self.settings: dict[str, Any] = {
            "names": ["llm.test", "192.0.2.1"], "pair": "acme-11111111-", "directory": str(self.directory), "lineage": str(path / "live"),
            "certbot": str(path / "certbot"), "options": "/certbot.ini", "staging_directory": "https://staging.test/dir", "authority": "",
            "state": str(path / "state"), "reload_units": [],
        }  # fmt: skip

    def certbot_has(self, what: str) -> None:
        for name in ("fullchain.pem", "privkey.pem"):
            (self.path / "next" / name).write_text(f"{what} {name}\n")

    def run(self, *options: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        given = self.path / "settings.json"
        given.write_text(json.dumps(self.settings | settings))
        return subprocess.run([sys.executable, PROGRAM, given, *options], text=True, capture_output=True, check=False)

    def calls(self) -> list[str]:
        """How certbot was called since this was asked last."""
        calls = self.path / "calls"
        found = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return found

    def served(self) -> str:
        return (self.directory / "fullchain.pem").read_text().split()[0]

    def pairs(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "pairs").iterdir())

    def reason(self) -> str:
        return str(json.loads((self.path / "state/outcome.json").read_text())["reason"])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


ALWAYS = "certonly --config /certbot.ini --domain llm.test --ip-address 192.0.2.1"


def test_an_order_is_tried_first_and_a_renewal_is_left_to_certbot(place: Place) -> None:
    assert place.run().returncode == 0
    assert place.calls() == [f"{ALWAYS} --dry-run --server https://staging.test/dir", f"{ALWAYS} --force-renewal"]
    assert place.served() == "first"
    assert place.run().returncode == 0
    assert place.calls() == [ALWAYS]
    # another order, without a directory to try it at
    assert place.run(pair="acme-22222222-", staging_directory="").returncode == 0
    assert place.calls() == [f"{ALWAYS} --force-renewal"]
    assert place.reason() == ""


def test_the_pair_changes_as_a_whole_and_the_oldest_go(place: Place) -> None:
    for number in range(5):
        place.certbot_has(f"number-{number}")
        assert place.run().returncode == 0
        assert place.served() == f"number-{number}"
    assert len(place.pairs()) == 3
    assert (place.directory / "privkey.pem").stat().st_mode & 0o777 == 0o600
    assert (place.directory / "fullchain.pem").stat().st_mode & 0o777 == 0o644
    pairs = place.pairs()
    (place.directory / "current/fullchain.pem").write_text("changed by somebody")
    assert place.run().returncode == 0
    assert place.pairs() == pairs
    assert place.served() == "number-4"


def test_a_refusal_leaves_what_is_there_and_is_told_in_one_line(place: Place) -> None:
    assert place.run().returncode == 0
    place.certbot_has("second")
    for word, pair, reason in (
        ("--dry-run", "acme-22222222-", "the dry run at https://staging.test/dir failed: torn"),
        ("--force-renewal", "acme-22222222-", "torn"),
        ("certonly", "acme-11111111-", "torn"),
    ):
        (place.path / "fails").write_text(word)
        (place.path / "said").write_text("Saving debug log to /l\ntorn\n")
        done = place.run(pair=pair)
        assert done.returncode == 1
        assert place.reason() == reason
        assert done.stderr == f"no certificate for llm.test, 192.0.2.1: {reason}\n"
        assert place.served() == "first"


def test_reasons(program: ModuleType) -> None:
    assert (
        program.reason_of(REFUSED)
        == 'a.test: Get "http://a.test/": dial tcp 127.0.0.1:80: connect: connection refused (connection)'
    )
    assert (
        program.reason_of(POLICY)
        == 'Order included an identifier for which issuance is forbidden by policy: "blocked.test"'
    )
    assert program.reason_of(
        "Saving debug log to /l\nThe requested dns-x plugin does not appear to be installed\n"
    ) == ("The requested dns-x plugin does not appear to be installed")
    assert program.reason_of("") == "certbot said nothing"


def test_the_first_one_signs_itself_and_never_replaces_another(place: Place) -> None:
    assert place.run("first").returncode == 0
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", place.directory / "fullchain.pem"],
        text=True, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert "DNS:llm.test, IP Address:192.0.2.1" in shown
    assert place.pairs() == ["first"]
    assert place.run().returncode == 0
    assert place.served() == "first" and place.pairs() != ["first"]
    pairs = place.pairs()
    assert place.run("first").returncode == 0
    assert place.pairs() == pairs


def test_a_service_that_was_not_reloaded_is_asked_again(
    place: Place, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemctl is a script here: molecule/tls_certificate_acme has the real one."""
    bin_directory = place.path / "bin"
    bin_directory.mkdir()
    systemctl = bin_directory / "systemctl"

    def say(reload: str) -> Callable[[], list[str]]:
        systemctl.write_text(
            f'#!/bin/sh\ncase "$*" in *absent*) exit 3;; "reload "*) echo "$*" >>{place.path}/asked; {reload};; esac\n'
        )
        systemctl.chmod(0o755)
        return lambda: (place.path / "asked").read_text().splitlines()

    monkeypatch.setenv("PATH", f"{bin_directory}:/usr/bin:/bin")
    units = {"reload_units": ["absent.service", "nginx.service"]}
    asked = say("echo no >&2; exit 1")
    assert place.run(**units).returncode == 1
    assert place.reason() == "the new certificate is in place, but nginx.service was not reloaded: no"
    asked = say("exit 0")
    assert place.run(**units).returncode == 0
    assert place.run(**units).returncode == 0
    assert asked() == ["reload nginx.service"] * 2
