"""The specification of the GPUs against the GPUs, and the versions of the toolkit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.filter.nvidia_container_toolkit import (
    container_toolkit_host_problems,
    container_toolkit_plan,
    container_toolkit_problems,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.container_toolkit_host import (
    REFRESH,
    Toolkit,
    ToolkitError,
    difference,
    parse_devices,
    parse_gpus,
)

PACKAGES = [
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
]
G0, G1, M0, M1 = (
    f"{kind}-{number * 8}-0000-0000-0000-000000000000"
    for kind, number in zip(("GPU", "GPU", "MIG", "MIG"), "0123", strict=True)
)
TWO = f"GPU 0: NVIDIA H100 80GB HBM3 (UUID: {G0})\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: {G1})\n"
DIVIDED = (
    f"GPU 0: NVIDIA H100 (UUID: {G0})\n  MIG 3g.40gb     Device  0: (UUID: {M0})\n  MIG 3g.40gb     Device  1: (UUID: {M1})\n"
    f"GPU 1: NVIDIA H100 (UUID: {G1})\n"
)
LIBRARY = "/usr/lib/x86_64-linux-gnu/libcuda.so.580.159.04"
ASKED = {"host": "gpu1", "packages": PACKAGES, "version": "1.20.0", "minimum": "1.19.1", "without_gpu": "refuse"}


class Host:
    """Stands in for the driver, NVIDIA's programs and systemd. What the specification is made of is really there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.smi: tuple[int, str, str] = (0, TWO, "")
        self.library = LIBRARY
        self.unit_works = True
        self.generate_works = True
        self.commands: list[str] = []
        self.toolkit = Toolkit(self.command, root=root)
        for name in ("nvidia-smi", "nvidia-ctk"):
            self.write(f"/usr/bin/{name}")
        self.write(LIBRARY)
        self.write("/dev/nvidia0")

    def write(self, path: str, text: str = "") -> None:
        target = self.root / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def generate(self) -> None:
        """What nvidia-ctk writes, in short."""
        devices = "".join(
            f'    - name: "{number}"\n      containerEdits:\n        deviceNodes:\n            - path: /dev/nvidia0\n    - name: {uuid}\n'
            for number, uuid in enumerate(parse_gpus(self.smi[1]))
        )
        self.write(
            "/run/cdi/nvidia.yaml",
            f"---\ncdiVersion: 0.7.0\nkind: nvidia.com/gpu\ndevices:\n{devices}    - name: all\ncontainerEdits:\n    mounts:\n"
            f"        - hostPath: {self.library}\n          containerPath: {self.library}\n",
        )

    def command(self, command: list[str]) -> tuple[int, str, str]:
        self.commands.append(" ".join(command))
        if command[0] == "nvidia-smi":
            return self.smi
        if command[:3] == ["nvidia-ctk", "cdi", "list"]:
            spec = self.root / "run/cdi/nvidia.yaml"
            lines = spec.read_text().splitlines() if spec.exists() else []
            names = [line.split("name: ")[1].strip('"') for line in lines if "- name: " in line]
            return (
                0,
                "".join(f"nvidia.com/gpu={name}\n" for name in names),
                f'level=info msg="Found {len(names)} CDI devices"',
            )
        if command[:3] == ["nvidia-ctk", "cdi", "generate"]:
            if not self.generate_works:
                return 1, "", "failed to initialize NVML: Driver Not Loaded"
            self.generate()
        elif command == ["systemctl", "restart", REFRESH] and self.unit_works:
            self.generate()
        return 0, "", ""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_gpus_and_their_parts() -> None:
    assert parse_gpus(TWO) == [G0, G1]
    # what is divided cannot be had as a whole
    assert parse_gpus(DIVIDED) == [M0, M1, G1]
    assert parse_gpus("No devices found.\n") == []


def test_names_that_a_container_can_ask_for() -> None:
    assert parse_devices(f"nvidia.com/gpu=0\nnvidia.com/gpu={G0}\nnvidia.com/gpu=all\nacme.com/nic=0\n") == [
        "0",
        G0,
        "all",
    ]


def test_gpus_are_compared_by_uuid_else_by_number() -> None:
    assert difference([G0, G1], ["0", "1", G0, G1, "all"]) == ""
    assert difference([G0, G1], ["0", G0, "all"]) == f"{G1} missing"
    assert difference([M0, M1], ["0", G0, "all"]) == f"{M0}, {M1} missing and {G0} gone"
    assert difference([G0, G1], ["0", "1", "all"]) == ""
    assert difference([M0, M1, G1], ["0:0", "0:1", "1", "all"]) == ""
    assert difference([G0, G1], ["0", "all"]) == "it has 1 GPUs instead of 2"
    assert difference([G0], []) == f"{G0} missing"


