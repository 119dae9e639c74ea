"""What a second run costs that changes nothing: this collection, ordinary tasks and pyinfra on the same fleet, in turns.

    python -m tests.bench.noop [--hosts 1 2 4 8] [--repeats 3] [--ways fleet unproved ordinary pyinfra]

Uses the running demo fleet and nothing else: `make demo DEMO_HOSTS=8` starts one that is large enough for all sizes. A size is the number
of inference hosts; the gateway is always there too, and smaller sizes are runs with --limit.

    fleet      site.yml, with everything that it does: it looks at the models too, and ends with completions through the gateway
    unproved   the same without the questions of a client at the end (--skip-tags verify)
    ordinary   ordinary/site.yml, the same hosts stated a task for each file, under Ansible's defaults
    pyinfra    pyinfra_deploy.py, the same by pyinfra (installed into .cache/pyinfra when it is missing)

Every way first runs once to see that it would change nothing, and once to count its calls; that run warms it up, too. In each repeat every
way opens its own connections. CPU of a host is that of its control group without vLLM's, so the completions are not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(os.environ.get("DEMO_DIR", ROOT / ".demo"))
ORDINARY = ROOT / "tests/bench/ordinary/site.yml"
PYINFRA_VERSION = "3.10.0"
PYINFRA = ROOT / ".cache/pyinfra"
# The Python programs of all ways are compiled once, by the run that warms them up, as on anybody's machine.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
SSH = [
    "ssh", "-i", str(DEMO / "id_ed25519"), "-o", "IdentitiesOnly=yes", "-o", f"UserKnownHostsFile={DEMO / 'known_hosts'}",
    "-o", "BatchMode=yes", "-o", "ControlPath=none", "-l", "fleet",
]  # fmt: skip
# The whole host's, and that of all vLLM instances; the second is missing on a gateway. With cgroup v1 there is no figure for a slice, so the
# processes in it are summed up.
READ_CPU = r"""
if [ -e /sys/fs/cgroup/cpu.stat ]; then
  grep -h usage_usec /sys/fs/cgroup/cpu.stat /sys/fs/cgroup/system.slice/system-vllm.slice/cpu.stat 2>/dev/null
else
  awk '{printf "usage_usec %d\n", $1 / 1000}' /sys/fs/cgroup/cpuacct/cpuacct.usage
  cat /sys/fs/cgroup/systemd/system.slice/system-vllm.slice/*/cgroup.procs \
      /sys/fs/cgroup/unified/system.slice/system-vllm.slice/*/cgroup.procs 2>/dev/null | sed 's|.*|/proc/&/stat|' | xargs -r cat |
    sed 's/.*) //' | awk -v hz="$(getconf CLK_TCK)" '{t += $12 + $13} END {if (NR) printf "usage_usec %d\n", t * 1000000 / hz}'
fi
true"""


@dataclasses.dataclass
class Result:
    """One way at one size."""

    way: str
    hosts: int
    wall: list[float] = dataclasses.field(default_factory=list)
    controller_cpu: list[float] = dataclasses.field(default_factory=list)
    host_cpu: list[float] = dataclasses.field(default_factory=list)
    calls: float = 0


def on_host(address: str, command: str) -> bytes:
    """Run a command on a host by plain ssh."""
    done = subprocess.run([*SSH, address, command], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{address}: {command[:60]}...: {done.stderr.decode().strip()}")
    return done.stdout


def cpu(addresses: list[str]) -> list[float]:
    """Seconds of CPU that each host has used, without vLLM's."""

    def one(address: str) -> float:
        whole, *vllm = [int(line.split()[1]) / 1e6 for line in on_host(address, READ_CPU).decode().splitlines()]
        return whole - sum(vllm)

    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(one, addresses))


def copied_files(groups: list[str]) -> list[str]:
    """What ordinary/site.yml copies to hosts of these groups."""
    return [
        task["ansible.builtin.copy"]["dest"]
        for play in yaml.safe_load(ORDINARY.read_text())
        if set(play["hosts"].split(":")) & set(groups)
        for task in play["tasks"]
        if "ansible.builtin.copy" in task
    ]


def fetch_files(fleet: dict[str, dict[str, str]], target: Path) -> None:
    """What is on the hosts, as the source of what the ordinary ways put there."""
    for group, hosts in fleet.items():
        paths = " ".join(path.lstrip("/") for path in copied_files([group]))
        for name, address in hosts.items():
            archive = on_host(address, f"sudo -n tar --create --dereference --directory=/ {paths}")
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(target / name, filter="data")


