"""The watch on real hosts: an engine that hangs is started again, one that works is not, and a GPU that fails takes its instances out of traffic."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.certificates import Authority
from tests.host_agent import Gateway, connection
from tests.roles import applied, changed, refused, until

ROOT = Path(__file__).resolve().parents[3]
RECORDINGS = ROOT / "tests/unit/recordings"
HEALTHY = RECORDINGS / "nvidia/h100x8/nvidia-smi.xml"
QUESTION = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}


def shown(host: Host, name: str, unit: str) -> str:
    return str(host.check_output(f"systemctl show --property={name} --value {unit}"))


def metrics(host: Host) -> str:
    """What the watch exports; nothing before it has written that."""
    return str(host.run("cat /run/vllm-fleet/watch/watch.prom").stdout)


def answers(host: Host, port: int) -> bool:
    ask = f"curl --silent --max-time 2 --header 'Content-Type: application/json' --data '{json.dumps(QUESTION)}' http://127.0.0.1:{port}/v1/completions"
    return '"choices"' in host.run(ask).stdout


def nvidia_smi(host: Host, document: Path) -> None:
    """Have nvidia-smi say what it said somewhere else."""
    host.check_output(
        f"cat >/srv/nvidia-smi.new <<'END'\n{document.read_text()}END\nmv /srv/nvidia-smi.new /srv/nvidia-smi.xml"
    )


@pytest.fixture
def watched(host: Host) -> Iterator[Host]:
    """A host whose watch has heard of both instances that can answer, and that has restarts left."""
    host.check_output("systemctl stop vllm-fleet-watch; rm -rf /run/vllm-fleet/heal/*")
    host.check_output("systemctl start vllm@busy vllm@hung vllm-fleet-watch")
    lines = [f'vllm_fleet_instance_answers{{instance_name="{name}"}} 1' for name in ("busy", "hung")]
    until(lambda: all(line in metrics(host) for line in lines), 60, "they do not answer")
    yield host
    host.check_output("systemctl kill --signal=CONT vllm@hung; systemctl start vllm@hung vllm-fleet-watch")


def test_it_has_few_rights(host: Host) -> None:
    pid = shown(host, "MainPID", "vllm-fleet-watch")
    assert "CapEff:\t0000000000000000" in host.file(f"/proc/{pid}/status").content_string
    assert host.check_output(f"stat --format %U /proc/{pid}") == "vllm-fleet-watch"
    for unit, most in (("vllm-fleet-watch", 2.0), ("vllm-fleet-heal", 2.5)):
        exposed = host.check_output(f"systemd-analyze security --no-pager {unit} | tail -n 1")
        assert float(exposed.split(":")[1].split()[0]) <= most, exposed
    assert host.run("runuser --user vllm-fleet-watch -- systemctl kill --signal=KILL vllm@busy").rc != 0
    # it follows the messages of the kernel, which not everybody may read
    until(lambda: host.run("pgrep --uid vllm-fleet-watch journalctl").rc == 0, 10, "nobody reads the journal")


def test_an_engine_that_hangs_is_started_again_and_one_with_a_long_prompt_is_not(
    watched: Host, tmp_path: Path, authority: Authority
) -> None:
    before = {name: shown(watched, "InvocationID", f"vllm@{name}") for name in ("busy", "hung")}
    long = json.dumps({**QUESTION, "stand_in": {"prefill_seconds": 70}})
    watched.check_output(
        f"curl --silent --data '{long}' http://127.0.0.1:8002/v1/completions >/srv/long.json 2>&1 </dev/null & sleep 0.5"
    )
    watched.check_output("systemctl kill --signal=STOP vllm@hung")
    begin = time.monotonic()
    until(
        lambda: shown(watched, "InvocationID", "vllm@hung") not in (before["hung"], ""), 75, "it is not started again"
    )
    started = time.monotonic() - begin
    until(lambda: answers(watched, 8003), 20, "it does not answer again")
    healed = time.monotonic() - begin
    print(f"hung engine: started again after {started:.1f} s, answers after {healed:.1f} s")
    assert started < 60
    until(lambda: "choices" in watched.file("/srv/long.json").content_string, 60, "the long prompt has no answer")
    assert shown(watched, "InvocationID", "vllm@busy") == before["busy"]
    said = watched.check_output(f"journalctl --unit vllm-fleet-heal --since -{healed + 10:.0f}s --output cat")
    assert len(re.findall(r"hung hangs \(no answer for 4.*it is killed.*2 restarts are left", said)) == 1, said
    assert "busy" not in said
    peer = connection(watched, tmp_path, authority, "watch")
    peer.request("GET", "/metrics")
    text = peer.getresponse().read().decode()
    assert 'vllm_fleet_restarts_total{instance_name="hung",cause="hung"} 1' in text
    assert 'vllm_fleet_restarts_left{instance_name="busy"} 3' in text
    assert 'running{instance_name="chat"} 1' in text


def test_nobody_restarts_what_is_said_to_be_stopped_or_more_often_than_allowed(watched: Host) -> None:
    """Whoever has the rights of the watch can ask for what it likes."""
    invocation = shown(watched, "InvocationID", "vllm@busy")

    def asked(name: str, **more: str) -> str:
        request = json.dumps({"invocation": invocation, "why": "a test", "cause": "hung", **more})
        since = watched.check_output("date +%s.%N")
        place = f"/run/vllm-fleet/watch/restart/{name}.json"
        watched.check_output(
            f"echo '{request}' >/run/vllm-fleet/watch/restart/.new; mv /run/vllm-fleet/watch/restart/.new '{place}'"
        )
        until(lambda: not watched.file(place).exists, 10, "nobody takes the request")
        until(lambda: shown(watched, "ActiveState", "vllm-fleet-heal") == "inactive", 10, "it does not end")
        return str(watched.check_output(f"journalctl --unit vllm-fleet-heal --since @{since} --output cat"))

    assert "no such instance" in asked("ssh")
    assert "none that can be followed" in asked("-H")
    assert "meanwhile" in asked("busy", invocation="0" * 32)
    watched.check_output("vllm-fleet state busy stopped")
    assert "busy is not restarted: it is stopped" in asked("busy")
    watched.check_output("vllm-fleet state busy up")
    watched.check_output(
        """python3 -c 'import json, time; now = time.monotonic(); print(json.dumps({"times": [now - 2, now - 1, now]}))' >/run/vllm-fleet/heal/busy.json"""
    )
    assert "it was restarted 3 times within 60 min" in asked("busy")
    assert shown(watched, "InvocationID", "vllm@busy") == invocation
    until(
        lambda: 'vllm_fleet_restarts_refused_total{instance_name="busy"} 1' in metrics(watched), 10, "it is not counted"
    )


def test_a_gpu_that_needs_a_reset_takes_its_instance_out_and_no_other(watched: Host, gateway: Gateway) -> None:
    assert "sick" not in gateway.told["hung"]
    nvidia_smi(watched, RECORDINGS / "gpu_health/r580-reset.xml")
    try:
        until(lambda: "sick" in gateway.told["hung"], 20, "gateways do not hear of it")
        assert gateway.told["hung"]["sick"] == "GPU 1 (0000:3d:00.0): the driver says what it needs: Reset"
        assert (gateway.told["hung"]["operator"], gateway.told["hung"]["leaving"]) == ("up", False)
        assert "sick" not in gateway.told["busy"]
        found = watched.run("vllm-fleet health")
        assert found.rc == 2
        assert "CRITICAL GPU 1 (0000:3d:00.0): the driver says what it needs: Reset" in found.stdout
        assert "nvidia-smi --gpu-reset --id 1" in found.stdout
        assert 'vllm_fleet_instance_sick{instance_name="hung"} 1' in metrics(watched)
        # what a person said is not touched
        said = watched.check_output("vllm-fleet state hung")
        assert "hung: up" in said and "its host wants it out: GPU 1" in said
    finally:
        nvidia_smi(watched, HEALTHY)
    until(lambda: "sick" not in gateway.told["hung"], 20, "it stays out")
    told = json.loads(watched.run("vllm-fleet health --json").stdout)
    assert not [one for one in told["findings"] if one["gpu"]]


def test_the_watch_can_be_turned_off_and_its_restarts_too(host: Host) -> None:
    applied(host, "host_agent", host_agent_watch_restart=False)
    assert shown(host, "LoadState", "vllm-fleet-heal.path") == "not-found"
    assert shown(host, "ActiveState", "vllm-fleet-watch") == "active"
    assert not changed(applied(host, "host_agent", host_agent_watch_restart=False))
    applied(host, "host_agent", host_agent_watch=False)
    for unit in ("vllm-fleet-watch.service", "vllm-fleet-heal.path", "vllm-fleet-heal.service"):
        assert shown(host, "LoadState", unit) == "not-found"
        assert shown(host, "ActiveState", unit) == "inactive"
    assert "host_agent_watch is off" in host.run("vllm-fleet health").stdout
    assert not changed(applied(host, "host_agent", host_agent_watch=False))
    applied(host, "host_agent")
    assert shown(host, "ActiveState", "vllm-fleet-watch") == "active"
    assert not changed(applied(host, "host_agent"))


@pytest.mark.one_host
def test_bad_input_of_the_watch_is_refused_before_anything_changes(host: Host) -> None:
    for variables, message in (
        ({"host_agent_watch_restarts": 0}, "host_agent_watch_restarts is 0; it must be 1 to 20"),
        ({"host_agent_watch_hung_seconds": 1}, "must be 5 or more (it is 1)"),
        ({"host_agent_watch_disk_warn_percent": 99}, "the first must be less than the second"),
        ({"host_agent_watch_disks": {"root": "here"}}, "each must be the absolute path"),
    ):
        said = refused(host, "host_agent", **variables)
        assert message in said
        assert "changed=0" in said
