"""The status of the fleet: what is not well in what hosts said, and how it is shown."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet_status, fleet_status_host, fleet_status_table

NOW = 1_796_040_000.0
DAY = 86400
UP = {"operator": "up", "by": "", "since": "", "reason": "", "turn": "", "share": ""}
DRAINED = {
    "operator": "drained",
    "by": "ann",
    "since": "2026-11-30T12:00:00Z",
    "reason": "new fan",
    "turn": "",
    "share": "",
}
LEASE = {"who": "ann", "controller": "ctl", "pid": 7, "since": "2026-11-30 12:00:00"}


def instance(name: str = "chat", **change: Any) -> dict[str, Any]:
    """An instance as fleet_status_host finds it."""
    return {
        "name": name, "model": "qwen2.5-7b", "model_path": "/srv/models/qwen2.5-7b", "runtime": "systemd", "runs": "/opt/vllm/releases/0.33.0-abcdef012345",
        "generation": 7, "confirmed": True, "previous": 6, "running_generation": 7, "held": "", "port": 8000, "gpus": [0, 1],
        "unit": {"active": "active", "sub": "running", "enabled": True, "result": "success", "restarts": 0},
        "start": {"at": NOW - 3 * DAY, "kind": "boot", "why": "boot"}, "word": UP, "leaving": False,
        "gateways": {"gw-1": {"use": "in", "why": "", "in_flight": 3, "silent_seconds": 0.4}},
        "metrics": {"running": 3, "waiting": 1, "kv_use": 0.412, "generated_tokens_per_second": 812.4, "prompt_tokens_per_second": 90.0},
        "gpu": {"memory_used_mib": 145000, "memory_total_mib": 163118, "temperature_c": 64, "utilization": 97.5}, **change,
    }  # fmt: skip


def machine(*instances: dict[str, Any], **change: Any) -> dict[str, Any]:
    """What a host says."""
    return {
        "reached": True, "why": "", "asked_at": NOW,
        "status": {
            "up_since": NOW - 3 * DAY, "instances": list(instances), "gateway": None, "agent": {"gateways": ["gw-1"]},
            "units": {"vllm-fleet-agent.service": "active"}, "gpus": [{"index": 0}, {"index": 1}], "lease": None,
            "certificates": {"fleet": NOW + 200 * DAY},
            "updates": {"waiting": None, "security": None, "held_security": [], "reboot_required": False, "reboot_for": []},
            "disks": [{"path": "/", "size_bytes": 100 * 10**9, "free_bytes": 60 * 10**9}], "health": [], "health_age_seconds": None,
            "silence": None, "internal_keys": 1, "missing": {}, "time": NOW, **change,
        },
    }  # fmt: skip


USE = {
    "use": True,
    "why": "",
    "check": "ok",
    "operator": "up",
    "leaving": False,
    "kept": False,
    "since": 5.0,
    "in_flight": 3,
}


def gateway(backends: dict[str, dict[str, Any]], name: str = "gw-1", **change: Any) -> dict[str, Any]:
    """What a gateway says."""
    said = {backend: {**USE, **use} for backend, use in backends.items()}
    told = {
        "name": name, "answers": True, "configuration": "c0ffee", "configuration_used": "c0ffee", "configuration_common": "same",
        "state_age_seconds": 2.0, "in_flight": 3, "backends": said, "certificates": {"tls": NOW + 60 * DAY},
        "routes": [{"model": "qwen", "instance": "chat", "backends": list(said), "min_available": 1, "used": sum(one["use"] for one in said.values())}],
        **change,
    }  # fmt: skip
    units = {"nginx.service": "active", "vllm-gateway-checks.service": "active"}
    return machine(gateway=told, units=units, agent=None, gpus=[])


DOWN = {"reached": False, "why": "Failed to connect to the host via ssh: no route to host", "asked_at": NOW}


def command(playbook: str, arguments: str) -> str:
    """As the action makes it."""
    return f"ansible-playbook {playbook} {arguments}".rstrip() if playbook else " -i inv"


def judged(found: dict[str, dict[str, Any]], **compared: Any) -> dict[str, Any]:
    """The document of hosts; those called gpu-... have the instance chat in the inventory."""
    inventory = {
        name: {"roles": ["vllm"], "instances": ["chat"]}
        if name.startswith("gpu")
        else {"roles": ["gateway"], "instances": []}
        for name in found
    }
    told = fleet_status.document(copy.deepcopy(found), inventory, NOW, compared.get("compared"))
    return fleet_status.judged(told, NOW, command)


def said(document: dict[str, Any], part: str = "problems") -> list[str]:
    """The sentences, each with what it is about."""
    return [f"{fleet_status_table.about(one)}: {one['what']}" for one in document[part]]


def fleet(**hosts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A gateway and two hosts, of which some are as given."""
    found = {
        "gpu-1": machine(instance()),
        "gpu-2": machine(instance()),
        "gw-1": gateway({"chat@gpu-1": {}, "chat@gpu-2": {}}),
    }
    return {**found, **{name.replace("_", "-"): host for name, host in hosts.items()}}


