"""Runs the tests: several jobs side by side, a line when one starts and ends, a log file for each.

    run.py lint | unit | e2e | molecule [SCENARIO ...] | test

The last line says `N passed, N failed`: the tests that pytest counted, and one for each job that is not pytest. The
exit code is 0 only when every job passed. Test hosts that the run started are removed at the end, also after a failure.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".cache" / "logs"
BIN = Path(sys.prefix, "bin")  # the environment that this runs in
HOSTS = ROOT / "tests" / "hosts" / "hosts.py"
LABEL = "gpufleet.fleet"
STILL_RUNNING_EVERY = 120  # seconds
WORKERS = 2
FLEET_TESTS = "tests/e2e/test_fleet.py"  # a fleet of its own, and the longest of all
LIVING_TESTS = "tests/e2e/test_living.py"  # five hosts of its own, which are changed while clients ask
# After e2e, which is the longest: the long ones first, so that the workers end at about the same time; and those which start engines
# as e2e does late.
LONGEST_FIRST = [
    "molecule nvidia_driver",
    "molecule vllm",
    "molecule model_store",
    "e2e living",
    "e2e others",
    "molecule docker",
    "molecule gateway",
    "molecule tls_certificate_acme",
    "molecule tls_certificate",
    "molecule nvidia_container_toolkit",
    "molecule uv",
]
# These mostly wait, for timers, closed ports and new connections: one of them runs beside the others. After the last of them its
# worker helps with the others. With a fourth one two cores were busy all the time, and three starts of the real vLLM took over ten minutes.
QUIET = [
    "molecule virtual_address",
    "molecule vllm_docker",
    "molecule base",
    "molecule firewall",
    "molecule ssh_hardening",
]
# The oldest Ansible that is supported, in an environment of its own. Where there is no newer Python, everything runs on it.
OLDEST = {"SETUP_PYTHON": "3.11", "SETUP_VENV": ".cache/python3.11"}
TAIL = 60  # lines of a failing job's log
COUNT = re.compile(r"(\d+) (passed|failed|error|errors)\b")
FAILED = re.compile(r"^(?:FAILED|ERROR) \S.*$", re.MULTILINE)  # pytest's short summary
ENVIRONMENT = {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "MOLECULE_GLOB": "molecule/*/molecule.yml",
    "LC_ALL": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",
    "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    "ANSIBLE_FORCE_COLOR": "0",
    "MOLECULE_SCENARIO_NAME": "lint",  # molecule sets its own; a syntax check of its playbooks needs one
    "NO_COLOR": "1",
    "CI": "true",  # pytest then shortens nothing in its summary
}


@dataclass
class Job:
    """One command with its log and, when it is over, its result."""

    name: str
    command: Sequence[str]
    pytest: bool = False
    status: str = "not run"
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        """The file that holds everything the job printed."""
        return LOGS / f"{self.name.replace(' ', '-')}.log"

    def count(self, code: int) -> None:
        """Set the result from the exit code and, for pytest, from the closing line of every pytest run in the log."""
        if self.pytest:
            text = self.log.read_text(errors="replace")
            for line in re.findall(r"^=+ (.*\d+ (?:passed|failed|error).*) =+$", text, re.MULTILINE):
                for number, what in COUNT.findall(line):
                    if what == "passed":
                        self.passed += int(number)
                    else:
                        self.failed += int(number)
            if code == 0 and not self.passed:
                self.status = "no tests"
                self.failed = 1
                return
        elif code == 0:
            self.passed = 1
        if code and not self.failed:
            self.failed = 1
        self.status = "failed" if code or self.failed else "ok"


class Runner:
    """Runs jobs, as many at the same time as there are workers."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.jobs: list[Job] = []
        self.lock = threading.Lock()
        self.stopping = False

    def say(self, text: str) -> None:
        """Print one line with the time since the start."""
        seconds = int(time.monotonic() - self.start)
        with self.lock:
            print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {text}", flush=True)

    def job(self, job: Job) -> None:
        """Run one job to its end."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self.say(f"start   {job.name}")
        began = time.monotonic()
        with job.log.open("wb") as log:
            job.process = subprocess.Popen(
                job.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
            while True:
                try:
                    code = job.process.wait(timeout=STILL_RUNNING_EVERY)
                    break
                except subprocess.TimeoutExpired:
                    self.say(f"  ...   {job.name}, {int(time.monotonic() - began)} s: {last_line(job.log)}")
        job.seconds = time.monotonic() - began
        job.count(code)
        tests = f", {job.passed} tests" if job.pytest and job.passed else ""
        self.say(f"{job.status:<7} {job.name} ({job.seconds:.0f} s{tests})")
        if job.status != "ok" and not self.stopping:
            tail = job.log.read_text(errors="replace").splitlines()[-TAIL:]
            with self.lock:
                print("\n".join(f"    | {line}" for line in tail))
                print(f"    the whole log: {job.log.relative_to(ROOT)}", flush=True)

    def queue(self, jobs: Sequence[Job], quiet: Sequence[Job] = ()) -> None:
        """Run jobs in their order, as many at the same time as there are workers, and a quiet one beside them while there is one."""
        loud_ones, quiet_ones = deque(jobs), deque(quiet)
        lock = threading.Lock()

        def work(*queues: deque[Job]) -> None:
            while not self.stopping:
                with lock:
                    job = next((queue.popleft() for queue in queues if queue), None)
                if job is None:
                    return
                self.job(job)

        self.jobs += [*jobs, *quiet]
        orders = [(loud_ones, quiet_ones)] * WORKERS + [(quiet_ones, loud_ones)] * bool(quiet)
        threads = [threading.Thread(target=work, args=order, daemon=True) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without a timeout would not let a signal through
                thread.join(0.2)

    def stop(self) -> None:
        """End what still runs: each job with everything it started."""
        self.stopping = True
        running = [job.process for job in self.jobs if job.process and job.process.poll() is None]
        for process in running:
            os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def result(self) -> int:
        """Print the table and the closing line; return the exit code."""
        width = max((len(job.name) for job in self.jobs), default=4)
        print(f"\n{'job':<{width}}  {'result':<8}  {'time':>6}  {'passed':>6}  {'failed':>6}")
        for job in self.jobs:
            print(f"{job.name:<{width}}  {job.status:<8}  {job.seconds:>4.0f} s  {job.passed:>6}  {job.failed:>6}")
        bad = [job for job in self.jobs if job.status != "ok"]
        if bad:
            print(f"\nnot ok: {', '.join(job.name for job in bad)}; the logs are in {LOGS.relative_to(ROOT)}/")
            for job in bad:
                for line in FAILED.findall(job.log.read_text(errors="replace") if job.log.exists() else ""):
                    print(f"  {line[:600]}")
        passed = sum(job.passed for job in self.jobs)
        failed = sum(job.failed or (1 if job.status != "ok" else 0) for job in self.jobs)
        print(f"\n{passed} passed, {failed} failed", flush=True)
        return 1 if failed or not passed else 0


def last_line(log: Path) -> str:
    """The last line of a log that says something, short."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def scenarios() -> list[str]:
    """The molecule scenarios: every directory of molecule/ but `shared` and what Python compiled."""
    others = ("shared", "__pycache__")
    return sorted(path.name for path in (ROOT / "molecule").iterdir() if path.is_dir() and path.name not in others)


