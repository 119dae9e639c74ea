"""What is downloaded on a host whose only way out is a real proxy: a package by apt, uv by pip, a release by uv. Without it, nothing is.

The host has a strict umask, too.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from tests.playbooks import playbook
from tests.roles import ROOT, applied, changed, host_name, refused

PASSWORD = "geheim1"  # noqa: S105 -- of the proxy in this test
APT_FILE = "/etc/apt/apt.conf.d/99vllm-fleet-proxy"
OFFLINE: dict[str, Any] = {"fleet_proxy": {}}


def asked(host: Host) -> list[str]:
    """What the proxy was asked for until now."""
    log = host.check_output("journalctl --unit=way-out --output=cat")
    return re.findall(r"Request \(file descriptor \d+\): (\S+ \S+)", log)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A lock with the stand-in, which is on the host, and a package that is not."""
    pinned = re.search(r"^iniconfig==(?:.*\\\n)*.*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pinned
    file = tmp_path / "vllm.txt"
    file.write_text(f"{(ROOT / '.cache/stand-in/vllm.txt').read_text()}{pinned[0]}\n")
    return file


def test_the_proxy_is_the_only_way_out(host: Host) -> None:
    """Else the other tests would show nothing."""
    # What apt asks on this host.
    archive = host.check_output("apt-get indextargets --format '$(REPO_URI)'").splitlines()[0]
    assert host.run("curl --silent --max-time 5 %s", archive).rc != 0
    assert host.run("curl --silent --max-time 5 --proxy http://127.0.0.1:3128 %s", archive).rc == 0
    assert "407" in host.run("curl --silent --head --proxy http://127.0.0.1:3128 %s", archive).stdout


def test_apt_and_pip_came_by_the_proxy(host: Host) -> None:
    """The role was applied to a host that had neither python3-venv nor uv."""
    requests = asked(host)
    assert any(request.endswith(".deb") and "python3" in request for request in requests), requests
    assert any(request.startswith("CONNECT ") for request in requests), requests
    assert host.check_output("/usr/local/bin/uv --version")


def test_the_password_is_for_root_alone(host: Host) -> None:
    assert host.file(APT_FILE).mode == 0o600
    assert host.run(f"setpriv --reuid=65534 --regid=65534 --clear-groups cat {APT_FILE}").rc != 0
    assert host.run("setpriv --reuid=65534 --regid=65534 --clear-groups apt-cache policy curl").rc == 0
    assert PASSWORD not in host.check_output("journalctl --output=cat --grep ansible- --no-pager")
    found = host.run(f"grep -rlI {PASSWORD} /etc /opt /var/lib/vllm-fleet /usr/local /run/systemd").stdout.split()
    assert sorted(found) == sorted([APT_FILE, "/etc/way-out.conf"])


def release(host: Host, lock: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    """Have the role vllm build a release on the host."""
    steps = [{"name": "gpufleet.llm.host_support"}, {"name": "gpufleet.llm.vllm", "tasks_from": "release"}]
    play = {
        "hosts": host_name(host),
        "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": step} for step in steps],
    }
    file = lock.with_name("release.yml")
    file.write_text(yaml.safe_dump([play]))
    given = {"vllm_lock_file": str(lock), "vllm_packages": [], "check_inputs_collect": True, **variables}
    return playbook(
        file, f"--inventory={ROOT}/molecule/shared/inventory/", "-vvv", "--diff", "--extra-vars", json.dumps(given)
    )


def test_a_release_comes_by_the_proxy(host: Host, lock: Path) -> None:
    before = len(asked(host))
    done = release(host, lock, **OFFLINE)
    assert done.returncode != 0
    assert "could not be built" in done.stdout
    assert len(asked(host)) == before
    done = release(host, lock)
    assert done.returncode == 0, done.stdout
    assert len(asked(host)) > before
    assert host.run("ls /opt/vllm/releases/*/lib/python3*/site-packages/iniconfig/__init__.py").rc == 0
    assert PASSWORD not in done.stdout + done.stderr


def test_modes_do_not_depend_on_the_umask_of_the_login(host: Host) -> None:
    """What the roles wrote until here, everybody can read, but for the one file with a password."""
    assert host.check_output("/usr/local/bin/strict-python -c 'import os; print(oct(os.umask(0)))'") == "0o27"
    places = "/opt/uv /opt/vllm /usr/local/bin /etc/apt /var/lib/apt/lists"
    closed = host.check_output(f"find {places} ! -type l ! -perm -o=r ! -name partial ! -name lock").split()
    assert closed == [APT_FILE]
    assert host.check_output("setpriv --reuid=65534 --regid=65534 --clear-groups /usr/local/bin/uv --version")


def test_uv_does_not_come_without_it(host: Host) -> None:
    host.check_output("mv /opt/uv/releases /opt/uv/releases.aside && mkdir /opt/uv/releases")
    before = len(asked(host))
    assert "pip could not install uv" in refused(host, "proxy", **OFFLINE)
    assert len(asked(host)) == before
    host.check_output("rm -r /opt/uv/releases && mv /opt/uv/releases.aside /opt/uv/releases")


def test_what_a_host_downloads_by_itself_goes_by_it(host: Host) -> None:
    """Unattended upgrades, say: the role base sees to it that apt knows of a proxy that is new or another one."""
    base = {
        "role_under_test": "base", "base_packages": [], "base_time_sync": False, "base_unattended_upgrades": False, "base_core_dumps": True,
    }  # fmt: skip
    host.check_output(f"rm -f {APT_FILE}")
    assert host.run("apt-get update --error-on=any").rc != 0
    told = applied(host, "proxy", "--diff", **base)
    assert changed(told)
    assert PASSWORD not in told
    assert host.run("apt-get update --error-on=any").rc == 0
    assert not changed(applied(host, "proxy", **base))
    applied(host, "proxy", **base, **OFFLINE)
    assert not host.file(APT_FILE).exists
    assert not changed(applied(host, "proxy", **base, **OFFLINE))


def test_an_address_that_is_none_is_refused_and_not_shown(host: Host) -> None:
    told = refused(host, "proxy", fleet_proxy={"http": f"proxy.example:3128/{PASSWORD}", "no": []})
    assert "fleet_proxy: http is no address of a proxy; it is http://NAME:PORT" in told
    assert "key 'no' is unknown" in told
    assert PASSWORD not in told