class Bench:
    """The ways, on one fleet."""

    def __init__(self, fleet: dict[str, dict[str, str]], directory: Path) -> None:
        self.fleet, self.directory = fleet, directory
        (directory / "defaults.cfg").write_text("[defaults]\n")
        fetch_files(fleet, directory / "files")

    def chosen(self, size: int) -> dict[str, dict[str, str]]:
        """The gateway and so many inference hosts."""
        return {"gateway": self.fleet["gateway"], "vllm": dict(list(self.fleet["vllm"].items())[:size])}

    def pyinfra_inventory(self, size: int) -> Path:
        """An inventory file for pyinfra."""
        data = {
            "ssh_user": "fleet", "ssh_key": str(DEMO / "id_ed25519"), "ssh_known_hosts_file": str(DEMO / "known_hosts"),
            "ssh_strict_host_key_checking": "yes", "ssh_allow_agent": False, "ssh_look_for_keys": False, "_sudo": True,
        }  # fmt: skip
        file = self.directory / f"inventory{size}.py"
        groups = {
            group: [(name, {**data, "ssh_hostname": address}) for name, address in hosts.items()]
            for group, hosts in self.chosen(size).items()
        }
        file.write_text("".join(f"{group} = {hosts!r}\n" for group, hosts in groups.items()))
        return file

    def command(self, way: str, size: int) -> tuple[list[str], dict[str, str]]:
        """The command of a way, and what it needs in its environment."""
        environment = {"ORDINARY_FILES": str(self.directory / "files"), "DEMO_DIR": str(DEMO), "LC_ALL": "C.UTF-8"}
        if way == "pyinfra":
            program = str(PYINFRA / "bin/pyinfra")
            deploy = str(ROOT / "tests/bench/pyinfra_deploy.py")
            return [program, str(self.pyinfra_inventory(size)), deploy, "--json"], environment
        limit = ":".join(name for hosts in self.chosen(size).values() for name in hosts)
        playbook = str(ORDINARY if way == "ordinary" else ROOT / "site.yml")
        if way == "ordinary":
            environment["ANSIBLE_CONFIG"] = str(self.directory / "defaults.cfg")
            # For the callback that counts.
            environment["ANSIBLE_COLLECTIONS_PATH"] = str(ROOT / ".collections")
        command = ["ansible-playbook", "-i", str(ROOT / "inventories/demo"), playbook, "--limit", limit]
        # The others have no firewall and do not harden SSH.
        skipped = [] if way == "ordinary" else ["firewall", "ssh_hardening", *(["verify"] if way == "unproved" else [])]
        return command + [f"--skip-tags={','.join(skipped)}"] * bool(skipped), environment

    def run(self, way: str, size: int, *options: str, **more: str) -> tuple[float, float, str]:
        """Run a way once. Returns its seconds, its CPU seconds here, and what it printed about its calls."""
        command, environment = self.command(way, size)
        path = f"{ROOT}/.venv/bin:{os.environ['PATH']}"
        # A directory of its own for each run: no connection is left over from the one before.
        with tempfile.TemporaryDirectory(prefix="cp") as sockets:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            begun = time.perf_counter()
            done = subprocess.run(
                [*command, *options], cwd=self.directory if way == "pyinfra" else ROOT, text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False,
                env={**ENVIRONMENT, **environment, **more, "PATH": path, "ANSIBLE_SSH_CONTROL_PATH_DIR": sockets},
            )  # fmt: skip
            wall = time.perf_counter() - begun
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        problem = f"it ended with {done.returncode}" if done.returncode else changes(way, done.stdout)
        if problem:
            print((done.stdout + done.stderr)[-4000:])
            raise SystemExit(f"{way} on {size} inference hosts: {problem}")
        return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr

    def prepare(self, way: str, size: int) -> float:
        """See that a way would change nothing, warm it up, and count its calls on each host."""
        if way == "pyinfra":
            self.run(way, size, "--dry")
            _wall, _cpu, log = self.run(way, size, "-y", "-vv")
            total = len(re.findall(r"^\s*\[[^]]+\] >>> ", log, re.MULTILINE))
        else:
            self.run(way, size, "--check")
            file = self.directory / "calls.json"
            counting = {
                "ANSIBLE_CALLBACKS_ENABLED": "gpufleet.llm.remote_calls",
                "REMOTE_CALLS_FILE": str(file),
            }
            self.run(way, size, **counting)
            total = sum(entry["total"] for entry in json.loads(file.read_text()).values())
        return total / (size + len(self.fleet["gateway"]))

    def measure(self, ways: list[str], size: int, repeats: int) -> list[Result]:
        """All ways at one size, in turns."""
        addresses = [address for hosts in self.chosen(size).values() for address in hosts.values()]
        results = {way: Result(way, len(addresses), calls=self.prepare(way, size)) for way in ways}
        first, second = cpu(addresses), cpu(addresses)
        looking = [later - earlier for earlier, later in zip(first, second, strict=True)]
        for number in range(repeats):
            for way in ways if number % 2 else reversed(ways):
                before = cpu(addresses)
                wall, controller, _log = self.run(way, size, *(["-y"] if way == "pyinfra" else []))
                used = [b - a - c for a, b, c in zip(before, cpu(addresses), looking, strict=True)]
                results[way].wall.append(wall)
                results[way].controller_cpu.append(controller)
                results[way].host_cpu.append(statistics.mean(used))
        return list(results.values())


