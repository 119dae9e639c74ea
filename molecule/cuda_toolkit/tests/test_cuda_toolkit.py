"""The compiler is there and brings no driver. Repository and packages are those of molecule/nvidia_driver/vendors.py."""

from __future__ import annotations

from testinfra.host import Host

from tests.roles import refused


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
