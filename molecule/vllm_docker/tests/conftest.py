"""What the tests of this scenario need. images.sh says what the images are."""

from __future__ import annotations

import json

import pytest
import testinfra
from testinfra.host import Host

from tests.contained import Instances


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    """Digests and ids of the images, by their names."""
    host = testinfra.get_host("docker://vllm-docker-debian13")
    found: dict[str, str] = json.loads(host.check_output("cat /srv/images.json"))
    return found


@pytest.fixture
def instances(host: Host) -> Instances:
    """The instances of the host."""
    return Instances(host)
