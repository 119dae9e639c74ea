"""
The driver's packages on hosts where apt really installs, upgrades, pins, holds and removes them.

What stands in for what is told in vendors.py beside: the hosts are Debian and say that they are Ubuntu 24.04, their GPUs and NVSwitches are
files, the packages are empty but for names, versions, dependencies, conflicts, units and a script for nvidia-smi. No kernel module and no GPU is
here. The tests of a host build on each other, in the order of this file.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import nvidia_apt
from testinfra.host import Host

from tests.nvidia import Machine
from tests.roles import applied, changed, refused
from tests.unit.test_nvidia_plan import decided

OLD, NEW, NEXT = "580.159.03", "580.178.04", "595.71.05"
HARDWARE = "/srv/vendors/hardware"
ROLE = "nvidia_driver"


def version(host: Host, name: str) -> str:
    """Version of an installed package, without the vendor's revision; empty when it is not there."""
    done = host.run("dpkg-query --showformat='${db:Status-Abbrev}${Version}' --show %s", name)
    found = re.match(r".i (.*?)-", done.stdout)
    return found[1] if found else ""


def driver_packages(host: Host) -> list[str]:
    """What is installed of the driver."""
    listed = host.check_output("dpkg-query --showformat='${db:Status-Abbrev}|${Package}\\n' --show").splitlines()
    return [
        name
        for line in listed
        for state, name in [line.split("|")]
        if state[1] == "i" and re.search(r"nvidia|cuda-drivers", name)
    ]


def told(output: str) -> str:
    """What Ansible printed, without the line breaks and quotes of its own."""
    return " ".join(output.split()).replace("''", "'")


def use_gpus(host: Host) -> None:
    """A process of a unit holds a GPU, as /proc shows it."""
    host.check_output(
        f"mkdir -p {HARDWARE}/proc/4711/fd && ln -sf /dev/nvidia0 {HARDWARE}/proc/4711/fd/3 && echo python3 >{HARDWARE}/proc/4711/comm"
        f" && echo 0::/system.slice/vllm@chat.service >{HARDWARE}/proc/4711/cgroup"
    )


def free_gpus(host: Host) -> None:
    host.check_output(f"rm -rf {HARDWARE}/proc/4711")


# --- from Ubuntu's archive, on a machine with NVSwitches ------------------------------------------------------------


def test_the_newest_of_the_branch_works_on_all_gpus(hgx: Host) -> None:
    assert hgx.check_output("nvidia-smi --query-gpu=index").count(OLD) == 8
    assert version(hgx, "libnvidia-compute-580-server") == OLD
    assert hgx.file("/lib/modules/6.8.0-88-generic/kernel/nvidia-580srv-open/nvidia.ko").exists
    for unit in ("vllm-fleet-nvidia-nodes", "nvidia-persistenced", "nvidia-fabricmanager"):
        assert hgx.service(unit).is_running, unit
    assert "--no-persistence-mode" not in hgx.check_output("systemctl show --property=ExecStart nvidia-persistenced")
    assert hgx.file(f"{HARDWARE}/dev/nvidia-uvm").exists


def test_the_fabric_manager_is_there_for_nvswitches_only_and_of_the_same_version(hgx: Host, one: Host) -> None:
    assert version(hgx, "nvidia-fabricmanager-580") == OLD
    assert not [name for name in driver_packages(one) if "fabric" in name]