def test_a_specification_is_made_and_found_right(host: Host) -> None:
    look = host.toolkit.look()
    assert (look["due"], look["gpus"]) == ("refresh", [G0, G1])
    assert look["reason"].endswith("run/cdi/nvidia.yaml is not there")
    done = host.toolkit.refresh()
    assert (done["done"], done["due"], done["devices"]) == ("refresh", "", ["0", "1", G0, G1, "all"])
    assert not any("generate" in command for command in host.commands)
    assert host.toolkit.refresh()["done"] == ""


def test_where_the_unit_does_nothing_it_is_made_all_the_same(host: Host) -> None:
    host.unit_works = False
    assert host.toolkit.refresh()["due"] == ""
    assert "nvidia-ctk cdi generate --output=/run/cdi/nvidia.yaml" in host.commands


def test_what_cannot_be_made_is_an_error(host: Host) -> None:
    host.unit_works = host.generate_works = False
    with pytest.raises(
        ToolkitError, match=r"nvidia\.yaml is not there; .* says: failed to initialize NVML: Driver Not Loaded"
    ):
        host.toolkit.refresh()


def test_a_gpu_that_nobody_can_have_is_named(host: Host) -> None:
    """As one in MIG mode that has no instances: the driver shows it, the toolkit leaves it out."""
    host.generate()
    text = host.toolkit.spec.read_text().replace(f"    - name: {G1}\n", "")
    host.generate = lambda: host.write("/run/cdi/nvidia.yaml", text)  # type: ignore[method-assign]
    host.generate()
    with pytest.raises(ToolkitError, match=rf"{G1} missing\. A GPU in MIG mode that has no instances"):
        host.toolkit.refresh()


def test_gpus_that_were_divided_since(host: Host) -> None:
    host.generate()
    host.smi = (0, DIVIDED, "")
    assert host.toolkit.look()["reason"].endswith(f"{M0}, {M1} missing and {G0} gone")
    assert host.toolkit.refresh()["due"] == ""


def test_another_driver_since(host: Host) -> None:
    host.generate()
    (host.root / LIBRARY[1:]).unlink()
    host.library = LIBRARY.replace("580", "595")
    host.write(host.library)
    assert host.toolkit.look()["reason"].endswith(f"names {LIBRARY}, which is not there: it is of another driver")
    assert host.toolkit.refresh()["due"] == ""


@pytest.mark.parametrize("smi", [(9, "", "NVIDIA-SMI has failed"), (0, "No devices found.\n", "")])
def test_a_driver_that_is_gone(host: Host, smi: tuple[int, str, str]) -> None:
    host.generate()
    host.smi = smi
    look = host.toolkit.look()
    assert (look["due"], look["gpus"]) == ("remove", [])
    assert host.toolkit.refresh()["done"] == "remove"
    assert not host.toolkit.spec.exists()
    assert host.toolkit.look()["due"] == ""


def test_a_host_without_anything(host: Host) -> None:
    for name in ("nvidia-smi", "nvidia-ctk"):
        (host.root / "usr/bin" / name).unlink()
    look = host.toolkit.look()
    assert (look["gpus"], look["pci_gpus"], look["due"], look["driver_problem"]) == (
        [],
        0,
        "",
        "there is no driver (nvidia-smi)",
    )
    host.write("/usr/bin/nvidia-smi")
    assert host.toolkit.look()["reason"] == "there is no toolkit yet"


def test_gpus_on_the_bus(host: Host) -> None:
    for slot, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030200"),
        ("0000:02:00.0", "0x10de", "0x030000"),
        ("0000:02:00.1", "0x10de", "0x040300"),  # its sound
        ("0000:03:00.0", "0x10de", "0x068000"),  # an NVSwitch
        ("0000:04:00.0", "0x1a03", "0x030000"),  # the board's own
    ):
        host.write(f"/sys/bus/pci/devices/{slot}/vendor", f"{vendor}\n")
        host.write(f"/sys/bus/pci/devices/{slot}/class", f"{kind}\n")
    assert host.toolkit.look()["pci_gpus"] == 2


