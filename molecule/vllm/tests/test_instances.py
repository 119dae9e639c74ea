"""What the role does with instances, whatever runs in them: with the stand-in for vLLM (tests/stand_in), which starts in a second.

The tests that change the host build on each other's end state.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from tests import tiny_models
from tests.roles import ROOT, applied, apply_role, refused, until
from tests.served import KEY, Client, ask, ends_before_a_stop, generation, main_pid, nothing_is_left_of_a_proof

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
            "option 'lora-modules'[0].path 'adapter' is not in model_store_models",
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
        (
            {"vllm_lock_file": "/nowhere.txt", "vllm_extras": ["otel", "audio"]},
            "`make lock VLLM_VERSION=0.32.0 DEVICE=cpu EXTRAS=audio,otel`",
        ),
        ({"vllm_verify_timeout": 0}, "vllm_verify_timeout is 0; it must be at least 1 second"),
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


def command(host: Host, **settings: object) -> None:
    """Command how `chat` behaves from now on."""
    host.check_output("echo %s >/var/cache/vllm/chat/stand_in.json", json.dumps(settings))


def shown(host: Host, name: str, **variables: Any) -> str:
    """The line of an instance in the table of the entry point status, which changes nothing."""
    told = applied(host, "vllm", entry_point="status", **variables)
    assert "changed=0" in told
    (line,) = re.findall(rf"^ +({name} .*)$", told, re.MULTILINE)
    return " ".join(line.split())


def test_the_status_says_what_runs_and_how_it_stands_to_the_inventory(host: Host) -> None:
    before = host.check_output("find /etc/vllm /opt/vllm -type f -newermt @0 -printf '%p %T@\\n' | sort")
    instances = [CHAT, {**PLAIN, "port": 8002}, {**OTHER, "name": "third"}]
    release = host.check_output("basename $(readlink /etc/vllm/chat/current/release)")
    assert shown(host, "chat", vllm_instances=instances) == f"chat 1 - {release} active 8000 as wanted"
    assert shown(host, "other", vllm_instances=instances) == f"other 2 1 {release} active 8001 differs"
    assert shown(host, "third", vllm_instances=instances) == "third - - - inactive - not there yet"
    assert shown(host, "other", vllm_instances=[CHAT]) == f"other 2 1 {release} active 8001 is not in it"
    told = applied(host, "vllm", entry_point="status", vllm_instances=[CHAT, PLAIN], vllm_internal_key="f" * 64)
    assert re.search(r" chat .* as wanted$", told, re.MULTILINE), "a new key is no change of an instance"
    assert "A former internal key is taken as well" in told
    assert host.check_output("find /etc/vllm /opt/vllm -type f -newermt @0 -printf '%p %T@\\n' | sort") == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatt", "there is no vLLM instance 'chatt' here; there is chat, other. Nothing has been changed."),
        ("chat", "vLLM instance chat has no generation before 1 that ever answered. Nothing has been changed."),
    ],
)
def test_what_cannot_go_back_is_refused(host: Host, name: str, expected: str) -> None:
    assert expected in refused(host, "vllm", entry_point="revert", vllm_revert_instances=[name])
    assert host.run("ls /etc/vllm/*/held").rc != 0


def test_an_instance_goes_back_and_stays_there_until_nobody_holds_it(host: Host) -> None:
    before, instances = main_pid(host, "chat"), [CHAT, PLAIN]
    told = applied(
        host,
        "vllm",
        entry_point="revert",
        vllm_revert_instances=["other"],
        vllm_revert_reason="too short",
        vllm_instances=instances,
    )
    assert "The earlier generations answer" in told
    assert (generation(host, "other"), main_pid(host, "chat")) == ("1", before)
    assert host.file("/etc/vllm/other/current").linked_to == "/etc/vllm/other/1"
    assert not host.file("/etc/vllm/other/2/confirmed").exists, "what follows would go back to it"
    held = host.file("/etc/vllm/other/held").content_string.strip()
    assert re.fullmatch(r"\S+@\S+, since 20\d\d-\d\d-\d\d \d\d:\d\d UTC, back from generation 2 to 1: too short", held)

    assert f"is held: {held}" in refused(host, "vllm", entry_point="revert", vllm_revert_instances=["other"])
    assert shown(host, "other", vllm_instances=instances).endswith(f"active 8001 differs; held: {held}")
    # with another port and another name than the inventory has for it
    renamed = {**PLAIN, "port": 8009, "options": {"served-model-name": ["new-name"]}}
    told = applied(host, "vllm", vllm_instances=[CHAT, renamed])
    assert f"is held: {held}." in " ".join(told.split())
    assert "changed=0" in told
    assert (generation(host, "other"), ask(host, 8001, "other-name")[0]) == ("1", 200)

    host.check_output("rm /etc/vllm/other/held")
    applied(host, "vllm", vllm_instances=instances)
    assert (generation(host, "other"), main_pid(host, "chat")) == ("2", before)
    assert host.file("/etc/vllm/other/2/confirmed").exists


def test_an_instance_that_does_not_answer_where_it_went_back_to_comes_forth_again(host: Host) -> None:
    """As if the host had changed under the earlier generation."""
    file = "/etc/vllm/other/1/environment"
    fault = json.dumps({"answers": "500"}).replace('"', r"\"")
    host.check_output(f"cp -a {file} /root/environment && echo %s >>{file}", f'STAND_IN="{fault}"')
    told = refused(host, "vllm", entry_point="revert", vllm_revert_instances=["other"], vllm_start_timeout=12)
    assert "vLLM instance other on" in told
    assert (
        "did not come up with generation 1: no answer after 12 s: asked to generate (/v1/completions), it answered HTTP 500"
        in told
    )
    assert "other: generation 2 is back and answers." in told
    assert (generation(host, "other"), ask(host, 8001, "other-name")[0]) == ("2", 200)
    assert host.file("/etc/vllm/other/2/confirmed").exists
    assert host.run("ls /etc/vllm/*/held").rc != 0
    host.check_output(f"mv /root/environment {file}")
    assert "changed=0" in applied(host, "vllm", vllm_instances=[CHAT, PLAIN])


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantization": "nonsense"}, "Unknown quantization method: nonsense."),
        ({"gpu-memory-utilization": 1.5}, "gpu_memory_utilization: Input should be less than or equal to 1"),
        ({"max-model-len": 10_000_000}, "User-specified max_model_len (10000000) is greater"),
        ({"compilation-config": "{not json"}, "argument --compilation-config: Invalid JSON"),
    ],
)
def test_a_wrong_option_costs_no_second_of_service(host: Host, options: dict[str, Any], expected: str) -> None:
    """Each of them passes the table of options. In check mode, too."""
    pid, records = main_pid(host, "other"), host.run("ls /opt/vllm/judged").stdout
    wrong = {**PLAIN, "options": {**PLAIN["options"], **options}}
    with Client(host, 8001, "other-name") as client:
        told = refused(host, "vllm", vllm_instances=[CHAT, wrong])
    assert f"vllm_instances (other): vLLM itself refuses this: {expected}" in told
    assert len(client.answers) > 1 and set(client.answers) == {200}, client.answers
    assert (main_pid(host, "other"), generation(host, "other")) == (pid, "2")
    assert host.run("test -e /etc/vllm/other/3").rc != 0
    assert host.run("ls /opt/vllm/judged").stdout == records
    assert host.run("ls /run | grep vllm-judge").rc == 1
    if "quantization" in options:
        assert expected in refused(host, "vllm", "--check", vllm_instances=[CHAT, wrong])


def asked(host: Host) -> int:
    """How often vLLM was asked on this host."""
    text = host.run("journalctl --quiet --no-pager --output=cat _PID=1 --grep 'Started run-.*/judge.py'").stdout
    return len(text.splitlines())


def test_what_vllm_took_it_is_not_asked_about_again(host: Host) -> None:
    """A refusal of `chat` stops each run; `other` is taken as it is meant, and only the first asks."""
    refusable = {**CHAT, "options": {**CHAT["options"], "quantization": "nonsense"}}
    fine = {**PLAIN, "options": {**PLAIN["options"], "enable-prefix-caching": False, "allowed-origins": ["https://a"]}}
    before = asked(host)
    for _ in range(2):
        assert "(other)" not in refused(host, "vllm", vllm_instances=[refusable, fine])
    assert asked(host) == before + 3


def test_a_configuration_that_vllm_refuses_goes_back(host: Host) -> None:
    """Nobody asks it before, so only the engine, when it starts with the model, says no. The release itself is proved to start."""
    before = main_pid(host, "chat")
    broken = {**PLAIN, "options": {**PLAIN["options"], "max-model-len": 10_000_000}}
    told = refused(host, "vllm", vllm_instances=[CHAT, broken], vllm_start_proof="refuse", vllm_judgement="off")
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
        (
            {"answers": "wrong"},
            "no answer after 12 s: asked to generate (/v1/completions), it answered without content",
        ),
        ({"answers": "500"}, "no answer after 12 s: asked to generate (/v1/completions), it answered HTTP 500"),
        ({"start_seconds": 60}, "no answer after 12 s"),
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
    assert "no answer after 10 s: /v1/completions: no answer" in told
    assert host.file("/etc/vllm/other/current").linked_to == "/etc/vllm/other/2"
    until(lambda: ask(host, 8001, "other-name")[0] == 200, 90, "it did not go back")
    assert generation(host, "other") == "2"


def test_every_kind_of_model_goes_through_the_gate(host: Host) -> None:
    """Nobody says of which kind they are. The real ones: tests/drills/test_kinds.py."""
    kinds = [kind for kind in tiny_models.KINDS if kind not in ("generate", "reward")]  # a reward model is a reranker
    for kind in kinds:
        config = json.dumps(tiny_models.files(kind)["config"])
        host.check_output("mkdir -p /srv/models/%s && echo %s >/srv/models/%s/config.json", kind, config, kind)
    models = [{"name": name, "source": "path", "path": f"/srv/models/{name}"} for name in (MODEL, *kinds)]
    small = {"environment": {"VLLM_CPU_KVCACHE_SPACE": 0.1}}
    instances = [{"name": kind, "model": kind, "port": 8100 + number, **small} for number, kind in enumerate(kinds)]
    applied(host, "vllm", vllm_instances=[CHAT, *instances], model_store_models=models, vllm_start_timeout=30)
    for kind in kinds:
        assert host.file(f"/etc/vllm/{kind}/current/confirmed").exists


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


def test_an_instance_that_is_busy_is_up_and_one_that_hangs_is_not(host: Host) -> None:
    """Of many requests each takes longer than the run waits. What tells them apart is whether anybody else is served meanwhile."""
    quick = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 40, "stand_in": {"seconds_per_token": 0.05}})
    ask_on = f"while curl -sf -m 9 -H 'Authorization: Bearer {KEY}' -d '{quick}' http://127.0.0.1:8000/v1/completions; do :; done"
    host.check_output("systemd-run --unit=clients bash -c %s", f"({ask_on}) & ({ask_on}) & wait")
    command(host, seconds_per_token=30)
    assert "changed=0" in applied(host, "vllm", vllm_instances=[CHAT], vllm_verify_timeout=2)
    command(host, answers="hang")
    host.check_output("systemctl stop clients")
    told = refused(host, "vllm", vllm_instances=[CHAT], vllm_verify_timeout=2)
    assert "/v1/completions: no answer (timed out)" in told
    command(host)


def test_a_crash_is_followed_by_a_start(host: Host) -> None:
    host.check_output("pkill -9 -u vllm -f VLLM::EngineCore")
    until(lambda: main_pid(host, "chat") == 0 or ask(host, model=MODEL)[0] != 200, 30, "it is still up")
    until(lambda: ask(host, model=MODEL)[0] == 200, 60, "it does not come back")
