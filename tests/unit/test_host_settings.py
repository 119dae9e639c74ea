"""Settings of ours that something later overrules, and the time servers that a host had."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import host_clock, host_settings


def written(root: Path, files: dict[str, str]) -> Path:
    """A root with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SYSCTL = {"etc/sysctl.d/60-vllm-fleet.conf": "# why\nnet.core.somaxconn = 4096\nvm.swappiness = 10\n"}
JOURNAL = {"etc/systemd/journald.conf.d/50-vllm-fleet.conf": "[Journal]\nSystemMaxUse=2G\n"}
LIMITS = {"etc/security/limits.d/60-vllm-fleet.conf": "* soft nofile 1048576\n* hard core 0\n"}
APT = {
    "etc/apt/apt.conf.d/52vllm-fleet": 'APT::Periodic::Unattended-Upgrade "1";\nUnattended-Upgrade::Automatic-Reboot "false";\n'
}
MODPROBE = {"etc/modprobe.d/vllm-fleet-nvidia.conf": "options nvidia NVreg_EnableGpuFirmware=1\n"}
NGINX = "etc/systemd/system/nginx.service.d"
UNIT = {f"{NGINX}/50-vllm-fleet.conf": "[Service]\nLimitNOFILE=65536\nExecStartPre=/bin/a\n"}


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        # the input of the report, and what the distribution's link makes of it
        (SYSCTL, {"etc/sysctl.conf": "net.core.somaxconn=1024\n"}, "net.core.somaxconn 1024 /etc/sysctl.conf"),
        (SYSCTL, {"etc/sysctl.d/99-mine.conf": "net/core/somaxconn=1024\n"}, "net.core.somaxconn 1024 /etc/sysctl.d/99-mine.conf"),
        (SYSCTL, {"usr/lib/sysctl.d/99-x.conf": "-vm.swappiness=1\n"}, "vm.swappiness 1 /usr/lib/sysctl.d/99-x.conf"),
        (SYSCTL, {"etc/sysctl.d/10-mine.conf": "vm.swappiness=1\n"}, ""),
        (SYSCTL, {"etc/sysctl.d/99-same.conf": "vm.swappiness=10\n#net.core.somaxconn=1\n"}, ""),
        # the last one counts, and a file of the same name in /etc hides another
        (SYSCTL, {"etc/sysctl.d/98.conf": "vm.swappiness=1\n", "etc/sysctl.d/99.conf": "vm.swappiness=10\n"}, ""),
        (SYSCTL, {"usr/lib/sysctl.d/99.conf": "vm.swappiness=1\n", "etc/sysctl.d/99.conf": ""}, ""),
        (JOURNAL, {"etc/systemd/journald.conf.d/90.conf": "[Journal]\nSystemMaxUse=1G\n"}, "[Journal] SystemMaxUse 1G /etc/systemd/journald.conf.d/90.conf"),
        # the main file is read first, whatever it says
        (JOURNAL, {"etc/systemd/journald.conf": "[Journal]\nSystemMaxUse=1G\n"}, ""),
        (LIMITS, {"etc/security/limits.d/90.conf": "* - nofile 1024\n"}, "* soft nofile 1024 /etc/security/limits.d/90.conf"),
        (LIMITS, {"etc/security/limits.conf": "* soft nofile 1024\n", "etc/security/limits.d/90.conf": "bob soft nofile 1\n"}, ""),
        (APT, {"etc/apt/apt.conf.d/99x": 'APT::Periodic::Unattended-Upgrade "0";\n'}, "APT::Periodic::Unattended-Upgrade 0 /etc/apt/apt.conf.d/99x"),
        (APT, {"etc/apt/apt.conf.d/20auto-upgrades": 'APT::Periodic::Unattended-Upgrade "0";\n'}, ""),
        (MODPROBE, {"etc/modprobe.d/zz.conf": "options nvidia NVreg_EnableGpuFirmware=0\n"}, "nvidia NVreg_EnableGpuFirmware 0 /etc/modprobe.d/zz.conf"),
        (UNIT, {f"{NGINX}/90.conf": "[Service]\nLimitNOFILE=1024\n"}, f"[Service] LimitNOFILE 1024 /{NGINX}/90.conf"),
        # what may be said several times adds up; an empty value takes it back
        (UNIT, {f"{NGINX}/90.conf": "[Service]\nExecStartPre=/bin/b\n"}, ""),
        (UNIT, {f"{NGINX}/90.conf": "[Service]\nExecStartPre=\n"}, f"[Service] ExecStartPre  /{NGINX}/90.conf"),
    ],
)  # fmt: skip
def test_what_a_later_file_sets_otherwise(
    tmp_path: Path, ours: dict[str, str], theirs: dict[str, str], expected: str
) -> None:
    found = host_settings.overruled(written(tmp_path, {**ours, **theirs}))
    assert [f"{one['setting']} {one['value']} {one['by']}" for one in found] == ([expected] if expected else [])
    assert all(one["file"] == "/" + next(iter(ours)) for one in found)


@pytest.mark.parametrize(
    ("files", "servers"),
    [
        ({"etc/systemd/timesyncd.conf": "[Time]\n#NTP=\nNTP=ntp.corp 10.0.0.1\nFallbackNTP=ntp.ubuntu.com\n"}, ["ntp.corp", "10.0.0.1"]),
        ({"etc/systemd/timesyncd.conf": "NTP=old.corp\n", "etc/systemd/timesyncd.conf.d/a.conf": "[Time]\nNTP=\nNTP=ntp.corp\n"}, ["ntp.corp"]),
        ({"etc/ntpsec/ntp.conf": "pool 0.debian.pool.ntp.org iburst\nserver ntp.corp iburst\n# server x\ndriftfile /y\n"}, ["ntp.corp"]),
        ({"run/systemd/netif/links/2": "ADMIN_STATE=configured\nNTP=10.0.0.1 fd00::1\n"}, ["10.0.0.1", "fd00::1"]),
        ({"etc/systemd/timesyncd.conf": "NTP=ntp.ubuntu.com 2.debian.pool.ntp.org\n"}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_the_time_servers_that_a_host_had(tmp_path: Path, files: dict[str, str], servers: list[str]) -> None:
    assert host_clock.time_servers(written(tmp_path, files)) == servers


def test_the_kernel_says_whether_its_clock_is_kept() -> None:
    assert isinstance(host_clock.synchronised(), bool)