# --- what is not well


def test_a_fleet_that_is_well() -> None:
    document = judged(fleet())
    assert (document["well"], document["problems"], document["notes"]) == (True, [], [])
    assert json.loads(json.dumps(document))["version"] == 1


def test_half_of_the_fleet_is_down_and_the_status_says_which() -> None:
    """And what the gateway says of it; all of it in one sentence, before all others."""
    found = fleet(
        gpu_2=DOWN, gpu_3=DOWN, gw_1=gateway({"chat@gpu-1": {}, "chat@gpu-2": {"use": False, "why": "no answer"}})
    )
    document = judged(found)
    assert said(document) == ["gpu-2, gpu-3: cannot be reached: 2 of 4 hosts (no route to host)"]
    assert document["problems"][0]["do"] == "ansible gpu-2,gpu-3 -m ansible.builtin.ping -i inv"
    lines = fleet_status_table.lines(document, NOW)
    assert any(
        line.split()[:5] == ["gpu-2", "chat", "-", "-", "-"] and "no answer" in line and " out" in line
        for line in lines
    ), lines
    assert lines[-1] == "1 problem"


def test_why_hosts_are_down_is_told_once() -> None:
    refused = 'Data could not be sent to remote host "{0}". Make sure this host can be reached over ssh: ssh: connect to host {0} port 22: Connection refused'
    found = {f"gpu-{number}": {**DOWN, "why": refused.format(f"10.0.0.{number}")} for number in range(3)}
    assert said(judged(found)) == ["gpu-0, gpu-1, gpu-2: cannot be reached: 3 of 3 hosts (Connection refused)"]
    found["gpu-2"] = {**DOWN, "why": "fleet_status failed on the host: /bin/sh: 1: python3: not found"}
    [told] = said(judged(found))
    assert told.endswith("(gpu-0, gpu-1: Connection refused; gpu-2: /bin/sh: 1: python3: not found)")


def test_all_down() -> None:
    document = judged({"gpu-1": DOWN, "gw-1": DOWN})
    assert said(document) == ["gpu-1, gw-1: cannot be reached: 2 of 2 hosts (no route to host)"]
    fleet_status_table.lines(document, NOW)


UNIT = instance()["unit"]
LOOP = {**UNIT, "active": "activating", "sub": "auto-restart", "result": "exit-code", "restarts": 4}
SILENT = {
    "metrics": {"why": "it refuses connections", "listens": False},
    "start": {"at": NOW - 120, "kind": "switch", "why": ""},
}
HUNG = {**SILENT, "metrics": {"why": "no answer within 2 s", "listens": True}}
CRASHED = {"start": {"at": NOW - 300, "kind": "restart", "why": ""}, "unit": {**UNIT, "restarts": 2}}
LOST: dict[str, Any] = {
    "key": "gpu",
    "level": "critical",
    "what": "GPU 1 fell off the bus",
    "since": None,
    "instances": [],
    "gpu": 1,
    "do": "reboot it",
}


