"""What happens to fleets, to a fleet of two gateways and three inference hosts, while clients ask it all the time. No request may fail.

By hand, as root, where a Docker engine answers (an hour on two cores):

    .venv/bin/pytest tests/drills/test_living.py -s

vLLM is the stand-in (tests/stand_in); hosts are containers with systemd, over SSH. Where something is killed that has running requests, those
cannot be saved: `lost` in what is printed at the end are requests that were on it at that moment; every other one has to end well. Each
test leaves a fleet that serves; tests/e2e/test_living.py is the short form.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.conftest import FIGURES, KILL_MODULES, LEASE, LEFTOVERS, Done, on, until
from tests.hosts import hosts
from tests.living import NEW, OLD, PORTS, SECONDS_PER_TOKEN, Living, instances, living
from tests.load import Load, Outcome
from tests.stand_in.fleet import says

QUESTIONS = [{"name": "a capital", "prompt": "The capital of France is", "max_tokens": 4, "matches": "Paris"}]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Living]:
    """The fleet, and its clients."""
    with living("drill-living") as found:
        yield found


def said(done: Done) -> str:
    """What a run said, its line breaks undone."""
    return " ".join(done.output.split())


def good(done: Done, what: str) -> None:
    """A run that has to succeed."""
    FIGURES[what] = f"{done.seconds:.0f} s"
    assert done.status == 0, done.output


def back_to(fleet: Living, version: str) -> None:
    """The inventory names a version that works, and every host runs it."""
    good(fleet.upgrade(**fleet.release(version)), f"upgrade.yml back to {version}")
    assert set(fleet.versions().values()) == {version}
    fleet.whole()


def leaving(fleet: Living, worker: str) -> bool:
    """Whether a turn has taken a host out, and nothing of it is used any more."""
    return fleet.word(worker)["operator"] == "drained" and fleet.out_of_use(worker)


@contextmanager
def upgrading(fleet: Living, version: str, worker: str) -> Iterator[tuple[int, Callable[[], Done]]]:
    """An upgrade that has come to where this host is out of traffic: its process group, and what ends with it."""
    fleet.fleet.variables |= fleet.release(version)
    begun = time.monotonic()
    process = fleet.fleet.begin("playbooks/upgrade.yml")
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.append(process.stdout.read() if process.stdout else ""))
    reader.start()

    def end() -> Done:
        process.wait(900)
        reader.join()
        return Done(process.returncode, told[0], time.monotonic() - begun)

    try:
        until(f"{worker} has its turn", lambda: process.poll() is not None or leaving(fleet, worker), 600, 0.1)
        assert process.poll() is None, end().output
        yield process.pid, end
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        end()


# --- what is changed


def test_an_option_is_changed(fleet: Living) -> None:
    with fleet.asked("site.yml, an option"):
        done = fleet.fleet.run(vllm_instances=instances(**{"max-num-seqs": 128}))
        good(done, "site.yml, an option of every instance")
    fleet.whole()


def test_a_version_is_upgraded(fleet: Living) -> None:
    with fleet.asked("upgrade.yml"):
        good(fleet.upgrade(**fleet.release(NEW)), "upgrade.yml, three hosts")
        assert set(fleet.versions().values()) == {NEW}
        fleet.whole()


def test_an_upgrade_that_is_done_changes_nothing(fleet: Living) -> None:
    before = [fleet.pid(worker, instance) for worker in fleet.workers for instance in PORTS]
    with fleet.asked("upgrade.yml again"):
        done = fleet.upgrade()
    assert {counters["changed"] for counters in done.recap().values()} == {0}, done.output
    assert [fleet.pid(worker, instance) for worker in fleet.workers for instance in PORTS] == before


def test_a_version_is_rolled_back_and_held(fleet: Living) -> None:
    with fleet.asked("rollback.yml"):
        good(
            fleet.fleet.run("-e", "fleet_instance=chat", playbook="playbooks/rollback.yml"), "rollback.yml, three hosts"
        )
        assert set(fleet.versions().values()) == {OLD}
        fleet.fleet.run(check=True)
        assert set(fleet.versions().values()) == {OLD}, "site.yml respects that it is held"
        good(fleet.fleet.run("-e", "fleet_instance=chat", playbook="playbooks/unhold.yml"), "unhold.yml")
        back_to(fleet, NEW)


# --- versions that are no good


def test_a_version_that_does_not_start(fleet: Living) -> None:
    others = [fleet.pid(worker) for worker in fleet.workers[1:]]
    bad = fleet.release("0.33.1+cpu", start_error="no kernel image is available")
    with fleet.asked("a version that does not start"), fleet.trying(**bad):
        done = fleet.upgrade()
    assert done.status != 0, done.output
    assert "no kernel image is available" in said(done)
    assert set(fleet.versions().values()) == {NEW}
    assert [fleet.pid(worker) for worker in fleet.workers[1:]] == others
    fleet.whole()


def test_a_version_that_answers_nonsense(fleet: Living) -> None:
    """It passes every health check. Not one of its answers reaches a client: those would fail, as the load knows what is right."""
    others = [fleet.pid(worker) for worker in fleet.workers[1:]]
    bad = fleet.release("0.33.2+cpu", answers="nonsense")
    with fleet.asked("a version that answers nonsense"), fleet.trying(**bad, turn_questions=QUESTIONS):
        done = fleet.upgrade()
    assert done.status != 0, done.output
    assert "Paris" in said(done)
    assert set(fleet.versions().values()) == {NEW}
    assert [fleet.pid(worker) for worker in fleet.workers[1:]] == others
    fleet.whole()


def test_a_version_that_is_slow(fleet: Living) -> None:
    """Clients get right answers of it, so it is in traffic for as long as the soak takes to see how late the first token is."""
    others = [fleet.pid(worker) for worker in fleet.workers[1:]]
    bad = fleet.release("0.33.3+cpu", prefill_seconds=0.8)
    with fleet.asked("a version that is slow"), fleet.trying(**bad, turn_soak_seconds=45):
        done = fleet.upgrade()
    assert done.status != 0, done.output
    assert set(fleet.versions().values()) == {NEW}
    assert [fleet.pid(worker) for worker in fleet.workers[1:]] == others
    fleet.whole()


# --- runs that are disturbed


def test_the_second_host_dies_in_its_turn(fleet: Living) -> None:
    """Its requests have ended: nobody loses anything. The first one has the new version, the third one is not touched."""
    second = fleet.workers[1]
    before = fleet.pid(second)
    with fleet.asked("docker kill of the second host in its turn"):
        with upgrading(fleet, OLD, second) as (_process, end):
            # out of traffic, it still answers what it had begun
            until("the instance is stopped", lambda: fleet.pid(second) != before, 120, 0.1)
            hosts.docker("kill", second)
            done = end()
        assert done.status != 0, done.output
        hosts.docker("start", second)
        assert hosts.address(second) == fleet.fleet.addresses[second], "the engine gave it another address"
        assert (fleet.version(fleet.workers[0]), fleet.version(fleet.workers[2])) == (OLD, NEW)
        until(f"{second} can be asked again", lambda: bool(fleet.version(second)), 120)
        back_to(fleet, OLD)


def test_the_controller_is_killed_and_runs_again(fleet: Living) -> None:
    """While the second host is out. Nothing of the run is left but small files on the hosts; the next one goes on by them."""
    second = fleet.workers[1]
    with fleet.asked("kill -9 of the controller in the second host's turn"):
        with upgrading(fleet, NEW, second) as (process, end):
            os.killpg(process, signal.SIGKILL)
            end()
            on(second, KILL_MODULES)
        assert fleet.word(second)["operator"] == "drained"
        done = fleet.upgrade()
        good(done, "upgrade.yml after one that was killed")
        assert set(fleet.versions().values()) == {NEW}
        fleet.whole()
    for host in (*fleet.workers, *fleet.fleet.gateways):
        assert on(host, f"ls {LEASE} 2>/dev/null || true") == ""
        assert on(host, LEFTOVERS) == ""


def test_two_operators(fleet: Living) -> None:
    """The second one is told who is first, and disturbs nothing."""
    with fleet.asked("two operators"), upgrading(fleet, OLD, fleet.workers[0]) as (_process, end):
        done = fleet.fleet.run(playbook="playbooks/upgrade.yml")
        assert done.status != 0, done.output
        assert "is being changed by" in said(done), done.output
        good(end(), "upgrade.yml beside a second operator")
    assert set(fleet.versions().values()) == {OLD}
    fleet.whole()


# --- verbs


def long_stream(fleet: Living) -> tuple[threading.Thread, list[Outcome]]:
    """One answer of 45 seconds on the first host's instance, by the first gateway: the thread that reads it, and what becomes of it."""
    tokens = round(45 / SECONDS_PER_TOKEN)
    load = Load(
        [fleet.load.gateways[0]], ["tiny"], fleet.load.key, streams=1, whole=0, tokens=(tokens, tokens), says=says
    )
    load.over.set()

    def read() -> None:
        load.over.clear()
        load.thread.start()
        time.sleep(1)
        load.over.set()
        load.thread.join()

    thread = threading.Thread(target=read)
    thread.start()
    return thread, load.outcomes


