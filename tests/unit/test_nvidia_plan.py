"""What is decided about the driver: every recorded machine against the variables that matter for it, as one table."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.module_utils import nvidia_apt, nvidia_plan
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia import DRIVER_PACKAGE

from tests.nvidia import MACHINES, Machine

ROLE = Path(__file__).resolve().parents[2] / "roles/nvidia_driver"
# machine | variables, without their prefix | decision: action, source, flavour, branch or version, and what follows | what is told
TABLE = """
no-gpu                 |                                            | none                          | there is no NVIDIA GPU on the PCI bus
no-gpu                 | expected_gpus: 1                           | refuse                        | no NVIDIA GPU is on the PCI bus
passthrough            |                                            | none                          | 2 x 0x2330 (Hopper), given to guests

bare-t4                |                                            | install ubuntu open 580       | nvidia-headless-no-dkms-580-server-open=580.* nvidia-utils-580-server=580.*
bare-t4                | manage: auto                               | install ubuntu open 580       | and linux-modules-nvidia-580-server-open-6.8.0-1043-aws linux-modules-nvidia-580-server-open-aws as the source has them
bare-t4                | flavour: proprietary                       | install ubuntu proprietary 580 | nvidia-headless-no-dkms-580-server=580.*
bare-t4                | version: 580.159.03                        | install ubuntu open 580       | nvidia-utils-580-server=580.159.03-*
bare-t4                | version: 580.95.05                         | refuse                        | security fixes of the branch 580 came with 580.159.03
bare-t4                | {version: 580.95.05, allow_insecure: true} | install ubuntu open 580       | nvidia-utils-580-server=580.95.05-*
bare-t4                | branch: "570"                              | refuse                        | gets no security fixes any more
bare-t4                | {branch: "595", version: 580.159.03}       | refuse                        | which is not of the branch 595
bare-t4                | branch: "535"                              | install ubuntu open 535       | nvidia-utils-535-server=535.*
bare-t4                | source: debian                             | refuse                        | the host runs Ubuntu
bare-t4                | source: nvidia                             | install nvidia open 580       | nvidia-driver-pinning-580 linux-headers-aws
bare-t4                | {source: nvidia, branch: "595"}            | install nvidia open 595       | libnvidia-compute=595.* nvidia-utils=595.*
bare-t4                | {source: nvidia, version: 580.159.03}      | install nvidia open 580       | nvidia-driver-pinning-580.159.03
bare-t4                | manage: never                              | leave                         | nvidia_driver_manage is never; there is no driver
bare-t4                | kernel_flavour: aws-edge                   | install ubuntu open 580       | linux-modules-nvidia-580-server-open-aws-edge
t4                     |                                            | leave                         | driver 535.309.01 from Ubuntu's archive works (1 GPU), and this role did not install it
t4                     | manage: always                             | upgrade ubuntu open 580       | the branch is 535, not 580
t4                     | {manage: always, branch: "535"}            | leave                         | is as asked for
t4                     | {manage: always, source: nvidia}           | refuse                        | The two must not be mixed
t4                     | state: absent                              | refuse                        | This role did not install the driver
t4                     | {manage: always, state: absent}            | remove                        | 11 packages of the driver are removed

v100                   |                                            | leave                         | works (4 GPUs)
v100                   | manage: always                             | leave                         | is as asked for
v100                   | {manage: always, branch: "595"}            | refuse                        | is not driven by the branch 595 any more
bare-v100              |                                            | install ubuntu proprietary 580 | linux-modules-nvidia-580-server-generic
bare-v100              | flavour: open                              | refuse                        | does not work with the open kernel modules
mixed-generations      |                                            | refuse                        | needs the open kernel modules and another one the proprietary ones
gh200                  |                                            | install ubuntu open 580       | linux-modules-nvidia-580-server-open-nvidia-64k
gh200                  | flavour: proprietary                       | refuse                        | Grace Hopper

a100                   |                                            | leave                         | replaces memory rows at its next reset
a100                   | {manage: always, source: ubuntu}           | refuse                        | The driver is from NVIDIA's repository, and Ubuntu's archive is wanted
a100                   | manage: always                             | upgrade nvidia open 580       | linux-headers-generic is missing
mig                    |                                            | leave                         | is as asked for
mig                    | hold: false                                | leave                         | not held any more: libnvidia-cfg1-580-server
mig                    | flavour: proprietary                       | upgrade ubuntu proprietary 580 | the kernel modules are open, not proprietary
mig                    | version: 580.178.04                        | upgrade ubuntu open 580       | the version is 580.159.03, not 580.178.04
mig                    | branch: "535"                              | upgrade ubuntu open 535       | the branch is 580, not 535

