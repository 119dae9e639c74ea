"""Rolling upgrades of three hosts under constant load, by this collection and the usual ways, on the same hosts with the same clients.

    python -m tests.bench.rollouts [--rollouts 10] [--usual 3] [--picture docs/images/upgrade-timeline.svg] [--keep]

    fleet        playbooks/upgrade.yml, behind the two gateways
    plain        `systemctl restart` host by host, each awaited by /health, behind Nginx on the same two hosts with least_conn and max_fails=3. Unit
                 and Nginx say nothing of how to stop and whom to ask again
    plain tuned  the same by somebody who knows: SIGTERM to the API server alone (KillMode=mixed), `shutdown-timeout: 60`, so that running requests
                 may end, and `proxy_next_upstream error timeout http_500 http_502 http_503 non_idempotent`, since vLLM answers 500 while it stops

Every rollout brings the other one of two versions of the stand-in for vLLM (tests/stand_in), which takes START_SECONDS to start. The plain instances
are the same programs with the same configuration in ordinary units, on another port.
Told are the requests that failed, the longest pause within a stream, and the seconds for which a host took none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import timeline
from tests.e2e.conftest import on
from tests.hosts import hosts
from tests.load import Gateway, Load, Outcome
from tests.stand_in import fleet as stand_ins

NAME = "bench-rollouts"
VERSIONS = ("0.32.0+cpu", "0.33.0+cpu")
START_SECONDS = 5
SECONDS_PER_TOKEN = 0.05
SOAK_SECONDS = 5  # of the default's 30: a host is in traffic meanwhile
PORT, PLAIN_PORT, PLAIN_HTTPS = 8000, 8100, 8443
WAYS = ("fleet", "plain", "plain tuned")
REST = 5.0  # seconds of load before and after each rollout
# Says whenever one of these changes: whether somebody listens on a port, and where a link leads.
WATCH_HOST = """
import json, os, sys, time
port, link, last = "%04X" % int(sys.argv[1]), sys.argv[2], None
def listening():
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(file):
            words = line.split()
            if words[3] == "0A" and words[1].endswith(":" + port):
                return True
    return False
while True:
    now = [listening(), os.readlink(link) if os.path.islink(link) else ""]
    if now != last:
        print(json.dumps([time.time(), *now]), flush=True)
    last = now
    time.sleep(0.1)
"""
# Says whenever the backends change that a gateway uses.
WATCH_GATEWAY = """
import json, time
last = None
while True:
    with open("/run/vllm-gateway/state.json") as file:
        now = sorted(name for name, backend in json.load(file)["backends"].items() if backend["use"])
    if now != last:
        print(json.dumps([time.time(), now]), flush=True)
    last = now
    time.sleep(0.1)
"""
PLAIN_UNIT = """[Unit]
Description=vLLM, the usual way
[Service]
Environment=HOME=/var/lib/plain VLLM_API_KEY={key} 'STAND_IN={behaves}'
ExecStart=/opt/plain/bin/vllm serve --config /etc/plain.yaml
Restart=always
{more}
[Install]
WantedBy=multi-user.target
"""
PLAIN_NGINX = """worker_processes auto;
pid /run/plain-nginx.pid;
error_log /var/log/plain-nginx.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    upstream vllm {{
        least_conn;
        keepalive 32;
{servers}
    }}
    server {{
        listen {port} ssl;
        ssl_certificate /etc/ssl/vllm-fleet/fullchain.pem;
        ssl_certificate_key /etc/ssl/vllm-fleet/privkey.pem;
        location / {{
            proxy_pass http://vllm;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Authorization "Bearer {key}";
            proxy_buffering off;
            proxy_connect_timeout 3s;
            proxy_read_timeout 900s;
{again}
        }}
    }}
}}
"""
HEALTHY = f"until curl -sf -o /dev/null http://127.0.0.1:{PLAIN_PORT}/health; do sleep 0.2; done"
MIXED = "KillMode=mixed\nTimeoutStopSec=90"
AGAIN = "            proxy_next_upstream error timeout http_500 http_502 http_503 non_idempotent;"


@dataclass
class Rollout:
    """One upgrade of all hosts."""

    way: str
    begun: float
    ended: float
    requests: int
    failed: int
    longest_pause: float
    out: dict[str, float]  # seconds for which a host took no requests
    failures: list[str] = field(default_factory=list)


class Watch:
    """What programs on test hosts say, each line with what it is about."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.told: dict[str, list[list[Any]]] = {}

    def add(self, name: str, host: str, program: str, *arguments: str) -> None:
        """Start one."""
        process = subprocess.Popen(
            ["docker", "exec", host, "python3", "-c", program, *arguments], text=True, stdout=subprocess.PIPE
        )
        self.processes.append(process)
        lines: list[list[Any]] = self.told.setdefault(name, [])

        def follow() -> None:
            assert process.stdout
            for line in process.stdout:
                lines.append(json.loads(line))

        threading.Thread(target=follow, daemon=True).start()

    def end(self) -> None:
        """Stop them."""
        for process in self.processes:
            process.kill()
            process.wait()


