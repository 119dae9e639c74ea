"""What sslyze, a judge of its own, finds where clients come in: protocols, ciphers, known attacks, resumption, and whether Mozilla's profile is met."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import make_pair
from tests.gateway.backends import Backend
from tests.gateway.harness import NAME, Gateway, document, route, running

PROTOCOLS = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3")
RESUMED = 10


def judged(gateway: Gateway) -> tuple[dict[str, Any], list[str]]:
    """What was found, by its name, and in what Mozilla's intermediate profile is not met."""
    place = gateway.directory / "sslyze.json"
    command = [
        sys.executable, "-m", "sslyze", "--mozilla_config=intermediate", "--resum", f"--resum_attempts={RESUMED}", "--http_headers",
        f"--json_out={place}", f"--sni={NAME}", f"127.0.0.1:{gateway.port}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert place.exists(), done.stdout + done.stderr
    (scanned,) = json.loads(place.read_text())["server_scan_results"]
    asked = {name: told for name, told in scanned["scan_result"].items() if told["status"] != "NOT_SCHEDULED"}
    assert {told["status"] for told in asked.values()} == {"COMPLETED"}, asked
    verdict = done.stdout.rpartition("COMPLIANCE AGAINST")[2]
    missed = [line.split()[1].rstrip(":") for line in verdict.splitlines() if line.strip().startswith("* ")]
    return {name: told["result"] for name, told in asked.items()}, missed


def names(ciphers: dict[str, Any]) -> set[str]:
    return {one["cipher_suite"]["name"].removeprefix("TLS_") for one in ciphers["accepted_cipher_suites"]}


@pytest.mark.parametrize("kind", ["ECDSA", "RSA"])
def test_the_judge_finds_nothing(tmp_path: Path, kind: str) -> None:
    """Nothing but that nobody else trusts a certificate that signs itself."""
    only = Backend("chat@gpu-1")
    pair = make_pair(30, NAME, rsa_bits=2048 if kind == "RSA" else 0)
    with running(tmp_path, document([route("small", [only])], [only]), [only.id], pair) as gateway:
        found, missed = judged(gateway)
    assert missed == ["certificate_path_validation"]
    spoken = [name for name in PROTOCOLS if found[f"{name}_cipher_suites"]["is_tls_version_supported"]]
    assert spoken == ["tls_1_2", "tls_1_3"]
    sealed = {"AES_128_GCM_SHA256", "AES_256_GCM_SHA384", "CHACHA20_POLY1305_SHA256"}
    assert names(found["tls_1_2_cipher_suites"]) == {f"ECDHE_{kind}_WITH_{cipher}" for cipher in sealed}
    assert names(found["tls_1_3_cipher_suites"]) == sealed
    assert {curve["name"] for curve in found["elliptic_curves"]["supported_curves"]} == {"X25519", "secp256r1", "secp384r1"}  # fmt: skip
    renegotiation = found["session_renegotiation"]
    assert renegotiation["supports_secure_renegotiation"] and renegotiation["client_renegotiations_success_count"] == 0
    assert not renegotiation["is_vulnerable_to_client_renegotiation_dos"]
    assert not found["tls_compression"]["supports_compression"]
    assert not found["heartbleed"]["is_vulnerable_to_heartbleed"]
    assert not found["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"]
    assert found["robot"]["robot_result"].startswith("NOT_VULNERABLE")
    assert found["tls_fallback_scsv"]["supports_fallback_scsv"]
    assert found["tls_extended_master_secret"]["supports_ems_extension"]
    # By any worker, out of the memory that they share. On a busy machine one of the judge's attempts fails now and then, among all that it does at the
    # same time; of 1,400 made by Python alone, one by one and ten at once, none did.
    assert found["session_resumption"]["session_id_successful_resumptions_count"] > RESUMED / 2
    assert found["http_headers"]["strict_transport_security_header"]["max_age"] == 63072000
