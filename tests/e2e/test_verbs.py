"""An operator's verbs on a fleet of two gateways and two inference hosts, while clients ask it: drain, undrain, stop, start, restart, reboot, logs.

vLLM is the stand-in; the tests run in this order.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import FIGURES, ROOT, Done, on, until
from tests.hosts import hosts
from tests.load import Gateway, Load
from tests.stand_in import fleet as stand_ins
from tests.stand_in.fleet import Fleet

NAME = "e2e-verbs"
UNIT = "vllm@chat.service"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """The fleet, deployed."""
    found = stand_ins.up(
        NAME, ROOT / ".cache" / NAME, ["gw1", "gw2"], ["gpu1", "gpu2"],
        turn_soak_seconds=3,
        # One of their network that no container gets. Every host can say it: it is a template.
        virtual_address_ip="{{ ansible_host | regex_replace('[0-9]+$', '200') }}",
        vllm_instances=[{"name": "chat", "model": "tiny", "port": 8000, "options": {"max-model-len": 2048}}],
    )  # fmt: skip
    try:
        found.run(check=True)
        yield found
    finally:
        hosts.down(NAME)


def verb(fleet: Fleet, name: str, *arguments: str) -> Done:
    """Run the playbook of a verb."""
    done = fleet.run(*arguments, playbook=f"playbooks/{name}.yml")
    FIGURES[f"{name}.yml {' '.join(arguments)}"] = f"{done.seconds:.0f} s"
    return done


def said(done: Done) -> str:
    """What a run said, its line breaks undone."""
    return " ".join(done.output.split())


def word(host: str) -> dict[str, Any]:
    """The operator's word on the instance of a host."""
    found: dict[str, Any] = json.loads(on(host, "cat /var/lib/vllm-fleet/chat.json 2>/dev/null || echo '{}'"))
    return found


def unit(host: str) -> str:
    """What systemd says of the instance of a host."""
    return on(host, f"systemctl is-active {UNIT}; systemctl is-enabled {UNIT}", check=False).replace("\n", " ").strip()


def pid(host: str) -> str:
    """The process of the instance."""
    return on(host, f"systemctl show --property=MainPID --value {UNIT}").strip()


def backend(host: str) -> str:
    return f"chat@{host}"


def running(host: str) -> int:
    """How many requests the instance of a host works on."""
    lines = on(host, "curl -s 127.0.0.1:8000/metrics || curl -s http://$(hostname -i):8000/metrics").splitlines()
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running")))


def all_used(fleet: Fleet) -> bool:
    return all(fleet.used(gateway) == set(map(backend, fleet.workers)) for gateway in fleet.gateways)


def address(fleet: Fleet) -> str:
    """The address that the gateways share."""
    return fleet.addresses[fleet.gateways[0]].rpartition(".")[0] + ".200"


def has_address(fleet: Fleet, gateway: str) -> bool:
    return bool(on(gateway, f"ip -brief address show to {address(fleet)}", check=False).strip())


def taken(gateway: str) -> list[float]:
    """When a gateway took the address, in seconds of the epoch."""
    lines = on(gateway, "journalctl --output short-unix --unit keepalived | grep 'Entering MASTER STATE' || true")
    return [float(line.split()[0]) for line in lines.splitlines()]


def over_the_address(fleet: Fleet, **more: Any) -> Load:
    """Clients of the address."""
    authority = on(fleet.gateways[0], "cat /etc/ssl/vllm-fleet/ca.pem")
    tls = ssl.create_default_context(cadata=authority)
    return Load(
        [Gateway("address", address(fleet), tls=tls, server="llm.test")],
        ["tiny"],
        stand_ins.KEY,
        says=stand_ins.says,
        **more,
    )


def boot(host: str) -> str:
    """Which boot it is."""
    return on(host, "stat --format %Z /proc/1; cut -d' ' -f22 /proc/1/stat")


def long_answers(fleet: Fleet, tokens: int) -> tuple[list[threading.Thread], list[tuple[int, Any]]]:
    """Begin as many long answers as there are hosts; each gets one."""
    came: list[tuple[int, Any]] = []

    def ask() -> None:
        body = {"model": "tiny", "prompt": "Count", "max_tokens": tokens, "ignore_eos": True}
        status, answer, _headers = fleet.ask(fleet.gateways[0], "POST", "/v1/completions", body)
        came.append((status, answer))

    threads = [threading.Thread(target=ask) for _ in fleet.workers]
    for thread in threads:
        thread.start()
    return threads, came


def test_a_drain_below_the_minimum_is_refused_before_anything_changes(fleet: Fleet) -> None:
    done = verb(fleet, "drain")
    assert done.status != 0
    assert "route tiny needs 1 of its 2 backends (min_available) and would have 0 in use" in said(done)
    assert "Nothing has been changed" in said(done)
    assert all(word(worker) == {} for worker in fleet.workers)
    assert all_used(fleet)


