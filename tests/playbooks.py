"""ansible-playbook for tests that run it often: the real program, without the second or two of processor time that loading it takes.

A process loads Ansible once and forks for each run; the fork reads the command line, the configuration's files and the inventory as the program
does, and ends as it does. What Ansible reads of its environment while it is loaded belongs to the process, so each environment has one.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
PREPARED: dict[str, Prepared] = {}
LOCK = threading.Lock()


def rooted(task: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A task of a file in this directory, for a play that is elsewhere: what it imports is found there."""
    imported = task.get("ansible.builtin.import_tasks")
    return {**task, "ansible.builtin.import_tasks": str(directory / imported)} if imported else task


class Prepared:
    """A process that has Ansible loaded."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            # in a directory without an ansible.cfg, which would be read
            [sys.executable, "-P", str(Path(__file__)), "serve"], env=environment, cwd="/", text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self.end)

    def run(self, arguments: list[str], directory: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run ansible-playbook. One at a time."""
        with self.lock, tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
            places = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (output, error)]
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps([arguments, str(directory), variables, *places]) + "\n")
            self.process.stdin.flush()
            status = json.loads(self.process.stdout.readline())
            output.seek(0)
            error.seek(0)
            return subprocess.CompletedProcess(arguments, status, output.read(), error.read())

    def end(self) -> None:
        """Let it end."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()


def playbook(
    *arguments: str | Path,
    directory: Path = ROOT,
    environment: dict[str, str] | None = None,
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ansible-playbook in a directory with a whole environment; by default that of this process with the clone's ansible.cfg.

    `variables` are further ones of the environment that differ from run to run, and that Ansible does not read while it is loaded.
    """
    environment = environment or {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    environment = {"LC_ALL": "C.UTF-8", **environment}
    environment.pop("PYTEST_CURRENT_TEST", None)
    with LOCK:
        key = json.dumps(environment, sort_keys=True)
        if key not in PREPARED:
            PREPARED[key] = Prepared(environment)
    return PREPARED[key].run(["ansible-playbook", *map(str, arguments)], directory, variables or {})


def tell(*names: str) -> dict[str, Any]:
    """The task that tells registered values, in a form that no width of a terminal breaks; results() reads it."""
    return {
        "name": "All results",
        "ansible.builtin.debug": {"msg": f"RESULTS{{{{ [{', '.join(names)}] | to_json | b64encode }}}}"},
    }


def results(output: str) -> list[Any]:
    """What the task tell() told."""
    found = re.search(r"RESULTS([A-Za-z0-9+/=\s]+?)(?:\n\n|$)", output)
    assert found, output
    values: list[Any] = json.loads(base64.b64decode(found[1]))
    return values


def serve() -> None:
    """Load Ansible, and fork for every line of the input: [arguments, directory, variables, file for the output, file for the errors]."""
    import ansible.cli.playbook
    from ansible import constants

    requests: IO[str] = sys.stdin
    for line in requests:
        child = os.fork()
        if child:
            _pid, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        arguments, directory, variables, *files = json.loads(line)
        os.environ.update(variables)
        os.setsid()
        for number, file in enumerate(["/dev/null", *files]):
            descriptor = os.open(file, os.O_RDWR)
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(directory)
        sys.argv = arguments
        # Made when Ansible was loaded, and removed by the first run that ends.
        with tempfile.TemporaryDirectory(prefix="ansible-local-") as place:
            setting: Any = constants
            setting.DEFAULT_LOCAL_TMP = place
            ansible.cli.playbook.main()


if __name__ == "__main__":
    serve()