def test_a_drain_waits_for_a_long_answer(fleet: Living) -> None:
    with fleet.asked("drain.yml of each host during answers of 45 s"):
        streams = [long_stream(fleet) for _ in range(6)]
        time.sleep(2)
        for worker in fleet.workers[:2]:
            limit = ("--limit", worker)
            pid = fleet.pid(worker)
            done = fleet.fleet.run(*limit, "-e", "fleet_reason=a drill", playbook="playbooks/drain.yml")
            good(done, f"drain.yml of {worker} during long answers")
            assert fleet.out_of_use(worker)
            assert fleet.pid(worker) == pid, "it runs on"
            good(fleet.fleet.run(*limit, playbook="playbooks/undrain.yml"), f"undrain.yml of {worker}")
            fleet.whole()
        for thread, outcomes in streams:
            thread.join(120)
            assert [outcome.failure for outcome in outcomes] == [""], [outcome.told() for outcome in outcomes]


def test_a_rolling_restart(fleet: Living) -> None:
    before = {(worker, name): fleet.pid(worker, name) for worker in fleet.workers for name in PORTS}
    with fleet.asked("restart.yml"):
        good(fleet.fleet.run(playbook="playbooks/restart.yml"), "restart.yml, three hosts")
        fleet.whole()
    after = {(worker, name): fleet.pid(worker, name) for worker in fleet.workers for name in PORTS}
    assert not set(before.items()) & set(after.items())


