"""What vLLM may connect to, tried from its user and from containers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

from tests.network import address_of, scan
from tests.roles import applied, changed

# And a port that a program of vLLM's user will answer at.
MORE = {"firewall_allow": [{"name": "more", "ports": ["50001"], "networks": ["0.0.0.0/0"]}]}
FETCHES: dict[str, Any] = {
    **MORE,
    "vllm_instances": [{"name": "see", "port": 8000, "options": {"allowed-media-domains": ["img.example"]}}],
}


def reaches(host: Host, address: str, port: int, user: str = "vllm") -> bool:
    """Whether a program of this user gets a connection. What is refused is told at once, and not waited for."""
    program = f"import socket; socket.create_connection(('{address}', {port}), 5)"
    done = host.run(f'timeout 4 runuser --user {user} -- python3 -c "{program}"')
    assert done.rc != 124, "it is dropped and not refused"
    return bool(done.rc == 0)


@pytest.fixture(scope="module")
def fetching(inference: Host) -> Iterator[Host]:
    """A host with an instance that fetches what requests name. Nobody has made its user before."""
    assert inference.run("id vllm").rc != 0
    applied(inference, "firewall", **FETCHES)
    yield inference
    applied(inference, "firewall")
    inference.check_output("userdel vllm")


@pytest.mark.parametrize("family", [4, 6])
def test_of_what_is_private_it_reaches_the_fleet_only(
    fetching: Host, gateway: Host, outsider: Host, family: int
) -> None:
    """By IPv6 the fleet has no addresses here: fleet_address is of IPv4."""
    assert reaches(fetching, address_of(gateway, family), 443) == (family == 4)
    assert not reaches(fetching, address_of(outsider, family), 22)
    assert reaches(fetching, "127.0.0.1" if family == 4 else "::1", 8000)
    # others of the host are not held back
    assert reaches(fetching, address_of(outsider, family), 22, user="root")


def test_the_rules_are_as_wanted_in_the_next_run_and_after_a_boot(fetching: Host, outsider: Host) -> None:
    assert not changed(applied(fetching, "firewall", **FETCHES))
    fetching.check_output("systemctl restart vllm-fleet-firewall")
    assert not reaches(fetching, address_of(outsider), 22)


def test_it_answers_those_who_ask_it(fetching: Host, outsider: Host) -> None:
    fetching.check_output("systemd-run --unit=answers --uid=vllm python3 -m http.server 50001")
    try:
        fetching.check_output("until ss -ltn | grep -q :50001; do sleep 0.1; done")
        assert scan(outsider, fetching, [50001])["open"] == [50001]
    finally:
        fetching.check_output("systemctl stop answers")


def test_what_is_named_stays_open(fetching: Host, outsider: Host) -> None:
    there: dict[str, Any] = {"name": "pictures", "ports": ["22"], "networks": [address_of(outsider)]}
    applied(fetching, "firewall", firewall_egress_allow=[there], **FETCHES)
    assert reaches(fetching, address_of(outsider), 22)


def test_an_instance_that_fetches_nothing_is_held_back_on_request(fetching: Host, outsider: Host) -> None:
    applied(fetching, "firewall")
    assert reaches(fetching, address_of(outsider), 22)
    applied(fetching, "firewall", firewall_egress="all")
    assert not reaches(fetching, address_of(outsider), 22)
    applied(fetching, "firewall", firewall_egress="off", **FETCHES)
    assert reaches(fetching, address_of(outsider), 22)
