"""What is refused before a certificate is asked for by ACME."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.filter import acme as filters
from ansible_collections.gpufleet.llm.plugins.module_utils import acme
from ansible_collections.gpufleet.llm.plugins.modules import certificate_pair

from tests.certificates import make_pair

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/tls_certificate"
LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
GOOD: dict[str, Any] = {
    "directory": LETS_ENCRYPT, "staging_directory": "", "agree_to_terms": True, "email": "", "profile": "", "eab_key_id": "", "eab_key": "",
    "authority": "", "dns_plugin": "", "dns_requirements": [], "dns_credentials": "",
}  # fmt: skip
KNOWN = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__tls_certificate_dns_plugins"]
HASH = "example==1 --hash=sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (["llm.example.com"], {}),
        (["llm.example.com", "203.0.114.7"], {"profile": "shortlived"}),
        (["llm"], {"directory": "https://ca.internal/acme", "authority": "-----BEGIN CERTIFICATE-----"}),
        (["llm.example.com"], {"dns_plugin": "rfc2136", "dns_credentials": "secret"}),
        (["llm.example.com"], {"dns_plugin": "elsewhere", "dns_requirements": [HASH]}),
        (["llm.example.com"], {"eab_key_id": "kid", "eab_key": "key", "email": "admin@example.com"}),
    ],
)
def test_what_is_right(names: list[str], settings: dict[str, Any]) -> None:
    assert acme.problems({**GOOD, **settings}, names, KNOWN) == []


@pytest.mark.parametrize(
    ("names", "settings", "problem"),
    [
        ([], {"agree_to_terms": False}, "agree_to_terms is not true: read the terms of service of"),
        ([], {"directory": "http://ca.internal"}, "tls_certificate_acme_directory is 'http://ca.internal'"),
        ([], {"staging_directory": "nowhere"}, "tls_certificate_acme_staging_directory is 'nowhere'"),
        ([], {"email": "admin"}, "is 'admin', which is no e-mail address"),
        ([], {"eab_key": "key"}, "one is set"),
        ([], {"authority": "-----BEGIN PRIVATE KEY-----"}, "has no certificate in PEM"),
        (["gateway"], {}, "has gateway, and Let's Encrypt gives certificates for public names only"),
        (["10.0.0.1"], {"profile": "shortlived"}, "public addresses only"),
        (["203.0.114.7"], {}, "profile to shortlived"),
        (
            ["203.0.114.7"],
            {"dns_plugin": "rfc2136", "dns_credentials": "s", "profile": "shortlived"},
            "cannot be proved by DNS",
        ),
        ([], {"dns_plugin": "dns-rfc2136", "dns_credentials": "s"}, "without dns-"),
        ([], {"dns_plugin": "elsewhere"}, "`tools/lock_certbot.py certbot-dns-elsewhere` prints them"),
        ([], {"dns_plugin": "rfc2136"}, "dns_credentials is empty"),
        ([], {"dns_plugin": "elsewhere", "dns_requirements": ["example==1"]}, "an entry is package==version"),
        ([], {"dns_credentials": "s"}, "dns_plugin says of no plugin"),
    ],
)
def test_each_mistake_is_told(names: list[str], settings: dict[str, Any], problem: str) -> None:
    [found] = acme.problems({**GOOD, **settings}, names, KNOWN)
    assert problem in found


def test_every_plugin_that_comes_with_the_role_has_a_lock_of_certbots_version() -> None:
    certbot = (ROLE / "files/locks/certbot.txt").read_text()
    version = certbot.partition("\ncertbot==")[2].split()[0]
    assert tuple(map(int, version.split(".")[:2])) >= (5, 3)
    for plugin in KNOWN:
        lock = (ROLE / f"files/locks/certbot-dns-{plugin}.txt").read_text()
        assert f"\ncertbot-dns-{plugin}=={version} " in lock
        assert "\ncertbot==" not in lock


def test_the_filter_gets_what_the_role_gives_it() -> None:
    given = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__tls_certificate_acme_given"]
    assert set(given) == set(GOOD)
    assert set(filters.FilterModule().filters()) == {"acme_problems"}


class FakeModule:
    """Stands in for AnsibleModule: parameters, and commands that are really run."""

    def __init__(self, **parameters: Any) -> None:
        self.params = {name: option.get("default") for name, option in certificate_pair.ARGUMENTS.items()} | parameters

    def run_command(self, command: list[str]) -> tuple[int, str, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr


def test_a_pair_counts_when_it_was_ordered_as_it_is_wanted_and_renewed_in_time(tmp_path: Path) -> None:
    pair = tmp_path / "pairs/acme-11111111-2222"
    pair.mkdir(parents=True)
    (tmp_path / "current").symlink_to("pairs/acme-11111111-2222")
    for name, text in zip(("fullchain.pem", "privkey.pem"), make_pair(days=22, name="llm.example.com"), strict=True):
        (tmp_path / name).write_text(text)

    def reason(**parameters: Any) -> str:
        return certificate_pair.look(FakeModule(directory=str(tmp_path), names=["llm.example.com"], **parameters))

    assert reason(pair="acme-11111111-", life=0.25) == ""  # 22 of 82 days
    assert reason(pair="acme-33333333-") == "the certificate was not ordered as it is wanted now"
    assert reason(life=0.3) == "the certificate is valid for 22.0 of its 82 days"
