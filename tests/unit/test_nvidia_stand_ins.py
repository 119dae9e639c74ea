"""
The stand-in packages of molecule/nvidia_driver, and what the role asks apt for, before any host is started.

The real apt, with directories of its own and in simulation: nothing is installed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import nvidia_apt, nvidia_plan

from tests.nvidia import Machine
from tests.unit.test_nvidia_plan import decided

ROOT = Path(__file__).resolve().parents[2]
TOOLS = all(shutil.which(program) for program in ("apt-get", "dpkg-deb", "gpg"))
pytestmark = pytest.mark.skipif(not TOOLS, reason="needs apt, dpkg-deb and gpg")


def vendors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendors", ROOT / "molecule/nvidia_driver/vendors.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Apt:
    """apt with a state of its own, and with what it is told to be installed."""

    def __init__(self, base: Path, state: Path) -> None:
        self.base, self.state = base, state
        for directory in ("lists/partial", "archives/partial", "preferences.d"):
            (state / directory).mkdir(parents=True)
        (state / "status").touch()
        (state / "extended").touch()
        (state / "sources.list").write_text(f"deb [trusted=yes] file:{base}/ubuntu ./\n")
        options = {
            "Dir::Etc::SourceList": state / "sources.list", "Dir::Etc::SourceParts": "/dev/null", "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": state / "preferences.d", "Dir::State": state, "Dir::State::Lists": state / "lists",
            "Dir::State::Status": state / "status", "Dir::State::Extended_States": state / "extended", "Dir::Cache": state,
            "Dir::Cache::Archives": state / "archives", "Dir::Log": state, "APT::Architecture": "amd64", "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root", "Debug::NoLocking": "1",
        }  # fmt: skip
        self.options = [f"-o{name}={value}" for name, value in options.items()]

    def __call__(self, *arguments: str, good: bool = True) -> str:
        done = subprocess.run(
            ["apt-get", *self.options, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        assert (done.returncode == 0) == good, done.stdout + done.stderr
        return done.stdout + done.stderr

    def resolve(self, asked: list[str]) -> list[str]:
        """name=580.* as Ansible's module hands it to apt: with the newest version that fits."""
        found = []
        for item in asked:
            name, _, pattern = item.partition("=")
            if not pattern:
                found.append(name)
                continue
            said = subprocess.run(
                ["apt-cache", *self.options, "madison", name], capture_output=True, text=True, check=True
            ).stdout
            versions = [line.split("|")[1].strip() for line in said.splitlines()]
            fitting = [
                version for version in versions if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), version)
            ]
            assert fitting, f"no source has {item}: {versions}"
            found.append(f"{name}={fitting[0]}")
        return found

    def install(self, asked: list[str], *options: str) -> dict[str, str]:
        """Simulate, note the result as installed and held, and return it."""
        self.unhold()
        said = self(
            "-s", "--no-install-recommends", "--allow-change-held-packages", *options, "install", *self.resolve(asked)
        )
        installed = self.installed()
        for name in re.findall(r"^(?:Remv|Purg) (\S+)", said, re.MULTILINE):
            installed.pop(name, None)
        installed.update(dict(re.findall(r"^Inst (\S+)(?: \[[^]]*\])? \((\S+)", said, re.MULTILINE)))
        stanzas = {}
        for file in (self.base / "ubuntu/Packages", self.base / "nvidia/Packages"):
            for stanza in file.read_text().split("\n\n") if file.exists() else []:
                if match := re.match(r"Package: (\S+)\nVersion: (\S+)\n", stanza):
                    stanzas[match.groups()] = re.sub(r"\n(Filename|Size|SHA256): .*", "", stanza)
        wanted = [
            stanzas[entry].replace("\nArchitecture", "\nStatus: hold ok installed\nArchitecture", 1)
            for entry in installed.items()
        ]
        (self.state / "status").write_text("\n\n".join(wanted) + "\n\n")
        return installed

    def unhold(self) -> None:
        """As the role does before a change."""
        status = self.state / "status"
        status.write_text(status.read_text().replace("hold ok installed", "install ok installed"))

    def installed(self) -> dict[str, str]:
        text = (self.state / "status").read_text()
        return dict(re.findall(r"Package: (\S+)\nVersion: (\S+)", text))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("v")
    module = vendors()
    module.archive(directory, module.ARCHIVE)
    module.nvidia(directory)
    yield directory
    subprocess.run(["gpgconf", "--homedir", str(directory / "key"), "--kill", "gpg-agent"], check=False)


