"""The checks as the role runs them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "vllm-gateway-checks"
ONE = "chat@gateway-backend-1"


def state(host: Host) -> dict[str, Any]:
    return dict(json.loads(host.check_output("cat /run/vllm-gateway/state.json")))


def until(what: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "not so in time"
        time.sleep(0.5)


def test_the_checks_use_the_backends(host: Host) -> None:
    told = state(host)
    assert {name: use["use"] for name, use in told["backends"].items()} == {ONE: True, "chat@gateway-backend-2": True}
    assert time.time() - told["time"] < 10
    in_flight = host.check_output("curl -s --unix-socket /run/vllm-gateway/admin.sock http://admin/in_flight")
    assert json.loads(in_flight)["serial"] == told["serial"], "Nginx has taken it up"


@pytest.mark.one_host
def test_the_unit_is_hardened(host: Host) -> None:
    told = host.check_output("systemd-analyze security --no-pager %s | tail -1", UNIT)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", told)
    assert found and float(found[1]) <= 1.5, told
    pid = host.check_output("systemctl show --property=MainPID --value %s", UNIT)
    assert host.check_output("stat --format=%%U /proc/%s", pid) == "vllm-gateway"
    assert host.run("grep -qs internal-0123456789abcdef /proc/%s/cmdline /proc/%s/environ", pid, pid).rc == 1
    assert host.run("setpriv --reuid=nobody --clear-groups ls /run/vllm-gateway").rc != 0, (
        "who reaches the socket may ask it"
    )


def test_a_backend_that_is_stopped_is_out_and_comes_back_by_itself(host: Host) -> None:
    host.check_output("systemctl stop stand-in@1")
    try:
        until(lambda: not state(host)["backends"][ONE]["use"])
        assert state(host)["backends"][ONE]["why"] == "it refuses connections"
    finally:
        host.check_output("systemctl start stand-in@1")
    until(lambda: state(host)["backends"][ONE]["use"])
    journal = host.check_output("journalctl --unit %s --output=cat --since=-2min", UNIT)
    assert f"{ONE} is out of use: it refuses connections [route fake: 1 of 2 backends in use]" in journal


def test_a_restart_of_the_checks_changes_nothing(host: Host) -> None:
    before = state(host)
    host.check_output("systemctl kill --signal=KILL %s", UNIT)
    until(lambda: host.service(UNIT).is_running and state(host)["time"] > before["time"] + 1)
    assert state(host)["backends"] == before["backends"]
    assert state(host)["serial"] == before["serial"]
    assert host.service(UNIT).is_enabled


@pytest.mark.one_host
def test_after_a_boot_the_checks_tell_before_nginx_asks(host: Host) -> None:
    """As at a boot: /run is empty, systemd makes what belongs there, and starts both in their order."""
    before = state(host)["backends"]
    host.check_output(
        f"systemctl stop nginx {UNIT} && rm -rf /run/vllm-gateway && systemd-tmpfiles --create && systemctl start {UNIT} nginx"
    )
    assert state(host)["backends"] == before, "what was written down is believed"
    assert host.check_output("stat --format='%%U:%%G %%a' /run/vllm-gateway") == "vllm-gateway:www-data 750"
    test_the_checks_use_the_backends(host)
