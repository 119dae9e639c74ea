"""What the tests of the agent and of the watch share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.certificates import Authority
from tests.host_agent import Gateway, connection, obeys
from tests.roles import until


@pytest.fixture(scope="session")
def authority() -> Authority:
    """The authority of the fleet, which one of the hosts has."""
    import testinfra

    there = (
        testinfra.get_host("docker://host-agent-debian12").file("/etc/ssl/vllm-fleet/authority/ca.pem").content_string
    )
    key = testinfra.get_host("docker://host-agent-debian12").file("/etc/ssl/vllm-fleet/authority/ca.key").content_string
    return Authority(there, key)


@pytest.fixture
def gateway(host: Host, tmp_path: Path, authority: Authority) -> Iterator[Gateway]:
    """The gateway gw-1, which does at once what it is told."""
    found = Gateway(connection(host, tmp_path, authority, "gw-1"), "gw-1")
    found.says = obeys()
    found.start()
    until(lambda: found.told, 5, "the agent does not answer")
    yield found
    found.end()
    host.run("rm -f /run/vllm-fleet/agent/*.json /var/lib/vllm-fleet/chat.json")
    host.check_output("systemctl start vllm@chat vllm@embed")