def last_before(told: Sequence[Sequence[Any]], moment: float) -> Sequence[Any]:
    """What was said last."""
    return next((line for line in reversed(told) if line[0] <= moment), told[0])


def edges(
    listening: Sequence[Sequence[Any]],
    used: Sequence[tuple[float, bool]],
    restarts: Sequence[float],
    begin: float,
    end: float,
) -> list[tuple[float, str]]:
    """When the states of a host began: from when it listened, when it was used, and when its restart was asked for (the usual way)."""
    first = last_before(listening, begin)[2]
    moments = sorted({begin, *(line[0] for line in listening), *(moment for moment, _ in used), *restarts})
    found, been_down = [], False
    for moment in moments:
        if not begin <= moment < end:
            continue
        _, listens, link = last_before(listening, moment)
        uses = last_before(used, moment)[1] if used else True
        been_down = been_down or not listens
        asked = [each for each in restarts if each <= moment]
        if not listens:
            state = "down"
        elif asked and not any(asked[-1] <= line[0] <= moment and not line[1] for line in listening):
            state = "refuses"
        elif not uses:
            state = "returns" if been_down else "drains"
        else:
            state, been_down = ("serves new" if link != first else "serves"), False
        found.append((moment, state))
    return found


class Bench:
    """The fleet with both ways on it."""

    def __init__(self, directory: Path) -> None:
        self.fleet = stand_ins.up(
            NAME, directory, ["gw1", "gw2"], ["gpu1", "gpu2", "gpu3"],
            vllm_instances=[{"name": "chat", "model": "tiny", "port": PORT, "options": {"max-model-len": 512}}],
            vllm_environment={"STAND_IN": self.behaves()},
            turn_soak_seconds=SOAK_SECONDS,
        )  # fmt: skip
        self.releases = [stand_ins.give_release(directory, self.fleet.workers, version) for version in VERSIONS]
        self.now = 0
        done = self.fleet.run(**self.releases[0])
        assert done.status == 0, done.output
        self.watch = Watch()
        for worker in self.fleet.workers:
            self.watch.add(worker, worker, WATCH_HOST, str(PORT), "/etc/vllm/chat/current")
        for gateway in self.fleet.gateways:
            self.watch.add(gateway, gateway, WATCH_GATEWAY)
        self.paths: list[str] = []

    def behaves(self) -> str:
        """How the stand-in does, both ways."""
        return json.dumps({"seconds_per_token": SECONDS_PER_TOKEN, "start_seconds": START_SECONDS})

    def prepare(self, tuned: bool) -> None:
        """The usual units, with the releases that the collection has installed."""
        find = "ls -d /opt/vllm/releases/*/"
        if len(on(self.fleet.workers[0], find).split()) < len(VERSIONS):
            self.upgrade()
        self.paths = [path.rstrip("/") for path in on(self.fleet.workers[0], find).split()]
        for worker in self.fleet.workers:
            self.prepare_plain(worker, tuned)
            if f"plain {worker}" not in self.watch.told:
                self.watch.add(f"plain {worker}", worker, WATCH_HOST, str(PLAIN_PORT), "/opt/plain")

    def prepare_plain(self, worker: str, tuned: bool) -> None:
        """The usual unit on a host."""
        configuration = {
            "model": "/srv/models/tiny", "served-model-name": ["tiny"], "host": "0.0.0.0", "port": PLAIN_PORT, "max-model-len": 512,
            **({"shutdown-timeout": 60} if tuned else {}),
        }  # fmt: skip
        lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in configuration.items())
        on(worker, "cat >/etc/plain.yaml", stdin=lines)
        unit = PLAIN_UNIT.format(key=stand_ins.KEY, behaves=self.behaves(), more=MIXED if tuned else "")
        on(worker, "cat >/etc/systemd/system/plain.service", stdin=unit)
        on(
            worker,
            f"mkdir -p /var/lib/plain && ln -sfn {self.paths[0]} /opt/plain && systemctl daemon-reload && systemctl restart plain && {HEALTHY}",
        )

    def plain_nginx(self, again: bool) -> None:
        """The usual Nginx beside the gateway's."""
        servers = "\n".join(
            f"        server {self.fleet.addresses[worker]}:{PLAIN_PORT} max_fails=3 fail_timeout=10s;"
            for worker in self.fleet.workers
        )
        text = PLAIN_NGINX.format(servers=servers, port=PLAIN_HTTPS, key=stand_ins.KEY, again=AGAIN if again else "")
        for gateway in self.fleet.gateways:
            on(gateway, "cat >/etc/plain-nginx.conf", stdin=text)
            on(gateway, "kill $(cat /run/plain-nginx.pid) 2>/dev/null; sleep 1; nginx -c /etc/plain-nginx.conf")

    def upgrade(self) -> dict[str, float]:
        """By the playbook. No moment is known at which a restart was asked for: nobody is refused."""
        self.now = 1 - self.now
        done = self.fleet.run(playbook="playbooks/upgrade.yml", **self.releases[self.now])
        assert done.status == 0, done.output
        return {}

    def restart(self) -> dict[str, float]:
        """By hand, host by host."""
        asked = {}
        for worker in self.fleet.workers:
            there = on(worker, "readlink /opt/plain").strip()
            other = next(path for path in self.paths if path != there)
            asked[worker] = time.time()
            on(worker, f"ln -sfn {other} /opt/plain && systemctl restart plain")
            on(worker, HEALTHY)
        return asked

    def load(self, way: str) -> Load:
        """The same clients for all ways, by another port."""
        load = self.fleet.load(tokens=(1, 200), streams=12, whole=4)
        if way != "fleet":
            load.gateways = [
                Gateway(gateway.name, gateway.address, PLAIN_HTTPS, gateway.tls) for gateway in load.gateways
            ]
        return load

    def rollouts(self, way: str, count: int) -> tuple[list[Rollout], list[timeline.Panel], Load]:
        """So many upgrades in one way, with clients through all of them."""
        if way != "fleet":
            self.prepare(way == "plain tuned")
            self.plain_nginx(way == "plain tuned")
        load = self.load(way)
        found, panels = [], []
        load.start()
        for number in range(count):
            time.sleep(REST)
            begun = time.time()
            asked = self.upgrade() if way == "fleet" else self.restart()
            ended = time.time()
            time.sleep(REST)
            chosen = [outcome for outcome in list(load.outcomes) if begun - REST <= outcome.ended <= ended + REST]
            panel = self.panel(way, begun - REST, ended + REST, chosen, asked)
            panels.append(panel)
            failed = [outcome.told() for outcome in chosen if outcome.failure]
            found.append(
                Rollout(
                    way, begun, ended, len(chosen), len(failed),
                    max(outcome.longest_pause for outcome in chosen),
                    {
                        host: sum(span.end - span.begin for span in panel.spans if span.host == host and not span.state.startswith("serves"))
                        for host in sorted({span.host for span in panel.spans})
                    },
                    failed[:20],
                )
            )  # fmt: skip
            print(f"{way} {number + 1} of {count}: {ended - begun:.0f} s, {len(failed)} of {len(chosen)} requests failed, longest pause "
                  f"{found[-1].longest_pause:.2f} s, out {found[-1].out}", flush=True)  # fmt: skip
        load.stop()
        return found, panels, load

    def panel(
        self, way: str, begin: float, end: float, outcomes: Sequence[Outcome], asked: dict[str, float]
    ) -> timeline.Panel:
        """The picture of one."""
        spans = []
        for worker in self.fleet.workers:
            if way == "fleet":
                backend = f"chat@{worker}"
                used = sorted(
                    (line[0], any(backend in last_before(self.watch.told[gateway], line[0])[1] for gateway in self.fleet.gateways))
                    for name in self.fleet.gateways for line in self.watch.told[name]
                )  # fmt: skip
                found = edges(self.watch.told[worker], used, [], begin, end)
            else:
                found = edges(self.watch.told[f"plain {worker}"], [], [asked[worker]], begin, end)
            spans += timeline.spans_of(worker.removeprefix(f"{NAME}-"), found, end)
        titles = {
            "fleet": "playbooks/upgrade.yml", "plain": "systemctl restart, host by host, behind plain Nginx with max_fails",
            "plain tuned": "the same, tuned: running requests may end, and Nginx asks another host after an error",
        }  # fmt: skip
        return timeline.Panel(
            titles[way], begin, end, spans,
            [outcome.ended for outcome in outcomes if not outcome.failure],
            [outcome.ended for outcome in outcomes if outcome.failure],
        )  # fmt: skip


