"""What is found on recorded machines, and what nvidia-smi's answers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import gpu, nvidia, nvidia_host, nvidia_pci
from ansible_collections.gpufleet.llm.plugins.modules import nvidia_look

from tests.nvidia import MACHINES, RECORDINGS, Machine

# machine: where the driver is from, loaded module, module on disk for the running kernel, libraries
FOUND = {
    "no-gpu": ("", "", "", ""),
    "bare-t4": ("", "", "", ""),
    "t4": ("ubuntu", "535.309.01 open", "535.309.01 open prebuilt", "535.309.01"),
    "v100": ("ubuntu", "580.159.03 proprietary", "580.159.03 proprietary prebuilt", "580.159.03"),
    "a100": ("nvidia", "580.159.03 open", "580.159.03 open dkms", "580.159.03"),
    "h100x8": ("ubuntu", "580.159.03 open", "580.159.03 open prebuilt", "580.159.03"),
    # Its libraries are where no distribution has them, so only nvidia-smi knows their version.
    "h200-container": ("outside", "580.159.04 open", "", ""),
    "consumer": ("ubuntu", "570.124.04 proprietary", "570.124.04 proprietary dkms", "570.124.04"),
    "cloud-image": ("nvidia", "550.90.07 open", "550.90.07 open dkms", "550.90.07"),
    "runfile": ("runfile", "575.57.08 open", "575.57.08 open other", "575.57.08"),
    "half-upgraded": ("ubuntu", "570.195.03 open", "580.159.03 open prebuilt", "580.159.03"),
    "nouveau": ("ubuntu", "", "580.159.03 open prebuilt", "580.159.03"),
    "mixed": ("mixed", "", "", "580.126.09"),
    "debian12-no-module": ("debian", "", "", "535.309.01"),
}


def found(machine: str, path: Path) -> dict[str, Any]:
    return Machine(machine, path).findings()


@pytest.mark.parametrize("machine", FOUND)
def test_the_driver(machine: str, tmp_path: Path) -> None:
    seen = found(machine, tmp_path)
    module = seen["modules"].get(seen["kernel"]["running"], {})
    assert (
        seen["origin"],
        " ".join(filter(None, seen["loaded"].values())),
        " ".join(filter(None, (module.get("version"), module.get("flavour"), module.get("kind")))),
        seen["userspace"],
    ) == FOUND[machine]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_has_the_same_findings(machine: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert found(machine, tmp_path / "a").keys() == found("h100x8", tmp_path / "b").keys()


def test_debians_own_module_has_a_name_of_its_own(tmp_path: Path) -> None:
    """As the drill with Debian's real packages saw it: modprobe has a rule for the other name, modinfo does not know it."""
    kernel = "6.1.0-41-cloud-amd64"
    machine = Machine("debian12-no-module", tmp_path)
    machine.put_run(
        f"modinfo -k {kernel} nvidia-current",
        f"filename:       /lib/modules/{kernel}/updates/dkms/nvidia-current.ko\nversion:        535.261.03\nlicense:        NVIDIA\n",
    )
    assert machine.findings()["modules"] == {
        kernel: {"version": "535.261.03", "flavour": "proprietary", "signer": "", "kind": "dkms"}
    }


def test_devices_go_by_class_and_vendor(tmp_path: Path) -> None:
    seen = found("consumer", tmp_path)["devices"]
    assert [(device["address"], device["kind"], device["driver"]) for device in seen] == [
        ("0000:01:00.0", "gpu", "nvidia")
    ]
    (tmp_path / "h").mkdir()
    kinds = [device["kind"] for device in found("h100x8", tmp_path / "h")["devices"]]
    assert (kinds.count("gpu"), kinds.count("nvswitch")) == (8, 4)
    (tmp_path / "n").mkdir()
    assert found("no-gpu", tmp_path / "n")["devices"] == []


@pytest.mark.parametrize(
    ("device", "name", "flavours"),
    [
        ("0x102d", "Kepler or older", []),
        ("0x13f2", "Maxwell, Pascal or Volta", ["proprietary"]),
        ("0x15f8", "Maxwell, Pascal or Volta", ["proprietary"]),
        ("0x1db6", "Maxwell, Pascal or Volta", ["proprietary"]),
        ("0x1e02", "Turing or Ampere", ["open", "proprietary"]),
        ("0x1eb8", "Turing or Ampere", ["open", "proprietary"]),
        ("0x20b5", "Turing or Ampere", ["open", "proprietary"]),
        ("0x2236", "Turing or Ampere", ["open", "proprietary"]),
        ("0x2330", "Hopper", ["open", "proprietary"]),
        ("0x2335", "Hopper", ["open", "proprietary"]),
        ("0x2342", "Grace Hopper", ["open"]),
        ("0x25b6", "Ampere", ["open", "proprietary"]),
        ("0x26b9", "Ada", ["open", "proprietary"]),
        ("0x27b8", "Ada", ["open", "proprietary"]),
        ("0x2901", "Blackwell or newer", ["open"]),
        ("0x2b85", "Blackwell or newer", ["open"]),
        ("0x3182", "Blackwell or newer", ["open"]),
    ],
)
def test_the_generation_of_a_gpu_goes_by_its_device_id(device: str, name: str, flavours: list[str]) -> None:
    generation = nvidia_pci.generation(device)
    assert (generation["name"], generation["flavours"]) == (name, flavours)