def test_check_says_what_would_be_and_changes_nothing(fleet: Fleet) -> None:
    one = fleet.workers[0]
    for name in ("drain", "stop", "restart"):
        done = verb(fleet, name, "--limit", one, "--check")
        assert done.status == 0, done.output
    assert word(one) == {}
    assert all_used(fleet)


def test_a_drain_ends_no_long_answer(fleet: Fleet) -> None:
    one, other = fleet.workers
    before = pid(one)
    threads, came = long_answers(fleet, 1000)  # 20 s
    until("both have a question", lambda: all(running(worker) for worker in fleet.workers), 10, 0.2)
    done = verb(fleet, "drain", "--limit", one, "-e", "fleet_reason='new fan'")
    assert done.status == 0, done.output
    assert re.search(
        rf"{backend(one)}: drained; every gateway has let it go and its requests have ended, after \d+ s", said(done)
    )
    assert "playbooks/undrain.yml" in said(done)
    for thread in threads:
        thread.join(60)
    assert [(status, answer["usage"]["completion_tokens"]) for status, answer in came] == [(200, 1000)] * 2
    assert fleet.used(fleet.gateways[0]) == {backend(other)}
    assert (word(one)["operator"], word(one)["reason"], pid(one)) == ("drained", "new fan", before)
    # said again, it is no change
    again = verb(fleet, "drain", "--limit", one)
    assert again.recap()[one]["changed"] == 0
    assert "was drained by" in said(again)


def test_undrain_brings_it_back(fleet: Fleet) -> None:
    one = fleet.workers[0]
    done = verb(fleet, "undrain", "--limit", one)
    assert done.status == 0, done.output
    assert "in use again after" in said(done)
    assert all_used(fleet)


def test_what_is_stopped_stays_stopped(fleet: Fleet) -> None:
    """Over a boot and a run of site.yml, which prepares what changes, and verify.yml takes it as it is. No request fails meanwhile."""
    one, other = fleet.workers
    with fleet.load(streams=4, whole=2, tokens=(1, 50)):
        done = verb(fleet, "stop", "--limit", one, "-e", "fleet_reason=moved")
        assert done.status == 0, done.output
        assert unit(one) == "inactive disabled"
        assert word(one)["operator"] == "stopped"
        hosts.docker("restart", one)
        until(
            "the host is up",
            lambda: "running" in on(one, "systemctl is-system-running || true", check=False) or unit(one) != "",
            60,
        )
        assert fleet.addresses[one] == hosts.address(one)
        until(
            "the gateway hears of it again",
            lambda: fleet.state(fleet.gateways[0])[backend(one)]["operator"] == "stopped",
            30,
        )
        assert unit(one) == "inactive disabled"
        # something new for it alone: the other host is the last one that serves
        [chat] = fleet.variables["vllm_instances"]
        fleet.host_variables[one] = {"vllm_instances": [{**chat, "options": {"max-model-len": 1536}}]}
        done = verb(fleet, "../site")
        assert done.status == 0, done.output
        assert unit(one) == "inactive disabled"
        assert "1536" in on(one, "cat /etc/vllm/chat/current/config.yaml")
        assert fleet.used(fleet.gateways[0]) == {backend(other)}
        second = verb(fleet, "../site")
        assert {host: counts["changed"] for host, counts in second.recap().items()} == dict.fromkeys(
            second.recap(), 0
        ), second.output
        done = verb(fleet, "start", "--limit", one)
        assert done.status == 0, done.output
        assert f"{backend(one)}: runs, answers and is in use" in said(done)
        assert unit(one) == "active enabled"
        assert all_used(fleet)


def test_a_route_that_was_stopped_on_purpose_is_no_failure(fleet: Fleet) -> None:
    done = verb(fleet, "stop", "-e", "drain_force=true")
    assert done.status == 0, done.output
    assert fleet.ask(fleet.gateways[0], "POST", "/v1/completions", {"model": "tiny", "prompt": "a"})[0] == 503
    done = verb(fleet, "verify")
    assert done.status == 0, done.output
    assert "on purpose: every backend is stopped by" in said(done)
    assert verb(fleet, "start").status == 0
    until("both are used", lambda: all_used(fleet), 30)


def test_a_restart_of_all_hosts_loses_no_request(fleet: Fleet) -> None:
    before = [pid(worker) for worker in fleet.workers]
    with fleet.load(streams=6, whole=3) as load:
        done = verb(fleet, "restart")
    assert done.status == 0, done.output
    assert all(pid(worker) != old for worker, old in zip(fleet.workers, before, strict=True))
    FIGURES["restart.yml, the load"] = load.summary().told()
    assert all_used(fleet)


def test_a_reboot_loses_no_request(fleet: Fleet) -> None:
    one = fleet.workers[0]
    hosts.docker("update", "--restart", "always", one)
    before = on(one, "stat --format %Z /proc/1; cat /proc/1/stat | cut -d' ' -f22")
    with fleet.load(streams=6, whole=3) as load:
        done = verb(fleet, "reboot", "--limit", one)
    assert done.status == 0, done.output
    assert f"{one}: rebooted, kernel" in said(done)
    assert on(one, "stat --format %Z /proc/1; cat /proc/1/stat | cut -d' ' -f22") != before
    FIGURES["reboot.yml, the load"] = load.summary().told()
    assert all_used(fleet)