@pytest.fixture
def apt(base: Path, tmp_path: Path) -> Apt:
    made = Apt(base, tmp_path / "apt")
    made("update")
    return made


def asked(apt: Apt, result: dict[str, Any]) -> list[str]:
    """What the role hands to apt; its preferences are in place before."""
    (apt.state / "preferences.d/50-vllm-fleet-nvidia").write_text(
        nvidia_apt.preferences(result["source"], version=result["version"])
    )
    command = ["apt-cache", *apt.options, "show", *result["optional"]]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [*result["packages"], *nvidia_apt.fitting(shown, result["optional"], result["version"], result["required"])]


def plan(path: Path, **variables: Any) -> dict[str, Any]:
    """The decision for a bare machine."""
    path.mkdir()
    result = decided(Machine("bare-h100x8", path).findings(), **variables)
    assert result["action"] == "install", result["told"]
    return result


def test_the_archive_installs_upgrades_and_goes_back(apt: Apt, tmp_path: Path) -> None:
    old = plan(tmp_path / "a", version="580.126.09", allow_insecure=True)
    installed = apt.install(asked(apt, old))
    assert installed["libnvidia-compute-580-server"] == "580.126.09-0ubuntu0.24.04.1"
    assert installed["linux-modules-nvidia-580-server-open-6.8.0-88-generic"] == "6.8.0-88.89+1"
    newer = plan(tmp_path / "b", version="580.159.03")
    installed = apt.install(asked(apt, newer))
    assert installed["libnvidia-compute-580-server"] == "580.159.03-0ubuntu0.24.04.1"
    branch = plan(tmp_path / "c", branch="595")
    installed = apt.install(asked(apt, branch))
    assert "libnvidia-compute-580-server" not in installed
    assert installed["libnvidia-compute-595-server"].startswith("595.71.05")
    back = plan(tmp_path / "d", version="580.159.03")
    installed = apt.install(asked(apt, back), "--allow-downgrades")
    assert installed["libnvidia-compute-580-server"].startswith("580.159.03")
    assert "libnvidia-compute-595-server" not in installed


def test_within_the_branch_the_modules_go_along(apt: Apt, tmp_path: Path) -> None:
    apt.install(asked(apt, plan(tmp_path / "a", version="580.126.09", allow_insecure=True)))
    installed = apt.install(asked(apt, plan(tmp_path / "b", branch="580")))
    assert installed["libnvidia-compute-580-server"].startswith("580.159.03")
    assert installed["linux-modules-nvidia-580-server-open-6.8.0-88-generic"] == "6.8.0-88.89+2"
    assert installed["linux-modules-nvidia-580-server-open-generic"] == "6.8.0-88.89+2"


def test_the_old_branch_has_to_be_told_to_make_room(apt: Apt, tmp_path: Path) -> None:
    """An installed version of which there is a newer one weighs more for apt than what something new depends on."""
    apt.install(asked(apt, plan(tmp_path / "a", version="580.126.09", allow_insecure=True)))
    branch = plan(tmp_path / "b", branch="595")
    apt.unhold()
    wanted = apt.resolve(asked(apt, branch))
    assert "unmet dependencies" in apt("-s", "--no-install-recommends", "install", *wanted, good=False)
    installed = {"packages": dict(apt.installed())}
    room = nvidia_plan.replaced(installed, branch)
    assert "libnvidia-compute-580-server" in room
    said = apt("-s", "--no-install-recommends", "install", *wanted, *(f"{name}-" for name in room))
    assert "Inst libnvidia-compute-595-server" in said
    assert sorted(re.findall(r"^Remv (\S+)", said, re.MULTILINE)) == room