def test_secure_boot_and_its_exceptions(tmp_path: Path) -> None:
    machine = Machine("t4", tmp_path)
    assert machine.findings()["secure_boot"]
    machine.write(f"{nvidia_host.EFI}/{nvidia_host.UNVALIDATED}", b"\x06\0\0\0\x01")  # mokutil --disable-validation
    assert not machine.findings()["secure_boot"]
    (tmp_path / "h").mkdir()
    assert not found("bare-h100x8", tmp_path / "h")["secure_boot"]
    (tmp_path / "b").mkdir()
    assert not found("bare-t4", tmp_path / "b")["secure_boot"]  # no EFI at all


def test_who_uses_the_gpus(tmp_path: Path) -> None:
    users = found("h100x8", tmp_path)["users"]
    assert [(user["pid"], user["unit"]) for user in users] == [
        (2101, "nvidia-persistenced.service"), (2202, "nvidia-fabricmanager.service"), (4711, "vllm@chat.service"),
    ]  # fmt: skip
    assert nvidia.names_of(users[2:]) == "vllm@chat.service"
    assert nvidia.names_of([{"unit": "", "program": "python3"}] * 2) == "python3"


def test_units_holds_and_what_is_half_installed(tmp_path: Path) -> None:
    seen = found("mig", tmp_path)
    assert seen["units"] == {
        "nvidia-persistenced.service": {"active": "active", "enabled": "static"},
        "vllm-fleet-nvidia-nodes.service": {"active": "active", "enabled": "enabled"},
    }
    assert "libnvidia-compute-580-server" in seen["holds"]
    (tmp_path / "h").mkdir()
    half = found("half-installed", tmp_path / "h")
    assert "libnvidia-cfg1-580-server" in half["unfinished"]
    assert "libnvidia-cfg1-580-server" not in half["packages"]


def test_the_kernel_of_the_next_boot(tmp_path: Path) -> None:
    assert found("new-kernel", tmp_path)["kernel"] == {"running": "6.8.0-88-generic", "newest": "6.8.0-90-generic"}
    assert nvidia.version_key("6.8.0-100-generic") > nvidia.version_key("6.8.0-99-generic")
    assert nvidia.version_key("580.159.03") > nvidia.version_key("580.95.05")


def test_repositories_of_nvidia_are_found(tmp_path: Path) -> None:
    assert found("a100", tmp_path)["repositories"] == ["/etc/apt/sources.list.d/cuda-ubuntu2204-x86_64.list"]


def test_bridges_to_nvswitches_are_told_from_network_cards(tmp_path: Path) -> None:
    assert found("bare-b200x8", tmp_path)["fabric_bridges"] == ["mlx5_4"]


@pytest.mark.parametrize(
    "version", ["580.159.03-0ubuntu0.24.04.1", "580.159.03-1ubuntu1", "1:580.159.03-1", "580.159.03"]
)
def test_the_version_of_the_driver_in_that_of_a_package(version: str) -> None:
    assert nvidia.upstream(version) == "580.159.03"


# --- nvidia-smi -----------------------------------------------------------------------------------------------------


def gpus(machine: str) -> list[dict[str, Any]]:
    directory = RECORDINGS / machine
    return gpu.parse_nvidia_smi_full(
        (directory / "nvidia-smi.csv").read_text(), (directory / "nvidia-smi.xml").read_text()
    )


def test_the_full_form_has_everything_of_the_short_one() -> None:
    for machine in MACHINES:
        if not (file := RECORDINGS / machine / "nvidia-smi.csv").exists():
            continue
        short = gpu.parse_nvidia_smi(file.read_text())
        assert short
        for brief, full in zip(short, gpus(machine), strict=True):
            assert brief.items() <= full.items()
            assert full["address"], machine


def test_mig_and_its_parts() -> None:
    divided, whole = gpus("mig")
    assert (divided["mig"], whole["mig"]) == (True, False)
    assert divided["mig_devices"] == [
        {"index": 0, "memory_mib": 40192}, {"index": 1, "memory_mib": 19968}, {"index": 2, "memory_mib": 19968},
    ]  # fmt: skip
    assert whole["mig_devices"] == []


def test_memory_errors_rows_and_the_fabric() -> None:
    first = gpus("a100")[0]
    assert (first["ecc"], first["ecc_uncorrected"]) == (True, 0)
    assert first["remapped_rows"] == {"uncorrectable": 1, "pending": True, "failure": False}
    assert gpus("v100")[0]["ecc_uncorrected"] == 0  # the old names
    assert gpus("v100")[0]["remapped_rows"] == {"uncorrectable": None, "pending": None, "failure": None}
    assert gpus("consumer")[0]["ecc_uncorrected"] is None
    assert gpus("h100x8")[7]["fabric"] == {"state": "Completed", "status": "Success"}
    assert gpus("h100x8-guest")[0]["fabric"] == {"state": "", "status": ""}
    assert gpus("lost-gpu")[0]["recovery_action"] == "GPU Reset"
    assert gpus("lost-gpu")[1]["recovery_action"] == ""


def test_a_document_that_cannot_be_read_adds_nothing() -> None:
    query = (RECORDINGS / "t4/nvidia-smi.csv").read_text()
    for document in ("", "<nvidia_smi_log>", "<nvidia_smi_log></nvidia_smi_log>"):
        (card,) = gpu.parse_nvidia_smi_full(query, document)
        assert (card["name"], card["address"], card["ecc_uncorrected"]) == ("Tesla T4", "", None)


def test_answers_without_the_mig_column_are_understood() -> None:
    (card,) = gpu.parse_nvidia_smi("0, Tesla T4, 15360, 7.5, 535.309.01\n")
    assert card["mig"] is False


def test_the_module_looks_at_this_machine_without_failing() -> None:
    """Whatever it is: the findings have all of their keys, and nothing is changed."""
    seen = nvidia_look.look(Path("/"), Path("/"))
    assert {"devices", "smi", "origin", "secure_boot", "units"} <= seen.keys()
