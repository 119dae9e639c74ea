"""Who gets a turn, and what follows when one fails: the very plays and tasks of the playbooks, where each role only writes down that it was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.playbooks import playbook, rooted

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOKS = ROOT / "playbooks"
HOSTS = ["a", "b", "c"]
TAKEN = ["out", "activate", "back", "confirm"]


def acted(task: dict[str, Any], log: Path) -> dict[str, Any]:
    """A task where a role is a word in the log: its entry point and the host. It fails where the variable `fails` has that word among others."""
    role = task.get("ansible.builtin.include_role")
    if role is None:
        inner: dict[str, Any] = {
            part: [acted(one, log) for one in task[part]] for part in ("block", "rescue", "always") if part in task
        }
        return {**task, **inner}
    word = f"{role['tasks_from']} {{{{ inventory_hostname }}}}"
    script = f"echo '{word}' >> {log}; for one in {{{{ fails | default([]) | map('quote') | join(' ') }}}}; do test \"$one\" != '{word}' || exit 1; done"
    if role["tasks_from"] == "failed":
        script += "{{ '; false' if turn_fails else '' }}"
    kept = {key: value for key, value in task.items() if key in ("name", "when", "vars", "run_once")}
    return {**kept, "ansible.builtin.raw": script, "check_mode": False}


def play(file: str, name: str, log: Path) -> dict[str, Any]:
    """A play of a playbook, with the file of the turn in it."""
    [found] = [play for play in yaml.safe_load((PLAYBOOKS / file).read_text()) if play.get("name") == name]
    tasks: list[dict[str, Any]] = []
    for task in found["tasks"]:
        if str(task.get("ansible.builtin.include_tasks", "")).endswith("take_turn.yml"):
            tasks += yaml.safe_load((PLAYBOOKS / "tasks/take_turn.yml").read_text())
        else:
            tasks.append(rooted(task, (PLAYBOOKS / file).parent))
    return {**found, "become": False, "tasks": [acted(task, log) for task in tasks]}


def run(
    path: Path, plays: list[dict[str, Any]], groups: dict[str, list[str]], *options: str, **extra: Any
) -> tuple[int, list[str], str]:
    """Run plays on three hosts; the exit code, what was done, and what was said on one line."""
    variables = {
        "ansible_connection": "local",
        "vllm_due": ["chat"],
        "vllm_changed": ["chat"],
        "turn_report": "the report",
    }
    inventory: dict[str, Any] = {name: {"hosts": {host: {} for host in hosts}} for name, hosts in groups.items()}
    inventory["all"] = {"vars": variables}
    (path / "hosts.json").write_text(json.dumps(inventory))
    (path / "plays.json").write_text(json.dumps(plays))
    done = playbook("-i", path / "hosts.json", path / "plays.json", *options, "-e", json.dumps(extra))
    log = path / "log"
    return done.returncode, log.read_text().splitlines() if log.exists() else [], " ".join(done.stdout.split())


def rollout(path: Path, left: list[str] | None = None, **extra: Any) -> tuple[int, list[str], str]:
    """The plays of serve.yml from the change on."""
    names = [
        "Change vLLM in batches where it serves",
        "Go back where the change was taken, since it failed elsewhere",
        "End with the failure",
    ]
    plays = [play("plays/serve.yml", name, path / "log") for name in names]
    left = left or []
    groups = {
        "vllm": HOSTS,
        "activation_left": left,
        "activation_restart": [host for host in HOSTS if host not in left],
    }
    # what failed.yml does, which is only a word here
    for one in plays[0]["tasks"][-1]["rescue"]:
        if one["name"] == "take_turn | The failure ends the rollout":
            plays[0]["tasks"][-1]["rescue"].insert(
                -1, {"name": "Noted", "ansible.builtin.group_by": {"key": "turn_failed"}}
            )
            break
    return run(path, plays, groups, **extra)


def of(host: str, *words: str) -> list[str]:
    return [f"{word} {host}" for word in words]


def test_one_host_after_the_other_has_its_turn(tmp_path: Path) -> None:
    code, done, said = rollout(tmp_path)
    assert code == 0, said
    assert done == of("a", *TAKEN) + of("b", *TAKEN) + of("c", *TAKEN)


def test_those_that_a_run_left_in_their_turn_come_first(tmp_path: Path) -> None:
    code, done, said = rollout(tmp_path, left=["c"])
    assert code == 0, said
    assert done == of("c", *TAKEN) + of("a", *TAKEN) + of("b", *TAKEN)


@pytest.mark.parametrize(
    ("fails", "before"), [("out", ["out"]), ("activate", ["out", "activate"]), ("back", TAKEN[:3]), ("confirm", TAKEN)]
)
def test_a_turn_that_fails_is_undone_and_ends_the_rollout(tmp_path: Path, fails: str, before: list[str]) -> None:
    code, done, said = rollout(tmp_path, fails=[f"{fails} b"])
    assert code == 2, said
    assert done == of("a", *TAKEN) + of("b", *before, "out_again", "withdraw", "failed")


@pytest.mark.parametrize("undo", ["out_again", "withdraw"])
def test_a_change_that_cannot_be_undone_is_reported_all_the_same(tmp_path: Path, undo: str) -> None:
    code, done, _said = rollout(tmp_path, fails=["back a", f"{undo} a"])
    assert code == 2
    assert done[-2:] == of("a", undo, "failed")


def test_what_was_changed_goes_back_on_demand(tmp_path: Path) -> None:
    code, done, said = rollout(tmp_path, fails=["back b"], upgrade_on_failure="revert")
    assert code == 2, said
    back = ["out", "revert", "back", "revert_settle"]
    assert done == of("a", *TAKEN) + of("b", *TAKEN[:3], "out_again", "withdraw", "failed") + of("a", *back)
    assert "the report" in said


def test_a_rollback_is_a_turn_of_its_own(tmp_path: Path) -> None:
    plays = [play("rollback.yml", "Put the instance back", tmp_path / "log")]
    code, done, said = run(tmp_path, plays, {"rollback_hosts": HOSTS}, fleet_instance="chat", fails=["back b"])
    assert code == 2, said
    taken = ["out", "revert", "back", "revert_settle"]
    assert done == of("a", *taken) + of("b", *taken[:3], "out_again", "revert_undo", "failed")


def test_a_look_takes_nothing_out(tmp_path: Path) -> None:
    found = play("plays/serve.yml", "Change vLLM in batches where it serves", tmp_path / "log")
    code, done, said = run(
        tmp_path, [found], {"vllm": HOSTS, "activation_left": [], "activation_restart": HOSTS}, "--check"
    )
    assert code == 0, said
    assert done == of("a", "activate") + of("b", "activate") + of("c", "activate")


@pytest.mark.parametrize(
    ("playbook_name", "given", "expected"),
    [
        (
            "upgrade",
            {"upgrade_on_failure": "maybe"},
            "upgrade_on_failure is maybe; it is keep (hosts that were changed stay so) or revert",
        ),
        ("upgrade", {"fleet_instance": "chat"}, "an upgrade brings all that the inventory changed"),
        ("rollback", {"fleet_instance": "chatt"}, "fleet_instance is 'chatt', which is no instance of these hosts"),
        (
            "rollback",
            {"fleet_instance": "chat", "fleet_generation": "last"},
            "fleet_generation is 'last', but must be a whole number",
        ),
    ],
)
def test_what_was_asked_for_is_looked_at_first(
    tmp_path: Path, playbook_name: str, given: dict[str, str], expected: str
) -> None:
    instance = {"name": "chat", "model": "small", "port": 8000}
    inventory = {group: {"hosts": {"a": {"vllm_instances": [instance]}}} for group in ("vllm", "gateway")}
    (tmp_path / "hosts.json").write_text(json.dumps(inventory))
    done = playbook("-i", tmp_path / "hosts.json", PLAYBOOKS / f"{playbook_name}.yml", "-e", json.dumps(given))
    assert done.returncode != 0
    assert expected in " ".join(done.stdout.split()), done.stdout
    assert done.stdout.count("PLAY [") == 1


def test_what_the_turn_changed_is_noted_for_those_who_go_back() -> None:
    """confirm.yml notes it in a turn; whoever uses the role alone spends no task on it."""
    [note] = [
        task
        for task in yaml.safe_load((ROOT / "roles/vllm/tasks/confirm.yml").read_text())
        if "ansible.builtin.set_fact" in task
    ]
    assert (list(note["ansible.builtin.set_fact"]), note["when"]) == (
        ["vllm_changed"],
        "vllm_confirm_later | default(false)",
    )
    [turn] = yaml.safe_load((PLAYBOOKS / "tasks/take_turn.yml").read_text())
    [keep] = [task for task in turn["block"] if "take_turn.keep" in str(task)]
    assert keep["vars"]["vllm_confirm_later"] is True


def test_a_host_that_is_gone_has_its_report_too(tmp_path: Path) -> None:
    """The very failed.yml, on a host that nobody can reach: it says what failed before, and that nothing goes back by itself."""
    gone = {"ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_ssh_common_args": "-o ConnectTimeout=5"}
    (tmp_path / "hosts.json").write_text(json.dumps({"all": {"hosts": {"gpu-1": gone}}}))
    failed = {
        "ansible.builtin.include_role": {
            "name": "gpufleet.llm.turn",
            "tasks_from": "failed",
            "rolespec_validate": False,
        }
    }
    variables = {"turn_act": "reboot", "turn_instances": ["chat"], "turn_failure": "gpu-1 did not come back in 1800 s."}
    plays = [{"hosts": "all", "gather_facts": False, "vars": variables, "tasks": [failed]}]
    (tmp_path / "plays.json").write_text(json.dumps(plays))
    done = playbook("-i", tmp_path / "hosts.json", tmp_path / "plays.json")
    said = " ".join(done.stdout.split())
    assert done.returncode == 2, said
    assert "gpu-1: the reboot failed, the host cannot be reached any more, and the rollout stops here." in said
    assert "gpu-1 did not come back in 1800 s." in said
    assert "unreachable=0 failed=1" in said
    assert "noted as one that failed] *** changed" not in said
