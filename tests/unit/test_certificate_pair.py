"""Whether a certificate and its key are those that are wanted, by the real openssl."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.modules.certificate_pair import ARGUMENTS, AUTHORITY_DAYS, days_left, look

from tests.certificates import Authority

NAMES = ["llm.example.com", "192.0.2.10", "2001:db8::1"]
AUTHORITY = "vLLM Fleet CA gw-1, Zürich"


class FakeModule:
    """Stands in for AnsibleModule: parameters, and commands that are really run."""

    def __init__(self, **parameters: Any) -> None:
        wanted = {"certificate": "", "names": NAMES, "authority_name": AUTHORITY, "days": 10}
        defaults = {name: argument.get("default") for name, argument in ARGUMENTS.items()}
        self.params = {**defaults, **wanted, **parameters}

    def run_command(self, command: list[str]) -> tuple[int, str, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr


def make(directory: Path, name: str = AUTHORITY, names: list[str] = NAMES, days: int = 30) -> None:
    """A certificate that signed itself: its issuer is its own name."""
    alternatives = ",".join(f"{'DNS' if name.startswith('l') else 'IP'}:{name}" for name in names)
    options = ["-addext", f"subjectAltName={alternatives}"] if names else []
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-utf8",
         "-subj", f"/O=An office/CN={name}", "-days", str(days), *options,
         "-keyout", str(directory / "privkey.pem"), "-out", str(directory / "fullchain.pem")],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def reason(tmp_path: Path) -> Callable[..., str]:
    """What is wrong with the pair of the test."""
    return lambda **parameters: look(FakeModule(directory=str(tmp_path), **parameters))


def test_the_wanted_pair(tmp_path: Path, reason: Callable[..., str]) -> None:
    make(tmp_path)
    assert reason() == ""
    assert reason(names=[NAMES[2].upper(), *NAMES[:2]]) == ""


def test_each_thing_that_can_be_wrong(tmp_path: Path, reason: Callable[..., str]) -> None:
    assert reason() == "there is no fullchain.pem"
    make(tmp_path)
    assert reason(names=NAMES[:2]) == "the certificate is for 192.0.2.10, 2001:db8::1, llm.example.com"
    assert reason(names=[*NAMES, "more.example.com"]).startswith("the certificate is for ")
    assert reason(authority_name="vLLM Fleet CA gw-2") == f"the certificate was signed by {AUTHORITY}"
    assert reason(days=31) == "the certificate is valid for 30 days"
    make(tmp_path, names=[])
    assert reason() == "the certificate is for no name"


def test_a_key_of_another_certificate(tmp_path: Path, reason: Callable[..., str]) -> None:
    make(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    make(other)
    (other / "privkey.pem").rename(tmp_path / "privkey.pem")
    assert reason() == "the key does not belong to the certificate"
    (tmp_path / "privkey.pem").write_text("torn")
    assert reason().startswith("privkey.pem cannot be read: ")
    (tmp_path / "privkey.pem").unlink()
    assert reason() == "there is no privkey.pem"
    (tmp_path / "fullchain.pem").write_text("torn")
    (tmp_path / "privkey.pem").write_text("torn")
    assert reason().startswith("fullchain.pem cannot be read: ")


def test_a_given_certificate_is_compared_as_it_is(tmp_path: Path, reason: Callable[..., str]) -> None:
    make(tmp_path, name="anybody", names=[], days=1)
    text = (tmp_path / "fullchain.pem").read_text()
    assert reason(certificate=text + "\n\n", names=["x"]) == ""
    assert reason(certificate="-----BEGIN CERTIFICATE-----") == "the certificate is another one"


def test_a_host_without_openssl(tmp_path: Path, reason: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert reason() == "openssl is not installed"


def signed(directory: Path, authority: Authority, name: str = "gpu-1") -> None:
    """A certificate of an authority, as a host of the fleet has it."""
    certificate, key = authority.sign(name, "192.0.2.10")
    for file, text in (("cert.pem", certificate), ("key.pem", key), ("ca.pem", authority.pem)):
        (directory / file).write_text(text)


def test_a_certificate_of_the_authority_that_is_there(tmp_path: Path, reason: Callable[..., str]) -> None:
    mine, other = Authority(), Authority()
    signed(tmp_path, mine)
    wanted = {
        "certificate_file": "cert.pem", "key_file": "key.pem", "names": ["192.0.2.10"], "common_name": "gpu-1",
        "authority_name": "", "authority_files": [str(tmp_path / "authority.pem"), str(tmp_path / "ca.pem")],
    }  # fmt: skip
    assert reason(**wanted) == ""
    assert reason(**{**wanted, "common_name": "gpu-2"}) == "the certificate is that of gpu-1"
    # the authority itself is here, and it is another one, with the same name
    (tmp_path / "authority.pem").write_text(other.pem)
    assert reason(**wanted) == f"ca.pem is not {tmp_path}/authority.pem"
    (tmp_path / "ca.pem").write_text(other.pem)
    assert "has not signed it" in reason(**wanted)
    (tmp_path / "authority.pem").unlink()
    assert "has not signed it" in reason(**wanted)
    (tmp_path / "ca.pem").unlink()
    assert reason(**{**wanted, "authority_name": "Test CA"}) == ""
    assert reason(**wanted) == "the certificate was signed by Test CA"
    (tmp_path / "authority.pem").write_text(mine.pem)
    assert reason(**wanted) == "there is no ca.pem"


def test_a_certificate_of_the_first_of_two_authorities(tmp_path: Path, reason: Callable[..., str]) -> None:
    """While a fleet goes over to another authority, hosts trust both, and what the former one signed is signed anew."""
    mine, former = Authority(name="Mine"), Authority(name="Former")
    signed(tmp_path, former)
    wanted = {
        "certificate_file": "cert.pem", "key_file": "key.pem", "names": ["192.0.2.10"], "authority_name": "",
        "authority_files": [str(tmp_path / "authority.pem"), str(tmp_path / "ca.pem")], "former": former.pem,
    }  # fmt: skip
    (tmp_path / "ca.pem").write_text(f"{former.pem}\n{mine.pem}")
    assert reason(**wanted) == ""
    (tmp_path / "ca.pem").write_text(f"{mine.pem}\n{former.pem}")
    assert "has not signed it" in reason(**wanted)
    # where the authority itself is
    (tmp_path / "authority.pem").write_text(mine.pem)
    signed(tmp_path, mine)
    assert reason(**wanted) == f"ca.pem is not {tmp_path}/authority.pem and the former authority"
    (tmp_path / "ca.pem").write_text(f"{mine.pem}\n\n{former.pem}\n")
    assert reason(**wanted) == ""
    assert reason(**{**wanted, "former": ""}) == f"ca.pem is not {tmp_path}/authority.pem"


def test_no_certificate_has_to_outlive_its_authority(tmp_path: Path, reason: Callable[..., str]) -> None:
    authority = Authority(days=20)
    wanted = {
        "certificate_file": "cert.pem", "key_file": "key.pem", "names": ["192.0.2.10"], "authority_name": "",
        "authority_files": [str(tmp_path / "ca.pem")], "days": 100,
    }  # fmt: skip
    signed(tmp_path, authority)  # for 30 days
    assert reason(**wanted) == ""
    certificate, key = authority.sign("gpu-1", "192.0.2.10", days=15)
    (tmp_path / "cert.pem").write_text(certificate)
    (tmp_path / "key.pem").write_text(key)
    assert reason(**wanted) == "the certificate is valid for 15 days"
    assert reason(**{**wanted, "days": 10}) == ""


def test_how_long_an_authority_lasts(tmp_path: Path) -> None:
    module: Any = FakeModule()
    file = tmp_path / "ca.pem"
    assert days_left(module, None) is None
    assert days_left(module, file) is None
    file.write_text("torn")
    assert days_left(module, file) is None
    file.write_text(Authority(days=300).pem)
    assert 299 < (days_left(module, file) or 0) <= 300
    # none that it signs is longer: the bound of fleet_authority_valid_days and tls_certificate_valid_days
    assert AUTHORITY_DAYS > 825