@pytest.mark.parametrize(
    ("change", "expected", "playbook"),
    [
        ({"unit": {**UNIT, "active": "failed", "result": "oom-kill"}}, "has failed (oom-kill)", "logs"),
        ({"unit": {**UNIT, "active": "inactive"}}, "does not run, and nobody said that it should be stopped", "start"),
        ({"unit": LOOP}, "ends as soon as it starts (exit-code, restart 4)", "logs"),
        ({"unit": {**UNIT, "active": None}}, "has no unit", "site"),
        ({"generation": None}, "has no generation to run", "site"),
        (HUNG, "runs and does not tell its metrics: no answer within 2 s", "restart"),
        (SILENT, "was started 2 min ago and does not answer yet: it refuses connections", "logs"),
        (CRASHED, "ended by itself and was started again by systemd 5 min ago (restart 2)", "logs"),
        ({"running_generation": 6}, "runs generation 6 while 7 is the current one", "site"),
        ({"confirmed": False}, "has generation 7, which never answered", "site"),
        ({"word": {**DRAINED, "turn": "upgrade"}}, "was left drained by a turn (upgrade) that is over", "upgrade"),
        ({"word": {**DRAINED, "turn": "reboot"}}, "was left drained by a turn (reboot) that is over", "reboot"),
        ({"word": {**UP, "turn": "upgrade", "share": "5"}}, "was left up with 5 % of the requests by a turn (upgrade) that is over", "upgrade"),
        ({"gpus": [0, 5]}, "uses GPU 5, which nvidia-smi does not list", "ssh gpu-1"),
    ],
)  # fmt: skip
def test_one_problem_of_an_instance_has_one_command(change: dict[str, Any], expected: str, playbook: str) -> None:
    """What the gateway thinks of it follows from that, and is not said again."""
    out = gateway({"chat@gpu-1": {"use": False, "why": "it refuses connections"}, "chat@gpu-2": {}})
    if "word" in change or "gpus" in change:
        out = gateway({"chat@gpu-1": {}, "chat@gpu-2": {}})
    silent = {"gateways": {"gw-1": {"use": "out", "why": "", "in_flight": 0, "silent_seconds": 1.0}}}
    document = judged(fleet(gpu_1=machine(instance(**{**silent, **change})), gw_1=out))
    assert said(document) == [f"chat@gpu-1: {expected}"]
    do = document["problems"][0]["do"]
    assert f"ansible-playbook {playbook} --limit gpu-1" in do or do.startswith(playbook)


def test_what_a_run_is_doing_now_is_no_problem() -> None:
    changed = instance(unit={**UNIT, "active": "inactive"}, word={**DRAINED, "turn": "upgrade"}, running_generation=6)
    out = gateway({"chat@gpu-1": {"use": False, "operator": "drained"}, "chat@gpu-2": {}})
    document = judged(fleet(gpu_1=machine(changed, lease=LEASE), gw_1=out))
    assert said(document) == []
    assert said(document, "notes")[0].startswith(
        "gpu-1: is being changed by ann on ctl (process 7), since 2026-11-30 12:00:00 UTC"
    )


def test_what_a_person_wants_is_no_problem() -> None:
    stopped = {**DRAINED, "operator": "stopped", "reason": ""}
    found = fleet(
        gpu_1=machine(instance(word=DRAINED, held="bob, since noon")),
        gpu_2=machine(instance(word=stopped, unit={**UNIT, "active": "inactive"}, metrics=None, gpus=[9])),
        gw_1=gateway(
            {"chat@gpu-1": {"use": False, "operator": "drained"}, "chat@gpu-2": {"use": False, "operator": "stopped"}},
            routes=[],
        ),
    )
    document = judged(found)
    assert said(document) == []
    assert said(document, "notes") == [
        "chat@gpu-1: is drained by ann since 2026-11-30T12:00:00Z: new fan",
        "chat@gpu-2: is stopped by ann since 2026-11-30T12:00:00Z",
        "chat@gpu-1: is held: bob, since noon",
    ]
    assert [one["do"].split()[1] for one in document["notes"][:2]] == ["undrain", "start"]