def table(rollouts: Sequence[Rollout]) -> list[str]:
    """For docs/results/rollouts.md."""
    lines = [
        "| way | upgrades without a failed request | requests | failed | longest pause in a stream | a host out of traffic | an upgrade |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in dict.fromkeys(rollout.way for rollout in rollouts):
        chosen = [rollout for rollout in rollouts if rollout.way == way]
        out = [seconds for rollout in chosen for seconds in rollout.out.values()]
        lines.append(
            f"| {way} | {sum(not rollout.failed for rollout in chosen)} of {len(chosen)} | {sum(rollout.requests for rollout in chosen)} "
            f"| {sum(rollout.failed for rollout in chosen)} | {max(rollout.longest_pause for rollout in chosen):.2f} s "
            f"| {statistics.median(out):.1f} s ({min(out):.1f} to {max(out):.1f}) "
            f"| {statistics.median(rollout.ended - rollout.begun for rollout in chosen):.0f} s |"
        )
    return lines


def main() -> int:
    """Read the command line, and do all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--usual", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--keep", action="store_true", help="leave the hosts")
    given = parser.parse_args()
    rollouts: list[Rollout] = []
    panels: list[timeline.Panel] = []
    with tempfile.TemporaryDirectory() as directory:
        bench = None
        try:
            bench = Bench(Path(directory))
            for way in given.ways:
                found, drawn, load = bench.rollouts(way, given.rollouts if way == "fleet" else given.usual)
                rollouts += found
                panels.append(drawn[len(drawn) // 2])
                print(load.summary().told())
                if way == "fleet" and load.failures():
                    print(load.report())
        finally:
            if bench:
                bench.watch.end()
            if not given.keep:
                hosts.down(NAME)
            if given.json:
                told = {"rollouts": [asdict(one) for one in rollouts], "panels": [asdict(panel) for panel in panels]}
                given.json.write_text(json.dumps(told, indent=1))
    print("\n".join(table(rollouts)))
    if given.picture:
        given.picture.write_text(timeline.picture(panels))
    return 0 if all(not rollout.failed for rollout in rollouts if rollout.way == "fleet") else 1


if __name__ == "__main__":
    sys.exit(main())