bare-h100x8            |                                            | install ubuntu open 580       | 8 x 0x2330 (Hopper), 4 x NVSwitch
bare-h100x8            | expected_gpus: 4                           | install ubuntu open 580       | nvidia-headless-no-dkms-580-server-open=580.*
h100x8                 |                                            | leave                         | works (8 GPUs)
h100x8                 | {manage: always, branch: "595"}            | refuse                        | while vllm@chat.service uses the GPUs
h100x8                 | {manage: always, branch: "595", reboot: true} | upgrade ubuntu open 595    | the branch is 580, not 595
h100x8                 | {manage: always, state: absent}                           | refuse                        | vllm@chat.service uses the GPUs
h100x8                 | expected_gpus: 7                           | leave                         | not proved: nvidia-smi shows 8 GPUs, and 7 are expected
h100x8-fabric-mismatch |                                            | leave                         | not proved: the fabric manager is 580.126.09, and the driver 580.159.03
h100x8-fabric-mismatch |                                            | leave                         | not proved: GPU 0 is not part of the fabric: In Progress
h100x8-fabric-mismatch | manage: always                             | leave                         | fabric manager: nvidia-fabricmanager-580=580.159.03-* libnvidia-nscq-580=580.159.03-*
h100x8-fabric-mismatch | {manage: always, fabric_manager: false}    | leave                         | is as asked for
h100x8-guest           | manage: always                             | leave                         | is as asked for
h100x8-guest           |                                            | leave                         | works (8 GPUs)
h200-container         |                                            | leave                         | works, and it is a matter of a container's machine
h200-container         | {manage: always, branch: "595"}            | leave                         | works, and it is a matter of a container's machine
bare-b200              |                                            | install ubuntu open 580       | Blackwell or newer
bare-b200              | flavour: proprietary                       | refuse                        | does not work with the proprietary kernel modules
bare-b200              | branch: "535"                              | refuse                        | It needs 570 or newer
bare-b200x8            |                                            | refuse                        | They need nvlsm, which Ubuntu's archive does not have
bare-b200x8            | source: nvidia                             | install nvidia open 580       | linux-headers-generic-hwe-24.04
bare-b200x8            | fabric_manager: false                      | install ubuntu open 580       | linux-modules-nvidia-580-server-open-generic-hwe-24.04

consumer               |                                            | leave                         | warning: the branch 570 gets no security fixes any more
consumer               | manage: always                             | upgrade ubuntu open 580       | the branch is 570, not 580
cloud-image            |                                            | leave                         | warning: the branch 550 gets no security fixes any more
cloud-image            | manage: always                             | upgrade nvidia open 580       | the branch is 550, not 580
dgx                    |                                            | leave                         | it is a matter of DGX Server 7.3.1
dgx                    | {manage: always, branch: "595"}            | leave                         | it is a matter of DGX Server 7.3.1
dgx                    | state: absent                              | refuse                        | The driver belongs to DGX Server 7.3.1
runfile                |                                            | leave                         | it is a matter of NVIDIA's .run installer
runfile                | manage: always                             | leave                         | it is a matter of NVIDIA's .run installer
runfile-broken         |                                            | refuse                        | Remove it by nvidia-uninstall

half-upgraded          |                                            | leave then reboot             | blocked: The host has to be rebooted: the kernel runs the module 570.195.03, and the libraries are 580.159.03
half-upgraded          | reboot: true                               | leave then reboot             | then: reboot, because the kernel runs the module 570.195.03
half-upgraded-idle     |                                            | leave then reload             | so new programs fail
half-installed         |                                            | upgrade ubuntu open 580       | was left half installed
nouveau                |                                            | leave then reboot             | blocked: The host has to be rebooted: nouveau has the GPUs
nouveau                | reboot: true                               | leave then reboot             | held: libnvidia-cfg1-580-server
bare-nouveau           |                                            | install ubuntu open 580       | 0x2236 (Turing or Ampere)
new-kernel             |                                            | leave                         | warning: the next boot takes the kernel 6.8.0-90-generic, and there is no module for it
old-ours               |                                            | upgrade ubuntu open 580       | 580.95.05 lacks security fixes that came with 580.159.03
old-ours               | allow_insecure: true                       | leave                         | is as asked for
old-ours               | version: 580.95.05                         | refuse                        | security fixes of the branch 580 came with 580.159.03
lost-gpu               |                                            | leave                         | not proved: nvidia-smi shows 7 GPUs, and 8 are expected; missing is 0000:ed:00.0
lost-gpu               |                                            | leave                         | warning: GPU 0 (0000:17:00.0) asks for a recovery action: GPU Reset
mixed                  |                                            | refuse                        | come from more than one source