def test_an_outage_comes_first() -> None:
    dead = instance(unit={**UNIT, "active": "failed"})
    found = fleet(
        gpu_1=machine(dead),
        gpu_2=machine(dead),
        gw_1=gateway({f"chat@gpu-{number}": {"use": False} for number in (1, 2)}),
    )
    assert said(judged(found)) == [
        "gw-1: the route qwen has no backend in use: its clients get 503",
        "chat@gpu-1, chat@gpu-2: has failed (success)",
    ]


def test_a_backend_that_only_the_gateway_complains_of() -> None:
    document = judged(fleet(gw_1=gateway({"chat@gpu-1": {}, "chat@gpu-2": {"use": False, "why": "HTTP 500"}})))
    assert said(document) == ["chat@gpu-2: is not used by gw-1: HTTP 500"]


def test_one_that_is_kept() -> None:
    found = fleet(
        gpu_1=machine(instance(word=DRAINED)),
        gw_1=gateway({"chat@gpu-1": {"kept": True, "why": "the route qwen needs it"}, "chat@gpu-2": {}}),
    )
    assert said(judged(found)) == ["chat@gpu-1: wants out and is kept in use by gw-1: the route qwen needs it"]


def test_an_instance_that_is_not_there() -> None:
    assert said(judged(fleet(gpu_2=machine(), gw_1=gateway({"chat@gpu-1": {}})))) == [
        "chat@gpu-2: is in the inventory and not on the host"
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"state_age_seconds": 90.0}, "its checks have written nothing for 90 s: backends are used as they said last"),
        ({"state_age_seconds": None}, "its checks have said nothing yet: every backend is used"),
        ({"answers": False, "configuration_used": None}, "Nginx does not answer on its socket"),
        ({"configuration_used": "decade"}, "Nginx works with the configuration decade, the file has c0ffee"),
        ({"certificates": {"tls": NOW + 3.5 * DAY}}, "its certificate for clients ends in 3 days"),
        ({"certificates": {"tls": NOW - DAY}}, "its certificate for clients has expired"),
    ],
)
def test_problems_of_a_gateway(change: dict[str, Any], expected: str) -> None:
    assert said(judged(fleet(gw_1=gateway({"chat@gpu-1": {}, "chat@gpu-2": {}}, **change)))) == [f"gw-1: {expected}"]


def test_gateways_that_differ_and_one_that_is_none() -> None:
    both: dict[str, dict[str, Any]] = {"chat@gpu-1": {}, "chat@gpu-2": {}}
    document = judged(fleet(gw_2=gateway(both, "gw-2", configuration_common="other"), gw_3=machine(agent=None)))
    assert said(document) == [
        "gw-3: is a gateway of the inventory, and has no configuration of one",
        "gw-1, gw-2: these gateways were told different routes, clients or backends",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"health": [LOST]}, "GPU 1 fell off the bus"),
        ({"health_age_seconds": 900.0}, "its watch has written nothing for 15 min"),
        ({"units": {"vllm-fleet-agent.service": "failed"}}, "vllm-fleet-agent is failed"),
        ({"missing": {"gpus": "nvidia-smi did not answer within 5 s"}, "gpus": []}, "its GPUs do not answer: nvidia-smi did not answer within 5 s"),
        ({"missing": {"units": "systemctl did not answer within 5 s"}, "units": {}}, "units could not be looked at: systemctl did not answer within 5 s"),
        ({"disks": [{"path": "/", "size_bytes": 100 * 10**9, "free_bytes": 2 * 10**9}]}, "the disk of / is 98% full (2.0 GB free)"),
        ({"time": NOW - 300}, "its clock is 5 min behind the controller's"),
        ({"certificates": {"fleet": NOW + DAY}}, "its certificate of the fleet ends in 1 day"),
        ({"certificates": {"authority": NOW + 89.5 * DAY}}, "its authority of the fleet ends in 89 days"),
    ],
)  # fmt: skip
def test_problems_of_a_machine(change: dict[str, Any], expected: str) -> None:
    document = judged(fleet(gpu_1=machine(instance(), **change)))
    assert said(document) == [f"gpu-1: {expected}"]
    assert document["problems"][0]["do"]
    assert "{host" not in document["problems"][0]["do"]


