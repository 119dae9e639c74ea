"""Hosts that a run does not act on, and hosts that are dead: --limit names the hosts to act on, and a dead one stops nobody.

A fleet of two inference hosts with the stand-in for vLLM and a gateway. One inference host is stopped before the first run; a second gateway
is in the inventory and has never been there. At the end the host is back, and the internal key is changed on both while clients ask.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.conftest import LEASE, STRANGERS_LEASE, Done, on, request
from tests.hosts import hosts
from tests.stand_in import fleet as stand_ins

FLEET = "e2e-limit"
GATEWAY, WORKER, DEAD = (f"{FLEET}-{name}" for name in ("gateway", "gpu1", "gpu2"))
ABSENT = f"{FLEET}-absent"  # a gateway
KEY = stand_ins.KEY
HEADS = "Strict-Transport-Security"


@dataclass
class Small(stand_ins.Fleet):
    """The fleet, of which one gateway is there."""

    def see(self, method: str, path: str, body: object = None) -> tuple[int, Any, str]:
        """Ask the gateway: the status, the answer, and a header that its configuration decides."""
        status, answer, headers = self.ask(GATEWAY, method, path, body)
        return status, answer, headers.get(HEADS.lower(), "")

    def complete(self) -> int:
        """Ask for a completion."""
        return self.see("POST", "/v1/completions", {"model": "tiny", "prompt": "One", "max_tokens": 1})[0]


def leases() -> dict[str, str]:
    """Who holds the hosts that run."""
    return {host: on(host, f"cat {LEASE} 2>/dev/null || true") for host in (GATEWAY, WORKER)}


def told(done: Done) -> str:
    """What a run said, its line breaks undone."""
    return " ".join(done.output.split())


def instance(port: int) -> list[dict[str, Any]]:
    """The one instance of the inference hosts."""
    return [{"name": "chat", "model": "tiny", "port": port, "options": {"max-model-len": 512}}]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """The bare hosts, one of them stopped."""
    client = {"name": "a", "key": KEY, "requests_per_minute": 600, "concurrent_requests": 4}
    made = stand_ins.up(
        FLEET, tmp_path_factory.mktemp("limit"), ["gateway"], ["gpu1", "gpu2"], vllm_instances=instance(8000), gateway_clients=[client]
    )  # fmt: skip
    hosts.docker("stop", "--time", "0", DEAD)
    made.addresses[ABSENT] = str(ipaddress.ip_address(made.addresses[DEAD]) + 100)
    made.gateways.append(ABSENT)
    # what is wrong with a host outside of --limit, too, stops nobody
    made.host_variables[DEAD] = {"vllm_start_timeout": "soon"}
    # Of the two backends one is dead: what the other one runs is changed all the same.
    made.variables["turn_kept"] = "force"
    yield Small(**vars(made))
    hosts.down(FLEET)


def test_dead_hosts_do_not_keep_the_others_from_being_deployed(small: Small) -> None:
    done = small.run()
    assert f"{ABSENT}, {DEAD} cannot be reached and stay as before" in told(done), done.output
    assert done.status == 4, done.output
    recap = done.recap()
    assert {name: (counters["unreachable"], counters["failed"]) for name, counters in recap.items()} == {
        GATEWAY: (0, 0), WORKER: (0, 0), DEAD: (1, 0), ABSENT: (1, 0),
    }  # fmt: skip
    assert small.complete() == 200
    assert set(leases().values()) == {""}


def test_the_status_says_which_half_is_down(small: Small) -> None:
    """And shows the other one; what the gateway says of the dead backend is there all the same."""
    done = small.run(
        "-e", "status_format=json", "-e", f"status_file={small.directory}/status.json", playbook="playbooks/status.yml"
    )
    assert done.status == 2, done.output
    assert f"{DEAD}, {ABSENT}: cannot be reached: 2 of 4 hosts" in done.output, done.output
    status = json.loads((small.directory / "status.json").read_text())
    assert {name: host["reached"] for name, host in status["hosts"].items()} == {
        GATEWAY: True, WORKER: True, DEAD: False, ABSENT: False,
    }  # fmt: skip
    [chat], [dead] = (status["hosts"][name]["instances"] for name in (WORKER, DEAD))
    assert (chat["unit"]["active"], chat["generation"], chat["gateways"][GATEWAY]["use"]) == ("active", 1, "in")
    assert chat["metrics"]["running"] is not None
    assert dead["gateways"][GATEWAY]["use"] == "out"
    assert set(leases().values()) == {""}


def test_a_run_that_leaves_dead_hosts_out_is_a_good_one(small: Small) -> None:
    done = small.run("--limit", f"{WORKER},{GATEWAY}")
    assert done.status == 0, done.output
    assert {name: counters["changed"] for name, counters in done.recap().items()} == {WORKER: 0, GATEWAY: 0}, (
        done.output
    )
    assert f"{DEAD}: vllm_start_timeout is 'soon', but must be a whole number" in told(done).replace("''", "'")
    assert set(leases().values()) == {""}


def test_a_gateway_that_somebody_changes_is_left_to_them(small: Small) -> None:
    """The instance moves to another port, and the gateway outside of --limit cannot be told of it yet."""
    on(GATEWAY, f"cat >{LEASE}", stdin=json.dumps(STRANGERS_LEASE))
    before = on(GATEWAY, "cat /etc/vllm-gateway/fleet.json")
    done = small.run("--limit", WORKER, vllm_instances=instance(8001))
    assert done.status == 2, done.output
    assert f"{GATEWAY} is being changed by alice on ctl9 (process 7)" in told(done)
    assert on(GATEWAY, "cat /etc/vllm-gateway/fleet.json") == before
    assert json.loads(leases()[GATEWAY]) == STRANGERS_LEASE
    on(GATEWAY, f"rm {LEASE}")


def test_a_gateway_outside_of_the_limit_hears_what_concerns_it_and_nothing_else(small: Small) -> None:
    _, health, header = small.see("GET", "/healthz")
    done = small.run("--limit", WORKER, gateway_hsts_seconds=1000)
    assert done.status == 0, done.output
    assert f"{ABSENT} is outside of --limit and cannot be reached" in told(done)
    assert set(done.recap()) == {WORKER}
    data = json.loads(on(GATEWAY, "cat /etc/vllm-gateway/fleet.json"))
    assert {id: backend["port"] for id, backend in data["backends"].items()} == {
        f"chat@{host}": 8001 for host in (WORKER, DEAD)
    }
    assert small.complete() == 200
    _, health_now, header_now = small.see("GET", "/healthz")
    assert (health_now["program"], header_now) == (health["program"], header)
    assert health_now["configuration"] != health["configuration"]
    assert set(leases().values()) == {""}


def test_who_knows_already_is_not_told_again(small: Small) -> None:
    """Neither by the next such run, nor does the gateway's own run find anything but its own work: the header of the test before."""
    done = small.run("--limit", WORKER)
    assert (done.status, done.recap()[WORKER]["changed"]) == (0, 0), done.output
    before = on(GATEWAY, "stat --format %z /etc/vllm-gateway/fleet.json")
    done = small.run("--limit", GATEWAY)
    assert done.status == 0, done.output
    assert on(GATEWAY, "stat --format %z /etc/vllm-gateway/fleet.json") == before
    assert small.see("GET", "/v1/models")[2] == "max-age=1000"
    assert set(leases().values()) == {""}