def test_gateways_are_rebooted_one_after_the_other_and_the_address_moves_first(fleet: Fleet) -> None:
    """Clients of the address: what runs when it moves is cut, which nothing can help, and no request that begins fails."""
    one, two = fleet.gateways
    for gateway in fleet.gateways:
        hosts.docker("update", "--restart", "always", gateway)
    until("the first gateway has the address", lambda: has_address(fleet, one) and not has_address(fleet, two), 30)
    done = verb(fleet, "reboot", "--limit", "gateway", "--check")
    assert done.status == 0, done.output
    for gateway in fleet.gateways:
        assert f"{gateway}: would be rebooted" in said(done)
    assert has_address(fleet, one)
    boots, began = {gateway: boot(gateway) for gateway in fleet.gateways}, time.time()
    # Streams are cut where they run, others are asked again, as every client does. One by the gateway's own address is not cut at all.
    load = over_the_address(fleet, streams=6, whole=6, tokens=(1, 400), silence=30)
    own = fleet.load(streams=2, whole=0, tokens=(200, 400))
    own.leave_out(two)
    load.start()
    own.thread.start()
    try:
        time.sleep(2)
        process = fleet.begin("playbooks/reboot.yml", "--limit", "gateway")
        until("the address moves", lambda: has_address(fleet, two), 120, 0.2)
        own.leave_out(one, two)
        output, _ = process.communicate(timeout=300)
        until("it is back where it belongs", lambda: has_address(fleet, one) and not has_address(fleet, two), 30)
        time.sleep(1)
    finally:
        load.stop()
        own.stop()
    assert process.returncode == 0, output
    assert all(boot(gateway) != before for gateway, before in boots.items())
    moves = sorted(moment for gateway in fleet.gateways for moment in taken(gateway) if moment > began)
    assert len(moves) == 2, moves
    assert own.outcomes
    own.check()
    cut = load.failures()
    strange = [
        each.told()
        for each in cut
        if not any(each.begun < moment + 0.2 and abs(each.ended - moment) < 3 for moment in moves)
    ]
    assert not strange, "\n".join([*strange, f"moves: {moves}"])
    assert len(cut) <= 12 * len(moves)
    FIGURES["reboot.yml of two gateways, the load over their address"] = (
        f"{load.summary().told()}; {len(moves)} moves cut {len(cut)}"
    )
    assert all_used(fleet)


def test_a_gateway_that_does_not_come_back_ends_the_reboots(fleet: Fleet) -> None:
    one, two = fleet.gateways
    hosts.docker("update", "--restart", "no", one)
    before = boot(two)
    try:
        with over_the_address(fleet, streams=0, whole=2, tokens=(1, 1), think=0.5) as load:
            load.leave_out("address")
            load.settle()
            done = verb(fleet, "reboot", "--limit", "gateway", "-e", "reboot_seconds=15")
            load.leave_out()
            assert done.status != 0
            assert has_address(fleet, two)
            time.sleep(1)
    finally:
        hosts.docker("update", "--restart", "always", one)
        hosts.docker("start", one)
    assert boot(two) == before
    assert "this one takes it back when it is well and this is run for it once more" in said(done), done.output
    until(
        "it answers",
        lambda: on(one, "systemctl is-active ssh nginx || true", check=False).split() == ["active"] * 2,
        60,
    )
    done = verb(fleet, "reboot", "--limit", one)
    assert done.status == 0, done.output
    until("the address is back where it belongs", lambda: has_address(fleet, one), 30)


def test_a_question_to_each_route(fleet: Fleet) -> None:
    done = verb(fleet, "test_api", "-e", "test_api_tokens=7")
    assert done.status == 0, done.output
    assert re.search(
        r"ok ask tiny first token after \d+\.\d\d s, \d+ pieces in \d+\.\d\d s: Paris is the capital of France",
        said(done),
    ), done.output
    done = verb(fleet, "test_api", "-e", "test_api_model=other")
    assert done.status != 0
    assert "test_api_model is other, which is no route of" in said(done)


def test_logs_on_the_screen_and_in_files(fleet: Fleet, tmp_path: Path) -> None:
    done = verb(fleet, "logs", "-e", "logs_lines=20")
    assert done.status == 0, done.output
    assert f"== vllm@chat on {fleet.workers[0]}" in done.output
    assert f"== vllm-gateway-checks on {fleet.gateways[0]}" in done.output
    done = verb(fleet, "logs", "-e", f"logs_path={tmp_path}", "-e", "fleet_instance=chat")
    assert done.status == 0, done.output
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.log"))
    assert written == [f"{worker}/vllm@chat.log" for worker in fleet.workers]
    text = (tmp_path / written[0]).read_text()
    assert f"{fleet.workers[0]} vllm-serve[" in text, "what the instance said"
    assert fleet.variables["vllm_internal_key"] not in text
