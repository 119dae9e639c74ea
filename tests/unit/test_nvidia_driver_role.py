"""The role nvidia_driver beyond its decision: whose turn it is, what its files say, and that its data fits together."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.nvidia import Machine
from tests.playbooks import playbook

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/nvidia_driver"
TURN = ["drain", "look", "packages", "extras", "activate", "start", "verify", "undrain"]


def load(path: str) -> Any:
    return yaml.safe_load((ROLE / path).read_text())


def turns(path: Path, fails: int = 0) -> list[str]:
    """
    Run the real turn.yml by the real loop of install.yml on three hosts; every file that it includes only says that it was there.

    With `fails`, the verify.yml of the host whose turn has that number fails.
    """
    for name in TURN:
        script = f"echo '{name} {{{{ inventory_hostname }}}}' >> {path}/log"
        if name == "verify":
            script += f"; test $(grep -c verify {path}/log) != {fails}"
        (path / f"{name}.yml").write_text(yaml.safe_dump([{"ansible.builtin.raw": script}]))
    shutil.copy(ROLE / "tasks/turn.yml", path)
    (loop,) = [task for task in load("tasks/install.yml") if task.get("ansible.builtin.include_tasks") == "turn.yml"]
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "nvidia_driver_look": {"plan": {"action": "upgrade", "activate": "reboot", "services": ["x"]}},
        "__nvidia_driver_extras_due": True,
        "nvidia_driver_drain_tasks": f"{path}/drain.yml",
        "nvidia_driver_undrain_tasks": f"{path}/undrain.yml",
    }
    play = {"hosts": "all", "gather_facts": False, "vars": variables, "tasks": [loop]}
    (path / "play.yml").write_text(yaml.safe_dump([play]))
    done = playbook("-i", "a,b,c", path / "play.yml")
    assert bool(done.returncode) == bool(fails), done.stdout + done.stderr
    return (path / "log").read_text().split("\n")[:-1]


def test_one_host_after_the_other_gets_its_turn(tmp_path: Path) -> None:
    said = turns(tmp_path)
    order = list(dict.fromkeys(line.split()[1] for line in said))
    assert sorted(order) == ["a", "b", "c"]  # in whatever order Ansible takes them
    assert said == [f"{name} {host}" for host in order for name in TURN]


def test_after_a_host_that_fails_nobody_gets_a_turn_and_it_stays_out_of_service(tmp_path: Path) -> None:
    said = turns(tmp_path, fails=2)
    first, second = dict.fromkeys(line.split()[1] for line in said)
    assert said == [f"{name} {first}" for name in TURN] + [f"{name} {second}" for name in TURN[:-1]]


def test_the_settings_of_the_decision_are_the_variables_of_the_role() -> None:
    settings = load("vars/main.yml")["__nvidia_driver_settings"]
    defaults = load("defaults/main.yml")
    for name, value in settings.items():
        assert value == ("{{ __nvidia_driver_sources }}" if name == "sources" else f"{{{{ nvidia_driver_{name} }}}}")
        assert name == "sources" or f"nvidia_driver_{name}" in defaults


def test_every_source_has_packages_for_both_flavours_and_every_floor() -> None:
    internal = load("vars/main.yml")
    parts = [*internal["__nvidia_driver_nvidia_packages"].values(), *(
        entry["packages"] for name, entry in internal["__nvidia_driver_sources"].items() if name != "nvidia"
    )]  # fmt: skip
    for listed in parts:
        assert [part["from"] for part in listed] == sorted((part["from"] for part in listed), reverse=True)
        assert listed[-1]["from"] == 0, "the oldest branches have no names"
        for part in listed:
            assert part["open"] and part["proprietary"] and part["running"]
    for branch, floor in load("defaults/main.yml")["nvidia_driver_floors"].items():
        assert str(floor).startswith(f"{branch}.")


def test_hashes_are_hashes() -> None:
    for place, digest in load("vars/main.yml")["__nvidia_driver_keyring_hashes"].items():
        assert len(bytes.fromhex(digest)) == 32, place


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    unit = tmp_path / "vllm-fleet-nvidia-nodes.service"
    text = (ROLE / "templates/etc/systemd/system/vllm-fleet-nvidia-nodes.service.j2").read_text()
    unit.write_text(text.replace("/usr/local/lib/vllm-fleet/nvidia-nodes", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "vllm-fleet-nvidia-nodes" not in done.stderr, done.stderr


def test_the_script_that_makes_nodes_is_a_shell_script() -> None:
    script = (ROLE / "templates/usr/local/lib/vllm-fleet/nvidia-nodes.j2").read_text()
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


# --- the role in check mode, on recorded machines -------------------------------------------------------------------


def programs(recorded: Machine, directory: Path) -> Path:
    """Programs that say what those of the recorded machine said."""
    directory.mkdir()
    texts = {
        "modinfo": next(
            (answer.text for name, answer in recorded.answers.items() if name.startswith("modinfo") and answer.good), ""
        )
    }
    texts["systemctl"] = recorded.answers["systemctl"].text
    for name, text in texts.items():
        (directory / f"{name}.txt").write_text(text)
        (directory / name).write_text(f"#!/bin/sh\nexec cat {directory}/{name}.txt\n")
    if (recorded.directory / "nvidia-smi.csv").exists():
        smi = recorded.directory / "nvidia-smi"
        (directory / "nvidia-smi").write_text(
            f'#!/bin/sh\ncase "$*" in *-x*) exec cat {smi}.xml ;; *) exec cat {smi}.csv ;; esac\n'
        )
    for file in directory.iterdir():
        file.chmod(0o755)
    return directory


def checked(path: Path, machine: str, tasks_from: str = "main", **variables: Any) -> tuple[int, str]:
    """Run the role with --check against this machine, with the files and devices of a recorded one. Nothing is changed."""
    (path / "machine").mkdir()
    recorded = Machine(machine, path / "machine")
    found = recorded.findings()
    shown = programs(recorded, path / "bin")
    facts = {
        "distribution": found["distribution"], "release": found["release"], "codename": "noble", "architecture": "x86_64", "container": "",
        "packages": {}, "units": {}, "service_manager": "systemd", "gpus": [], "gpu_error": "",
    }  # fmt: skip
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars": {
            "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "host_support_facts": {"changed": False},
            "__nvidia_driver_test_root": f"{path}/machine", "__nvidia_driver_test_hardware": f"{path}/machine", **variables,
        },
        "tasks": [
            {"ansible.builtin.set_fact": {"gpufleet": facts, "cacheable": True}},
            {"ansible.builtin.include_role": {"name": "gpufleet.llm.nvidia_driver", "tasks_from": tasks_from}},
        ],
    }  # fmt: skip
    (path / "play.yml").write_text(yaml.safe_dump([play]))
    variables = {"PATH": f"{shown}:{os.environ['PATH']}"}
    done = playbook("-i", "here,", path / "play.yml", "--check", "--diff", variables=variables)
    # Ansible shows texts as YAML, with line breaks and doubled quotes of its own.
    return done.returncode, " ".join((done.stdout + done.stderr).split()).replace("''", "'")


def test_a_bare_host_is_told_what_would_be_done_and_shown_the_files(tmp_path: Path) -> None:
    code, said = checked(tmp_path, "bare-h100x8", nvidia_driver_version="580.159.03")
    assert code == 0, said
    assert "decision: install: open modules, 580.159.03, from Ubuntu's archive" in said
    assert "nvidia-headless-no-dkms-580-server-open=580.159.03-*" in said
    assert "+Pin: release o=/^(NVIDIA|Debian|LP-PPA-graphics-drivers)$/" in said
    assert "+blacklist nouveau" in said
    assert "ExecStart=/usr/bin/nvidia-persistenced --user nvidia-persistenced --persistence-mode" in said
    assert "failed=0" in said


def test_with_nvidias_repository_a_mirror_is_the_only_source(tmp_path: Path) -> None:
    mirror = "https://mirror.example/cuda/ubuntu2404/x86_64"
    code, said = checked(tmp_path, "bare-b200x8", nvidia_driver_source="nvidia", nvidia_driver_repository_url=mirror)
    assert code == 0, said
    assert f"+deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] {mirror}/ /" in said
    assert "/etc/apt/sources.list.d/cuda-ubuntu2404-x86_64.list" in said
    assert "+Pin: release o=/^(Ubuntu|Debian|LP-PPA-graphics-drivers)$/" in said


def test_a_refusal_and_a_mistake_are_told_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    code, said = checked(tmp_path / "a", "runfile-broken")
    assert code
    assert "Remove it by nvidia-uninstall, reboot, and run again" in said
    code, said = checked(tmp_path / "b", "bare-t4", nvidia_driver_version="580", nvidia_driver_branch="580-server")
    assert code
    assert "it is a whole version such as 580.159.03" in said
    assert "it is auto or three digits in quotes" in said


def test_the_proof_tells_the_gpus_or_fails(tmp_path: Path) -> None:
    for name in ("good", "lost"):
        (tmp_path / name).mkdir()
    code, said = checked(tmp_path / "good", "mig", tasks_from="verify")
    assert code == 0, said
    assert (
        "GPU 0: NVIDIA A100 80GB PCIe, 81920 MiB, driver 580.159.03, MIG, 3 parts, ECC on, uncorrected errors 0" in said
    )
    code, said = checked(tmp_path / "lost", "lost-gpu", tasks_from="verify")
    assert code
    assert "nvidia-smi shows 7 GPUs, and 8 are expected; missing is 0000:ed:00.0" in said


def test_a_driver_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    code, said = checked(tmp_path, "cloud-image")
    assert code == 0, said
    assert (
        "decision: leave: driver 550.90.07 from NVIDIA's repository works (1 GPU), and this role did not install it"
        in said
    )
    assert "/etc/systemd/system/vllm-fleet-nvidia-nodes.service" in said
    assert "/etc/apt/preferences.d" not in said
    assert "/etc/modprobe.d" not in said