# --- the internal key

KEYS = ["c" * 40, "d" * 40, "e" * 40]
FORMER_SECONDS = 15


def taken(small: Small, host: str) -> list[bool]:
    """Which of the keys the instance of a host takes, asked on the host itself."""
    url = f"http://{small.addresses[host]}:8001/v1/models"
    asked = [f'url = "{url}"\nheader = "Authorization: Bearer {key}"\nsilent\nmax-time = 5' for key in KEYS]
    curl = "curl --output /dev/null --write-out '%{http_code}' --config -"
    statuses = [on(host, curl, stdin=lines) for lines in asked]
    assert set(statuses) <= {"200", "401"}, statuses
    return [status == "200" for status in statuses]


def main_pids(*names: str) -> list[str]:
    """The processes of the instances, and the generations that they run."""
    return [
        on(name, "systemctl show --property=MainPID --value vllm@chat; cat /run/vllm/chat/generation") for name in names
    ]


class Clients:
    """Clients that ask all the time, and one that is not done with the body of its request before former keys have an end."""

    def __init__(self, small: Small) -> None:
        self.small = small
        self.statuses: list[int] = []
        self.over = threading.Event()
        self.slow = b""
        self.threads = [threading.Thread(target=self.ask) for _ in range(2)] + [threading.Thread(target=self.upload)]

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *_error: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def ask(self) -> None:
        while not self.over.is_set():
            try:
                self.statuses.append(self.small.complete())
            except OSError as error:
                self.statuses.append(-(error.errno or 1))
            time.sleep(0.05)

    def upload(self) -> None:
        """The worker of Nginx that began to read it is an old one when it is there, and shows the key that it had."""
        body = json.dumps({"model": "tiny", "prompt": "One", "max_tokens": 1}).encode() + b" " * 999
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        address = self.small.addresses[GATEWAY]
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        with context.wrap_socket(socket.create_connection((address, 443), timeout=30)) as connection:
            connection.sendall(head.encode())
            while not self.over.wait(1) and on(DEAD, "grep ' ' /etc/vllm-keys/accepted || true") == "":
                connection.sendall(body[:1])
                body = body[1:]
            connection.sendall(body)
            self.slow = connection.recv(12)


