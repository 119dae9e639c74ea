"""Modules that are run without Ansible's machinery do what they do with it."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.plugin_utils import quick

from tests.playbooks import playbook, results, tell

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]
QUICK = sorted(path.stem for path in (ROOT / "plugins/action").glob("*.py") if "plugin_utils.quick" in path.read_text())
SECRET = "s3cret-s3cret-s3cret-s3cret-s3cret"


def on_host(name: str, change: tuple[str, str] = ("", ""), **arguments: Any) -> tuple[int, dict[str, Any]]:
    """Run a module as the host's Python would."""
    text = quick.program(name, arguments, "Invoked", check_mode=False, diff=False).decode().replace(*change, 1)
    done = subprocess.run([sys.executable, "-I", "-"], input=text, capture_output=True, text=True, check=False)
    return done.returncode, quick.understood(
        name, {"rc": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    )


Task = tuple[str, dict[str, Any], dict[str, Any]]  # module, arguments, keywords of the task


class Play:
    """Runs tasks on this machine, the quick way or Ansible's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *tasks: Task, options: tuple[str, ...] = (), ordinary: bool = False) -> list[dict[str, Any]]:
        """The results of the tasks. What was printed about each is in `told`."""
        listed: list[dict[str, Any]] = [
            {f"gpufleet.llm.{name}": arguments, "register": f"result_{number}", "ignore_errors": True, **keywords}
            for number, (name, arguments, keywords) in enumerate(tasks)
        ]
        listed.append(tell(*(f"result_{number}" for number in range(len(tasks)))))
        variables = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        play = [{"hosts": "all", "gather_facts": False, "vars": variables, "tasks": listed}]
        (self.path / "play.yml").write_text(yaml.safe_dump(play, sort_keys=False))
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_PIPELINING": str(not ordinary),
            "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "1",  # else the name of a task comes after what is told about it
        }
        done = playbook("-i", "here,", self.path / "play.yml", *options, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        output, _, last = done.stdout.partition("TASK [All results]")
        self.told = (output + done.stderr).split("TASK [gpufleet")[1:]
        return results(last)


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that says which key it was asked with, as none should."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = f"no: {self.headers['Authorization']}".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_module_needs_nothing_of_ansible(name: str) -> None:
    assert f"{quick.COLLECTION}.modules.{name}" in quick.texts(name)


def test_what_needs_ansible_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs Ansible itself: from ansible.*open_url"):
        quick.texts("managed_python")


def test_everything_that_a_module_imports_comes_along() -> None:
    names = {name.rpartition(".")[2] for name in quick.texts("vllm_look")}
    assert {"vllm_look", "generations_host", "vllm", "vllm_container_host"} <= names


def test_a_success_a_failure_and_a_crash() -> None:
    status, result = on_host("host_facts", gather=["system"], paths=[])
    assert status == 0
    assert result["ansible_facts"]["gpufleet"]["kernel"] == os.uname().release
    status, result = on_host("host_lease", state="held", holder={"no": "holder"}, instead_of="")
    assert status == 1
    assert result["failed"]
    status, result = on_host("host_facts", ("module.exit_json(", "module.exit_jsonn("), gather=[], paths=[])
    assert result["failed"]
    assert "has no attribute 'exit_jsonn'" in result["msg"]


def test_an_old_python_is_named() -> None:
    status, result = on_host("host_facts", ("OLDEST = (3, 10)", "OLDEST = (9, 9)"), gather=[], paths=[])
    assert status == 1
    assert "these roles need 9.9 or newer; set ansible_python_interpreter" in result["msg"]


def test_a_host_that_says_nothing() -> None:
    assert quick.understood("x", {"rc": 127, "stdout": "", "stderr": "sh: 1: python3: not found\n"})["msg"] == (
        "x failed on the host: sh: 1: python3: not found"
    )
    assert "ended with 137" in quick.understood("x", {"rc": 137, "stdout": "", "stderr": ""})["msg"]
    assert quick.understood("x", {"rc": 0, "stdout": 'motd [1]\n{"changed": false}', "stderr": ""}) == {
        "changed": False
    }


def test_the_journal_gets_no_contents_of_lists() -> None:
    assert (
        quick.summary({"path": "/x", "instances": [{"TOKEN": SECRET}], "gone": {}}) == "path=/x instances=(1) gone=(0)"
    )


@pytest.mark.parametrize("options", [(), ("--check",)], ids=["run", "check"])
def test_both_ways_give_the_same_result(play: Play, tmp_path: Path, options: tuple[str, ...]) -> None:
    facts = {"gather": ["system", "users", "paths"], "paths": [str(ROOT / "galaxy.yml")]}
    model = {"name": "m", "source": "url", "directory": "m-1"}
    store = {"path": str(tmp_path / "store"), "user": "nobody-at-all", "models": [model]}
    pair = {"directory": str(tmp_path)}
    tasks: list[Task] = [("host_facts", facts, {}), ("model_store", store, {}), ("certificate_pair", pair, {})]
    ways = [play.run(*tasks, options=options, ordinary=ordinary) for ordinary in (True, False)]
    for result in ways[0]:
        result.pop("invocation", None)
    assert ways[0] == ways[1]
    assert ways[1][0]["ansible_facts"]["gpufleet"]["users"]["root"] == 0
    assert ways[1][1]["missing"] == ["m"]
    assert ways[1][1]["changed"] == bool(options)
    assert ways[1][2]["reason"] == "there is no fullchain.pem"


def test_a_mistake_is_told_in_the_same_words_and_a_secret_in_an_answer_is_blackened(play: Play, echo: str) -> None:
    gate = {"instances": [{"name": "chat", "url": echo, "model": "m"}], "api_key": SECRET, "timeout": 1}
    wrong, unknown, answer = play.run(
        ("host_facts", {"gather": ["everything"]}, {}), ("host_facts", {"gathr": []}, {}), ("completion_gate", gate, {})
    )
    assert wrong["failed"]
    assert "value of gather must be one or more of" in wrong["msg"]
    assert "everything" in wrong["msg"]
    assert "Unsupported parameters" in unknown["msg"]
    assert "no: Bearer ********" in answer["msg"]
    assert SECRET not in play.told[2]


def test_a_program_that_fails_is_told_in_the_same_words(play: Play, tmp_path: Path) -> None:
    """By its exit status, and when it is not there at all. Rules of a module are kept, too."""
    complains = tmp_path / "uv"
    complains.write_text("#!/bin/sh\necho $UV_LINK_MODE; pwd; echo no such luck >&2; exit 3\n")
    complains.chmod(0o755)
    release = {"path": str(tmp_path / "release"), "version": "1", "lock": "/x", "options_script": "/x"}
    tasks: list[Task] = [
        ("vllm_release", {**release, "uv": str(complains)}, {}),
        ("vllm_release", {**release, "uv": str(tmp_path / "nothing")}, {}),
        ("vllm_generation", {"state": "prepared"}, {}),
    ]
    quickly, ordinary = play.run(*tasks), play.run(*tasks, ordinary=True)
    for result in ordinary:
        result.pop("invocation", None)
    for told in ("failed", "msg", "rc", "stdout", "stderr"):
        assert [one.get(told) for one in quickly[::2]] == [one.get(told) for one in ordinary[::2]], told
    assert (quickly[1]["rc"], ordinary[1]["rc"]) == (2, 2)
    assert str(tmp_path / "nothing") in quickly[1]["msg"], "Ansible does not say which"
    assert (quickly[0]["rc"], quickly[0]["msg"], quickly[0]["stdout"]) == (3, "no such luck", "\n/\n")
    assert "all of the following are missing: release" in quickly[2]["msg"]


def test_what_the_quick_way_cannot_do_is_done_by_ansible(play: Play) -> None:
    look = {"gather": ["paths"], "paths": ["/x"]}
    home = {"gather": ["paths"], "paths": ["~/x"]}  # whose home is for the host to say
    play.run(
        ("host_facts", look, {}),
        ("host_facts", home, {}),
        ("host_facts", look, {"environment": {"A": "b"}}),
        ("host_facts", look, {"vars": {"ansible_pipelining": False}}),
        ("host_facts", look, {"vars": {"ansible_python_interpreter": "auto_silent"}}),
        options=("-vvv",),
    )
    assert ["modules/host_facts.py as it is" in told for told in play.told] == [True, False, False, False, False]
    assert ["modules/host_facts.py\n" in told for told in play.told] == [False, True, True, True, True]