def test_hosts_are_rebooted(fleet: Living) -> None:
    """Two of three, one after the other. A container that ends is started again by the engine, as a machine is by its firmware."""
    limit = ",".join(fleet.workers[:2])
    for worker in fleet.workers[:2]:
        hosts.docker("update", "--restart=always", worker)
    before = [fleet.pid(worker) for worker in fleet.workers]
    was = [on(worker, "cut --delimiter=' ' --fields=22 /proc/1/stat") for worker in fleet.workers]
    with fleet.asked("reboot.yml, two hosts"):
        done = fleet.fleet.run("--limit", limit, "-e", "fleet_reason=a drill", playbook="playbooks/reboot.yml")
        good(done, "reboot.yml, two hosts")
        fleet.whole()
    after = [fleet.pid(worker) for worker in fleet.workers]
    booted = [on(worker, "cut --delimiter=' ' --fields=22 /proc/1/stat") for worker in fleet.workers]
    assert (booted[0] != was[0], booted[1] != was[1], booted[2] != was[2]) == (True, True, False)
    assert before[2] == after[2]
    for worker in fleet.workers[:2]:
        hosts.docker("update", "--restart=no", worker)


def test_a_host_leaves_the_inventory_and_comes_back(fleet: Living) -> None:
    *others, third = list(fleet.workers)
    with fleet.asked("a host removed from the inventory, and added again"):
        fleet.fleet.workers = others
        good(fleet.fleet.run(), "site.yml without a host")
        for gateway in fleet.fleet.gateways:
            assert set(fleet.fleet.state(gateway)) == {f"{name}@{worker}" for name in PORTS for worker in others}
        fleet.fleet.workers = [*others, third]
        good(fleet.fleet.run(), "site.yml with the host again")
        fleet.whole()


# --- what breaks


def moved(fleet: Living, worker: str, begun: float) -> float:
    """Seconds until no gateway uses a host."""
    until(f"the traffic has left {worker}", lambda: fleet.out_of_use(worker), 60, 0.1)
    return time.time() - begun