def changes(way: str, output: str) -> str:
    """What a run changed or would change, in words, or nothing."""
    if way == "pyinfra":
        told: dict[str, Any] = json.loads(output[output.index("{") :])
        # With -y there is no plan: what a result calls a success is a change.
        wanted = [operation["name"] for operation in told["plan"] if operation["hosts_with_change"]]
        wanted += [
            operation["name"] for operation in (told["results"] or {}).get("operations", ()) if operation["success"]
        ]
        return f"it changes {', '.join(wanted)}" if wanted else ""
    recap = re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", output, re.MULTILINE)
    if not recap:
        return "it ran on no host"
    bad = [host for host, *numbers in recap if set(numbers) != {"0"}]
    return f"it changes {', '.join(bad)}" if bad else ""


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """The line through the points: seconds at no host, and seconds a host."""
    slope, intercept = statistics.linear_regression([hosts for hosts, _ in points], [wall for _, wall in points])
    return intercept, slope


def install_pyinfra() -> None:
    """An environment of its own: it is no part of the project's."""
    if (PYINFRA / "bin/pyinfra").exists():
        return
    print("installing pyinfra ...", flush=True)
    uv = str(ROOT / ".venv/bin/uv")
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", "3.11", str(PYINFRA)], check=True)
    subprocess.run([uv, "pip", "install", "-q", "-p", str(PYINFRA), f"pyinfra=={PYINFRA_VERSION}"], check=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8])
    everything = ["fleet", "unproved", "ordinary", "pyinfra"]
    parser.add_argument("--ways", nargs="+", choices=everything, default=everything)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    try:
        addresses: dict[str, str] = json.loads((DEMO / "access.json").read_text())["hosts"]
        fleet: dict[str, dict[str, str]] = json.loads((DEMO / "fleet.json").read_text())
    except FileNotFoundError as error:
        raise SystemExit(f"{error.filename} is not there: start a fleet with `make demo DEMO_HOSTS=8`") from None
    fleet = {group: {name: addresses[name] for name in hosts} for group, hosts in fleet.items()}
    sizes = [size for size in sorted(set(arguments.hosts)) if 1 <= size <= len(fleet["vllm"])]
    if left_out := sorted(set(arguments.hosts) - set(sizes)):
        print(f"The fleet has {len(fleet['vllm'])} inference host(s), so {left_out} cannot be measured.")
    if not sizes or arguments.repeats < 1:
        raise SystemExit("nothing to measure")
    if "pyinfra" in arguments.ways:
        install_pyinfra()
    directory = Path(tempfile.mkdtemp(prefix="noop-"))  # for its owner only: it holds the secrets of the demo
    results: list[Result] = []
    try:
        bench = Bench(fleet, directory)
        print(
            f"{'way':<9} {'hosts':>5}  {'wall':>6}  {'CPU here':>8}  {'CPU a host':>10}  {'calls a host':>12}  (s, medians)"
        )
        for size in sizes:
            for result in bench.measure(arguments.ways, size, arguments.repeats):
                results.append(result)
                figures = [
                    statistics.median(values) for values in (result.wall, result.controller_cpu, result.host_cpu)
                ]
                print(
                    f"{result.way:<9} {result.hosts:>5}  {figures[0]:>6.2f}  {figures[1]:>8.2f}  {figures[2]:>10.2f}  {result.calls:>12.1f}",
                    flush=True,
                )
    finally:
        shutil.rmtree(directory)
    if len(sizes) > 1:
        for way in arguments.ways:
            base, each = fit(
                [(result.hosts, statistics.median(result.wall)) for result in results if result.way == way]
            )
            print(f"{way}: wall = {base:.2f} s + {each:.2f} s * hosts")


if __name__ == "__main__":
    main()