def test_a_former_key_is_taken_until_every_gateway_has_the_new_one(small: Small) -> None:
    """A gateway that cannot be reached may show it still. The host that was dead is back, and learns the new one alone."""
    hosts.docker("start", DEAD)
    small.addresses[DEAD] = hosts.address(DEAD)
    small.host_variables = {}
    client = {"name": "a", "key": KEY, "requests_per_minute": 6000, "concurrent_requests": 8}
    before = main_pids(WORKER)
    done = small.run(vllm_internal_key=KEYS[1], vllm_former_key_seconds=FORMER_SECONDS, gateway_clients=[client])
    assert done.status == 4, done.output
    assert f"{ABSENT} may still show the former internal key" in told(done)
    assert f"So both are taken by {WORKER}, until a run reaches every gateway" in told(done)
    assert (taken(small, WORKER), taken(small, DEAD)) == ([True, True, False], [False, True, False])
    assert main_pids(WORKER) == before, "no restart"
    assert small.complete() == 200


def test_changing_the_internal_key_loses_no_request(small: Small) -> None:
    """Nothing is restarted; afterwards the former keys, also the one of the run before, are refused."""
    small.gateways = [GATEWAY]
    before = main_pids(WORKER, DEAD)
    with Clients(small) as clients:
        done = small.run(vllm_internal_key=KEYS[2])
        assert done.status == 0, done.output
    assert set(clients.statuses) == {200}, clients.statuses
    assert len(clients.statuses) > 50
    assert clients.slow == b"HTTP/1.1 200"
    end = time.monotonic() + FORMER_SECONDS
    while [taken(small, host) for host in (WORKER, DEAD)] != [[False, False, True]] * 2:
        assert time.monotonic() < end, "a former key is taken still"
        time.sleep(1)
    assert main_pids(WORKER, DEAD) == before
    assert small.complete() == 200


# --- the keys of clients

NEW_KEY = "Sk/New.Key-of-Another-System=1"


def status_of(small: Small, key: str) -> int:
    """What the gateway says to a key."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return request(f"https://{small.addresses[GATEWAY]}", "GET", "/v1/models", key=key, tls=context).status


def rotate(small: Small, *keys: dict[str, str]) -> Done:
    """Run rotate_keys.yml for the keys of clients alone."""
    client = {"name": "a", "keys": list(keys), "requests_per_minute": 6000, "concurrent_requests": 8}
    return small.run("--tags", "gateway", playbook="playbooks/rotate_keys.yml", gateway_clients=[client])


def label(key: str) -> str:
    """How a key is told."""
    return f"a {hashlib.sha256(key.encode()).hexdigest()[:8]}"


def test_a_client_changes_its_key_without_a_gap(small: Small) -> None:
    """First both keys are taken, then the former one has ended, and at last it is gone."""
    with Clients(small) as clients:
        done = rotate(small, {"key": KEY, "expires": "2999-01-01"}, {"key": NEW_KEY})
        assert done.status == 0, done.output
    assert set(clients.statuses) == {200}, clients.statuses
    for line in (f"{label(KEY)} is taken until 2999-01-01", f"{label(NEW_KEY)} is taken without an end, and is new"):
        assert line in told(done)
    for key in (KEY, NEW_KEY):
        assert re.search(rf"ok +key {label(key)} +200, taken", done.output), done.output
    assert (status_of(small, KEY), status_of(small, NEW_KEY)) == (200, 200)

    done = rotate(small, {"key": KEY, "expires": "2020-01-01"}, {"key": NEW_KEY})
    assert done.status == 0, done.output
    assert f"{label(KEY)} is refused since 2020-01-01; take it out of gateway_clients" in told(done)
    assert re.search(rf"ok +key {label(KEY)} +401, refused", done.output), done.output
    assert (status_of(small, KEY), status_of(small, NEW_KEY)) == (401, 200)

    done = rotate(small, {"key": NEW_KEY})
    assert f"{label(KEY)} is taken no more: it is not in gateway_clients" in told(done)
    assert KEY not in done.output and NEW_KEY not in done.output
    again = rotate(small, {"key": NEW_KEY})
    assert {counters["changed"] for counters in again.recap().values()} == {0}, again.output


def test_the_internal_key_is_changed_by_the_same_playbook(small: Small) -> None:
    """And nothing else is: options that differ would restart an instance."""
    before = main_pids(WORKER, DEAD)
    changed = [{**instance(8001)[0], "options": {"max-model-len": 256}}]
    refused = small.run(playbook="playbooks/rotate_keys.yml", vllm_instances=changed, vllm_internal_key=KEYS[0])
    assert refused.status == 2, refused.output
    assert "Something else than keys has changed for the instances of" in told(refused)
    done = small.run(playbook="playbooks/rotate_keys.yml", vllm_instances=instance(8001))
    assert done.status == 0, done.output
    assert main_pids(WORKER, DEAD) == before, "no restart"
    end = time.monotonic() + FORMER_SECONDS
    while [taken(small, host) for host in (WORKER, DEAD)] != [[True, False, False]] * 2:
        assert time.monotonic() < end, "a former key is taken still"
        time.sleep(1)