def test_an_engine_hangs(fleet: Living) -> None:
    """The whole server is stopped by SIGSTOP, both instances of the host. Its running requests hang with it."""
    worker = fleet.workers[0]
    begun = time.time()
    lost = fleet.served_by(worker)
    limit = {"seconds": 0.0}
    with fleet.asked("SIGSTOP of a host's servers", lambda one: one.begun <= limit["seconds"] and lost(one)):
        for instance in PORTS:
            on(worker, f"kill -STOP {fleet.pid(worker, instance)}")
        seconds = moved(fleet, worker, begun)
        limit["seconds"] = time.time()
        FIGURES["hung engine: traffic moved after"] = f"{seconds:.1f} s"
        assert seconds < 30
        until(f"{worker} is healed", lambda: fleet.in_use(worker), 300, 0.5)
        FIGURES["hung engine: healed after"] = f"{time.time() - begun:.1f} s"


def test_an_engine_is_killed(fleet: Living) -> None:
    worker = fleet.workers[1]
    begun = time.time()
    lost = fleet.served_by(worker)
    with fleet.asked("kill -9 of an instance", lambda one: one.begun <= begun + 1 and lost(one)):
        on(worker, f"kill -9 {fleet.pid(worker)}")
        time.sleep(1)
        until(f"{worker} is back", lambda: bool(fleet.version(worker)) and fleet.in_use(worker), 120, 0.5)
        FIGURES["killed engine: in traffic again after"] = f"{time.time() - begun:.1f} s"


def test_a_host_loses_its_network(fleet: Living) -> None:
    """From one gateway alone, in one direction and without a word: what is sent there gets no answer."""
    worker, gateway = fleet.workers[2], fleet.fleet.gateways[0]
    address = fleet.fleet.addresses[gateway]
    lost = fleet.served_by(worker)
    limit = {"seconds": 0.0}

    def hopeless(one: Outcome) -> bool:
        return one.gateway == gateway and one.begun <= limit["seconds"] and lost(one)

    with fleet.asked("network cut between a gateway and a host", hopeless):
        begun = time.time()
        on(worker, f"ip route add blackhole {address}/32")
        try:
            names = {f"{name}@{worker}" for name in PORTS}
            until("the gateway leaves it", lambda: not names & fleet.fleet.used(gateway), 60, 0.1)
            limit["seconds"] = time.time()
            FIGURES["network cut: traffic moved after"] = f"{time.time() - begun:.1f} s"
            assert names <= fleet.fleet.used(fleet.fleet.gateways[1]), "the other gateway reaches it"
            fleet.load.settle(90)
        finally:
            on(worker, f"ip route del blackhole {address}/32")
        fleet.whole()


def test_a_disk_is_full(fleet: Living) -> None:
    """Of the first host, where generations are written: it fails before anything is stopped for it."""
    worker = fleet.workers[0]
    before = {each: fleet.pid(each) for each in fleet.workers}
    other = NEW if fleet.version(worker) == OLD else OLD
    with fleet.asked("a full disk"):
        on(
            worker,
            "mkdir /tmp/small && mount -t tmpfs -o size=1m,mode=0755 small /tmp/small && cp -a /etc/vllm/. /tmp/small/"
            " && mount --bind /tmp/small /etc/vllm && (cat /dev/zero >/etc/vllm/zero; true) 2>/dev/null",
        )
        try:
            with fleet.trying(**fleet.release(other)):
                done = fleet.upgrade()
            assert done.status != 0, done.output
            assert "No space left" in said(done), done.output
            assert {each: fleet.pid(each) for each in fleet.workers} == before
            fleet.whole()
        finally:
            on(worker, "rm -f /etc/vllm/zero; umount /etc/vllm; umount /tmp/small; rmdir /tmp/small")
        back_to(fleet, other)


FAKETIME = """[Service]
Environment=LD_PRELOAD=/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1 FAKETIME_TIMESTAMP_FILE=/var/lib/faketime FAKETIME_NO_CACHE=1
Environment=FAKETIME_DONT_FAKE_MONOTONIC=1
"""


