"""Whether a certificate and its key are those that are wanted, by the real openssl."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.modules.certificate_pair import look

NAMES = ["llm.example.com", "192.0.2.10", "2001:db8::1"]
AUTHORITY = "vLLM Fleet CA gw-1, Zürich"


class FakeModule:
    """Stands in for AnsibleModule: parameters, and commands that are really run."""

    def __init__(self, **parameters: Any) -> None:
        self.params = {
            "certificate": "",
            "names": NAMES,
            "authority_name": AUTHORITY,
            "days": 10,
            "life": 0,
            "pair": "",
            **parameters,
        }

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
