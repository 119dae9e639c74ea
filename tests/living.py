"""What happens to a fleet of two gateways and three inference hosts while clients ask it all the time: what tests/e2e/test_living.py and
tests/drills/test_living.py have in common.

Whoever uses it has the fixtures of this module: `living`, the fleet with its clients, and `asked`, which fails the test when a request failed in it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.e2e.conftest import FIGURES, KEEP, ROOT, Done, on, until
from tests.hosts import hosts
from tests.load import Load, Outcome
from tests.stand_in import fleet as stand_ins
from tests.stand_in.fleet import Fleet

GATEWAYS, WORKERS = ("gw1", "gw2"), ("gpu1", "gpu2", "gpu3")
OLD, NEW = "0.32.0+cpu", "0.33.0+cpu"
PORTS = {"chat": 8000, "code": 8001}
SECONDS_PER_TOKEN = 0.05
# Longest answers of the load: ten seconds.
TOKENS = (1, 200)


def instances(**options: Any) -> list[dict[str, Any]]:
    """The two instances of each host; they differ in the model that clients name."""
    return [
        {"name": "chat", "model": "tiny", "port": PORTS["chat"], "options": {"max-model-len": 1024, **options}},
        {
            "name": "code", "model": "tiny", "port": PORTS["code"],
            "options": {"max-model-len": 1024, "served-model-name": ["other"], **options},
        },
    ]  # fmt: skip


@dataclass
class Living:
    """The fleet, and who asks it."""

    fleet: Fleet
    load: Load
    # What was deployed last, by its name.
    releases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def workers(self) -> list[str]:
        return self.fleet.workers

    def release(self, version: str, **settings: Any) -> dict[str, Any]:
        """The variables of a release, which is made for the hosts when it is not there yet."""
        key = json.dumps([version, settings])
        if key not in self.releases:
            names = [f"{name_of(self.fleet)}-{worker}" for worker in WORKERS]
            self.releases[key] = stand_ins.give_release(self.fleet.directory, names, version, **settings)
        return self.releases[key]

    def upgrade(self, *arguments: str, **variables: Any) -> Done:
        """Run upgrade.yml."""
        return self.fleet.run(*arguments, playbook="playbooks/upgrade.yml", **variables)

    @contextmanager
    def trying(self, **variables: Any) -> Iterator[None]:
        """The inventory says something else for a while."""
        before = dict(self.fleet.variables)
        self.fleet.variables |= variables
        try:
            yield
        finally:
            self.fleet.variables.clear()
            self.fleet.variables.update(before)

    def versions(self) -> dict[str, str]:
        """Which release each host runs, by its instance `chat`."""
        return {worker: self.version(worker) for worker in self.workers}

    def version(self, worker: str, instance: str = "chat") -> str:
        """The version that an instance calls its own."""
        headers = f"Authorization: Bearer {self.fleet.variables['vllm_internal_key']}"
        url = f"http://{self.fleet.addresses[worker]}:{PORTS[instance]}/version"
        told = on(worker, f"curl -s -m 5 -K - {url}", stdin=f'header = "{headers}"', check=False)
        return str(json.loads(told)["version"]) if told.startswith("{") else ""

    def word(self, worker: str, instance: str = "chat") -> dict[str, Any]:
        """The operator's word on an instance."""
        told = on(worker, f"cat /var/lib/vllm-fleet/{instance}.json 2>/dev/null || echo '{{}}'")
        found: dict[str, Any] = json.loads(told)
        return {"operator": "up", **found}

    def pid(self, worker: str, instance: str = "chat") -> int:
        """The process of an instance; 0 when it does not run."""
        return int(on(worker, f"systemctl show --property MainPID --value vllm@{instance}"))

    def in_use(self, *workers: str) -> bool:
        """Whether every gateway sends requests to all instances of these hosts."""
        wanted = {f"{instance}@{worker}" for worker in workers or self.workers for instance in PORTS}
        return all(wanted <= self.fleet.used(gateway) for gateway in self.fleet.gateways)

    def out_of_use(self, worker: str) -> bool:
        """Whether no gateway does."""
        names = {f"{instance}@{worker}" for instance in PORTS}
        return not any(names & self.fleet.used(gateway) for gateway in self.fleet.gateways)

    def whole(self) -> None:
        """Wait until everything is in traffic."""
        until("every gateway uses every backend", self.in_use, 120, 0.5)

    def upstreams(self, outcome: Outcome) -> str:
        """Which backends a gateway asked for a request, by its log; of one whose answer did not begin, the client has no id."""
        key = outcome.id or '"status":"499"'
        told = on(outcome.gateway, f"grep -hF '{key}' /var/log/nginx/access.log", check=False)
        for line in map(json.loads, told.splitlines()):
            begun = datetime.fromisoformat(line["time"]).timestamp() - float(line["request_time"])
            if outcome.id or (abs(begun - outcome.begun) < 1.5 and line["uri"] == outcome.question.path):
                return str(line["upstream_addr"])
        return ""

    def first_token(self, worker: str, since: float, instance: str = "chat") -> float:
        """Seconds until a client had the first token of an instance as it runs now."""
        told = on(worker, f"systemctl show --timestamp=unix --property ExecMainStartTimestamp --value vllm@{instance}")
        started = float(told.strip().removeprefix("@"))
        address = f"{self.fleet.addresses[worker]}:{PORTS[instance]}"
        streams = [one for one in list(self.load.outcomes) if one.begun > started and not math.isnan(one.first)]
        streams.sort(key=lambda one: one.begun + one.first)
        first = next(one for one in streams if address in self.upstreams(one))
        return first.begun + first.first - since

    @contextmanager
    def asked(self, name: str, may_fail: Callable[[Outcome], bool] | None = None) -> Iterator[list[Outcome]]:
        """Clients ask meanwhile; a request that fails, fails this, unless it is one of those that nobody can save. Those are listed."""
        begun = time.time()
        lost: list[Outcome] = []
        yield lost
        time.sleep(2)
        self.load.settle()
        failed = [one for one in list(self.load.outcomes) if one.failure and one.ended >= begun]
        lost += [one for one in failed if may_fail and may_fail(one)]
        summary = self.load.summary(begun)
        FIGURES[f"clients: {name}"] = summary.told() + (
            f"; {len(lost)} were lost with what served them" if lost else ""
        )
        bad = [one for one in failed if one not in lost]
        assert not bad, "\n  ".join(
            [f"{len(bad)} of {summary.requests} requests failed:", *(one.told() for one in bad[:20])]
        )
        assert summary.requests > 20, summary.told()

    def served_by(self, worker: str, before: float = math.inf) -> Callable[[Outcome], bool]:
        """Says of a request whether it was on this host, and began before some moment."""
        address = self.fleet.addresses[worker]
        return lambda outcome: outcome.begun <= before and address in self.upstreams(outcome)


