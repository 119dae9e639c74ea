"""
Debian 12's own packages of the driver, really installed by the role: DKMS builds the module, and the role says what is missing then. Before that,
what lacks security fixes is refused.

By hand, as root, where a Docker engine and Debian's archive answer (15 minutes on two cores, most of it DKMS; 3 GB on the disk):

    .venv/bin/pytest tests/drills/test_debian_driver.py -s

What stands in: one PCI device and the name of the running kernel are files, because a test host has no GPU and the kernel of its machine. So the
module is built for the kernel of the headers that Debian has, and it cannot be loaded: the role has to say so.
The short form, in molecule/nvidia_driver: apt resolves the same list in simulation.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import testinfra
import yaml
from testinfra.host import Host

from tests.hosts import hosts

ROOT = Path(__file__).resolve().parents[2]
FLEET = HOST = "drill-debian-driver"
HARDWARE = "/srv/hardware"
VARIABLES = {
    "nvidia_driver_source": "debian",
    "nvidia_driver_flavour": "proprietary",
    "__nvidia_driver_test_hardware": HARDWARE,
}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """Debian 12 with a T4, on the kernel of Debian's clouds."""
    hosts.down(FLEET)
    hosts.up(FLEET, {HOST: "debian12"})
    connected = testinfra.get_host(f"docker://{HOST}")
    connected.check_output("apt-get update")
    device = f"{HARDWARE}/sys/bus/pci/devices/0000:10:00.0"
    connected.check_output(
        f"mkdir -p {device} {HARDWARE}/proc/sys/kernel {HARDWARE}/dev && echo 0x10de >{device}/vendor && echo 0x1eb8 >{device}/device"
        f" && echo 0x030200 >{device}/class"
        f" && apt-cache depends linux-headers-cloud-amd64 | sed -n 's/.*Depends: linux-headers-//p' >{HARDWARE}/proc/sys/kernel/osrelease"
    )
    yield connected
    hosts.down(FLEET)


@pytest.fixture(scope="module")
def kernel(host: Host) -> str:
    found: str = host.check_output(f"cat {HARDWARE}/proc/sys/kernel/osrelease")
    assert re.fullmatch(r"6\.1\.\S+-cloud-amd64", found)
    return found


def archives(host: Host) -> dict[str, str]:
    """Debian's archive and that of its security fixes, from where the host has them; spelled otherwise, as the role wants it."""
    found = re.findall(
        r"^deb (\S+?)/* bookworm(-security|) ", host.file("/etc/apt/sources.list").content_string, re.MULTILINE
    )
    urls = {suite: f"{url}/" for url, suite in found}
    return {"nvidia_driver_debian_url": urls[""], "nvidia_driver_debian_security_url": urls["-security"]}


def applied(host: Host, directory: Path, **variables: object) -> tuple[int, str]:
    """Apply the role: exit code, and what was told without line breaks."""
    inventory = {"ansible_connection": "community.docker.docker", "ansible_python_interpreter": "/usr/bin/python3"}
    play = {
        "hosts": "all",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": {"name": "gpufleet.llm.nvidia_driver"}}],
    }
    (directory / "hosts.yml").write_text(
        yaml.safe_dump({"all": {"hosts": {HOST: inventory}, "vars": {**VARIABLES, **archives(host), **variables}}})
    )
    (directory / "play.yml").write_text(yaml.safe_dump([play]))
    began = time.monotonic()
    done = subprocess.run(
        [str(ROOT / ".venv/bin/ansible-playbook"), "-i", str(directory / "hosts.yml"), str(directory / "play.yml")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "LC_ALL": "C.UTF-8", "ANSIBLE_FORCE_COLOR": "0"},
    )  # fmt: skip
    print(f"applied in {time.monotonic() - began:.0f} s")
    return done.returncode, " ".join((done.stdout + done.stderr).split()).replace("''", "'")


def test_what_lacks_security_fixes_is_refused(host: Host, tmp_path: Path) -> None:
    floors = {"535": "535.999.01"}
    for known in ("when the role has added the source", "before anything is done"):
        code, said = applied(host, tmp_path, nvidia_driver_floors=floors)
        assert code != 0
        assert ("decision: refuse: Of " in said) == (known == "before anything is done"), said
        assert "but security fixes of the branch 535 came with 535.999.01. Have apt ask" in said, said
    assert host.run("dpkg-query --show nvidia-smi nvidia-kernel-dkms libcuda1").stdout == ""


def test_debians_driver_is_installed_and_the_role_says_what_is_missing(host: Host, kernel: str, tmp_path: Path) -> None:
    code, said = applied(host, tmp_path)
    assert "decision: install: proprietary modules, branch 535, from Debian's archive" in said, said
    # Everything is there but a kernel that the module is for, and its device.
    assert code != 0
    assert f"The module nvidia could not be loaded on {HOST}: modprobe:" in said, said
    assert re.search(r"Module nvidia-current not found in directory /lib/modules/", said), said
    print(
        host.check_output(
            "dpkg-query --show nvidia-kernel-dkms nvidia-smi libcuda1 dkms gcc-12 linux-headers-cloud-amd64"
        )
    )


def test_dkms_built_the_module_for_the_kernel_of_the_headers(host: Host, kernel: str) -> None:
    package = host.check_output("dpkg-query --showformat='${Version}' --show nvidia-kernel-dkms").partition("-")[0]
    assert package.startswith("535.")
    assert f"nvidia-current/{package}, {kernel}, x86_64: installed" in host.check_output("dkms status")
    module = host.check_output(f"modinfo -k {kernel} nvidia-current")
    assert re.search(rf"^version:\s+{re.escape(package)}$", module, re.MULTILINE)
    assert re.search(rf"^vermagic:\s+{re.escape(kernel)} ", module, re.MULTILINE)


def test_nvidia_smi_is_there_and_asks_for_the_module(host: Host) -> None:
    done = host.run("nvidia-smi")
    assert done.rc == 9
    assert "couldn't communicate with the NVIDIA driver" in done.stdout


def test_no_desktop_came_along_and_everything_is_held(host: Host) -> None:
    installed = host.check_output("dpkg-query --showformat='${Package}\\n' --show").splitlines()
    assert not [name for name in installed if name.startswith("xserver-xorg")]
    held = host.check_output("apt-mark showhold").splitlines()
    assert {"nvidia-kernel-dkms", "nvidia-smi", "libcuda1", "firmware-nvidia-gsp"} <= set(held)


def test_a_second_run_installs_nothing_and_says_the_same(host: Host, tmp_path: Path) -> None:
    code, said = applied(host, tmp_path)
    assert code != 0
    assert "decision: leave: driver 535." in said
    assert "then: load, because the module 535." in said
    assert f"The module nvidia could not be loaded on {HOST}: modprobe:" in said, said


def test_without_the_stand_in_it_is_the_device_that_is_missing(host: Host, tmp_path: Path) -> None:
    code, said = applied(host, tmp_path, __nvidia_driver_test_hardware="/", nvidia_driver_expected_gpus=1)
    assert code != 0
    assert "nvidia_driver_expected_gpus is 1, but no NVIDIA GPU is on the PCI bus." in said, said