def test_what_the_watch_found_is_not_said_twice() -> None:
    hung = {
        **LOST,
        "key": "hung chat",
        "what": "hangs; it is being restarted",
        "instances": ["chat"],
        "gpu": None,
        "do": "",
    }
    full = {
        **LOST,
        "key": "disk /",
        "level": "warning",
        "what": "/ is 98 % full",
        "gpu": None,
        "do": "Look at /var/log.",
    }
    disks = [{"path": "/", "size_bytes": 100 * 10**9, "free_bytes": 2 * 10**9}]
    silent = instance(metrics={"why": "no answer within 3 s", "listens": True})
    out = gateway({"chat@gpu-1": {"use": False, "why": "no answer"}, "chat@gpu-2": {}})
    document = judged(fleet(gpu_1=machine(silent, health=[hung, full], disks=disks), gw_1=out))
    assert said(document) == ["chat@gpu-1: hangs; it is being restarted", "gpu-1: / is 98 % full"]
    assert document["problems"][0]["do"] == "ssh gpu-1 sudo vllm-fleet health"


def test_a_gateway_that_does_not_ask() -> None:
    """One that is down is told of by itself."""
    silent = {"gw-1": {"use": "in", "why": "", "in_flight": 0, "silent_seconds": 90.0}}
    document = judged(fleet(gpu_1=machine(instance(gateways=silent)), gpu_2=machine(instance(gateways={}))))
    assert said(document) == ["gpu-1, gpu-2: is not asked by gw-1: what is said of its instances does not arrive there"]
    assert document["problems"][0]["do"].startswith("ssh gw-1 ")
    document = judged(fleet(gpu_1=machine(instance(gateways=silent)), gpu_2=machine(instance(gateways={})), gw_1=DOWN))
    assert said(document) == ["gw-1: cannot be reached: 1 of 3 hosts (no route to host)"]
    assert document["hosts"]["gpu-1"]["instances"][0]["gateways"]["gw-1"]["use"] == "unknown"


def test_the_comparison_with_the_inventory() -> None:
    document = judged(fleet(), compared={"gpu-1": {"chat": "differs"}, "gpu-2": {"chat": "as wanted"}})
    assert said(document) == ["chat@gpu-1: differs from the inventory"]
    assert "inventory" in fleet_status_table.lines(document, NOW)[0]
    held = fleet(gpu_1=machine(instance(held="ann, since noon")))
    assert said(judged(held, compared={"gpu-1": {"chat": "differs"}})) == [], "somebody wants it to differ"


def test_what_waits_for_a_good_moment() -> None:
    updates = {
        "waiting": 12,
        "security": 3,
        "held_security": ["linux-image"],
        "reboot_required": True,
        "reboot_for": [],
    }
    silence = {"until": NOW + 60, "by": "ann", "turn": "reboot", "reason": "new fan"}
    document = judged(fleet(gpu_1=machine(instance(), updates=updates, silence=silence, internal_keys=2)))
    assert said(document) == []
    assert said(document, "notes") == [
        "gpu-1: is silenced until 2026-11-30 12:01 UTC by ann (reboot): new fan",
        "gpu-1: needs a reboot for updates that are installed",
        "gpu-1: takes a former internal key as well",
    ]
    assert "12, 1 held, reboot" in fleet_status_table.lines(document, NOW)[1]


