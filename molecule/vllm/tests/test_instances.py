"""What the role does with instances, whatever runs in them: with the stand-in for vLLM (tests/stand_in), which starts in a second.

The tests that change the host build on each other's end state.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from tests.roles import ROOT, applied, apply_role, refused, until
from tests.served import ask, ends_before_a_stop, generation, main_pid, nothing_is_left_of_a_proof

testinfra_hosts = ["docker://vllm-debian13"]

INSTANCES: list[dict[str, Any]] = yaml.safe_load(
    (ROOT / "molecule/shared/inventory/group_vars/vllm_stand_in.yml").read_text()
)["vllm_instances"]
CHAT, OTHER = INSTANCES
MODEL = "tiny"
# What the tests further down make of OTHER.
PLAIN = {**OTHER, "options": {**OTHER["options"], "max-model-len": 512}}
UNITS = ("chat", "other")
SLOW = {"seconds_per_token": 0.05}


def test_check_mode_shows_the_change_and_makes_none(host: Host) -> None:
    changed = {**OTHER, "options": {**OTHER["options"], "max-model-len": 512}}
    told = applied(host, "vllm", "--check", "--diff", vllm_instances=[CHAT, changed])
    assert "-max-model-len: 1024" in told
    assert "+max-model-len: 512" in told
    assert "QUOTED" not in told
    assert generation(host, "other") == "1"
    assert host.run("test -e /etc/vllm/other/2").rc != 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"options": {"max-model-length": 5}}, "did you mean 'max-model-len'?"),
        (
            {"options": {"enable-lora": True, "lora-modules": ["x=adapter"]}},
            "adapter 'adapter' is not in model_store_models",
        ),
        ({"model": "not-there"}, "model 'not-there' is not in model_store_models"),
        ({"prot": 1}, "prot"),
        ({"environment": {"VLLM_SERVER_DEV_MODE": 1}}, "VLLM_SERVER_DEV_MODE is refused"),
        ({"environment": {"VLLM_CPU_KVCACHE_SPACE": 4000}}, "GB of memory, but the host has"),
    ],
)
def test_a_mistake_is_refused_before_anything_changes(host: Host, change: dict[str, Any], expected: str) -> None:
    before = [main_pid(host, name) for name in UNITS]
    assert expected in refused(host, "vllm", vllm_instances=[CHAT, {**OTHER, **change}])
    assert [main_pid(host, name) for name in UNITS] == before
    assert host.run("test -e /etc/vllm/other/2").rc != 0


def test_a_port_that_something_else_holds_is_refused(host: Host) -> None:
    host.check_output("systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 8009")
    host.check_output("for i in $(seq 50); do ss -Hltn 'sport = :8009' | grep -q . && break; sleep 0.1; done")
    told = refused(host, "vllm", vllm_instances=[CHAT, {**OTHER, "port": 8009}])
    host.check_output("systemctl stop squatter")
    assert "port 8009 is taken by python3" in told


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"vllm_version": "0.26.0"}, "CVE-2026-114053"),
        ({"vllm_device": "cuda", "vllm_instances": [{**CHAT, "gpus": [0], "cpus": []}]}, "nvidia-smi is not there"),
        ({"vllm_internal_key": "short"}, "openssl rand -hex 32"),
    ],
)
def test_what_cannot_work_here_is_refused(host: Host, variables: dict[str, Any], expected: str) -> None:
    assert expected in refused(host, "vllm", **variables)


def test_a_running_request_ends_before_its_instance_stops(host: Host) -> None:
    """The real one does the same, and refuses what is new meanwhile (test_vllm.py)."""
    ends_before_a_stop(host, "other", lambda: ask(host, 8001, "other-name", tokens=100, stand_in=SLOW), 100)
    assert host.run("pgrep -u vllm -f VLLM::EngineCore -c").stdout.strip() == "1", "that of `chat`"


def test_a_change_restarts_only_its_instance_and_starts_a_stopped_one(host: Host) -> None:
    """`other` is stopped here (by the test before): it is started with its new generation."""
    before = main_pid(host, "chat")
    applied(host, "vllm", vllm_instances=[CHAT, PLAIN])
    assert main_pid(host, "chat") == before
    assert generation(host, "other") == "2"
    assert ask(host, 8001, "other-name")[0] == 200
    assert host.file("/etc/vllm/other/current").linked_to == "/etc/vllm/other/2"
    assert host.file("/etc/vllm/other/2/confirmed").exists


def test_an_environment_that_kills_every_start_is_refused_before_anything_stops(host: Host) -> None:
    before = main_pid(host, "other")
    deadly = {**PLAIN, "environment": {"STAND_IN": json.dumps({"start_error": "no kernel for this device"})}}
    told = refused(host, "vllm", vllm_instances=[CHAT, deadly], vllm_start_proof="refuse")
    assert "What vLLM instance other on" in told
    assert "RuntimeError: no kernel for this device" in told
    assert "Nothing was stopped" in told
    assert main_pid(host, "other") == before
    nothing_is_left_of_a_proof(host)
    assert host.run("ls /opt/vllm/proofs/*.json").rc != 0, "what failed is not recorded"


def test_a_configuration_that_vllm_refuses_goes_back(host: Host) -> None:
    """The option is known and of the right type; only the engine, when it starts with the model, says no. The release itself is proved to start."""
    before = main_pid(host, "chat")
    broken = {**PLAIN, "options": {**PLAIN["options"], "max-model-len": 10_000_000}}
    told = refused(host, "vllm", vllm_instances=[CHAT, broken], vllm_start_proof="refuse")
    assert "prove | The proofs answer a completion" in told
    assert len(host.check_output("ls /opt/vllm/proofs/*.json").split()) == 1
    nothing_is_left_of_a_proof(host)
    assert "vLLM instance other" in told
    assert "did not come up" in told
    assert "max_model_len (10000000) is greater" in told, "the lines of the journal that say why"
    assert "The previous generation is back and answers" in told
    assert generation(host, "other") == "2"
    assert ask(host, 8001, "other-name")[0] == 200
    assert host.run("test -e /etc/vllm/other/3").rc != 0
    assert main_pid(host, "chat") == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"answers": "wrong"}, "no completion after 12 s: an answer without content"),
        ({"answers": "500"}, "no completion after 12 s: HTTP 500"),
        ({"start_seconds": 60}, "no completion after 12 s"),
        ({"dies_after": 0.5, "answers": "hang"}, "vllm@other.service died"),
    ],
)
def test_an_instance_that_does_not_complete_is_not_up(host: Host, settings: dict[str, Any], expected: str) -> None:
    """/health says 200 in all of them but one. In the environment, so that only the new generation has it."""
    faulty = {**PLAIN, "environment": {"STAND_IN": json.dumps(settings)}}
    told = refused(host, "vllm", vllm_instances=[CHAT, faulty], vllm_start_timeout=12)
    assert expected in told
    assert "The previous generation is back and answers" in told
    assert ask(host, 8001, "other-name")[0] == 200


def test_an_instance_that_hangs_is_not_up_and_goes_back_when_it_is_killed(host: Host) -> None:
    """/health says 200. It does not end by itself either: systemd kills it, 30 seconds after the time that requests may take."""
    hanging = {**PLAIN, "environment": {"STAND_IN": json.dumps({"answers": "hang"})}}
    told = refused(host, "vllm", vllm_instances=[CHAT, hanging], vllm_start_timeout=10)
    assert "no completion after 10 s: no answer" in told
    assert host.file("/etc/vllm/other/current").linked_to == "/etc/vllm/other/2"
    until(lambda: ask(host, 8001, "other-name")[0] == 200, 90, "it did not go back")
    assert generation(host, "other") == "2"


def test_an_instance_that_nobody_wants_is_gone(host: Host) -> None:
    before = main_pid(host, "chat")
    applied(host, "vllm", vllm_instances=[CHAT])
    assert main_pid(host, "chat") == before
    assert host.run("systemctl is-active vllm@other").stdout.strip() == "inactive"
    assert host.run("systemctl is-enabled vllm@other").stdout.strip() != "enabled"
    assert not host.file("/etc/vllm/other").exists
    assert host.run("pgrep -u vllm -f VLLM::EngineCore -c").stdout.strip() == "1"


def test_a_run_that_died_half_way_is_finished_by_the_next(host: Host) -> None:
    """What a run leaves that dies between writing a generation and proving it, and a release that was half built."""
    host.check_output(
        "rm /etc/vllm/chat/current/confirmed && mkdir /etc/vllm/chat/.9.partial /opt/vllm/releases/0.1.0-half"
    )
    done = apply_role(host, "vllm", vllm_instances=[CHAT])
    assert done.returncode == 0, done.stdout
    assert host.file("/etc/vllm/chat/current/confirmed").exists
    assert not host.file("/etc/vllm/chat/.9.partial").exists
    assert not host.file("/opt/vllm/releases/0.1.0-half").exists
    again = applied(host, "vllm", vllm_instances=[CHAT])
    assert "changed=0" in again


def test_a_crash_is_followed_by_a_start(host: Host) -> None:
    host.check_output("pkill -9 -u vllm -f VLLM::EngineCore")
    until(lambda: main_pid(host, "chat") == 0 or ask(host, model=MODEL)[0] != 200, 30, "it is still up")
    until(lambda: ask(host, model=MODEL)[0] == 200, 60, "it does not come back")
