"""What a host needs to serve, as it shows on a running host."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import testinfra
from testinfra.host import Host

from tests.roles import ROOT, applied, apply_role, changed, environment, refused, role_command


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


@pytest.mark.one_host
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


@pytest.mark.one_host
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


@pytest.mark.one_host
def test_a_file_that_somebody_changed_is_put_right(host: Host) -> None:
    file = "/etc/chrony/sources.d/vllm-fleet.sources"
    before = host.check_output(f"cat {file}")
    # same size, same time: only the time of the last change of the inode tells
    host.check_output(f"touch -r {file} /tmp/time && sed -i s/time/emit/ {file} && touch -r /tmp/time {file}")
    assert changed(applied(host, "base"))
    assert host.check_output(f"cat {file}") == before


# --- upgrades


STAND_INS = r"""
set -e
mkdir -p /srv/security && cd /srv/security && rm -f ./*
# Stand-ins for packages of the security archive: one of NVIDIA's, by its name, and an ordinary one.
for name in nvidia-stand-in plain-stand-in; do
  for version in 1.0 2.0; do
    mkdir -p tree/DEBIAN
    printf 'Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: test\nDescription: stand-in\n' $name $version >tree/DEBIAN/control
    dpkg-deb --build tree ${name}_$version.deb >/dev/null
    rm -r tree
  done
  dpkg -i ${name}_1.0.deb >/dev/null
  {
    dpkg-deb -f ${name}_2.0.deb
    printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' ${name}_2.0.deb $(stat -c %s ${name}_2.0.deb) $(sha256sum ${name}_2.0.deb | cut -d' ' -f1)
  } >>Packages
done
codename=$(. /etc/os-release && echo $VERSION_CODENAME)
printf 'Origin: Debian\nLabel: Debian-Security\nSuite: stable-security\nCodename: %s-security\nSHA256:\n %s %s Packages\n' \
  $codename $(sha256sum Packages | cut -d' ' -f1) $(stat -c %s Packages) >Release
echo "deb [trusted=yes] file:/srv/security ./" >/etc/apt/sources.list.d/stand-in.list
apt-get update -q
"""


@pytest.mark.one_host
def test_security_updates_come_by_themselves_but_not_of_the_driver(host: Host) -> None:
    """Really carried out by unattended-upgrade, from an archive that calls itself Debian's security archive."""
    installed = "dpkg-query -W -f '${Package} ${Version}\\n' nvidia-stand-in plain-stand-in"
    try:
        done = host.run(STAND_INS)
        assert done.rc == 0, done.stderr
        done = host.run("unattended-upgrade -v")
        assert done.rc == 0, done.stdout + done.stderr
        assert host.check_output(installed).splitlines() == ["nvidia-stand-in 1.0", "plain-stand-in 2.0"]
        # apt noted at its update what waits; the next run of the role says so, and changes nothing
        told = applied(host, "base")
        assert not changed(told)
        assert "1 security updates wait" in " ".join(told.split())
        assert "nvidia-stand-in 2.0 (since today)" in " ".join(told.split())
    finally:
        host.run(
            "dpkg --purge nvidia-stand-in plain-stand-in; rm -rf /srv/security /etc/apt/sources.list.d/stand-in.list; apt-get update"
        )
    assert "security updates wait" not in applied(host, "base")


def test_the_upgrades_are_switched_on(host: Host) -> None:
    told = host.check_output("apt-config dump APT::Periodic")
    assert 'APT::Periodic::Unattended-Upgrade "1"' in told
    assert 'APT::Periodic::Update-Package-Lists "1"' in told
    assert host.check_output("systemctl is-enabled apt-daily-upgrade.timer") == "enabled"


def test_needrestart_leaves_vllm_alone(host: Host) -> None:
    """Asked of Perl, as needrestart reads it."""
    names = [
        "vllm@chat.service",
        "docker.service",
        "containerd.service",
        "nvidia-persistenced.service",
        "nginx.service",
    ]
    program = (
        "our %nrconf; do shift; for my $unit (@ARGV) { "
        'print "$unit\\n" if grep { $unit =~ $_ && !$nrconf{override_rc}{$_} } keys %{$nrconf{override_rc}} }'
    )
    told = host.check_output(
        f"perl - /etc/needrestart/conf.d/50-vllm-fleet.conf {' '.join(names)} <<'EOF'\n{program}\nEOF"
    )
    assert told.splitlines() == names[:-1]


# --- limits


def test_settings_of_the_network_are_in_effect_and_no_others_in_a_container(host: Host) -> None:
    assert (
        host.check_output("cat /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/conf/all/accept_redirects") == "4096\n0"
    )
    assert "vm." not in host.check_output("cat /etc/sysctl.d/60-vllm-fleet.conf")


@pytest.mark.one_host
def test_a_setting_that_does_not_take_effect_is_told(host: Host) -> None:
    told = refused(host, "base", base_sysctl={"net.core.nosuchthing": 1})
    assert "base_sysctl: net.core.nosuchthing (is missing) did not take effect" in told
    applied(host, "base")


def test_logins_leave_no_core(host: Host) -> None:
    """Nor have they other limits in a container: whoever may not raise a limit could not log in, so none is asked for there."""
    assert host.check_output("su - alice -s /bin/sh -c 'ulimit -c'") == "0"
    assert "nofile" not in host.check_output("cat /etc/security/limits.d/60-vllm-fleet.conf")
    assert host.check_output("systemctl show --property=DefaultLimitCORE") == "DefaultLimitCORE=0"


def test_a_service_that_crashes_leaves_no_core(host: Host) -> None:
    told = host.check_output("systemd-run --quiet --wait --pipe sh -c 'ulimit -c'")
    assert told == "0"


def test_tmp_is_in_memory_from_the_next_boot_on(host: Host) -> None:
    assert host.check_output("systemctl is-enabled tmp.mount") == "enabled"
    options = host.check_output("systemctl show tmp.mount --property=Options,What")
    assert "nosuid" in options
    assert "nodev" in options
    done = host.run("systemd-analyze verify /etc/systemd/system/tmp.mount")
    # it would also look into manuals, which are not installed
    told = [line for line in done.stderr.splitlines() if "tmp.mount:" in line and "Command 'man " not in line]
    assert told == []


# --- administrators


@pytest.mark.one_host
def test_the_administrators_have_sudo(host: Host) -> None:
    assert "operators" in host.user("alice").groups
    assert "(ALL : ALL) ALL" in host.check_output("sudo -l -U alice")
    assert host.file("/etc/sudoers.d/00-vllm-fleet").mode == 0o440
    applied(host, "base", base_admin_sudo_without_password=True)
    assert "(ALL : ALL) NOPASSWD: ALL" in host.check_output("sudo -l -U alice")
    applied(host, "base")


@pytest.mark.one_host
def test_ansible_itself_keeps_its_sudo(host: Host) -> None:
    """A member whose own rule comes later, and asks for no password, keeps it; one whose rule comes before the group's is not made a member."""
    users = {"base_admin_users": ["alice", "fleet"]}
    applied(host, "base", **users)
    assert "operators" in host.user("fleet").groups
    assert host.run("su - fleet -c 'sudo -n true'").rc == 0
    host.check_output("gpasswd --delete fleet operators && mv /etc/sudoers.d/fleet /etc/sudoers.d/00-early")
    try:
        assert "base_admin_users has fleet, as whom Ansible comes" in refused(host, "base", **users)
        assert host.user("fleet").groups == ["fleet"]
        assert not changed(applied(host, "base"))
    finally:
        host.check_output("mv /etc/sudoers.d/00-early /etc/sudoers.d/fleet")


@pytest.mark.one_host
def test_each_part_can_be_switched_off(host: Host) -> None:
    off = {
        "base_unattended_upgrades": False, "base_needrestart_exclude": False, "base_sysctl": {}, "base_limits": False,
        "base_core_dumps": True, "base_tmp_mount": False, "base_admin_group": "", "base_admin_users": [],
    }  # fmt: skip
    files = (
        "/etc/apt/apt.conf.d/52vllm-fleet /etc/needrestart/conf.d/50-vllm-fleet.conf /etc/sysctl.d/60-vllm-fleet.conf "
        "/etc/security/limits.d/60-vllm-fleet.conf /etc/systemd/system.conf.d/50-vllm-fleet.conf /etc/systemd/system/tmp.mount "
        "/etc/sudoers.d/00-vllm-fleet"
    )
    try:
        applied(host, "base", **off)
        assert not changed(applied(host, "base", **off))
        assert host.run(f"ls {files}").stdout == ""
        assert host.check_output("systemctl show --property=DefaultLimitCORE") != "DefaultLimitCORE=0"
    finally:
        applied(host, "base")
    assert host.run(f"ls {files}").rc == 0
    assert not changed(applied(host, "base"))


@pytest.mark.one_host
def test_mistakes_are_told_before_any_change(host: Host) -> None:
    told = refused(
        host, "base", base_sysctl={"net.ipv4.ip_forward": 1}, base_unattended_upgrades_exclude=["("], base_tmp_mount_size="lots",
        base_admin_group="Wheel!", base_limit_nofile=2000000, base_limit_nproc=12,
    )  # fmt: skip
    for words in (
        "base_sysctl has net.ipv4.ip_forward", "base_unattended_upgrades_exclude has '('", "base_tmp_mount_size is lots",
        "'Wheel!' is no name of a user or group", "base_limit_nofile is 2000000, more than the kernel allows", "base_limit_nproc",
    ):  # fmt: skip
        assert words in told
    assert not changed(told)


@pytest.mark.one_host
def test_those_of_a_directory_are_administrators_like_others(host: Host) -> None:
    """A name service beside the files, as sssd and winbind are: /etc/passwd does not know its users, and usermod does not change them."""
    host.check_output(
        "apt-get install -y -q libnss-extrausers && mkdir -p /var/lib/extrausers"
        " && echo 'john.doe:x:70001:70001::/home/john.doe:/bin/bash' >/var/lib/extrausers/passwd"
        " && echo 'engineers:x:70002:john.doe' >/var/lib/extrausers/group"
        " && sed -i.before 's/^\\(passwd\\|group\\):.*/& extrausers/' /etc/nsswitch.conf"
    )
    try:
        john = {"base_admin_group": "operators", "base_admin_users": ["alice", "john.doe"]}
        applied(host, "base", **john)
        # The group of the directory has no name here, which `id` ends with 1 for.
        assert "operators" in host.run("id -nG john.doe").stdout.split()
        assert host.run("grep john.doe /etc/passwd").rc == 1
        assert not changed(applied(host, "base", **john))
        # a group of the directory is its own business
        applied(host, "base", base_admin_group="engineers", base_admin_users=["john.doe"])
        assert "(ALL : ALL) ALL" in host.check_output("sudo -l -U john.doe")
        assert host.run("grep engineers /etc/group").rc == 1
        said = refused(host, "base", base_admin_group="engineers", base_admin_users=["alice"])
        assert "base_admin_users has alice, who is not in engineers: that group is one of a directory" in said
        said = refused(host, "base", base_admin_group="operators", base_admin_users=["jane.doe"])
        assert "base_admin_users has jane.doe, whom the host does not know (getent passwd jane.doe)" in said
    finally:
        host.check_output("gpasswd --delete john.doe operators; mv /etc/nsswitch.conf.before /etc/nsswitch.conf")
        applied(host, "base")


