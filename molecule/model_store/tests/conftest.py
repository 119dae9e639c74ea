"""All tests of this scenario apply the role to both hosts at once, which takes little longer than one of them."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def fresh_hubs(both: list[Host]) -> Iterator[None]:
    """Each test starts with well-behaved hubs that were asked nothing."""
    for host in both:
        host.check_output("rm -f /srv/hub/log /srv/hub/mode")
    yield
    for host in both:
        host.run("systemctl stop 'model-download-*' model-share")