bare-debian12          |                                            | install nvidia open 580       | linux-headers-cloud-amd64 nvidia-driver-cuda=580.*
bare-debian12          | source: debian                             | refuse                        | Of nvidia-open-kernel-dkms Debian's archive has 535.261.03, by the package lists
bare-debian12          | {source: debian, flavour: proprietary}     | install debian proprietary 535 | nvidia-smi nvidia-driver-bin libcuda1
bare-debian12          | {source: debian, allow_insecure: true}     | install debian open 535       | nvidia-open-kernel-dkms
bare-debian12          | {source: debian, debian_security_url: "x"} | install debian open 535       | nvidia-open-kernel-dkms
bare-debian12          | {source: debian, branch: "580"}            | refuse                        | Debian's archive has the branch 535 for Debian 12, not 580
bare-debian13          |                                            | refuse                        | Secure Boot is on, and the modules of NVIDIA's repository are built on the host
bare-debian13          | mok_enrolled: true                         | install nvidia open 595       | nvidia-driver-pinning-595 linux-headers-amd64
bare-debian13          | {branch: "580", mok_enrolled: true}        | refuse                        | not known to have the branch 580 for Debian 13.
bare-debian13          | {source: debian, mok_enrolled: true}       | refuse                        | gets no security fixes any more
debian12-no-module     | {source: debian, flavour: proprietary}     | upgrade debian proprietary 535 | linux-headers-cloud-amd64
debian12-no-module     | {source: debian, flavour: proprietary, state: absent} | remove             | packages of the driver are removed
"""  # noqa: E501 - a table is read by its columns
ROWS = [tuple(cell.strip() for cell in line.split("|")) for line in TABLE.splitlines() if line.strip()]


def load(path: str) -> Any:
    return yaml.safe_load((ROLE / path).read_text())


def settings(distribution: str, **changed: Any) -> dict[str, Any]:
    """The role's variables as the decision gets them: its defaults, and what a test changes."""
    defaults, internal = load("defaults/main.yml"), load("vars/main.yml")
    sources = internal["__nvidia_driver_sources"]
    sources["nvidia"]["packages"] = internal["__nvidia_driver_nvidia_packages"][distribution]
    names = set(internal["__nvidia_driver_settings"]) - {"sources"}
    assert set(changed) <= names
    return {**{name: defaults[f"nvidia_driver_{name}"] for name in names}, "sources": sources, **changed}


