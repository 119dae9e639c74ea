"""The operator's verbs: what is refused before anything changes, what is said at the end, and the playbooks on hosts that are not there."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.filter import verbs as filters
from ansible_collections.gpufleet.llm.plugins.module_utils import host_agent, verbs

from tests.playbooks import playbook

ROOT = Path(__file__).resolve().parents[2]
HOSTVARS: dict[str, dict[str, Any]] = {
    "gpu-1": {"vllm_instances": [{"name": "chat"}, {"name": "embed"}]},
    "gpu-2": {"vllm_instances": [{"name": "chat"}]},
    "gpu-3": {"vllm_instances": [{"name": "rank"}]},
    "gpu-4": {},
    "gw-1": {},
}
ASKED = {
    "instance": "", "limit": "", "vllm_group": "vllm", "serve": ["gpu-1", "gpu-2", "gpu-3", "gpu-4"], "gateways": ["gw-1"],
    "enough": False, "whole": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("hosts", "asked", "said"),
    [
        (["gpu-1", "gw-1"], {}, ""),
        (["gpu-1", "gpu-2"], {"instance": "embed"}, ""),
        (["gpu-2"], {"instance": "chta"}, "fleet_instance is 'chta', which is no instance of gpu-2: there is chat; did you mean chat?"),
        (["gpu-2"], {"instance": "embed"}, "there is chat; gpu-1 has it"),
        (["gpu-4"], {}, "vllm_instances of gpu-4 is empty"),
        (["gw-1"], {"limit": "gw-1"}, "no host of the group vllm is left in this run (--limit gw-1); it has gpu-1, gpu-2"),
        (["gw-1"], {"limit": "gw-1", "enough": True}, ""),
        (["gw-1"], {"limit": "gw-1", "enough": True, "instance": "chat"}, "but no host of this run (--limit gw-1) runs instances"),
        (["other"], {"enough": True}, "no host of the group vllm is left"),
        (["gpu-1"], {"whole": True}, ""),
        (["gpu-4"], {"whole": True}, ""),
        (["gpu-1"], {"whole": True, "instance": "chat"}, "this acts on whole hosts"),
    ],
)  # fmt: skip
def test_what_is_refused(hosts: list[str], asked: Mapping[str, Any], said: str) -> None:
    found = filters.verb_problems(HOSTVARS, hosts, {**ASKED, **asked})
    assert len(found) == bool(said)
    assert not said or said in found[0]


def test_which_instances_are_meant() -> None:
    assert filters.verb_backends(HOSTVARS, ["gpu-1", "gpu-2", "gpu-4"]) == ["chat@gpu-1", "embed@gpu-1", "chat@gpu-2"]
    assert filters.verb_backends(HOSTVARS, ["gpu-1", "gpu-2"], "embed") == ["embed@gpu-1"]


# --- the minimum of a route


def slurped(gateway: str, name: str, content: object) -> dict[str, Any]:
    text = content if isinstance(content, str) else json.dumps(content)
    return {"item": [gateway, name], "content": base64.b64encode(text.encode()).decode()}


def told(used: str, gateway: str = "gw-1", least: int = 2) -> list[dict[str, Any]]:
    """What a gateway tells of three backends, of which these are in use."""
    names = ["chat@gpu-1", "chat@gpu-2", "chat@gpu-3"]
    fleet = {"routes": [{"model": "qwen", "aliases": ["gpt"], "backends": names, "min_available": least}]}
    uses = {
        name: {"use": name[-1] in used, "why": "" if name[-1] in used else "refused", "operator": "up"}
        for name in names
    }
    return [
        slurped(gateway, "/etc/vllm-gateway/fleet.json", fleet),
        slurped(gateway, "/run/vllm-gateway/state.json", {"backends": uses}),
    ]


def test_a_route_that_would_fall_below_its_minimum_is_named() -> None:
    assert filters.verb_minimum_problems(told("123"), ["chat@gpu-1", "embed@gpu-1"]) == []
    [problem] = filters.verb_minimum_problems(told("123"), ["chat@gpu-1", "chat@gpu-2"])
    assert problem == (
        "route qwen needs 2 of its 3 backends (min_available) and would have 1 in use without chat@gpu-1, chat@gpu-2 (as gw-1 sees it)"
    )
    [problem] = filters.verb_minimum_problems([*told("12"), *told("12", "gw-2")], ["chat@gpu-1"])
    assert (
        "would have 1 in use without chat@gpu-1; out of use already: chat@gpu-3 (refused) (as gw-1, gw-2 see it)"
        in problem
    )
    # what is out already takes nothing away
    assert filters.verb_minimum_problems(told("12"), ["chat@gpu-3"]) == []
    assert filters.verb_minimum_problems(told("123", least=0), ["chat@gpu-1", "chat@gpu-2", "chat@gpu-3"]) == []
    [problem] = filters.verb_minimum_problems(told("123", least=0), ["chat@gpu-1", "chat@gpu-2", "chat@gpu-3"], 1)
    assert "would be left without a backend in use, without chat@gpu-1" in problem


def test_a_gateway_that_cannot_be_asked_has_no_say() -> None:
    fleet, state = told("123")
    unreachable = {"item": ["gw-2", "/etc/vllm-gateway/fleet.json"], "unreachable": True}
    leaving = ["chat@gpu-1", "chat@gpu-2"]
    assert filters.verb_minimum_problems([fleet, unreachable], leaving) == []
    assert filters.verb_minimum_problems([fleet, slurped("gw-1", "/run/vllm-gateway/state.json", "{")], leaving) == []
    assert len(filters.verb_minimum_problems([fleet, unreachable, state], leaving)) == 1


# --- what is said at the end

UP = host_agent.word(None)
ADA = host_agent.word(host_agent.spoken("drained", "ada", "monday", "new fan"))
STOPPED = host_agent.word(host_agent.spoken("stopped", "ada", "monday", ""))


def became(word: Mapping[str, str], before: Mapping[str, str], **more: Any) -> dict[str, Any]:
    return {"instances": {"chat": {"word": word, "before": before, "seconds": 12.3, "untouched": False, **more}}}


@pytest.mark.parametrize(
    ("verb", "result", "said"),
    [
        ("drain", became(ADA, UP), "chat@gpu-1: drained; every gateway has let it go and its requests have ended, after 12 s"),
        ("drain", became(ADA, ADA), "chat@gpu-1: was drained by ada: new fan since monday before, and still is"),
        ("drain", became(STOPPED, STOPPED, untouched=True), "chat@gpu-1: left as it is, stopped by ada since monday"),
        ("drain", {**became(UP, UP), "skipped_reason": "no gateway asks this host"}, "chat@gpu-1: not drained: no gateway asks this host"),
        ("undrain", became(UP, ADA), "chat@gpu-1: in use again after 12 s; it was drained by ada: new fan since monday"),
        ("undrain", became(UP, UP), "chat@gpu-1: nobody had taken it out"),
        ("start", became(UP, UP, untouched=True), "chat@gpu-1: runs, answers and is in use"),
        ("restart", became(UP, UP, untouched=True), "chat@gpu-1: restarted, answers and is in use"),
        ("restart", became(ADA, ADA, untouched=True), "chat@gpu-1: restarted and answers; stays drained by ada: new fan"),
        ("restart", became(STOPPED, STOPPED, untouched=True), "chat@gpu-1: left as it is, stopped by ada since monday"),
    ],
)  # fmt: skip
def test_what_became_of_an_instance(verb: str, result: Mapping[str, Any], said: str) -> None:
    [line] = filters.verb_report({"gpu-1": result}, verb, {}, {})
    assert line.startswith(said)


def test_the_report_has_the_next_command(tmp_path: Path) -> None:
    asked = {"instance": "chat", "inventory": [str(tmp_path)]}
    notes = {"left": "They run on.", "next": {"undrain": "To put them back", "test_api": "To ask"}}
    lines = filters.verb_report(
        {"gpu-1": became(ADA, UP), "gpu-2": {"failed": True}, "gpu-3": {}}, "drain", asked, notes
    )
    assert lines[1].startswith(
        "gpu-2, gpu-3: not done, see above. Once that is settled: ansible-playbook playbooks/drain.yml -i "
    )
    assert lines[1].endswith(f"{tmp_path.name} --limit gpu-2,gpu-3 -e fleet_instance=chat")
    assert lines[2] == "They run on."
    assert lines[3].startswith("To put them back: ansible-playbook playbooks/undrain.yml")
    assert "--limit gpu-1 " in lines[3]
    assert lines[4].startswith("To ask: ansible-playbook playbooks/test_api.yml -i ")
    assert "gpu-1" not in lines[4]
    [line] = filters.verb_report({"gpu-1": became(ADA, UP)}, "drain", {**asked, "check": True}, {})
    assert line == "chat@gpu-1: would be drained (--check)"
    check = {**asked, "check": True}
    assert filters.verb_report({"gpu-1": became(UP, UP)}, "restart", check, {}) == [
        "chat@gpu-1: would be restarted (--check)"
    ]
    assert filters.verb_report({"gpu-1": became(STOPPED, STOPPED)}, "restart", check, {}) == [
        "chat@gpu-1: left as it is, stopped by ada since monday"
    ]


def test_the_report_of_a_reboot() -> None:
    facts = {"ansible_facts": {"gpufleet": {"kernel": "6.2", "gpus": [1, 2]}}}
    hostvars: dict[str, Any] = {
        "gpu-1": {"reboot_done": True, "reboot_seen": {"kernel": "6.1"}, **facts},
        "gpu-2": {"reboot_seen": {"kernel": "6.1"}, **facts},
        "gw-1": {
            "reboot_done": True,
            "reboot_seen": {"kernel": "6.2"},
            "ansible_facts": {"gpufleet": {"kernel": "6.2", "gpus": []}},
        },
    }
    lines = filters.verb_reboot_report(hostvars, list(hostvars), {"inventory": []})
    assert lines[:2] == ["gpu-1: rebooted, kernel 6.2 after 6.1, 2 GPUs", "gw-1: rebooted, kernel 6.2 as before"]
    assert lines[2].startswith("gpu-2: not rebooted, or not back; see above.")
    assert lines[2].endswith("ansible-playbook playbooks/reboot.yml --limit gpu-2")


# --- verify


def test_what_operators_stopped_is_no_failure() -> None:
    rows = [
        {"check": "models", "result": "ok", "detail": "qwen"},
        {"check": "completion qwen", "result": "FAILED", "detail": "/v1/completions: 503: no backend"},
        {"check": "streaming qwen", "result": "FAILED", "detail": "503: no backend"},
        {"check": "alias gpt", "result": "FAILED", "detail": "/v1/completions: 503: no backend"},
        {"check": "completion other", "result": "FAILED", "detail": "/v1/completions: 503: no backend"},
    ]
    fleet, state = told("")
    assert filters.verify_rows(rows) == filters.verify_rows(rows, [fleet, state]) == rows
    uses = json.loads(base64.b64decode(state["content"]))
    for use in uses["backends"].values():
        use.update(operator="stopped", why="stopped by ada: moved")
    stopped = [fleet, slurped("gw-1", "/run/vllm-gateway/state.json", uses)]
    found = filters.verify_rows(rows, stopped)
    assert [row["result"] for row in found] == ["ok", "stopped", "stopped", "stopped", "FAILED"]
    assert found[1]["detail"] == "on purpose: every backend is stopped by ada: moved"
    # another answer is none of that
    assert filters.verify_rows([{**rows[1], "detail": "500: oh"}], stopped)[0]["result"] == "FAILED"
    # one that is out for another reason makes it a failure
    uses["backends"]["chat@gpu-2"].update(operator="up")
    assert filters.verify_rows(rows, [fleet, slurped("gw-1", "/run/vllm-gateway/state.json", uses)]) == rows


# --- logs


def test_logs_have_no_secrets() -> None:
    hostvars = {
        "a": {
            "vllm_internal_key": "internal-key-0123456789",
            "gateway_clients": [{"name": "team-a", "key": "client-key-0123456789"}, {"name": "team-b", "keys": [{"key": "other-key-0123456789"}]}],
            "vllm_group": "vllm",
        }
    }  # fmt: skip
    result = {
        "item": "vllm@chat",
        "stdout_lines": [
            "then internal-key-0123456789.",
            "team-a of vllm sent client-key-0123456789, other-key-0123456789,",
        ],
    }
    wanted = "team-a of vllm sent ********, ********,\nthen ********.\n"
    assert filters.verb_log(result, hostvars, "a") == wanted
    assert filters.verb_log(result, hostvars, "a", True) == f"== vllm@chat on a\n{wanted}"
    assert filters.verb_log({"item": "x", "stdout_lines": [], "stderr": ""}, hostvars, "a") == "(nothing)\n"
    assert verbs.masked("a short one", ["short", None, ""]) == "a short one"


# --- the playbooks

DEAD = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}  # nobody listens there
OF_INSTANCES = ("drain", "undrain", "stop", "start", "restart")
CHANGING = (*OF_INSTANCES, "reboot")


def plays(verb: str) -> list[dict[str, Any]]:
    """What a playbook is made of."""
    found: list[dict[str, Any]] = yaml.safe_load((ROOT / "playbooks" / f"{verb}.yml").read_text())
    return found


def imported(play: Mapping[str, Any]) -> str:
    """The playbook that a part of a playbook is."""
    return str(play.get("ansible.builtin.import_playbook", ""))


@pytest.mark.parametrize("verb", [*CHANGING, "logs"])
def test_what_is_asked_for_is_looked_at_first(verb: str) -> None:
    assert imported(plays(verb)[0]) == "plays/asked.yml"


@pytest.mark.parametrize("verb", CHANGING)
def test_who_changes_something_has_the_lease_and_says_what_was_done(verb: str) -> None:
    parts = plays(verb)
    assert imported(parts[1]) in ("begin.yml", "lease.yml")
    assert [imported(part) for part in parts].count("end.yml") + sum(
        (part.get("vars") or {}).get("fleet_lease_state") == "released" for part in parts
    ) == 1
    assert imported(parts[-2]) in ("end.yml", "lease.yml")
    assert parts[-1]["name"] == "Say what was done"


@pytest.mark.parametrize("verb", [*CHANGING, "logs", "test_api"])
def test_each_verb_is_a_line_in_the_runbook(verb: str) -> None:
    table = (ROOT / "docs/runbook.md").read_text().partition("## Symptoms")[0]
    assert f"`{verb}.yml" in table


def run(directory: Path, verb: str, *arguments: str) -> str:
    """What a playbook refuses to do on two hosts and a gateway that nobody reaches."""
    hosts = {
        name: {**DEAD, "vllm_instances": [{"name": "chat", "port": 8000, "model": "m"}]} for name in ("gpu-1", "gpu-2")
    }
    groups = {"vllm": {"hosts": hosts}, "gateway": {"hosts": {"gw-1": DEAD}}}
    file = directory / "hosts.json"
    file.write_text(json.dumps({"all": {"children": groups}}))
    done = playbook("-i", file, f"playbooks/{verb}.yml", *arguments)
    said = " ".join(done.stdout.split())
    assert done.returncode == 2, said
    assert "UNREACHABLE" not in said
    return said


@pytest.mark.parametrize(
    ("verb", "arguments", "wanted"),
    [
        ("drain", ["-e", "fleet_instance=chta"], "did you mean chat?"),
        ("logs", ["-e", "fleet_instance=chta"], "did you mean chat?"),
        ("reboot", ["-e", "fleet_instance=chat"], "this acts on whole hosts, with all of their instances; leave it out"),
        ("stop", ["--limit", "gw-1"], "no host of the group vllm is left in this run (--limit gw-1); it has gpu-1, gpu-2"),
        ("stop", ["-e", "drain_seconds=long"], "drain_seconds is 'long', but must be a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_a_host_is_asked(
    tmp_path: Path, verb: str, arguments: list[str], wanted: str
) -> None:
    assert wanted in run(tmp_path, verb, *arguments)
