"""The role changes nothing; what it must do is refuse, so the refusal is what is tested."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.roles import ROOT, applied, host_name, refused


def test_a_supported_host_passes(host: Host) -> None:
    applied(host, "host_support")


@pytest.fixture
def unknown_release(host: Host) -> Iterator[None]:
    """Let the host call itself a release that nobody has tried."""
    host.check_output(
        "cp -P /etc/os-release /tmp/os-release.link && sed s/^VERSION_ID=.*/VERSION_ID='\"99\"'/ /etc/os-release >/tmp/os-release"
    )
    host.check_output(
        "rm /etc/os-release && cp /tmp/os-release /etc/os-release && cp /etc/debian_version /tmp/debian_version && echo 99 >/etc/debian_version"
    )
    yield
    host.check_output(
        "rm /etc/os-release && cp -P /tmp/os-release.link /etc/os-release && cp /tmp/debian_version /etc/debian_version"
    )


@pytest.mark.usefixtures("unknown_release")
def test_an_unknown_release_is_refused_by_name(host: Host) -> None:
    told = refused(host, "host_support")
    assert "runs Debian 99" in told
    assert "Supported are Ubuntu 22.04" in told


@pytest.mark.usefixtures("unknown_release")
def test_an_unknown_release_passes_when_asked_to(host: Host) -> None:
    applied(host, "host_support", host_support_allow_unsupported=True)


def test_packages_are_installed_where_a_fresh_image_has_no_lists(host: Host) -> None:
    """The directory of the lists is new and empty: its date must not pass for that of lists."""
    host.check_output("rm -rf /var/lib/apt/lists && mkdir -p /var/lib/apt/lists/partial")
    assert not host.exists("jq")
    subprocess.run(
        [
            "ansible", host_name(host), f"--inventory={ROOT}/molecule/shared/inventory/",
            "--module-name=ansible.builtin.include_role", "--args=name=gpufleet.llm.host_support tasks_from=packages",
            f"--extra-vars={json.dumps({'host_support_packages': ['jq']})}",
        ],
        cwd=ROOT, check=True,
    )  # fmt: skip
    assert host.exists("jq")


def test_another_python3_by_alternatives_is_refused_and_the_own_one_works(host: Host) -> None:
    """As one that was built by hand: without the distribution's modules, and so without apt's."""
    own = host.check_output("readlink -f /usr/bin/python3")
    built = f'#!/bin/sh\nexec {own} -S "$@"\n'
    host.check_output(f"printf '%s' '{built}' >/usr/local/bin/python3.99 && chmod 0755 /usr/local/bin/python3.99")
    host.check_output("ln -sfn /usr/local/bin/python3.99 /usr/bin/python3")
    try:
        told = refused(host, "host_support")
        assert "/usr/bin/python3" in told
        assert f"is /usr/local/bin/python3.99, which has no bindings for apt; that of the distribution is {own}" in told
        applied(host, "host_support", ansible_python_interpreter=own)
    finally:
        host.check_output(f"ln -sfn {own.rpartition('/')[2]} /usr/bin/python3")
