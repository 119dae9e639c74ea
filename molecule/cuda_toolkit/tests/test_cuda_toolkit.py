"""The compiler is there and brings no driver. Repository and packages are those of molecule/nvidia_driver/vendors.py."""

from __future__ import annotations

import re

import pytest
from testinfra.host import Host

from tests.roles import applied, changed, refused


def test_the_compiler_says_its_release(host: Host) -> None:
    assert "release 13.0" in host.check_output("/usr/local/cuda-13.0/bin/nvcc --version")


def test_the_repository_brings_no_driver(host: Host) -> None:
    assert "(none)" in host.check_output("apt-cache policy nvidia-dkms-open | grep Candidate")
    host.check_output("mv /etc/apt/preferences.d/50-vllm-fleet-cuda /srv/")
    try:
        assert "(none)" not in host.check_output("apt-cache policy nvidia-dkms-open | grep Candidate")
    finally:
        host.check_output("mv /srv/50-vllm-fleet-cuda /etc/apt/preferences.d/")


def test_a_release_that_is_none_is_refused(host: Host) -> None:
    assert "it is two numbers in quotes" in refused(host, "cuda_toolkit", cuda_toolkit_version="13")


def test_a_run_that_changes_nothing_asks_for_the_facts_only(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_CALLBACKS_ENABLED", "gpufleet.llm.remote_calls")
    said = applied(host, "cuda_toolkit")
    assert not changed(said)
    assert re.findall(r"remote calls: \S+ (\d+) ", said) == ["1"], said


def test_the_key_is_fetched_and_only_the_known_one_is_taken(host: Host) -> None:
    digest = host.check_output("sha256sum /srv/vendors/cuda-keyring_1.1-1_all.deb").split()[0]
    host.check_output(
        "apt-get --yes purge cuda-keyring cuda-nvcc-13-0 && rm /usr/share/keyrings/cuda-archive-keyring.gpg"
    )
    refused(host, "cuda_toolkit", nvidia_driver_keyring_sha256="0" * 64)
    assert not host.package("cuda-nvcc-13-0").is_installed
    # As apt_repository of an older playbook wrote it: with a key in one file and none in the other, every call of apt fails.
    other = "/etc/apt/sources.list.d/developer_download_nvidia_com.list"
    host.check_output(f"echo 'deb file:///srv/vendors/nvidia/ /' >{other}")
    # And somebody else is at work with dpkg, which does not wait by itself.
    lock = "import fcntl, time; file = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); time.sleep(12)"
    host.check_output(f'systemd-run --quiet --collect python3 -c "{lock}"')
    applied(host, "cuda_toolkit", nvidia_driver_keyring_sha256=digest)
    assert host.package("cuda-nvcc-13-0").is_installed
    assert host.package("cuda-keyring").is_installed
    assert not host.file(other).exists
    assert host.file(f"{other}.disabled").exists
    host.check_output("apt-get update --error-on=any")