# --- what a host had before


@pytest.mark.one_host
def test_a_setting_that_would_not_outlast_a_boot_is_named_in_each_run(host: Host) -> None:
    host.check_output("cp -a /etc/sysctl.conf /tmp/ 2>/dev/null; echo net.core.somaxconn=1024 >/etc/sysctl.conf")
    words = "net.core.somaxconn of /etc/sysctl.d/60-vllm-fleet.conf is 1024 by /etc/sysctl.conf"
    try:
        for _run in range(2):
            said = applied(host, "base")
            assert not changed(said)
            assert words in " ".join(said.split())
        assert words in refused(host, "base", base_overruled="refuse")
        assert words not in " ".join(applied(host, "base", base_overruled="off").split())
        # and it is so: what sysctl makes of all files
        assert (
            "net.core.somaxconn = 1024" in host.run("sysctl --system 2>/dev/null | grep somaxconn | tail -n 1").stdout
        )
    finally:
        host.check_output(
            "rm /etc/sysctl.conf; mv /tmp/sysctl.conf /etc/ 2>/dev/null; sysctl -q -w net.core.somaxconn=4096"
        )
    assert words not in " ".join(applied(host, "base").split())


@pytest.mark.one_host
def test_the_time_servers_that_a_host_had_are_taken_over_and_asked(host: Host) -> None:
    """The unit of chrony is skipped in a container, so chronyd runs without touching the clock here."""
    host.check_output(
        "mkdir -p /etc/systemd/timesyncd.conf.d && printf '[Time]\\nNTP=192.0.2.7\\n' >/etc/systemd/timesyncd.conf.d/corp.conf"
    )
    host.check_output("systemd-run --unit=chronyd-test chronyd -x -d")
    try:
        said = applied(host, "base", base_ntp_servers=[])
        assert "server 192.0.2.7 iburst" in host.check_output("cat /etc/chrony/sources.d/*.sources")
        assert "is not kept right: no time server has set it" in " ".join(said.split())
        assert not changed(applied(host, "base", base_ntp_servers=[]))
    finally:
        host.check_output("systemctl stop chronyd-test; rm -r /etc/systemd/timesyncd.conf.d")
        applied(host, "base")