def test_functions(scenario: str) -> list[str]:
    """The names of the test functions of a scenario. Molecule passes a scenario that has none; we do not."""
    return [
        node.name
        for file in sorted((ROOT / "molecule" / scenario / "tests").glob("test_*.py"))
        for node in ast.walk(ast.parse(file.read_text(), str(file)))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def inventories() -> list[str]:
    """The inventories that a playbook can be checked with (the demo's hosts file may be made by the demo)."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "inventories").iterdir())
        if any(path.glob("*.yml")) or any(path.glob("*.py"))
    ]


def lint_jobs() -> list[Job]:
    """The linters, the one that takes longest first."""
    syntax = [
        Job(f"syntax {Path(inventory).name}", ["ansible-playbook", "site.yml", "-i", inventory, "--syntax-check"])
        for inventory in inventories()
    ]
    return [
        Job("ansible-lint", ["ansible-lint", "-c", ".config/ansible-lint.yml", "--strict"]),
        Job("sanity", [sys.executable, "tools/sanity.py"]),
        Job("yamllint", ["yamllint", "--strict", "."]),
        Job("ruff check", ["ruff", "check"]),
        Job("ruff format", ["ruff", "format", "--check", "--diff"]),
        Job("mypy", ["mypy"]),
        Job("luacheck", [sys.executable, "-m", "tests.luacheck"]),
        Job("changelog", ["antsibull-changelog", "lint"]),
        *syntax,
    ]


def pytest_job(name: str, *arguments: str) -> Job:
    """A job that is one pytest run."""
    return Job(name, [str(BIN / "python"), "-m", "pytest", *arguments], pytest=True)


def unit_jobs() -> list[Job]:
    """The unit tests; those of them that lean on ansible-core once more, on the oldest one. The drill test_oldest_core.py runs all there."""
    settings = [f"{name}={value}" for name, value in OLDEST.items()]
    on_oldest = 'tools/setup.sh && exec "$SETUP_VENV/bin/python" -m pytest -m core tests/unit'
    oldest = Job("unit oldest core", ["env", *settings, "bash", "-c", on_oldest], pytest=True)
    return [
        pytest_job("unit", "tests/unit", "tests/lua"),
        pytest_job("gateway", "tests/gateway"),
        *([oldest] if sys.version_info >= (3, 12) else []),
    ]


def molecule_jobs(wanted: Sequence[str]) -> list[Job]:
    """One job for each scenario; a scenario without a test is a job that fails."""
    jobs = []
    for scenario in wanted:
        if (ROOT / "molecule" / scenario / "molecule.yml").exists() and test_functions(scenario):
            jobs.append(Job(f"molecule {scenario}", ["molecule", "test", "-s", scenario], pytest=True))
        else:
            complaint = (
                f"print('molecule/{scenario}: no molecule.yml, or no test function in tests/test_*.py'); exit(1)"
            )
            jobs.append(Job(f"molecule {scenario}", [sys.executable, "-c", complaint]))
    return jobs


def clean(wanted: Sequence[str], e2e: bool) -> None:
    """Remove the fleets of the scenarios and of the end-to-end tests (`e2e` and `e2e-...`), and stop the engine."""
    if not shutil.which("docker"):
        return
    fleets = {f"molecule-{scenario}" for scenario in wanted}
    if e2e:
        listed = subprocess.run(
            ["docker", "network", "ls", "--filter", f"label={LABEL}", "--format", f'{{{{.Label "{LABEL}"}}}}'],
            text=True,
            capture_output=True,
            check=False,
        ).stdout.split()
        fleets |= {fleet for fleet in listed if fleet == "e2e" or fleet.startswith("e2e-")}
    for fleet in sorted(fleets):
        subprocess.run([sys.executable, str(HOSTS), "down", fleet], check=False)
    subprocess.run([sys.executable, str(HOSTS), "engine-stop"], check=False)


def main() -> int:
    """Read the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lint", "unit", "molecule", "e2e", "test"])
    parser.add_argument("scenario", nargs="*", help="with molecule: these scenarios only")
    arguments = parser.parse_args()
    wanted: list[str] = []
    if arguments.what in ("molecule", "test"):
        wanted = arguments.scenario or scenarios()
        if unknown := set(wanted) - set(scenarios()):
            parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(scenarios())}")
    e2e = arguments.what in ("e2e", "test")

    runner = Runner()

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        later = molecule_jobs(wanted)
        if e2e:
            later.append(pytest_job("e2e living", LIVING_TESTS))
            later.append(pytest_job("e2e others", "tests/e2e", f"--ignore={FLEET_TESTS}", f"--ignore={LIVING_TESTS}"))
        later.sort(key=lambda job: LONGEST_FIRST.index(job.name) if job.name in LONGEST_FIRST else 99)
        jobs = [
            *([pytest_job("e2e", FLEET_TESTS)] if e2e else []),
            *(lint_jobs() if arguments.what in ("lint", "test") else []),
            *(unit_jobs() if arguments.what in ("unit", "test") else []),
            *later,
        ]
        quiet = sorted((job for job in jobs if job.name in QUIET), key=lambda job: QUIET.index(job.name))
        runner.queue([job for job in jobs if job.name not in QUIET], quiet=quiet)
    except KeyboardInterrupt:
        runner.say("interrupted")
        runner.stop()
        return 130
    finally:
        if wanted or e2e:
            clean(wanted, e2e)
    return runner.result()


if __name__ == "__main__":
    sys.exit(main())