def test_specifications_and_hooks_of_before(host: Host) -> None:
    host.write("/etc/cdi/nvidia.yaml", "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n")
    host.write("/etc/cdi/nvidia.json", '{"kind": "nvidia.com/gpu"}')
    host.write("/etc/cdi/acme.yaml", "kind: acme.com/nic\n")
    host.write("/etc/cdi/nvidia.yaml.disabled", "kind: nvidia.com/gpu\n")
    host.write("/usr/share/containers/oci/hooks.d/oci-nvidia-hook.json", "{}")
    look = host.toolkit.look()
    assert look["other_specs"] == ["/etc/cdi/nvidia.json", "/etc/cdi/nvidia.yaml"]
    assert look["legacy_hooks"] == ["/usr/share/containers/oci/hooks.d/oci-nvidia-hook.json"]
    told = container_toolkit_host_problems(ASKED, look, {"nvidia-docker2": "2.11.0-1", "docker.io": "24.0.7-0ubuntu4"})
    assert [text.partition(": ")[0].partition(",")[0] for text in told] == [
        "gpu1 has nvidia-docker2",
        "/usr/share/containers/oci/hooks.d/oci-nvidia-hook.json of gpu1 is the hook by which containers got GPUs before CDI",
        "/etc/cdi/nvidia.json of gpu1 is another specification of the same GPUs",
        "/etc/cdi/nvidia.yaml of gpu1 is another specification of the same GPUs",
        "gpu1 has docker.io 24.0.7-0ubuntu4",
    ]


@pytest.mark.parametrize(
    ("without_gpu", "gpus", "pci", "refused"),
    [
        ("refuse", [], 0, True),
        ("refuse", [], 1, False),
        ("refuse", [G0], 0, False),
        ("skip", [], 0, False),
        ("install", [], 0, False),
    ],
)
def test_hosts_without_a_gpu(without_gpu: str, gpus: list[str], pci: int, refused: bool) -> None:
    look = {
        "gpus": gpus,
        "pci_gpus": pci,
        "driver_problem": "there is no driver",
        "legacy_hooks": [],
        "other_specs": [],
    }
    told = container_toolkit_host_problems({**ASKED, "without_gpu": without_gpu}, look, {})
    assert bool(told) is refused
    assert "gpu1 has no GPU of NVIDIA's (there is no driver" in " ".join(told) or not refused


def there(version: str, **other: str) -> dict[str, str]:
    return {**dict.fromkeys(PACKAGES, version), **other}


def offered(*versions: str) -> dict[str, Any]:
    return {name: {"candidate": versions[0], "versions": list(versions)} for name in PACKAGES}


ALL = [f"{name}=1.20.0-1" for name in PACKAGES]


@pytest.mark.parametrize(
    ("installed", "available", "install", "word"),
    [
        ({}, offered("1.21.0-1", "1.20.0-1"), ALL, ""),
        ({}, {}, ALL, ""),
        (there("1.20.0-1"), {}, [], ""),
        (there("1.17.8-1"), offered("1.20.0-1"), ALL, ""),
        # half of an upgrade, and a package of another repository
        (there("1.20.0-1", **{"libnvidia-container1": "1.19.1-1"}), offered("1.20.0-1"), ALL, ""),
        ({PACKAGES[0]: "1.20.0-1"}, offered("1.20.0-1"), ALL, ""),
        (there("1.21.0-1"), offered("1.21.0-1", "1.20.0-1"), [], "is 1.21.0-1, newer than nvidia_container_toolkit_version (1.20.0); it is kept"),
        (
            there("1.20.0-1", **{"libnvidia-container1": "1.21.0-1"}), offered("1.21.0-1", "1.20.0-1"),
            [f"{name}=1.21.0-1" for name in PACKAGES], "newer than",
        ),
        ({}, offered("1.19.1-1"), [], "the repository has no nvidia-container-toolkit 1.20.0-1, only 1.19.1-1"),
    ],
)  # fmt: skip
def test_the_four_packages_are_of_one_version(
    installed: dict[str, str], available: dict[str, Any], install: list[str], word: str
) -> None:
    found = container_toolkit_plan(ASKED, installed, available)
    assert found["install"] == install
    said = " ".join(found["problems"] + found["notes"])
    assert word in said if word else not said
    assert found["pending"] == (bool(install) and not available)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, ""),
        (
            {"version": "1.19.0"},
            {},
            "nvidia_container_toolkit_version is 1.19.0, and 1.19.1 is the oldest without a known way out",
        ),
        ({"version": "1.19.0", "minimum": "1.17.8"}, {}, ""),
        ({"version": "1.19.1-1"}, {}, ""),
        ({"version": "latest"}, {}, "nvidia_container_toolkit_version is 'latest'; it is a version such as 1.20.0"),
        ({"minimum": ""}, {}, "nvidia_container_toolkit_minimum_version is ''"),
        ({}, {"runtimes": {"nvidia": {}}}, "docker_daemon_options has the runtime nvidia"),
        ({}, {"default-runtime": "nvidia"}, "docker_daemon_options has the runtime nvidia"),
        ({}, {"runtimes": {"crun": {}}}, ""),
    ],
)
def test_variables(changes: dict[str, str], options: dict[str, Any], message: str) -> None:
    found = container_toolkit_problems({**ASKED, **changes}, options)
    assert len(found) == bool(message)
    assert message in " ".join(found)
