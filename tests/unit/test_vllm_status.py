"""What is said of the instances of a host, and which of them can go back."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import host_agent, vllm_status

INPUTS = {
    "systemd": ["/etc/systemd/system/vllm@.service", "/opt/vllm/bin/vllm-serve"],
    "docker": ["/etc/vllm/container.service"],
}


def instance(name: str = "chat", **change: Any) -> dict[str, Any]:
    """An instance as vllm_look finds it."""
    return {
        "name": name, "path": f"/etc/vllm/{name}", "wanted": True, "differs": False, "held": "", "generations": [1, 2, 3], "confirmed": [1, 2, 3],
        "current": 3, "previous": 2, "running": 3, "runtime": "systemd", "runs": "/opt/vllm/releases/0.33.0-abc", "port": 8000, "gpus": [0],
        "gate": {}, "active": "active", "enabled": True,
        "word": host_agent.word(None), **change,
    }  # fmt: skip


NEW: dict[str, Any] = {
    "generations": [],
    "confirmed": [],
    "current": None,
    "previous": None,
    "running": None,
    "runtime": "",
    "runs": "",
    "port": None,
}


def test_the_table() -> None:
    found = [
        instance(),
        instance("coder", current=4, differs=True, active="failed", running=None, held="ann, since noon"),
        instance("docs", running=2, wanted=False, runtime="docker", runs="registry.test/vllm@sha256:0"),
        instance("new", **NEW, active="inactive"),
    ]
    assert vllm_status.lines(found) == [
        "instance  generation          before  runs                         unit                   port  inventory",
        "chat      3                   2       0.33.0-abc                   active                 8000  as wanted",
        "coder     4 (never answered)  2       0.33.0-abc                   failed                 8000  differs; held: ann, since noon",
        "docs      3                   2       registry.test/vllm@sha256:0  active (generation 2)  8000  is not in it",
        "new       -                   -       -                            inactive               -     not there yet",
    ]
    assert vllm_status.lines([]) == ["There is no vLLM instance, and none is wanted."]


@pytest.mark.parametrize(
    ("changed", "differing"),
    [
        ([], ["c"]),
        (["/opt/vllm/bin/vllm-serve"], ["a", "c"]),
        (["/etc/vllm/container.service"], ["b", "c"]),
        (["/etc/vllm/internal_key"], ["c"]),
    ],
)
def test_a_file_that_an_instance_reads_makes_it_differ(changed: list[str], differing: list[str]) -> None:
    wanted = [{"name": "a", "runtime": "systemd"}, {"name": "b", "runtime": "docker"}]
    found = [instance("a"), instance("b"), instance("c", differs=True)]
    said = vllm_status.status(found, wanted, changed, INPUTS)
    assert [entry["name"] for entry in said if entry["differs"]] == differing


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([instance()], ""),
        ([instance("a"), instance("b")], "there is no vLLM instance 'chat' here; there is a, b"),
        ([], "there is no vLLM instance 'chat' here; there is none at all"),
        ([instance(previous=None)], "vLLM instance chat has no generation before 3 that ever answered"),
        ([instance(**NEW)], "vLLM instance chat has no generation that runs, so there is none before it"),
        (
            [instance(held="ann")],
            "vLLM instance chat is held: ann. playbooks/unhold.yml -e fleet_instance=chat lets it be changed",
        ),
    ],
)
def test_what_can_go_back(found: list[dict[str, Any]], expected: str) -> None:
    assert vllm_status.revert_problem(found, "chat") == expected
    assert vllm_status.revert_plan(found, ["chat"])["problems"] == ([expected] if expected else [])


def test_where_instances_go_back_to() -> None:
    stopped = {**host_agent.word(None), "operator": "stopped"}
    found = [
        instance("a", confirmed=[1, 2, 3]),
        instance("b", current=7, previous=5, confirmed=[1, 5], word=stopped),
        instance("c"),
    ]
    assert vllm_status.revert_plan(found, ["a", "b"]) == {
        "problems": [], "go_to": {"a": 2, "b": 5}, "come_from": {"a": 3, "b": 7}, "idle": ["b"],
    }  # fmt: skip
    assert vllm_status.revert_plan(found, ["a", "b"], 1)["go_to"] == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (1, ""),
        (3, "vLLM instance chat runs generation 3 already"),
        (4, "vLLM instance chat has no generation 4 that ever answered; there are 1, 2"),
    ],
)
def test_a_named_generation_has_to_have_answered(generation: int, expected: str) -> None:
    assert vllm_status.revert_problem([instance(confirmed=[1, 2, 3])], "chat", generation) == expected