def test_modules_that_no_source_has_are_named_so_that_apt_says_so(apt: Apt, tmp_path: Path) -> None:
    wanted = asked(apt, plan(tmp_path / "a", kernel_flavour="oracle"))
    assert "linux-modules-nvidia-580-server-open-oracle" in wanted
    assert "Unable to locate package linux-modules-nvidia-580-server-open-oracle" in apt(
        "-s", "install", *wanted[-1:], good=False
    )


def test_modules_of_another_version_than_the_libraries_cannot_be_installed(apt: Apt) -> None:
    said = apt(
        "-s",
        "install",
        "linux-modules-nvidia-580-server-open-generic",
        "nvidia-kernel-common-580-server=580.126.09-0ubuntu0.24.04.1",
        good=False,
    )
    assert "unmet dependencies" in said


def test_nvidias_repository_installs_pins_and_changes_the_branch(apt: Apt, base: Path, tmp_path: Path) -> None:
    with (apt.state / "sources.list").open("a") as file:
        file.write(f"deb [trusted=yes] file:{base}/nvidia ./\n")
    apt("update")
    first = plan(tmp_path / "a", source="nvidia", branch="580")
    apt.install(first["pin"])
    installed = apt.install(asked(apt, first))
    assert installed["libnvidia-compute-580"] == "580.159.03-0ubuntu1"
    assert installed["nvidia-persistenced"] == "580.159.03-0ubuntu1"
    next_one = plan(tmp_path / "b", source="nvidia", branch="595")
    apt.install(next_one["pin"])
    installed = apt.install(asked(apt, next_one))
    assert installed["libnvidia-compute"] == "595.71.05-1ubuntu1"
    assert "libnvidia-compute-580" not in installed


def test_the_signature_of_the_repository_is_checked(apt: Apt, base: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.gpg"
    key.write_bytes(
        subprocess.run(["gpg", "--homedir", str(base / "key"), "--export"], check=True, capture_output=True).stdout
    )
    (apt.state / "sources.list").write_text(f"deb [signed-by={key}] file:{base}/nvidia/ /\n")
    assert "Err" not in apt("update")
    key.write_bytes(b"")
    (apt.state / "sources.list").write_text(f"deb [signed-by={key}] file:{base}/nvidia/ /\n")
    assert "signature" in apt("update", "-oAPT::Update::Error-Mode=any", good=False).lower()


def test_the_two_do_not_mix(apt: Apt, base: Path, tmp_path: Path) -> None:
    first = plan(tmp_path / "a", branch="580")
    apt.install([*first["packages"], "nvidia-modprobe"])
    with (apt.state / "sources.list").open("a") as file:
        file.write(f"deb [trusted=yes] file:{base}/nvidia ./\n")
    (apt.state / "preferences.d/cuda-repository-pin-600").write_text(
        "Package: *\nPin: release l=NVIDIA CUDA\nPin-Priority: 600\n"
    )
    apt("update")
    assert "Inst " not in apt("-s", "dist-upgrade")  # as long as all is held
    apt.unhold()
    assert "Inst nvidia-modprobe" in apt("-s", "dist-upgrade")  # it would, without the preferences of the role
    (apt.state / "preferences.d/50-vllm-fleet-nvidia").write_text(nvidia_apt.preferences("ubuntu"))
    assert "Inst " not in apt("-s", "dist-upgrade")
    assert "Inst cuda-nvcc-13-0" in apt("-s", "install", "cuda-nvcc-13-0")
