"""Turns of hosts that serve: the batches, the backends that routes keep, the time, and what hosts say and remember."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.playbook.play import Play
from ansible_collections.gpufleet.llm.plugins.module_utils import host_agent, turns
from ansible_collections.gpufleet.llm.plugins.modules import turn_memory

CHAT = {"name": "chat", "port": 8000}
EMBED = {"name": "embed", "port": 8001}
HOSTS = ["a", "b", "c"]


def fleet(
    routes: list[dict[str, Any]], instances: dict[str, list[dict[str, Any]]] | None = None, **planned: Any
) -> dict[str, dict[str, Any]]:
    """The hostvars of a gateway and of hosts that serve, each with its part of the plan."""
    serving = instances or {host: [CHAT, EMBED] for host in HOSTS}
    hosts = {
        host: {
            "fleet_address": f"10.0.0.{number}",
            "vllm_instances": found,
            "__turn_planned": {"leaving": ["chat"], "out": {}, "seconds": None} | planned.get(host, {}),
        }
        for number, (host, found) in enumerate(serving.items(), 1)
    }
    return {**hosts, "gw": {"fleet_address": "10.0.1.1", "gateway_routes": routes}}


def plan(hostvars: dict[str, Any], order: list[str], serial: Any, dead: list[str] | None = None) -> dict[str, Any]:
    serving = [host for host in hostvars if host != "gw"]
    asked = {
        "act": "upgrade",
        "order": order,
        "serial": serial,
        "hosts": serving,
        "gateways": ["gw"],
        "dead": dead or [],
    }
    return turns.plan(hostvars, asked)


ROUTE = {"model": "small", "instance": "chat"}


# --- batches


@pytest.mark.parametrize("serial", [1, 2, "25%", "40%", "100%", [1, "25%"], [1, 3], ["10%", 1], 0])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_batches_are_those_that_ansible_makes(serial: Any, count: int) -> None:
    from ansible.executor.playbook_executor import PlaybookExecutor
    from ansible.inventory.manager import InventoryManager

    hosts = [f"h{number}" for number in range(count)]
    inventory = InventoryManager(DataLoader(), sources=[",".join(hosts) + ","])
    sizes = serial if isinstance(serial, list) else [serial]
    play = Play.load({"hosts": "all", "serial": sizes, "gather_facts": False, "tasks": []})
    executor = PlaybookExecutor.__new__(PlaybookExecutor)
    executor._inventory = inventory
    made = [[str(host) for host in batch] for batch in executor._get_serialized_batches(play)]
    assert turns.batches(hosts, serial) == made


# --- min_available


def test_a_batch_leaves_a_route_what_it_needs() -> None:
    assert plan(fleet([ROUTE]), HOSTS, [1, "25%"])["problems"] == []
    assert plan(fleet([{**ROUTE, "min_available": 1}]), HOSTS, 2)["problems"] == []


def test_a_batch_that_takes_too_many_is_refused() -> None:
    assert plan(fleet([ROUTE]), HOSTS, 2)["problems"] == [
        "route small would have 1 of its 3 backends in use while chat@a, chat@b are out; it needs 2 (min_available). Smaller batches: -e fleet_batch=1"
    ]


def test_each_route_is_looked_at_and_told_once() -> None:
    """Two gateways have the same route, another one asks for less of the same instance, and embed does not leave."""
    hostvars = fleet(
        [ROUTE, {"model": "other", "instance": "embed"}, {"model": "less", "instance": "chat", "min_available": 1}]
    )
    asked = {"act": "upgrade", "order": HOSTS, "serial": 2, "hosts": HOSTS, "gateways": ["gw", "gw2"], "dead": []}
    [problem] = turns.plan({**hostvars, "gw2": hostvars["gw"]}, asked)["problems"]
    assert problem.startswith("route small ")


def test_several_instances_of_a_host_leave_together() -> None:
    both = {"leaving": ["chat", "embed"]}
    hostvars = fleet([ROUTE, {"model": "other", "instance": "embed", "min_available": 3}], a=both, b=both, c=both)
    [problem] = plan(hostvars, HOSTS, 1)["problems"]
    assert problem == (
        "route other would have 2 of its 3 backends in use while embed@a is out; it needs 3 (min_available). Put back what is out, or lower "
        "min_available of the route"
    )


def test_hosts_outside_of_the_limit_count_as_serving_and_dead_ones_do_not() -> None:
    assert plan(fleet([ROUTE]), ["a"], 1)["problems"] == []
    [problem] = plan(fleet([ROUTE]), ["a"], 1, dead=["c"])["problems"]
    assert (
        "1 of its 3 backends in use while chat@a is out, with chat@c (its host cannot be reached) out already; it needs 2"
        in problem
    )


def test_what_a_person_drained_is_out_all_the_time() -> None:
    hostvars = fleet([ROUTE], b={"leaving": [], "out": {"chat": "drained by ada"}})
    [problem] = plan(hostvars, HOSTS, 1)["problems"]
    assert "with chat@b (drained by ada) out already" in problem
    # alone it may be changed: nothing leaves
    assert plan(hostvars, ["b"], 1)["problems"] == []


def test_what_a_turn_left_is_out_until_its_own_turn() -> None:
    """It comes first, so the others may follow; in the wrong order they may not."""
    hostvars = fleet([ROUTE], b={"out": {"chat": "drained by ada"}})
    assert plan(hostvars, ["b", "a", "c"], 1)["problems"] == []
    assert len(plan(hostvars, ["a", "b", "c"], 1)["problems"]) == 1


def test_a_lone_backend_may_leave_unless_the_route_says_otherwise() -> None:
    alone = {"a": [CHAT]}
    assert plan(fleet([ROUTE], alone), ["a"], 1)["problems"] == []
    [problem] = plan(fleet([{**ROUTE, "min_available": 1}], alone), ["a"], 1)["problems"]
    assert problem.startswith("route small would have 0 of its 1 backend in use while chat@a is out; it needs 1")


# --- what a host says


def found(name: str = "chat", operator: str = "up", turn: str = "", **change: Any) -> dict[str, Any]:
    """An instance as vllm_look finds it."""
    word = {**host_agent.word(None), "operator": operator, "by": "ada" if operator != "up" else "", "turn": turn}
    return {"name": name, "word": word, "start_seconds": None, **change}


def test_a_person_s_word_is_no_turn_s_to_change() -> None:
    said = turns.host_part(
        [
            found(),
            found("embed", "drained"),
            found("code", "drained", "upgrade"),
            found("old", "stopped"),
            found("other"),
        ],
        ["chat", "embed", "code", "old", "gone"],
        [],
    )
    assert said["leaving"] == ["chat", "code"]
    assert said["out"] == {"embed": "drained by ada", "code": "drained by ada", "old": "stopped by ada"}


def test_the_time_to_expect_is_that_of_the_last_turns_else_that_of_the_start() -> None:
    def turn(seconds: float, result: str = "done") -> dict[str, Any]:
        return {"result": result, "seconds": seconds}

    assert turns.expected([turn(500), turn(40), turn(50), turn(3, "failed"), turn(60)], [10.0]) == 50
    assert turns.expected([turn(3, "failed")], [10.0, None, 90.0]) == 90 + turns.AROUND_SECONDS
    assert turns.expected([], [None]) is None


def test_one_that_moved_is_not_waited_for() -> None:
    """Another port, or another name of its model."""
    before = [
        found(name, port=port, gate={"model": "small"})
        for name, port in (("chat", 1), ("embed", 2), ("code", 3), ("other", 4))
    ]
    names = ["chat", "embed", "code"]
    known = turns.host_part(before, names, [])["as_asked"]
    assert known == {"chat": [1, "small"], "embed": [2, "small"], "code": [3, "small"]}
    after = [before[0], {**before[1], "port": 9}, {**before[2], "gate": {"model": "large"}}, {**before[3], "port": 9}]
    assert turns.moved(after, names, known) == ["embed", "code"]
    assert turns.moved(after, names, {}) == []


# --- in words


def test_the_plan_in_words() -> None:
    hostvars = fleet([ROUTE], a={"seconds": 100.0}, c={"seconds": 40.0})
    assert plan(hostvars, HOSTS, [1, 2])["lines"] == [
        "upgrade: 3 hosts in 2 batches",
        "  batch 1  a  chat: about 2 min out of use",
        "  batch 2  b  chat: about 2 min out of use",
        "  batch 2  c  chat: about 40 s out of use",
        "  4 min in all, requests that run longest not counted",
    ]
    assert plan(fleet([ROUTE]), ["a"], 1)["lines"] == [
        "upgrade: 1 host in 1 batch",
        "  batch 1  a  chat: time unknown: no turn was made there yet",
    ]


def test_how_far_it_is() -> None:
    batches = [["a"], ["b"], ["c"]]
    assert turns.progress("a", batches, {"a": 10, "b": 200, "c": None}, {"a": 41.2}) == (
        "host 1 of 3 is back: a, 42 s out of traffic; 2 hosts to come, about 83 s"
    )
    assert turns.progress("c", batches, {}, {"a": 1, "c": 2}) == "host 3 of 3 is back: c, 2 s out of traffic"
    assert turns.left([["a"], ["b", "c"]], "a", {"b": 20.0, "c": 30.0}, {}) == 30
    assert turns.left([["a"], ["b", "c"]], "a", {"b": None, "c": 30.0}, {}) is None


def test_the_report_says_what_was_done_and_what_comes_next() -> None:
    hostvars: dict[str, Any] = {"a": {"turn_seconds": 41.2}, "b": {"turn_seconds": "100"}, "c": {}}
    lines = turns.report_lines(hostvars, HOSTS, "upgrade")
    assert lines[:3] == [
        "upgrade: 2 hosts changed, each out of traffic for 2 min at most (b)",
        "  a: 42 s",
        "  b: 100 s",
    ]
    assert "rollback.yml" in lines[-1]
    assert "unhold.yml" in turns.report_lines(hostvars, ["a"], "rollback")[-1]
    assert turns.report_lines(hostvars, ["c"], "upgrade") == [
        "upgrade: no host had a turn, since nothing that serves differs from what is wanted."
    ]
    assert "--check" in turns.report_lines(hostvars, HOSTS, "upgrade", check=True)[0]


# --- what a host remembers


class EndedError(Exception):
    """The module has told its result."""


def remember(path: Path, monkeypatch: pytest.MonkeyPatch, check: bool = False, **add: Any) -> dict[str, Any]:
    class FakeModule:
        def __init__(self, **_arguments: Any) -> None:
            self.params = {"path": str(path), "add": add or None}
            self.check_mode = check

        def exit_json(self, **result: Any) -> None:
            raise EndedError(json.dumps(result))

    monkeypatch.setattr(turn_memory, "AnsibleModule", FakeModule)
    with pytest.raises(EndedError) as told:
        turn_memory.main()
    result: dict[str, Any] = json.loads(str(told.value))
    return result


def test_a_host_remembers_its_last_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "turn/turns.json"
    assert remember(file, monkeypatch) == {"changed": False, "turns": []}
    remember(file, monkeypatch, check=True, act="upgrade", seconds=1)
    assert not file.exists()
    for number in range(turn_memory.KEPT + 2):
        remember(file, monkeypatch, act="upgrade", instances=["chat"], result="done", seconds=f"{number}.26")
    kept = remember(file, monkeypatch)["turns"]
    assert [turn["seconds"] for turn in kept] == [number + 0.3 for number in range(2, turn_memory.KEPT + 2)]
    assert (kept[0]["act"], kept[0]["instances"], len(file.read_text().splitlines())) == (
        "upgrade",
        ["chat"],
        turn_memory.KEPT + 2,
    )
    file.write_text("half of a fi")
    assert remember(file, monkeypatch)["turns"] == []
