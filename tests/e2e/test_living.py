"""A fleet of two gateways and three inference hosts is changed while clients ask it: no request fails.

The short form of tests/drills/test_living.py. vLLM is the stand-in; the tests run in this order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import FIGURES, Done, on
from tests.living import NEW, OLD, Living, living


@pytest.fixture(scope="module")
def fleet() -> Iterator[Living]:
    """The fleet, and its clients."""
    with living("e2e-living") as found:
        yield found


def said(done: Done) -> str:
    """What a run said, its line breaks undone."""
    return " ".join(done.output.split())


def test_an_upgrade_loses_no_request(fleet: Living) -> None:
    """The first host is watched with a tenth of the requests; each gateway tells that of it and of no other."""
    assert set(fleet.versions().values()) == {OLD}
    with fleet.asked("upgrade.yml, another version"):
        done = fleet.upgrade(**fleet.release(NEW), turn_canary_percent=10)
    FIGURES["upgrade.yml, three hosts"] = f"{done.seconds:.0f} s"
    assert done.status == 0, done.output
    assert set(fleet.versions().values()) == {NEW}
    fleet.whole()
    for gateway in fleet.fleet.gateways:
        told = on(gateway, "journalctl --unit vllm-gateway-checks --output cat --no-pager")
        for change in ("is used: [a-z ]+; it gets 10% of the requests at most", "gets as many requests as the others"):
            assert set(re.findall(rf"@(\S+) {change}", told)) == {fleet.workers[0]}, told


def test_a_version_that_does_not_start_stays_with_its_first_host(fleet: Living) -> None:
    """Which goes back by itself. The others are left as they are."""
    before = {worker: fleet.pid(worker) for worker in fleet.workers}
    bad = fleet.release("0.33.1+cpu", start_error="no kernel image is available")
    with fleet.asked("upgrade.yml, a version that does not start"), fleet.trying(**bad):
        done = fleet.upgrade()
    FIGURES["upgrade.yml, a version that does not start"] = f"{done.seconds:.0f} s"
    assert done.status != 0, done.output
    assert "no kernel image is available" in said(done)
    assert set(fleet.versions().values()) == {NEW}
    changed = [worker for worker in fleet.workers if fleet.pid(worker) != before[worker]]
    assert changed == fleet.workers[:1]
    fleet.whole()


def test_a_rollback_loses_no_request_and_holds(fleet: Living) -> None:
    begun = time.time()
    with fleet.asked("rollback.yml"):
        done = fleet.fleet.run("-e", "fleet_instance=chat", playbook="playbooks/rollback.yml")
    FIGURES["rollback.yml, three hosts"] = f"{done.seconds:.0f} s"
    assert done.status == 0, done.output
    seconds = fleet.first_token(fleet.workers[0], begun)
    FIGURES["rollback.yml, until a client has a token of the version of before"] = f"{seconds:.0f} s"
    assert set(fleet.versions().values()) == {OLD}
    assert {fleet.version(worker, "code") for worker in fleet.workers} == {NEW}, "one instance alone went back"
    fleet.whole()
    assert re.search(r"held", said(done)), done.output
