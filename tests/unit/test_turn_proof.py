"""What a turn proves, tells and asks, by the role's own tasks; the hooks and the silence alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.module_utils import silence, turn_hooks

from tests import playbooks
from tests.stand_in.local import KEY, Running, unpack, up

CAPITAL = {
    "name": "capital",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 7,
    "matches": r"\bParis\b",
}
WARM = {"prompt": "All work and no play", "max_tokens": 2, "times": 4, "parallel": 2}


# --- silence


def test_a_silence_ends_by_itself() -> None:
    text = silence.opened(1_800_000_000, 30, "ada@controller", "upgrade", "0.33", ["chat", "a"])
    assert json.loads(text) == {
        "until": "2027-01-15T08:30:00Z", "since": "2027-01-15T08:00:00Z", "by": "ada@controller", "turn": "upgrade", "reason": "0.33",
        "instances": ["a", "chat"],
    }  # fmt: skip
    found = silence.read(text, 1_800_000_000 + 29 * 60)
    assert found and found["ends"] == 1_800_001_800
    assert silence.read(text, 1_800_001_800) is None


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"until": 5}', '{"until": "tomorrow"}'])
def test_what_is_no_silence_is_none(text: str | None) -> None:
    assert silence.read(text, time.time()) is None


# --- hooks


def hook(*command: str, **more: Any) -> dict[str, Any]:
    return {"command": list(command), **more}


def test_a_hook_reads_the_event(tmp_path: Path) -> None:
    text = turn_hooks.told("started", {"act": "upgrade", "hosts": ["gpu-1"]})
    assert turn_hooks.call(hook("sh", "-c", f"cat > {tmp_path}/heard"), text)["problem"] == ""
    assert json.loads((tmp_path / "heard").read_text()) == {"event": "started", "act": "upgrade", "hosts": ["gpu-1"]}


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (hook("sh", "-c", "echo it is late >&2; exit 3"), "it ended with 3: it is late"),
        (hook("false"), "it ended with 1"),
        (hook("/nonexistent"), "it cannot be run: No such file or directory"),
        (hook("sleep", "30", seconds=1), "it was not done after 1 s, and was killed"),
        (hook("true"), ""),  # which reads nothing
    ],
)
def test_a_hook_that_fails_says_why(command: dict[str, Any], problem: str) -> None:
    begun = time.monotonic()
    assert turn_hooks.call(command, "{}\n" * 100000)["problem"] == problem
    assert time.monotonic() - begun < 10


def test_what_a_hook_left_running_does_not_hold_the_rollout() -> None:
    """A program in the background has its output still open."""
    begun = time.monotonic()
    result = turn_hooks.call(hook("sh", "-c", "sleep 20 & exit 0", seconds=2), "")
    assert time.monotonic() - begun < 10
    assert result["problem"] in ("", "it was not done after 2 s, and was killed")


def test_only_a_required_hook_ends_the_run() -> None:
    results = [turn_hooks.call(hook("false"), ""), turn_hooks.call(hook("false", required=True), "")]
    required, others = turn_hooks.split("failed", results)
    assert required == others == ["turn_hooks.failed: false: it ended with 1"]


@pytest.mark.parametrize(
    ("hooks", "problems"),
    [
        ({"started": [{"command": ["/bin/true"]}], "failed": []}, []),
        ({"started": [{"command": "/bin/true"}]}, ["turn_hooks.started[0].command must be a list"]),
        ({"started": [{"command": ["x"]}, {"command": []}]}, ["turn_hooks.started[1].command must be a list"]),
        ({"failed": [{"command": ["x"], "seconds": 0}]}, ["turn_hooks.failed[0].seconds is 0; it must be 1 or more."]),
    ],
)
def test_hooks_that_make_no_sense_are_refused(hooks: dict[str, Any], problems: list[str]) -> None:
    found = turn_hooks.problems(hooks)
    assert len(found) == len(problems)
    assert all(text.startswith(beginning) for text, beginning in zip(found, problems, strict=True))


# --- the role


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An instance on this machine."""
    directory = tmp_path_factory.mktemp("stand-in")
    (directory / "home").mkdir()
    running = up(unpack(directory), directory / "home")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def host(tmp_path: Path, server: Running) -> Path:
    """What is on its host, and an inventory with the host."""
    server.command(seconds_per_token=0.001)
    generation = tmp_path / "vllm/chat/7"
    generation.mkdir(parents=True)
    gate = {"name": "chat", "url": f"http://127.0.0.1:{server.port}", "model": server.model}
    (generation / "gate.json").write_text(json.dumps(gate))
    (generation.parent / "current").symlink_to("7")
    (tmp_path / "vllm/internal_key").write_text(KEY)
    hosts = {"gpu-1": {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": {"vllm": {"hosts": hosts}}}}))
    return tmp_path


def play(host: Path, entry: str, *more: str, **variables: Any) -> tuple[int, str]:
    """Run an entry point of the role; what the turn knows of the host is given."""
    instance = {"name": "chat", "current": 7, "word": {"operator": "up"}}
    include = {"name": "gpufleet.llm.turn", "tasks_from": entry}
    tasks: list[dict[str, Any]] = [
        {
            "block": [{"name": "It is so", "ansible.builtin.include_role": include}],
            "rescue": [playbooks.tell("turn_refused | default({})"), {"ansible.builtin.fail": {"msg": "rescued"}}],
        }
    ]
    content = {
        "hosts": "vllm", "gather_facts": False, "tasks": tasks,
        "vars": {
            "turn_act": "upgrade", "turn_instances": ["chat"], "vllm_config_path": str(host / "vllm"), "turn_soak_seconds": 0,
            "__turn_there": {"findings": {"instances": [instance]}}, **variables,
        },
    }  # fmt: skip
    (host / "play.yml").write_text(yaml.safe_dump([content]))
    run = playbooks.playbook("-i", host / "hosts.yml", *more, host / "play.yml")
    return run.returncode, run.stdout + run.stderr


def test_an_instance_that_is_warm_and_right_is_proved(host: Path) -> None:
    status, output = play(host, "prove", turn_warm_up=[WARM], turn_questions=[CAPITAL])
    assert status == 0, output
    assert "chat: warmed up by 4 requests in" in output
    assert "1 of 1 questions answered right" in output
    assert KEY not in output


def test_nonsense_is_refused_and_noted(host: Path, server: Running) -> None:
    """By the note nothing puts it back as long as it runs that generation, though it answers."""
    server.command(answers="nonsense")
    status, output = play(host, "prove", turn_questions=[CAPITAL])
    assert status == 2, output
    assert "What runs now is not put into use on gpu-1" in output
    assert "capital: it answered 'zq" in output
    assert playbooks.results(output) == [{"chat": 7}]
    status, output = play(host, "prove", turn_questions=[CAPITAL], turn_questions_mode="warn")
    assert status == 0, output
    assert "which turn_questions_mode lets pass" in output
    assert "0 of 1 questions answered right" in output


def test_without_questions_and_in_check_mode_nothing_is_asked(host: Path, server: Running) -> None:
    server.command(answers="nonsense")
    assert play(host, "prove")[0] == 0
    assert play(host, "prove", "--check", turn_questions=[CAPITAL])[0] == 0


def test_a_mistake_in_the_questions_is_found_before_any_change(host: Path) -> None:
    wrong = {
        "turn_questions": [{**CAPITAL, "matches": "("}],
        "turn_soak_error_share": 1,
        "turn_hooks": {"started": [{"command": []}]},
    }
    status, output = play(host, "preflight", **wrong)
    assert status == 2
    for text in (
        "turn_questions[0] (capital): matches is no regular expression",
        "turn_soak_error_share is 1",
        "turn_hooks.started[0].command",
    ):
        assert text in output, output
    assert play(host, "preflight", turn_questions=[CAPITAL], turn_warm_up=[WARM])[0] == 0


def test_hooks_hear_of_an_event_on_the_controller(host: Path) -> None:
    hooks = {
        "host_done": [hook("sh", "-c", f"cat >> {host}/heard"), hook("false")],
        "failed": [hook("touch", f"{host}/wrong")],
    }
    event = {
        "turn_event": "host_done",
        "turn_event_details": {"seconds": 7},
        "turn_reason": "news",
        "turn_hooks": hooks,
    }
    status, output = play(host, "hook", **event)
    assert status == 0, output
    assert "turn_hooks.host_done: false: it ended with 1" in output
    heard = json.loads((host / "heard").read_text())
    told = {name: heard[name] for name in ("event", "act", "reason", "host", "hosts", "instances", "seconds")}
    assert told == {
        "event": "host_done", "act": "upgrade", "reason": "news", "host": "gpu-1", "hosts": ["gpu-1"], "instances": ["chat"], "seconds": 7,
    }  # fmt: skip
    assert "@" in heard["by"] and heard["at"].endswith("Z")
    assert not (host / "wrong").exists()
    (host / "heard").unlink()
    assert play(host, "hook", "--check", **event)[0] == 0
    assert not (host / "heard").exists()
    event["turn_hooks"] = {"host_done": [hook("false", required=True)]}
    assert play(host, "hook", **event)[0] == 2