def test_a_clock_jumps(fleet: Living) -> None:
    """That of the gateway's checks and of a host's agent: an hour on, and a day back. The clock that only goes on is right, as a kernel has it."""
    places = {
        fleet.fleet.gateways[0]: "vllm-gateway-checks.service",
        fleet.workers[0]: "vllm-fleet-agent.service",
    }
    with fleet.asked("a clock jumps"):
        for host, unit in places.items():
            on(host, "DEBIAN_FRONTEND=noninteractive apt-get install -y -q libfaketime && echo +0 >/var/lib/faketime")
            drop_in = f"/etc/systemd/system/{unit}.d"
            on(host, f"mkdir -p {drop_in} && cat >{drop_in}/90-faketime.conf", stdin=FAKETIME)
            on(host, f"systemctl daemon-reload && systemctl restart {unit}")
        fleet.whole()
        worker = fleet.workers[0]
        for jump in ("+3600", "-86400"):
            for host in places:
                on(host, f"echo {jump} >/var/lib/faketime")
            time.sleep(5)
            assert fleet.in_use(), jump
            good(fleet.fleet.run("--limit", worker, playbook="playbooks/drain.yml"), f"drain.yml, clock {jump} s")
            assert fleet.out_of_use(worker)
            good(fleet.fleet.run("--limit", worker, playbook="playbooks/undrain.yml"), f"undrain.yml, clock {jump} s")
            fleet.whole()
        for host, unit in places.items():
            on(
                host,
                f"rm -r /etc/systemd/system/{unit}.d/90-faketime.conf && systemctl daemon-reload && systemctl restart {unit}",
            )
    fleet.whole()


def test_a_certificate_is_renewed(fleet: Living) -> None:
    """Clients that are connected go on, new ones see the new one. They know the authority, which stays."""
    names = fleet.fleet.variables["gateway_server_names"]
    show = "openssl x509 -noout -fingerprint -in /etc/ssl/vllm-fleet/fullchain.pem"
    before = {gateway: on(gateway, show) for gateway in fleet.fleet.gateways}
    with fleet.asked("a certificate is renewed"):
        good(
            fleet.fleet.run("--tags", "tls_certificate,gateway", gateway_server_names=[*names, "new.test"]),
            "site.yml, a name more in the certificate",
        )
        assert not set(before.items()) & {(gateway, on(gateway, show)) for gateway in fleet.fleet.gateways}


def test_a_gateway_is_away_during_a_drain(fleet: Living) -> None:
    """Its clients go to the other one meanwhile. When it is back, it knows of the drain before it sends anything there."""
    away, worker = fleet.fleet.gateways[1], fleet.workers[0]
    with fleet.asked("a gateway that is away during a drain"):
        fleet.load.leave_out(away)
        fleet.load.settle()
        hosts.docker("stop", "--time", "1", away)
        try:
            done = fleet.fleet.run("--limit", worker, playbook="playbooks/drain.yml")
        finally:
            hosts.docker("start", away)
        assert fleet.word(worker)["operator"] == "drained", done.output
        assert hosts.address(away) == fleet.fleet.addresses[away], "the engine gave it another address"

        def answers() -> bool:
            try:
                return fleet.fleet.ask(away, "GET", "/v1/models")[0] == 200
            except OSError:
                return False

        until("the gateway answers", answers, 60, 0.2)
        lines = int(on(away, "wc -l </var/log/nginx/access.log"))
        fleet.load.leave_out()
        time.sleep(15)
        asked = on(away, f"tail -n +{lines + 1} /var/log/nginx/access.log").splitlines()
        addresses = {json.loads(line)["upstream_addr"].rpartition(":")[0] for line in asked} - {""}
        assert addresses == {fleet.fleet.addresses[each] for each in fleet.workers[1:]}
        good(fleet.fleet.run("--limit", worker, playbook="playbooks/undrain.yml"), "undrain.yml")
        fleet.whole()


def test_the_clients_saw_all_gateways(fleet: Living) -> None:
    """Last: who asked whom."""
    asked = dict.fromkeys((gateway.name for gateway in fleet.load.gateways), 0)
    for outcome in list(fleet.load.outcomes):
        asked[outcome.gateway] += 1
    FIGURES["requests by gateway"] = ", ".join(f"{name} {count}" for name, count in asked.items())
    assert min(asked.values()) > 100