def test_a_run_that_changes_nothing_looks_once(hgx: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the role beside the one that brings the facts of the host."""
    monkeypatch.setenv("ANSIBLE_CALLBACKS_ENABLED", "gpufleet.llm.remote_calls")
    said = applied(hgx, ROLE)
    assert not changed(said)
    assert re.findall(r"remote calls: \S+ (\d+) ", said) == ["2"], said


def test_nothing_that_upgrades_touches_the_driver(hgx: Host) -> None:
    hgx.check_output(f"/srv/vendors.py archive /srv/vendors 535.309.01 580.126.09 {OLD} {NEW} {NEXT} && apt-get update")
    hgx.check_output(
        """printf 'Unattended-Upgrade::Origins-Pattern { "origin=Ubuntu"; };\n' >/etc/apt/apt.conf.d/99-test && unattended-upgrade --verbose"""
    )
    assert hgx.package("ordinary").version == "5.0"
    assert version(hgx, "libnvidia-compute-580-server") == OLD
    hgx.check_output("DEBIAN_FRONTEND=noninteractive apt-get --yes dist-upgrade")
    assert version(hgx, "libnvidia-compute-580-server") == OLD
    assert version(hgx, "nvidia-fabricmanager-580") == OLD
    assert "linux-image-generic" in hgx.check_output("apt-mark showhold")  # kernel and driver go together
    assert not changed(applied(hgx, ROLE))


def test_without_the_hold_they_would(hgx: Host) -> None:
    applied(hgx, ROLE, nvidia_driver_hold=False)
    assert "Inst libnvidia-compute-580-server" in hgx.check_output("apt-get --simulate dist-upgrade")
    assert "libnvidia-compute-580-server" in hgx.check_output("unattended-upgrade --dry-run --verbose 2>&1")
    applied(hgx, ROLE)
    assert "Inst libnvidia-compute-580-server" not in hgx.check_output("apt-get --simulate dist-upgrade")


def test_an_upgrade_under_running_work_is_refused(hgx: Host) -> None:
    use_gpus(hgx)
    try:
        said = told(refused(hgx, ROLE, nvidia_driver_version=NEW))
        assert "while vllm@chat.service uses the GPUs" in said
        assert "nothing has been changed" in said
        assert version(hgx, "libnvidia-compute-580-server") == OLD
    finally:
        free_gpus(hgx)


def test_an_exact_version_is_installed_held_and_in_use_without_a_reboot(hgx: Host) -> None:
    applied(hgx, ROLE, nvidia_driver_version=NEW)
    assert hgx.check_output("nvidia-smi").count(NEW) == 8
    assert version(hgx, "nvidia-fabricmanager-580") == NEW
    assert not changed(applied(hgx, ROLE, nvidia_driver_version=NEW))


def test_back_to_the_version_of_before(hgx: Host) -> None:
    applied(hgx, ROLE, nvidia_driver_version=OLD)
    assert hgx.check_output("nvidia-smi").count(OLD) == 8
    assert version(hgx, "nvidia-fabricmanager-580") == OLD


def test_from_branch_to_branch_nothing_of_the_old_one_is_left(hgx: Host) -> None:
    applied(hgx, ROLE, nvidia_driver_branch="595")
    assert hgx.check_output("nvidia-smi").count(NEXT) == 8
    assert version(hgx, "nvidia-fabricmanager-595") == NEXT
    assert [name for name in driver_packages(hgx) if "-580" in name] == []
    assert not changed(applied(hgx, ROLE, nvidia_driver_branch="595"))


def test_another_source_is_refused_as_long_as_this_one_is_there(hgx: Host) -> None:
    assert "The two must not be mixed" in told(
        refused(hgx, ROLE, nvidia_driver_source="nvidia", nvidia_driver_keyring_sha256="0" * 64)
    )


def test_a_repository_that_is_there_for_something_else_does_not_bring_its_driver(hgx: Host) -> None:
    """As CUDA's compiler or DCGM need it: it outranks the archive, and its packages replace those of the archive."""
    would = "apt-get --simulate install nvidia-dkms-open libnvidia-compute | grep ^Inst"
    preferences = "/etc/apt/preferences.d/50-vllm-fleet-nvidia"
    hgx.check_output(
        "echo 'deb [trusted=yes] file:/srv/vendors/nvidia /' >/etc/apt/sources.list.d/cuda.list && apt-get update"
        " && printf 'Package: *\\nPin: release l=NVIDIA CUDA\\nPin-Priority: 600\\n' >/etc/apt/preferences.d/cuda-repository-pin-600"
    )
    try:
        hgx.check_output(
            "apt-mark unhold $(apt-mark showhold) && DEBIAN_FRONTEND=noninteractive apt-get --yes dist-upgrade"
        )
        assert version(hgx, "libnvidia-compute-595-server") == NEXT
        assert hgx.run(would).rc != 0
        assert "Inst cuda-nvcc-13-0" in hgx.check_output("apt-get --simulate install cuda-nvcc-13-0")
        hgx.check_output(f"mv {preferences} /srv/preferences")
        assert "Inst libnvidia-compute " in hgx.check_output(would)  # it is these that keep it away
    finally:
        hgx.check_output(
            f"test -e {preferences} || mv /srv/preferences {preferences}; rm /etc/apt/sources.list.d/cuda.list /etc/apt/preferences.d/cuda-*; apt-get update"
        )
    assert changed(applied(hgx, ROLE, nvidia_driver_branch="595"))  # held again
    assert not changed(applied(hgx, ROLE, nvidia_driver_branch="595"))


def test_a_driver_that_waits_for_a_reboot_is_told(hgx: Host) -> None:
    use_gpus(hgx)
    hgx.check_output(f"echo {OLD} >{HARDWARE}/sys/module/nvidia/version")
    try:
        said = told(refused(hgx, ROLE, nvidia_driver_branch="595"))
        assert f"the kernel runs the module {OLD}, and the libraries are {NEXT}" in said
        assert "set nvidia_driver_reboot: true" in said
    finally:
        free_gpus(hgx)
    applied(hgx, ROLE, nvidia_driver_branch="595")  # nobody uses it any more: the module is replaced
    assert hgx.check_output("nvidia-smi").count(NEXT) == 8


def test_a_gpu_that_is_lost_fails_the_run(hgx: Host) -> None:
    hgx.check_output(f"cp {HARDWARE}/nvidia-smi.csv /srv/all.csv && sed -i '$d' {HARDWARE}/nvidia-smi.csv")
    try:
        assert "nvidia-smi shows 7 GPUs, and 8 are expected" in told(refused(hgx, ROLE, nvidia_driver_branch="595"))
    finally:
        hgx.check_output(f"cp /srv/all.csv {HARDWARE}/nvidia-smi.csv")


def test_it_can_be_removed(hgx: Host) -> None:
    applied(hgx, ROLE, nvidia_driver_state="absent")
    assert driver_packages(hgx) == []
    for path in ("/etc/apt/preferences.d/50-vllm-fleet-nvidia", "/etc/modprobe.d/vllm-fleet-nvidia.conf"):
        assert not hgx.file(path).exists
    assert not changed(applied(hgx, ROLE, nvidia_driver_state="absent"))


# --- from NVIDIA's repository, on a machine without NVSwitches ------------------------------------------------------


def keyring(host: Host) -> str:
    return str(host.check_output("sha256sum /srv/vendors/cuda-keyring_1.1-1_all.deb").split()[0])


def everything(host: Host) -> str:
    """All packages, configuration, units and loaded modules of a host."""
    return str(
        host.check_output(
            f"dpkg --list; systemctl list-units; find /etc /lib/systemd /usr/local /boot /var/lib/apt {HARDWARE} -type f -exec sha256sum {{}} +"
        )
    )


def test_check_mode_shows_the_decision_and_changes_nothing(one: Host) -> None:
    applied(one, ROLE, nvidia_driver_state="absent")
    assert driver_packages(one) == []
    before = everything(one)
    said = told(applied(one, ROLE, "--check", "--diff"))
    assert "decision: install: open modules, branch 580, from Ubuntu's archive" in said
    assert "packages: nvidia-headless-no-dkms-580-server-open=580.*" in said
    assert "+blacklist nouveau" in said
    assert changed(said)
    assert everything(one) == before


def test_what_lacks_security_fixes_is_refused_until_the_archive_has_newer(one: Host) -> None:
    one.check_output("/srv/vendors.py archive /srv/vendors 580.126.09 && apt-get update")
    before = everything(one)
    try:
        for options in ([], ["--check"]):
            said = told(refused(one, ROLE, *options))
            assert (
                "Of nvidia-headless-no-dkms-580-server-open Ubuntu's archive has 580.126.09, by the package lists of the host"
                in said
            )
            assert "security fixes of the branch 580 came with 580.159.03" in said
        assert everything(one) == before
    finally:
        one.check_output("/srv/vendors.py archive /srv/vendors")
    # the host's own lists are still the old ones
    applied(one, ROLE)
    assert OLD in one.check_output("nvidia-smi")
    applied(one, ROLE, nvidia_driver_state="absent")
    one.check_output("rm -rf %s/sys/module/nvidia %s/proc/driver", HARDWARE, HARDWARE)


def test_what_a_killed_run_left_is_finished_when_no_other_apt_works(one: Host) -> None:
    # as far as a run comes that is killed while dpkg works
    one.check_output("mkdir -p /etc/apt/preferences.d && touch /etc/apt/preferences.d/50-vllm-fleet-nvidia")
    one.check_output("dpkg --unpack /srv/vendors/ubuntu/libnvidia-compute-580-server_580.159.03-*.deb")
    one.check_output("rm -rf %s/sys/module/nvidia %s/proc/driver", HARDWARE, HARDWARE)
    lock = "import fcntl, time; file = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); time.sleep(45)"
    one.check_output("systemd-run --unit=another-apt python3 -c %s", lock)
    assert "retries left" in applied(one, ROLE)
    assert OLD in one.check_output("nvidia-smi")
    applied(one, ROLE, nvidia_driver_state="absent")
    one.check_output("rm -rf %s/sys/module/nvidia %s/proc/driver", HARDWARE, HARDWARE)


def test_a_key_that_is_not_the_known_one_is_refused(one: Host) -> None:
    refused(one, ROLE, nvidia_driver_source="nvidia", nvidia_driver_keyring_sha256="0" * 64)
    assert driver_packages(one) == []


def test_nvidias_repository_keeps_its_branch(one: Host) -> None:
    variables = {"nvidia_driver_source": "nvidia", "nvidia_driver_keyring_sha256": keyring(one)}
    applied(one, ROLE, **variables)
    assert OLD in one.check_output("nvidia-smi")
    assert "nvidia-driver-pinning-580" in driver_packages(one)
    assert not changed(applied(one, ROLE, **variables))
    one.check_output("apt-mark unhold $(apt-mark showhold)")
    assert NEXT not in one.check_output("apt-get --simulate dist-upgrade")
    applied(one, ROLE, **variables, nvidia_driver_branch="595")
    assert NEXT in one.check_output("nvidia-smi")
    assert version(one, "libnvidia-compute") == NEXT
    assert [name for name in driver_packages(one) if "-580" in name] == []


# --- from Debian's own archive --------------------------------------------------------------------------------------


def test_debians_real_packages_fit_together(hgx: Host, tmp_path: Path) -> None:
    """
    Real packages, the real apt, in simulation: nothing is installed. tests/drills/test_debian_driver.py installs them.

    The lists are in a directory of their own, because this host says that it is Ubuntu and does not know Debian's archive any more.
    """
    variables = {"source": "debian", "flavour": "proprietary"}
    plan = decided(Machine("bare-debian12", tmp_path).findings(), **variables)
    assert plan["action"] == "install", plan["told"]
    hgx.check_output(
        "mkdir -p /srv/apt/lists/partial /srv/apt/archives/partial /srv/apt/preferences.d"
        " && sed 's/ main$/ main contrib non-free non-free-firmware/' /srv/debian.list >/srv/apt/sources.list"
    )
    hgx.check_output("printf %s >/srv/apt/preferences.d/nvidia", nvidia_apt.preferences("debian"))
    apt = (
        "apt-get -oDir::Etc::SourceList=/srv/apt/sources.list -oDir::Etc::PreferencesParts=/srv/apt/preferences.d -oDir::State::Lists=/srv/apt/lists"
        " -oDir::Cache=/srv/apt"
    )
    hgx.check_output(f"{apt} update")
    said = hgx.check_output(f"{apt} --simulate --no-install-recommends install {' '.join(plan['packages'])}")
    found = dict(re.findall(r"^Inst (\S+)(?: \[[^]]*\])? \((\S+) ", said, re.MULTILINE))
    for name in ("nvidia-kernel-dkms", "nvidia-smi", "libcuda1", "firmware-nvidia-gsp"):
        assert found[name].startswith("535."), name
    assert [name for name in found if re.match(r"linux-headers-6\.1\..*-cloud-amd64", name)]
    assert not [name for name in found if name.startswith("xserver-xorg")]  # no desktop on a server