def decided(found: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return nvidia_plan.decide(found, settings(found["distribution"], **changed))


@pytest.mark.parametrize(("machine", "variables", "decision", "told"), ROWS, ids=[" ".join(row[:2]) for row in ROWS])
def test_decision(machine: str, variables: str, decision: str, told: str, tmp_path: Path) -> None:
    changed = yaml.safe_load(variables) if variables else {}
    result = decided(Machine(machine, tmp_path).findings(), **changed)
    words = [result["action"]]
    if result["action"] in ("install", "upgrade"):
        words += [result["source"], result["flavour"], result["branch"]]
    if result["activate"]:
        words += ["then", result["activate"]]
    lines = "\n".join(result["told"])
    assert " ".join(words) == decision, lines
    assert told in lines, lines


@pytest.mark.parametrize(
    ("machine", "changed", "disturbs"),
    [
        ("bare-t4", {}, False), ("t4", {}, False), ("t4", {"manage": "always"}, True), ("t4", {"manage": "always", "state": "absent"}, True),
        ("half-upgraded-idle", {}, True), ("nouveau", {"reboot": True}, True), ("bare-nouveau", {"reboot": True}, False),
    ],
)  # fmt: skip
def test_a_host_belongs_in_a_batch_when_a_driver_that_is_there_changes(
    machine: str, changed: dict[str, Any], disturbs: bool, tmp_path: Path
) -> None:
    assert decided(Machine(machine, tmp_path).findings(), **changed)["disturbs"] is disturbs


def test_every_machine_is_in_the_table() -> None:
    assert {row[0] for row in ROWS} == set(MACHINES)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_decision_changes_nothing_and_is_the_same_each_time(machine: str, tmp_path: Path) -> None:
    found = Machine(machine, tmp_path).findings()
    wanted = settings(found["distribution"])
    before = repr((found, wanted))
    assert nvidia_plan.decide(found, wanted) == nvidia_plan.decide(found, wanted)
    assert repr((found, wanted)) == before


@pytest.mark.parametrize("machine", MACHINES)
def test_what_the_variables_forbid_is_never_decided(machine: str, tmp_path: Path) -> None:
    found = Machine(machine, tmp_path).findings()
    assert decided(found, manage="never")["action"] in ("leave", "none", "refuse")
    careful = decided(found)
    assert careful["blocked"] or careful["activate"] != "reboot"
    assert not (careful["packages"] and careful["action"] == "leave" and not careful["managed"])


def offers(*versions: str) -> dict[str, Any]:
    """What apt has of a package."""
    return {"candidate": versions[0], "versions": list(versions)}


@pytest.mark.parametrize(
    ("machine", "variables", "available", "refused"),
    [
        ("bare-debian12", {"source": "debian"}, {}, ""),
        ("bare-debian12", {"source": "debian"}, {"libcuda1": offers("535.261.03-1")}, "Of libcuda1 Debian's archive has 535.261.03"),
        # the newest is what counts, by numbers
        ("bare-debian12", {"source": "debian"}, {"libcuda1": offers("535.99.01-1", "535.309.01-0+deb12u1")}, ""),
        # helpers have versions of their own, and packages of other branches are others
        ("bare-debian12", {"source": "debian"}, {"nvidia-persistenced": offers("535.171.04-1~deb12u1"), "libcuda1": offers("525.1-1")}, ""),
        ("bare-t4", {}, {"nvidia-utils-580-server": offers("580.126.09-0ubuntu0.24.04.1")}, "Ubuntu's archive has 580.126.09"),
        ("old-ours", {}, {"nvidia-utils-580-server": offers("580.95.05-0ubuntu0.24.04.1")}, "Ubuntu's archive has 580.95.05"),
        ("old-ours", {"allow_insecure": True}, {"nvidia-utils-580-server": offers("580.95.05-0ubuntu0.24.04.1")}, ""),
        # Ubuntu has packages of the same names, and NVIDIA's repository is not there yet
        ("bare-t4", {"source": "nvidia"}, {"nvidia-utils-580": offers("580.126.09-0ubuntu0.24.04.1")}, ""),
    ],
)  # fmt: skip
def test_what_lacks_security_fixes_is_refused_where_it_is_known(
    machine: str, variables: dict[str, Any], available: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    result = decided({**Machine(machine, tmp_path).findings(), "available": available}, **variables)
    assert (result["action"] == "refuse") == result["outdated"] == bool(refused)
    assert refused in result["reason"], result["reason"]
    assert not refused or "nvidia_driver_allow_insecure" in result["advice"]


@pytest.mark.parametrize(
    ("machine", "variables", "available", "refused"),
    [
        ("bare-t4", {"source": "nvidia"}, [], ""),
        ("bare-t4", {"source": "nvidia"}, ["nvidia-driver-pinning-580", "nvidia-driver-pinning-590"], ""),
        ("bare-t4", {"source": "nvidia"}, ["nvidia-driver-pinning-590", "nvidia-driver-pinning-595", "nvidia-driver-pinning-595.71.05"],
         "NVIDIA's repository has no branch 580 for Ubuntu 22.04, by the package lists of the host. It has 590, 595: nvidia_driver_branch."),
        ("bare-t4", {"source": "nvidia", "version": "580.159.03"}, ["nvidia-driver-pinning-580", "nvidia-driver-pinning-580.159.03"], ""),
        ("bare-t4", {"source": "nvidia", "version": "580.200.01"}, ["nvidia-driver-pinning-580", "nvidia-driver-pinning-580.95.05",
         "nvidia-driver-pinning-580.159.03"], "Of the branch 580 it has 580.95.05, 580.159.03: nvidia_driver_version."),
        ("bare-t4", {}, ["nvidia-utils-535-server", "nvidia-utils-580", "nvidia-utils-575-server"], "Ubuntu's archive has no branch 580"),
        ("bare-t4", {}, ["nvidia-utils-580-server"], ""),
        ("bare-debian13", {"mok_enrolled": True}, ["nvidia-driver-pinning-590"], "It has 590: nvidia_driver_branch."),
    ],
)  # fmt: skip
def test_a_branch_that_the_source_does_not_have_is_refused_with_those_that_it_has(
    machine: str, variables: dict[str, Any], available: list[str], refused: str, tmp_path: Path
) -> None:
    found = {**Machine(machine, tmp_path).findings(), "available": {name: offers("1") for name in available}}
    result = decided(found, **variables)
    assert (result["action"] == "refuse") == result["outdated"] == bool(refused)
    assert refused in f"{result['reason']} {result['advice']}"


def test_apt_is_asked_which_branches_there_are(tmp_path: Path) -> None:
    found = Machine("bare-t4", tmp_path).findings()
    assert "nvidia-utils-*" in nvidia_plan.to_ask(decided(found), settings(found["distribution"]))
    assert "nvidia-driver-pinning-*" in nvidia_plan.to_ask(
        decided(found, source="nvidia"), settings(found["distribution"])
    )
    assert nvidia_plan.to_ask(decided(found, state="absent"), settings(found["distribution"])) == []


def test_headers_are_no_driver(tmp_path: Path) -> None:
    """libnvidia-ml-dev comes with compilers: the host is as bare as before, and nobody holds or removes it."""
    machine = Machine("bare-t4", tmp_path)
    status = tmp_path / "var/lib/dpkg/status"
    status.write_text(
        f"{status.read_text()}\nPackage: libnvidia-ml-dev\nStatus: install ok installed\nMaintainer: Ubuntu\nArchitecture: amd64\n"
        "Version: 12.0.140~12.0.1-4build4\n"
    )
    found = machine.findings()
    assert found["origin"] == ""
    assert decided(found)["action"] == "install"
    assert not DRIVER_PACKAGE.match("libnvidia-ml-dev")


def test_the_mark_of_who_looks_after_the_driver_lies_apart_from_settings(tmp_path: Path) -> None:
    """Preferences of apt are for whoever looks after the host, too."""
    machine = Machine("mig", tmp_path)
    preferences = tmp_path / "etc/apt/preferences.d/50-vllm-fleet-nvidia"
    assert machine.findings()["ours"], "of hosts from before there was a mark"
    preferences.unlink()
    assert not machine.findings()["ours"]
    machine.write("var/lib/vllm-fleet/nvidia-driver", b"")
    assert machine.findings()["ours"]


def test_what_the_role_adds_on_the_way_is_known_when_it_is_there(tmp_path: Path) -> None:
    found = Machine("bare-debian12", tmp_path).findings()
    variables = {"source": "debian", "debian_url": "http://mirror.example/debian"}
    assert decided(found, **variables)["action"] == "install"
    assert decided({**found, "added_archives": [variables["debian_url"]]}, **variables)["outdated"]


def test_a_downgrade_is_one_only_when_it_was_asked_for(tmp_path: Path) -> None:
    found = Machine("mig", tmp_path).findings()
    assert decided(found, branch="535")["downgrade"]
    assert not decided(found, version="580.178.04")["downgrade"]


def test_packages_of_another_branch_are_left_over(tmp_path: Path) -> None:
    found = Machine("mig", tmp_path).findings()
    found["packages"]["nvidia-firmware-570-server-570.195.03"] = "570.195.03-0ubuntu0.22.04.1"
    assert decided(found)["leftovers"] == ["nvidia-firmware-570-server-570.195.03"]


# --- apt's preferences ----------------------------------------------------------------------------------------------


def test_the_preferences_name_every_package_of_the_driver_and_none_beside_it(tmp_path: Path) -> None:
    names = set()
    for machine in MACHINES:
        directory = tmp_path / machine
        directory.mkdir()
        names |= set(Machine(machine, directory).findings()["packages"])
    for name in [
        *names,
        "libnvidia-container1",
        "libnvidia-container-tools",
        "nvidia-container-toolkit-base",
        "cuda-nvcc-13-0",
        "nvidia-cuda-toolkit",
    ]:
        named = any(fnmatch.fnmatchcase(name, pattern) for pattern in nvidia_apt.APT_NAMES)
        assert named == bool(DRIVER_PACKAGE.match(name)), name


def test_every_package_that_a_source_brings_is_kept_away_from_the_others() -> None:
    for distribution in ("Ubuntu", "Debian"):
        for entry in settings(distribution)["sources"].values():
            for part in [*entry["packages"], *entry["fabric"]]:
                for name in re.findall(
                    r"'([^']+)'",
                    repr({key: value for key, value in part.items() if key in ("open", "proprietary", "packages")}),
                ):
                    filled = name.format(branch="580", kernel="generic", running="6.8.0-88-generic", version="580")
                    if filled in ("open", "proprietary", "packages") or filled.startswith("linux-headers"):
                        continue
                    assert any(fnmatch.fnmatchcase(filled, pattern) for pattern in nvidia_apt.APT_NAMES), filled


@pytest.mark.parametrize("source", ["ubuntu", "nvidia", "debian"])
def test_the_preferences_shut_out_all_sources_but_one(source: str) -> None:
    text = nvidia_apt.preferences(source)
    (origins,) = re.findall(r"^Pin: release o=/\^\((.*)\)\$/\nPin-Priority: -1$", text, re.MULTILINE)
    assert sorted(origins.split("|")) == sorted(
        origin for name, origin in nvidia_apt.APT_ORIGINS.items() if name != source
    )
    assert all(line.startswith(("Package: ", "Pin: ", "Pin-Priority: ")) or not line for line in text.splitlines())


@pytest.mark.parametrize("version", ["", "580.159.03"])
def test_the_preferences_have_few_patterns(version: str) -> None:
    """apt compares each with every name that it knows, at every call: a hundred of them are three seconds."""
    patterns = re.findall(
        r"[^ \n]*[*?[][^ \n]*", re.sub(r"(?m)^Pin.*$", "", nvidia_apt.preferences("ubuntu", version=version))
    )
    assert 5 < len(patterns) < 15, patterns


def test_what_cannot_stay_beside_the_wanted_makes_room() -> None:
    installed = [
        "linux-modules-nvidia-580-server-open-generic", "linux-image-generic", "libnvidia-compute-580-server", "nvidia-firmware-580-server-580.126.09",
        "nvidia-fabricmanager-580", "nvidia-modprobe", "nvidia-driver-pinning-580", "cuda-keyring", "nvidia-headless-no-dkms-580-server-open",
        "libnvidia-compute-595-server",
    ]  # fmt: skip
    found = {"packages": dict.fromkeys(installed, "1")}
    stay = [
        "linux-image-generic",
        "nvidia-modprobe",
        "nvidia-driver-pinning-580",
        "cuda-keyring",
        "libnvidia-compute-595-server",
    ]
    other_branch = nvidia_plan.replaced(found, {"branch": "595", "flavour": "open"})
    assert sorted(set(installed) - set(other_branch)) == sorted(stay)
    assert nvidia_plan.replaced(found, {"branch": "580", "flavour": "open"}) == ["libnvidia-compute-595-server"]
    assert nvidia_plan.replaced(found, {"branch": "580", "flavour": "proprietary"}) == [
        "libnvidia-compute-595-server",
        "linux-modules-nvidia-580-server-open-generic",
        "nvidia-headless-no-dkms-580-server-open",
    ]


@pytest.mark.skipif(not shutil.which("apt-cache"), reason="no apt here")
def test_apt_reads_the_preferences_as_they_are_meant(tmp_path: Path) -> None:
    """The real apt, with lists and a status file of its own: what it would install from which source."""
    lists, state = tmp_path / "lists", tmp_path / "state"
    (lists / "partial").mkdir(parents=True)
    state.mkdir()
    (state / "status").touch()
    sources = []
    for label, origin, version in (
        ("NVIDIA CUDA", "NVIDIA", "590.48.01-1ubuntu1"),
        ("Ubuntu", "Ubuntu", "580.159.03-0ubuntu0.24.04.1"),
    ):
        name = f"{label.replace(' ', '-').lower()}.example_ubuntu_dists_stable"
        sources.append(f"deb [trusted=yes] http://{label.replace(' ', '-').lower()}.example/ubuntu stable main\n")
        (lists / f"{name}_Release").write_text(
            f"Origin: {origin}\nLabel: {label}\nSuite: stable\nCodename: stable\nComponents: main\nArchitectures: amd64 arm64\n"
        )
        packages = ["libnvidia-compute", "libnvidia-container1", "nvidia-utils", "cuda-nvcc-13-0"]
        (lists / f"{name}_main_binary-amd64_Packages").write_text(
            "\n".join(
                f"Package: {package}\nVersion: {version}\nArchitecture: all\nFilename: x\nSize: 1\nSHA256: {'0' * 64}\n"
                for package in packages
            )
        )
    (tmp_path / "sources.list").write_text("".join(sources))

    def candidates(source: str) -> dict[str, str]:
        (tmp_path / "preferences").write_text(f"# a comment\n\n{nvidia_apt.preferences(source)}")
        options = {
            "Dir::Etc::SourceList": tmp_path / "sources.list", "Dir::Etc::SourceParts": "/dev/null", "Dir::Etc::Preferences": tmp_path / "preferences",
            "Dir::Etc::PreferencesParts": "/dev/null", "Dir::State::Lists": lists, "Dir::State::Status": state / "status", "Dir::Cache": tmp_path / "cache",
            "APT::Architecture": "amd64", "APT::Architectures": "amd64", "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": "",
        }  # fmt: skip
        command = [
            "apt-cache",
            *(f"-o{name}={value}" for name, value in options.items()),
            "policy",
            "libnvidia-compute",
            "libnvidia-container1",
            "nvidia-utils",
        ]
        said = subprocess.run(
            command, capture_output=True, text=True, check=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
        )
        assert not said.stderr, said.stderr
        return dict(re.findall(r"^(\S+):\n.*\n +Candidate: (\S+)", said.stdout, re.MULTILINE))

    ubuntu, nvidia = "580.159.03-0ubuntu0.24.04.1", "590.48.01-1ubuntu1"
    assert candidates("ubuntu") == {"libnvidia-compute": ubuntu, "libnvidia-container1": nvidia, "nvidia-utils": ubuntu}
    assert candidates("nvidia") == {"libnvidia-compute": nvidia, "libnvidia-container1": nvidia, "nvidia-utils": nvidia}
    assert candidates("debian")["libnvidia-compute"] == "(none)"


def test_a_guest_whose_machine_has_a_broken_fabric_is_not_proved(tmp_path: Path) -> None:
    found = Machine("h100x8-guest", tmp_path).findings()
    assert decided(found)["unproved"] == []
    found["smi"]["gpus"][3]["fabric"] = {"state": "In Progress", "status": ""}
    assert decided(found)["unproved"] == ["GPU 3 is not part of the fabric: In Progress, no status"]


SHOWN = """\
Package: linux-modules-nvidia-580-server-open-6.8.0-88-generic
Version: 6.8.0-88.89+1
Depends: nvidia-kernel-common-580-server (>= 580.178.04), nvidia-kernel-common-580-server (<= 580.178.04-1)

Package: linux-modules-nvidia-580-server-open-6.8.0-88-generic
Version: 6.8.0-88.89
Depends: nvidia-kernel-common-580-server (>= 580.159.03), nvidia-kernel-common-580-server (<= 580.159.03-1)

Package: linux-modules-nvidia-580-server-open-generic
Version: 6.8.0-90.91
Depends: linux-modules-nvidia-580-server-open-6.8.0-90-generic (= 6.8.0-90.91)

Package: linux-headers-6.8.0-88-generic
Version: 6.8.0-88.89
Depends: linux-headers-6.8.0-88
"""


def test_modules_are_those_that_were_built_for_the_version() -> None:
    modules, flavour = (
        "linux-modules-nvidia-580-server-open-6.8.0-88-generic",
        "linux-modules-nvidia-580-server-open-generic",
    )
    assert nvidia_apt.fitting(SHOWN, [modules, flavour], "580.159.03") == [f"{modules}=6.8.0-88.89"]
    assert nvidia_apt.fitting(SHOWN, [modules], "580.126.09") == []
    assert nvidia_apt.fitting(SHOWN, [modules], "") == [f"{modules}=6.8.0-88.89+1"]
    assert nvidia_apt.fitting(SHOWN, [modules], "", ["no-such"]) == [f"{modules}=6.8.0-88.89+1", "no-such"]
    assert nvidia_apt.fitting(
        SHOWN, ["linux-headers-6.8.0-88-generic", "linux-headers-6.8.0-1-generic"], "580.159.03"
    ) == ["linux-headers-6.8.0-88-generic"]
