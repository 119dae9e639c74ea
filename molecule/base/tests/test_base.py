"""What a host needs to serve, as it shows on a running host."""

from __future__ import annotations

import re

from testinfra.host import Host


def test_the_journal_is_on_disk_within_the_limit(host: Host) -> None:
    assert host.run('test -n "$(ls /var/log/journal/*/system.journal)"').rc == 0
    # journald tells its limit when it opens the journal on disk
    told = host.check_output("journalctl --unit systemd-journald --output cat --no-pager")
    assert re.search(r"System Journal .* max 64(\.0)?M,", told), told


def test_what_is_logged_is_kept(host: Host) -> None:
    host.check_output("logger --id vllm-fleet-was-here && journalctl --sync")
    assert "vllm-fleet-was-here" in host.check_output(
        "journalctl --directory /var/log/journal --output cat --since -1min"
    )


def test_a_burst_is_not_dropped(host: Host) -> None:
    host.check_output("seq 3000 | sed s/^/burst-line-/ | systemd-cat --identifier burst && journalctl --sync")
    assert host.check_output("journalctl --identifier burst --output cat | wc -l") == "3000"


def test_chrony_accepts_its_configuration_and_knows_the_server(host: Host) -> None:
    """The unit is skipped in a container (no clock of its own), so chronyd itself is asked, without touching the clock."""
    printed = host.check_output("chronyd -p")
    assert "/etc/chrony/sources.d" in printed
    assert "server time.example.net iburst" in host.check_output("cat /etc/chrony/sources.d/*.sources")


def test_chrony_is_enabled_or_rightly_skipped(host: Host) -> None:
    assert host.check_output("systemctl is-enabled chrony") == "enabled"
    condition = host.check_output("systemctl show chrony --property=ConditionResult,ActiveState")
    assert "ConditionResult=no" in condition or "ActiveState=active" in condition


def test_the_tools_are_there(host: Host) -> None:
    for tool in ("curl", "jq", "setfacl", "lspci", "lsof"):
        assert host.exists(tool), tool


def test_nothing_failed(host: Host) -> None:
    assert host.check_output("systemctl --failed --no-legend") == ""
