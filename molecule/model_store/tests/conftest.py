"""Both hosts of the scenario have what converge.yml put there, and share; how downloads fail and go on is shown on one of them (MATRIX=1: both)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import testinfra
import yaml
from testinfra.host import Host

from tests.roles import ROOT


@pytest.fixture(scope="session")
def both() -> list[Host]:
    """The hosts of the scenario, each with a hub of its own."""
    groups = yaml.safe_load((ROOT / "molecule/shared/inventory/hosts.yml").read_text())["all"]["children"]
    return [testinfra.get_host(f"docker://{name}") for name in groups["model_store"]["hosts"]]


@pytest.fixture(scope="session")
def hosts(both: list[Host]) -> list[Host]:
    """Those that a test of a download applies the role to."""
    return both if os.environ.get("MATRIX", "") == "1" else both[:1]


@pytest.fixture(autouse=True)
def fresh_hubs(both: list[Host]) -> Iterator[None]:
    """Each test starts with well-behaved hubs that were asked nothing."""
    for host in both:
        host.check_output("rm -f /srv/hub/log /srv/hub/mode /srv/hub/busy")
    yield
    for host in both:
        host.run("systemctl stop 'model-download-*' model-share")