def test_instances_whose_files_cannot_be_read_break_nothing() -> None:
    broken = {**instance(start=None, metrics=None, gpu=None), **fleet_status_host.UNREADABLE}
    document = judged(fleet(gpu_1=machine(broken, missing={"instance chat": "KeyError"})))
    assert "gpu-1: instance chat could not be looked at: KeyError" in said(document)
    fleet_status_table.lines(document, NOW)


# --- the table


def test_the_table() -> None:
    found = fleet(gpu_2=machine(instance(word=DRAINED, running_generation=6, metrics=None, gpu=None)))
    lines = fleet_status_table.lines(judged(found), NOW)
    assert lines[:4] == [
        "host   instance   model       release  gen  unit    traffic   run  wait   KV  tok/s   GPU GB   C  busy  started    cert  disk  who",
        "gpu-1  chat       qwen2.5-7b  0.33.0     7  active  in          3     1  41%    812  142/159  64   98%  3 d, boot  200d   40%  -",
        "gpu-2  chat       qwen2.5-7b  0.33.0   6>7  active  in          -     -    -      -        -   -     -  3 d, boot  200d   40%  drained ann",
        "gw-1   (gateway)  -           c0ffee     -  active  uses 2/2    3     -    -      -        -   -     -  -           60d   40%  -",
    ]


def test_columns_that_are_empty_everywhere_are_left_out_and_what_is_long_is_cut() -> None:
    found = [{"host": "gpu-1", "instance": "chat", "who": "held " + "x" * 300}, {"host": "gpu-2", "instance": "chat"}]
    lines = fleet_status_table.table(found, 60)
    assert lines[0].split() == ["host", "instance", "who"]
    assert max(map(len, lines)) == 60
    assert lines[1].endswith("..")


def test_a_large_fleet_with_ordinary_names_fits() -> None:
    one = instance(
        "embeddings", model="qwen2.5-coder-32b-instruct", held="ann@ctl-1, since 2026-11-30 12:00:00, compares versions", word=DRAINED,
        start={"at": NOW - 3 * DAY, "kind": "act", "why": "upgrade by ann@controller"},
    )  # fmt: skip
    updates = {"waiting": 120, "security": 3, "held_security": ["a"], "reboot_required": True, "reboot_for": []}
    found = {f"gpu-{number}.example.com": machine(one, updates=updates) for number in range(100)}
    document = judged(found, compared={"gpu-1.example.com": {"embeddings": "as wanted"}})
    assert max(len(line) for line in fleet_status_table.table(fleet_status_table.rows(document, NOW))) <= 160


def test_releases_are_told_apart_only_where_they_have_to_be() -> None:
    image = "registry.example/vllm/vllm-openai@sha256:" + "ab" * 32
    other = "/opt/vllm/releases/0.33.0-ffff00000000"
    document = judged(fleet(gpu_1=machine(instance(runs=image)), gpu_2=machine(instance())))
    assert sorted(fleet_status_table.short_releases(document).values()) == ["0.33.0", "vllm-openai"]
    document = judged(fleet(gpu_1=machine(instance(runs=other)), gpu_2=machine(instance())))
    assert sorted(fleet_status_table.short_releases(document).values()) == ["0.33.0-abcdef", "0.33.0-ffff00"]


def test_the_last_line() -> None:
    assert fleet_status_table.lines(judged(fleet()), NOW)[-1] == "all is well (3 hosts, 2 instances)"


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (300, "5 min"), (7200, "2 h"), (3 * DAY, "3 d"), (-5, "0 s")]
)
def test_spans(seconds: float, words: str) -> None:
    assert fleet_status.span(seconds) == words
