"""What a host needs to serve, as it shows on a running host."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from testinfra.host import Host

from tests.roles import ROOT, applied, changed, environment, refused, role_command


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


def test_a_full_disk_leaves_every_file_as_it_was(host: Host) -> None:
    """The directory of one of two changed files is a file system of its own here, and full."""
    directory = "/etc/chrony/sources.d"
    look = f"cat {directory}/*.sources /etc/systemd/journald.conf.d/*.conf"
    changes = {"base_ntp_servers": ["time.example.net", "time.example.org"], "base_journal_max_size": "65M"}
    before = host.check_output(look)
    host.check_output(
        f"cp -a {directory} /tmp/kept && mount -t tmpfs -o size=64k tmpfs {directory} && cp -a /tmp/kept/. {directory}"
        f" && (cat /dev/zero >{directory}/ballast; true)"
    )
    try:
        told = refused(host, "base", **changes)
        assert f"{directory}/vllm-fleet.sources: No space left on device; every file is as it was" in told
        assert host.check_output(look) == before
        host.check_output(f"rm {directory}/ballast")
        applied(host, "base", **changes)
        assert "time.example.org" in host.check_output(look)
    finally:
        host.check_output(f"umount {directory} && rm -r /tmp/kept")
    applied(host, "base")
    assert host.check_output(look) == before


def test_what_was_seen_is_forgotten_after_a_change(host: Host, tmp_path: Path) -> None:
    """There and back in one run: the look at the host before the first change must not stand for the second."""
    role = {"name": "gpufleet.llm.base"}
    tasks = [
        {"ansible.builtin.include_role": role, "vars": {"base_ntp_servers": servers}}
        for servers in (["time.example.net"], ["there.example.net"], ["time.example.net"])
    ]
    (tmp_path / "play.yml").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    command = role_command(host, "base")
    command[1] = str(tmp_path / "play.yml")
    done = subprocess.run(command, cwd=ROOT, env=environment("base"), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("changed: [") == 2, done.stdout
    assert "server time.example.net iburst" in host.check_output("cat /etc/chrony/sources.d/*.sources")


def test_a_file_that_somebody_changed_is_put_right(host: Host) -> None:
    file = "/etc/chrony/sources.d/vllm-fleet.sources"
    before = host.check_output(f"cat {file}")
    # same size, same time: only the time of the last change of the inode tells
    host.check_output(f"touch -r {file} /tmp/time && sed -i s/time/emit/ {file} && touch -r /tmp/time {file}")
    assert changed(applied(host, "base"))
    assert host.check_output(f"cat {file}") == before