def name_of(fleet: Fleet) -> str:
    """The name of a fleet, by its hosts."""
    return fleet.workers[0].rpartition("-")[0]


def deploy(name: str, directory: Path) -> Fleet:
    """From bare hosts to a fleet that serves; with E2E_KEEP=1 in the environment, the one that the last such run left."""
    kept = directory / "kept.json"
    if KEEP and kept.exists():
        told = json.loads(kept.read_text())
        return Fleet(**{**told, "directory": Path(told["directory"])})
    fleet = stand_ins.up(
        name, directory, GATEWAYS, WORKERS,
        vllm_instances=instances(),
        vllm_environment={"STAND_IN": json.dumps({"seconds_per_token": SECONDS_PER_TOKEN})},
        gateway_routes=[{"model": "tiny", "instance": "chat"}, {"model": "other", "instance": "code"}],
        turn_soak_seconds=5,
    )  # fmt: skip
    done = fleet.run(check=True)
    FIGURES["site.yml, two gateways and three hosts with the stand-in"] = f"{done.seconds:.0f} s"
    return fleet


@contextmanager
def living(name: str) -> Iterator[Living]:
    """The fleet, with clients that ask until the end."""
    directory = ROOT / ".cache" / name
    directory.mkdir(parents=True, exist_ok=True)
    load = None
    try:
        fleet = deploy(name, directory)
        load = fleet.load(tokens=TOKENS, streams=10, whole=3)
        load.start()
        yield Living(fleet, load)
        if KEEP:
            (directory / "kept.json").write_text(json.dumps(asdict(fleet), default=str))
    finally:
        if load:
            load.stop()
        if not KEEP:
            hosts.down(name)
            shutil.rmtree(directory)
