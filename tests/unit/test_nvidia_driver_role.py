"""The role nvidia_driver beyond its decision: whose turn it is, what its files say, and that its data fits together."""

from __future__ import annotations

import os
import re
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
TAGGED = {"tags": ["nvidia_driver"]}
TURN = ["drain", "look", "packages", "extras", "activate", "start", "verify", "undrain"]


def load(path: str) -> Any:
    return yaml.safe_load((ROLE / path).read_text())


def batched() -> dict[str, Any]:
    """The play of equip.yml for the hosts whose driver is in use, without its hosts."""
    plays = yaml.safe_load((ROOT / "playbooks/plays/equip.yml").read_text())
    (play,) = [play for play in plays if "driver_in_use" in play["hosts"]]
    return {name: value for name, value in play.items() if name in ("serial", "max_fail_percentage", "vars")}


def turns(path: Path, *options: str, fails: int = 0) -> list[str]:
    """
    Run the real turn.yml, as install.yml includes it, on three hosts in the batches of equip.yml; every file that it includes only says that it
    was there.

    With `fails`, the verify.yml of the host whose turn has that number fails.
    """
    for name in TURN:
        script = f"echo '{name} {{{{ inventory_hostname }}}}' >> {path}/log"
        if name == "verify":
            script += f"; test $(grep -c verify {path}/log) != {fails}"
        (path / f"{name}.yml").write_text(yaml.safe_dump([{"ansible.builtin.raw": script}]))
    shutil.copy(ROLE / "tasks/turn.yml", path)
    (turn,) = [task for task in load("tasks/install.yml") if task.get("ansible.builtin.include_tasks") == "turn.yml"]
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "nvidia_driver_look": {"plan": {"action": "upgrade", "activate": "reboot", "services": ["x"]}},
        "__nvidia_driver_extras_due": True,
        "nvidia_driver_drain_tasks": f"{path}/drain.yml",
        "nvidia_driver_undrain_tasks": f"{path}/undrain.yml",
    }
    play = {"hosts": "all", "gather_facts": False, "vars": variables, **batched(), "tasks": [turn]}
    (path / "play.yml").write_text(yaml.safe_dump([play]))
    done = playbook("-i", "a,b,c", path / "play.yml", *options)
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


def test_as_many_as_a_batch_has_get_their_turn_together(tmp_path: Path) -> None:
    said = turns(tmp_path, "-e", '{"fleet_batch": [1, 2]}')
    assert said[: len(TURN)] == [f"{name} a" for name in TURN]
    assert [line.split()[0] for line in said[len(TURN) :]] == [name for name in TURN for _host in "bc"]


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


def played(path: Path, machine: str, hosts: str, plays: list[dict[str, Any]], **variables: Any) -> tuple[int, str]:
    """Run plays with --check against this machine, with the files and devices of a recorded one. Nothing is changed."""
    (path / "machine").mkdir()
    recorded = Machine(machine, path / "machine")
    found = recorded.findings()
    shown = programs(recorded, path / "bin")
    facts = {
        "distribution": found["distribution"], "release": found["release"], "codename": "noble", "architecture": "x86_64", "container": "",
        "packages": {}, "units": {}, "service_manager": "systemd", "gpus": [], "gpu_error": "",
    }  # fmt: skip
    known = {"ansible.builtin.set_fact": {"gpufleet": facts, "cacheable": True}}
    (path / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": [known], "tags": ["always"]}, *plays])
    )
    inventory = {
        "hosts": {host: {} for host in hosts.split()},
        "vars": {
            "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "host_support_facts": {"changed": False},
            "__nvidia_driver_test_root": f"{path}/machine", "__nvidia_driver_test_hardware": f"{path}/machine", **variables,
        },
    }  # fmt: skip
    (path / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": {"vllm": inventory}}}))
    environment = {"PATH": f"{shown}:{os.environ['PATH']}"}
    tags = ("--tags", "nvidia_driver")
    done = playbook("-i", path / "hosts.yml", path / "play.yml", "--check", "--diff", *tags, variables=environment)
    # Ansible shows texts as YAML, with line breaks and doubled quotes of its own.
    return done.returncode, " ".join((done.stdout + done.stderr).split()).replace("''", "'")


def of_role(tasks_from: str = "main", **keywords: Any) -> dict[str, Any]:
    """A play as another repository has it, without a batch."""
    role = {"name": "gpufleet.llm.nvidia_driver", "tasks_from": tasks_from}
    return {
        "hosts": "vllm",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.import_role": role}],
        **TAGGED,
        **keywords,
    }


def checked(path: Path, machine: str, tasks_from: str = "main", **variables: Any) -> tuple[int, str]:
    """Run the role with --check on a recorded machine."""
    return played(path, machine, "here", [of_role(tasks_from)], **variables)


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


# --- which hosts have their turn together ---------------------------------------------------------------------------


def test_a_play_without_batches_is_refused_when_it_would_take_several_hosts_out_of_service(tmp_path: Path) -> None:
    for name in ("crowd", "one", "batches", "together"):
        (tmp_path / name).mkdir()
    code, said = played(tmp_path / "crowd", "old-ours", "a b c", [of_role()])
    assert code
    assert "change the driver of 3 hosts at once while it is in use (a, b, c)" in said
    assert "nothing has been changed" in said
    for name, hosts, play in (
        ("one", "a", of_role()),
        ("batches", "a b", of_role(serial=1)),
        ("together", "a b", of_role(vars={"nvidia_driver_together": True})),
    ):
        code, said = played(tmp_path / name, "old-ours", hosts, [play])
        assert code == 0, said
        assert "decision: upgrade" in said


def test_hosts_whose_driver_is_new_need_no_batches(tmp_path: Path) -> None:
    code, said = played(tmp_path, "bare-h100x8", "a b", [of_role()])
    assert code == 0, said
    assert said.count("decision: install") == 2


def test_the_playbook_has_batches_where_a_driver_is_in_use_and_the_others_at_once(tmp_path: Path) -> None:
    equip = {"import_playbook": str(ROOT / "playbooks/plays/equip.yml")}
    version = "{{ '580.95.05' if inventory_hostname == 'b' else '' }}"  # what is there
    preflight = of_role("preflight", vars={"check_inputs_collect": True})  # as playbooks/preflight.yml
    code, said = played(
        tmp_path,
        "old-ours",
        "a b c",
        [preflight, equip],
        nvidia_driver_version=version,
        nvidia_driver_allow_insecure="{{ inventory_hostname == 'b' }}",
    )
    assert code == 0, said
    at_rest = said.partition("PLAY [Bring the NVIDIA driver")[2].partition("PLAY [")[0]
    batches = said.partition("PLAY [Change the NVIDIA driver")[2].split("PLAY [Change the NVIDIA driver")
    batches[-1] = batches[-1].partition("PLAY [")[0]
    seen = [sorted(set(re.findall(r"\[([abc])\]", part))) for part in (at_rest, *batches)]
    assert seen == [["b"], ["a"], ["c"]], said
