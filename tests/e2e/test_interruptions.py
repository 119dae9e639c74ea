"""Runs that are killed at any moment: the next one converges, and nothing half done is ever left in use.

One bare host gets the roles base, tls_certificate and gateway, in two configurations that differ in everything a file can
differ in. Run after run is killed, each at another moment and each wanting the other configuration; in every second one the
module that runs on the host is killed as well. The roles of vLLM itself are killed in molecule/vllm and molecule/model_store.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ENVIRONMENT, KILL_MODULES, LEFTOVERS, ROOT, Done, on, program
from tests.hosts import hosts

FLEET = "e2e-killed"
HOST = f"{FLEET}-host"
ROUNDS = int(os.environ.get("KILLS", "8"))  # the drill makes more of them
KEYS = ("a" * 40, "b" * 40)


def configuration(number: int) -> dict[str, Any]:
    """One of two configurations."""
    return {
        "tls_certificate_names": ["llm.test", f"n{number}.test"],
        "gateway_server_names": ["llm.test", f"n{number}.test"],
        "gateway_clients": [
            {
                "name": f"team-{number}",
                "key": KEYS[number],
                "requests_per_minute": 600,
                "concurrent_requests": 4 + number,
            }
        ],
        "gateway_hsts_seconds": 1000 + number,
        "base_journal_max_size": f"{64 + number}M",
        "base_ntp_servers": ["time.example.net"] if number else [],
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A playbook and its inventory, in a directory of their own."""
    path = tmp_path_factory.mktemp("killed")
    backend = {"vllm_instances": [{"name": "chat", "model": "m", "port": 8000}], "fleet_address": "192.0.2.1"}
    shared = {
        "ansible_connection": "community.docker.docker",
        "gateway_routes": [{"model": "m", "instance": "chat"}],
        "gateway_internal_key": "c" * 40,
        "tls_certificate_reload_units": ["nginx.service"],
    }
    inventory = {
        "all": {"vars": shared},
        "gateway": {"hosts": {HOST: {}}},
        "vllm": {"hosts": {"nobody": backend}},
    }
    (path / "hosts.json").write_text(json.dumps(inventory))
    roles = [{"role": f"gpufleet.llm.{role}"} for role in ("base", "tls_certificate", "gateway")]
    (path / "play.yml").write_text(json.dumps([{"hosts": "gateway", "gather_facts": False, "roles": roles}]))
    return path


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """A bare host."""
    hosts.down(FLEET)
    hosts.up(FLEET, {HOST: "debian12"})
    yield HOST
    hosts.down(FLEET)


def command(directory: Path, number: int) -> list[str]:
    """The run that wants one of the configurations."""
    variables = directory / f"configuration-{number}.json"
    variables.write_text(json.dumps(configuration(number)))
    return ["ansible-playbook", str(directory / "play.yml"), "-i", str(directory / "hosts.json"), "-e", f"@{variables}"]


def run(directory: Path, number: int) -> Done:
    """A run that nobody kills."""
    return program(*command(directory, number), check=False)


def ask(host: str, key: str) -> tuple[int, str | None]:
    """Ask the gateway for its health and whether it knows a key: the status for the key, and the HSTS header."""
    address = hosts.address(host)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection(address, 443, timeout=10, context=context)
    connection.request("GET", "/v1/models", headers={"Host": "llm.test", "Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers.get("Strict-Transport-Security")


def test_runs_that_are_killed_converge_on_the_next(directory: Path, host: str) -> None:
    chance = random.Random(20261121)
    for number in range(ROUNDS):
        process = subprocess.Popen(
            command(directory, number % 2),
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        # The first runs have everything before them, and a bare host's packages to fetch.
        time.sleep(chance.uniform(1, 20 if number < 4 else 9))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if number % 2:
            on(host, KILL_MODULES)
    done = run(directory, 1)
    assert done.status == 0, done.output
    again = run(directory, 1)
    assert again.status == 0, again.output
    assert again.recap()[host]["changed"] == 0, again.output


def test_what_serves_then_is_what_was_asked_for(directory: Path, host: str) -> None:
    assert ask(host, KEYS[1]) == (200, "max-age=1001")
    assert ask(host, KEYS[0])[0] == 401
    told = on(host, "journalctl --unit systemd-journald --output cat --no-pager | grep 'System Journal' | tail -n 1")
    assert "max 65" in told


def test_nothing_is_left_behind(directory: Path, host: str) -> None:
    assert on(host, LEFTOVERS) == ""
    known = [hashlib.sha256(key.encode()).hexdigest() for key in KEYS]
    assert on(host, "grep -rlE '" + "|".join([*KEYS, known[0]]) + "' /etc || true") == ""
    assert on(host, f"grep -rl {known[1]} /etc").split() == ["/etc/vllm-gateway/fleet.json"]
    assert on(host, "dpkg --audit") == ""
    assert on(host, "systemctl --failed --no-legend") == ""
