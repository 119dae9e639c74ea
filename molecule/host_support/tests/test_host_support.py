"""The role changes nothing; what it must do is refuse, so the refusal is what is tested."""

from __future__ import annotations

import os
import subprocess

import pytest
from testinfra.host import Host

ROOT = os.environ["MOLECULE_PROJECT_DIRECTORY"]


def apply(host: Host, *extra: str) -> subprocess.CompletedProcess[str]:
    """Apply the role to the host under test with extra variables, in a run of its own."""
    name = host.backend.hostname.removeprefix("docker://")
    return subprocess.run(
        [
            "ansible", name, f"--inventory={ROOT}/molecule/shared/inventory/",
            "--module-name=ansible.builtin.include_role", "--args=name=gpufleet.llm.host_support", *extra,
        ],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip


def test_a_supported_host_passes(host: Host) -> None:
    done = apply(host)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def unknown_release(host: Host) -> None:
    """Let the host call itself a release that nobody has tried."""
    host.check_output("cp -P /etc/os-release /tmp/os-release.link && sed s/^VERSION_ID=.*/VERSION_ID='\"99\"'/ /etc/os-release >/tmp/os-release")
    host.check_output("rm /etc/os-release && cp /tmp/os-release /etc/os-release && cp /etc/debian_version /tmp/debian_version && echo 99 >/etc/debian_version")
    yield
    host.check_output("rm /etc/os-release && cp -P /tmp/os-release.link /etc/os-release && cp /tmp/debian_version /etc/debian_version")


@pytest.mark.usefixtures("unknown_release")
def test_an_unknown_release_is_refused_by_name(host: Host) -> None:
    done = apply(host)
    assert done.returncode != 0
    assert "runs Debian 99" in done.stdout
    assert "Supported are Ubuntu 22.04" in done.stdout


@pytest.mark.usefixtures("unknown_release")
def test_an_unknown_release_passes_when_asked_to(host: Host) -> None:
    done = apply(host, "--extra-vars=host_support_allow_unsupported=true")
    assert done.returncode == 0, done.stdout + done.stderr