# --- how one becomes root


def test_a_sudo_that_no_password_would_reach_is_told_before_it_is_waited_for() -> None:
    """The real sudo-rs, which is the sudo of Ubuntu 26.04, and the other one beside it."""
    host = testinfra.get_host("docker://base-debian13")
    host.check_output(
        "apt-get install -y -q sudo-rs && useradd --create-home --shell /bin/bash rusty && echo rusty:secret | chpasswd"
        " && cp -a /home/fleet/.ssh /home/rusty/ && chown -R rusty /home/rusty/.ssh && echo 'rusty ALL=(ALL:ALL) ALL' >/etc/sudoers.d/rusty"
    )
    login = {"ansible_user": "rusty", "ansible_become_password": "secret"}
    try:
        began = time.monotonic()
        said = refused(host, "base", ansible_become_exe="sudo-rs", **login)
        assert (
            "base-debian13: sudo-rs is sudo-rs there, and this Ansible does not understand how it asks for a password"
            in said
        )
        assert "Set ansible_become_exe: sudo.ws" in said
        assert time.monotonic() - began < 20, "the prompt was waited for"
        assert not changed(applied(host, "base", **login))
    finally:
        # What is left of a refused login may still run as the user.
        host.run("pkill -KILL -u rusty; sleep 1")
        host.check_output("apt-get purge -y -q sudo-rs && userdel --remove rusty && rm /etc/sudoers.d/rusty")


@pytest.mark.one_host
def test_a_release_that_nobody_has_tried_is_taken_with_a_warning(host: Host) -> None:
    lines = 's/^ID=.*/ID=ubuntu/; s/^NAME=.*/NAME="Ubuntu"/; s/^VERSION_ID=.*/VERSION_ID="26.04"/'
    host.check_output(
        f"sed '{lines}' /etc/os-release >/tmp/os-release && mount --bind /tmp/os-release /usr/lib/os-release"
    )
    try:
        done = apply_role(host, "base", "--check")
        assert "runs Ubuntu 26.04, on which nobody has tried these roles yet" in done.stdout + done.stderr
    finally:
        host.check_output("umount /usr/lib/os-release")
