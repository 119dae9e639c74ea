"""host_facts: each section on recordings and small trees, and the module itself as a task on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import host, host_mounts, host_sockets, host_units
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Program
from ansible_collections.gpufleet.llm.plugins.modules import host_facts

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = Path(__file__).parent / "recordings/host_facts"


def recorded(name: str) -> str:
    return (RECORDINGS / name).read_text()


def put(root: Path, path: str, text: str = "") -> Path:
    """Write a file, and its directories."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def link(root: Path, path: str, target: str) -> None:
    """Make a link, and its directories."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).symlink_to(target)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ubuntu2204", ("Ubuntu", "22.04", "jammy")),
        ("ubuntu2404", ("Ubuntu", "24.04", "noble")),
        ("debian12", ("Debian", "12", "bookworm")),
        ("debian13", ("Debian", "13", "trixie")),
    ],
)
def test_the_distribution_is_told_as_ansible_tells_it(tmp_path: Path, name: str, expected: tuple[str, ...]) -> None:
    put(tmp_path, "etc/os-release", recorded(f"os-release-{name}"))
    put(tmp_path, "proc/meminfo", "MemTotal:       527874560 kB\nMemFree:        1 kB\n")
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    found = host.system(tmp_path)
    assert (found["distribution"], found["release"], found["codename"]) == expected
    assert (found["service_manager"], found["memory_bytes"], found["container"]) == ("systemd", 527874560 * 1024, "")


def test_an_empty_host_has_empty_facts(tmp_path: Path) -> None:
    found = host.system(tmp_path)
    assert {found["distribution"], found["release"], found["codename"], found["service_manager"]} == {""}
    assert found["memory_bytes"] == 0
    assert not host.packages(tmp_path)
    assert not host_units.units("", tmp_path)
    assert not host_sockets.ports(tmp_path)
    assert not host_mounts.mounts(tmp_path)
    assert host.lists_age(tmp_path) is None


def test_an_os_release_that_is_broken_is_read_as_far_as_it_goes() -> None:
    assert host.os_release("ID='debian\nVERSION_ID=12\n# X=1\nnonsense\n") == {"VERSION_ID": "12"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ""),
        ({"run/systemd/container": "lxc\n"}, "lxc"),
        ({"proc/1/environ": "PATH=/bin\0container=systemd-nspawn\0"}, "systemd-nspawn"),
        ({".dockerenv": "", "proc/1/environ": "PATH=/bin\0"}, "docker"),
        ({"proc/1/environ": "container=oci\0", "run/.containerenv": ""}, "podman"),
        ({"run/host/container-manager": "podman", ".dockerenv": ""}, "podman"),
    ],
)
def test_containers_are_recognised_by_what_their_managers_leave(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    for path, text in files.items():
        put(tmp_path, path, text)
    assert host.container(tmp_path) == expected


def test_packages_are_those_that_are_installed_and_configured() -> None:
    assert host.parse_dpkg_status(recorded("dpkg-status-debian12")) == {
        "adduser": "3.134",
        "ca-certificates": "20230311+deb12u1",
        "dpkg": "1.21.22",
        "libc6": "2.36-9+deb12u14",
        "libc6:i386": "2.36-9+deb12u13",
        "nginx": "1.22.1-9+deb12u3",
    }


def test_the_architecture_of_the_host_is_not_in_the_names() -> None:
    assert host.parse_dpkg_status(recorded("dpkg-status-ubuntu2404")) == {
        "dpkg": "1.22.6ubuntu6.5",
        "nvidia-utils-580-server": "580.159.03-0ubuntu0.24.04.1",
        "openssl": "3.0.13-0ubuntu3.6",
        "tzdata": "2025b-0ubuntu0.24.04.1",
    }


def test_what_a_killed_dpkg_left_behind_counts(tmp_path: Path) -> None:
    put(tmp_path, "var/lib/dpkg/status", recorded("dpkg-status-debian12"))
    entry = "Package: {}\nStatus: install ok {}\nArchitecture: amd64\nVersion: {}\n"
    put(tmp_path, "var/lib/dpkg/updates/0000", entry.format("nginx", "half-configured", "1.22.1-9+deb12u4"))
    put(tmp_path, "var/lib/dpkg/updates/0001", entry.format("jq", "installed", "1.6-2.1"))
    put(tmp_path, "var/lib/dpkg/updates/tmp.i", entry.format("no", "installed", "1"))
    found = host.packages(tmp_path)
    assert ("nginx" in found, found.get("jq"), "no" in found) == (False, "1.6-2.1", False)


def test_dpkg_itself_agrees() -> None:
    """On this machine, where there is a dpkg."""
    if not shutil.which("dpkg-query"):
        pytest.skip("no dpkg here")
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Version}\n"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = {tuple(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("installed ")}
    assert {(name.split(":")[0], version) for name, version in host.packages().items()} == expected


def test_the_age_of_package_lists_is_that_of_the_last_look(tmp_path: Path) -> None:
    (tmp_path / "var/lib/apt/lists/partial").mkdir(parents=True)
    put(tmp_path, "var/lib/apt/lists/lock")
    assert host.lists_age(tmp_path) is None, "a fresh directory without lists"
    lists = put(tmp_path, "var/lib/apt/lists/deb.debian.org_debian_dists_bookworm_InRelease")
    os.utime(lists, (1, 1))  # the mirror's date
    for path in (lists.parent, lists.parent / "partial"):
        os.utime(path, (1000, 1000))
    assert host.lists_age(tmp_path, now=1500) == 500
    stamp = put(tmp_path, "var/lib/apt/periodic/update-success-stamp")
    os.utime(stamp, (1400, 1400))
    assert host.lists_age(tmp_path, now=1500) == 100


UNIT = "[Unit]\nDescription=x\n[Service]\nExecStart=/bin/true\n"
WANTED = UNIT + "[Install]\nWantedBy=multi-user.target\n"
WANTS = "etc/systemd/system/multi-user.target.wants"
LIB = "usr/lib/systemd/system"


@pytest.fixture
def unit_tree(tmp_path: Path) -> Path:
    """Units in every state that systemctl has a name for."""
    etc = "etc/systemd/system"
    put(tmp_path, f"{LIB}/chrony.service", WANTED + "Alias=chronyd.service\n")
    link(tmp_path, f"{WANTS}/chrony.service", f"/{LIB}/chrony.service")
    link(tmp_path, f"{etc}/chronyd.service", f"/{LIB}/chrony.service")
    put(tmp_path, f"{LIB}/nginx.service", WANTED)
    put(tmp_path, f"{etc}/vllm@.service", WANTED)
    link(tmp_path, f"{WANTS}/vllm@chat.service", f"/{etc}/vllm@.service")
    put(tmp_path, f"{etc}/idle@.service", WANTED)
    put(tmp_path, f"{LIB}/apt-daily.service", UNIT)
    link(tmp_path, f"{LIB}/sysinit.target.wants/apt-daily.service", "../apt-daily.service")
    put(tmp_path, f"{LIB}/foo.service", UNIT + "[Install]\nAlso=foo.socket\n")
    put(tmp_path, f"{LIB}/foo.socket", "[Socket]\nListenStream=1\n[Install]\nWantedBy=sockets.target\n")
    put(tmp_path, f"{LIB}/hwclock.service", UNIT)
    link(tmp_path, f"{etc}/hwclock.service", "/dev/null")
    put(tmp_path, f"{etc}/empty.service")
    link(tmp_path, "run/systemd/system/rm.service", "/dev/null")
    put(tmp_path, "opt/linked.service", WANTED)
    link(tmp_path, f"{etc}/linked.service", "/opt/linked.service")
    put(tmp_path, f"{LIB}/rt.service", WANTED)
    link(tmp_path, "run/systemd/system/multi-user.target.wants/rt.service", f"/{LIB}/rt.service")
    put(tmp_path, f"{LIB}/getty@.service", UNIT + "[Install]\nWantedBy=getty.target\nDefaultInstance=tty1\n")
    link(tmp_path, f"{etc}/getty.target.wants/getty@tty1.service", f"/{LIB}/getty@.service")
    put(tmp_path, f"{LIB}/other.service", WANTED)
    link(tmp_path, f"{etc}/nick.service", f"/{LIB}/other.service")
    put(tmp_path, f"{etc}/mine.service", UNIT)
    put(tmp_path, "run/systemd/generator/data.mount", "[Mount]\nWhat=/dev/sda\nWhere=/data\n")
    put(tmp_path, "run/systemd/transient/job.service", UNIT)
    return tmp_path


def unit_states(text: str) -> dict[str, str]:
    """Names and states of what `systemctl list-unit-files` prints."""
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if line}


def test_unit_files_are_judged_as_systemd_judges_them(unit_tree: Path) -> None:
    files = host_units.UnitFiles(unit_tree)
    found = {name: files.state(name) for name in files.files}
    assert found == unit_states(recorded("list-unit-files-252"))


@pytest.mark.parametrize("here", [False, True], ids=["a tree", "this machine"])
def test_systemctl_itself_agrees(unit_tree: Path, here: bool) -> None:
    if not shutil.which("systemctl"):
        pytest.skip("no systemctl here")
    root = Path("/") if here else unit_tree
    done = subprocess.run(
        ["systemctl", f"--root={root}", "list-unit-files", "--no-legend", "--plain", "--type=service,timer,socket,mount"],
        capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    files = host_units.UnitFiles(root)
    assert {name: files.state(name) for name in files.files} == unit_states(done.stdout)


def test_units_are_told_with_what_they_do_and_how_they_start(unit_tree: Path) -> None:
    found = host_units.units(recorded("list-units-252"), unit_tree)
    states = {name: (unit["active"], unit["enabled"]) for name, unit in found.items()}
    assert states["chrony.service"] == ("active", "enabled")
    assert states["chronyd.service"] == ("active", "alias")
    assert states["nginx.service"] == ("active", "disabled")
    assert states["vllm@chat.service"] == ("activating", "enabled")
    assert states["vllm@broken.service"] == ("failed", "disabled")
    assert states["getty@tty1.service"] == ("active", "enabled")
    assert states["-.mount"] == ("active", "")
    assert states["hwclock.service"] == ("inactive", "masked")
    assert states["idle@.service"] == ("inactive", "disabled")
    assert states["dbus.socket"] == ("active", "")
    assert states["apt-daily.timer"] == ("active", "")
    assert not {"home.mount", "auditd.service"} & states.keys(), "nothing but a name in another unit"


def test_an_instance_that_is_enabled_and_does_not_run_is_told(unit_tree: Path) -> None:
    assert host_units.units("", unit_tree)["vllm@chat.service"] == {"active": "inactive", "enabled": "enabled"}


def test_newer_systemds_are_read_too(tmp_path: Path) -> None:
    found = {name: unit["active"] for name, unit in host_units.units(recorded("list-units-257"), tmp_path).items()}
    assert found["ssh.socket"] == found["vllm@chat.service"] == found["user@1000.service"] == "active"
    assert found["nginx.service"] == "reloading"
    assert found[r"srv-models\x2dnfs.mount"] == "active"
    assert "plymouth-start.service" not in found


def test_users_and_groups_are_the_local_ones() -> None:
    assert host.ids("root:x:0:0:root:/root:/bin/bash\n+::::::\nvllm:x:998:998::/nonexistent:/usr/sbin/nologin\n\n") == {
        "root": 0,
        "vllm": 998,
    }
    assert host.ids("root:x:0:\nsudo:x:27:fleet,admin\nbroken\n") == {"root": 0, "sudo": 27}


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/nginx.service\n", "nginx.service"),
        ("0::/system.slice/system-vllm.slice/vllm@chat.service/worker\n", "vllm@chat.service"),
        ("0::/init.scope\n", "init.scope"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        ("12:cpu:/\n1:name=systemd:/system.slice/ssh.service\n0::/system.slice/ssh.service\n", "ssh.service"),
        ("4:memory:/docker/abc\n1:name=systemd:/docker/abc\n", ""),
        ("0::/../../system.slice/docker.service\n", "docker.service"),
        ("0::/kubepods.slice/pod1/x.service\n", ""),
        ("", ""),
    ],
)
def test_the_unit_is_read_from_the_control_group(cgroup: str, unit: str) -> None:
    assert host_sockets.unit_of(cgroup) == unit


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc with listeners: systemd holds the socket of sshd too, the workers of Nginx one more each."""
    for table in ("tcp", "tcp6"):
        put(tmp_path, f"net/{table}", recorded(table))
    processes = [
        (1, "systemd", "/init.scope", ["31006"]),
        (70, "sshd", "/system.slice/ssh.service", ["31006"]),
        (80, "nginx", "/system.slice/nginx.service", ["31001", "31002", "31009"]),
        (81, "nginx", "/system.slice/nginx.service", ["31001", "31002", "31009"]),
        (90, "vllm", "/system.slice/system-vllm.slice/vllm@chat.service", ["31003", "31004"]),
    ]
    for number, program, cgroup, inodes in processes:
        put(tmp_path, f"{number}/comm", program + "\n")
        put(tmp_path, f"{number}/cgroup", f"0::{cgroup}\n")
        link(tmp_path, f"{number}/fd/0", "/dev/null")
        for descriptor, inode in enumerate(inodes, 3):
            link(tmp_path, f"{number}/fd/{descriptor}", f"socket:[{inode}]")
    (tmp_path / "95").mkdir()  # it just ended
    return tmp_path


def test_ports_are_told_with_their_holders(proc: Path) -> None:
    found = {(entry["address"], entry["port"]): (entry["program"], entry["unit"]) for entry in host_sockets.ports(proc)}
    assert found == {
        ("0.0.0.0", 443): ("nginx", "nginx.service"),
        ("192.168.1.2", 8000): ("vllm", "vllm@chat.service"),
        ("127.0.0.1", 631): ("", ""),
        ("::", 22): ("sshd", "ssh.service"),
        ("::1", 8002): ("", ""),
        ("::ffff:127.0.0.1", 8003): ("", ""),
        ("2001:db8::1", 80): ("nginx", "nginx.service"),
    }
    assert len(host_sockets.ports(proc)) == len(found), "one entry for the workers of one program"


def test_processes_of_containers_are_left_out(proc: Path) -> None:
    for process, namespace in (("self", 1), ("1", 1), ("70", 1), ("80", 2), ("81", 2), ("90", 1)):
        link(proc, f"{process}/ns/net", f"net:[{namespace}]")
    assert {entry["program"] for entry in host_sockets.ports(proc)} == {"sshd", "vllm", ""}


def test_file_systems_are_the_real_ones() -> None:
    found = {
        mount["path"]: (mount["fstype"], mount["network"]) for mount in host_mounts.parse_mounts(recorded("mounts"))
    }
    assert found == {
        "/": ("ext4", False),
        "/boot/efi": ("vfat", False),
        "/srv/models": ("xfs", False),
        "/tank": ("zfs", False),
        "/home": ("nfs4", True),
        "/scratch": ("lustre", True),
        "/mnt/my share": ("cifs", True),
        "/mnt/s3": ("fuse.rclone", True),
        "/var/lib/docker/overlay2/abc/merged": ("overlay", False),
    }


def test_a_file_server_is_not_asked_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "proc/self/mounts", recorded("mounts"))
    (tmp_path / "srv/models").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    asked = []
    statvfs = os.statvfs

    def watched(path: Any) -> os.statvfs_result:
        asked.append(str(path))
        return statvfs(path)

    monkeypatch.setattr(os, "statvfs", watched)
    found = {mount["path"]: mount for mount in host_mounts.mounts(tmp_path)}
    assert asked == [str(tmp_path), f"{tmp_path}/srv/models"]
    assert 0 < found["/srv/models"]["free_bytes"] <= found["/srv/models"]["size_bytes"]
    assert found["/home"]["size_bytes"] is None


def test_paths_are_told_without_following_links(tmp_path: Path) -> None:
    file = put(tmp_path, "key", "hunter2")
    file.chmod(0o600)
    link(tmp_path, "current", "pairs/own")
    big = put(tmp_path, "big", "x" * (host.HASH_LIMIT + 1))
    found = host.path_state(file)
    assert found == {
        "exists": True, "type": "file", "target": "", "size": 7, "mode": "0600", "uid": os.getuid(), "gid": os.getgid(),
        "sha256": "f52fbd32b2b3b86ff88ef6c490628285f482af15ddcb29541f94bcf526a3f6c7",
    }  # fmt: skip
    current = host.path_state(tmp_path / "current")
    assert (current["exists"], current["type"], current["target"]) == (True, "link", "pairs/own")
    assert host.path_state(tmp_path)["type"] == "directory"
    assert host.path_state(big)["sha256"] == ""
    assert host.path_state(Path("/dev/null"))["type"] == "other"
    nothing = host.path_state(tmp_path / "no/thing")
    assert (nothing["exists"], nothing["type"], nothing["uid"]) == (False, "", None)
    assert nothing.keys() == found.keys()


@pytest.mark.parametrize(
    ("recording", "status", "gpus", "error"),
    [
        ("nvidia-smi-h100", 0, 2, ""),
        ("nvidia-smi-mismatch", 18, 0, "Driver/library version mismatch"),
        ("nvidia-smi-no-driver", 9, 0, "couldn't communicate with the NVIDIA driver"),
        ("nvidia-smi-none", 0, 0, "No devices were found"),
    ],
)
def test_gpus_are_told_or_why_there_are_none(recording: str, status: int, gpus: int, error: str) -> None:
    program = Program(["sh", "-c", f"cat '{RECORDINGS / recording}'; exit {status}"])
    found = host_facts.gpu_facts(program)
    assert len(found["gpus"]) == gpus
    assert error in found["gpu_error"] if error else not found["gpu_error"]


def test_a_host_without_nvidia_smi_has_no_gpus_and_no_error() -> None:
    assert host_facts.gpu_facts(None) == {"gpus": [], "gpu_error": ""}


def test_a_program_that_hangs_is_not_waited_for() -> None:
    begun = time.monotonic()
    assert Program(["sleep", "30"]).output(0.2) == (False, "sleep did not answer within 0.2 s")
    assert Program(["/no/such/program"]).output(1) == (False, "/no/such/program cannot be run")
    assert time.monotonic() - begun < 10


def test_the_module_runs_as_a_task() -> None:
    """Once for real, in check mode, with everything that it looks at."""
    arguments = json.dumps({"paths": ["/etc/passwd", "/no/such/path"]})
    done = subprocess.run(
        [str(Path(sys.prefix, "bin/ansible")), "localhost", "-i", "localhost,", "-c", "local", "--check", "-e", "ansible_python_interpreter=/usr/bin/python3",
         "-m", "gpufleet.llm.host_facts", "-a", arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8", "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.partition("=>")[2])
    assert result["changed"] is False
    facts = result["ansible_facts"]["gpufleet"]
    assert facts.keys() == {
        "distribution", "release", "codename", "architecture", "kernel", "python", "python_path", "python_replaced", "container",
        "service_manager", "memory_bytes", "cpus", "packages", "uv", "trees", "lists_age_seconds", "units", "users", "groups", "ports", "mounts",
        "gpus", "gpu_error", "paths", "held_updates", "group_members", "overruled", "time_servers", "clock_synchronised",
    }  # fmt: skip
    assert facts["users"]["root"] == 0
    assert facts["paths"]["/etc/passwd"]["type"] == "file"
    assert facts["paths"]["/no/such/path"]["exists"] is False


@pytest.mark.parametrize(
    ("link", "has_apt", "path", "replaced"),
    [
        ("python3.11", True, "/usr/bin/python3.11", ""),
        (
            "python3.11",
            False,
            "/usr/bin/python3.11",
            "",
        ),  # where apt's bindings are not installed yet, Ansible brings them
        ("../local/bin/python3.14", False, "/usr/bin/python3.11", "/usr/local/bin/python3.14"),
        ("../local/bin/python3.14", True, "/usr/bin/python3.11", ""),  # the modules run with another one
        ("", False, "/usr/bin/python3.11", ""),
    ],
)
def test_another_python3_by_alternatives_is_seen(
    tmp_path: Path, link: str, has_apt: bool, path: str, replaced: str
) -> None:
    for name in ("usr/bin/python3.11", "usr/local/bin/python3.14", "usr/share/python3/debian_defaults"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[DEFAULT]\n# the default python3 version\ndefault-version = python3.11\n")
    if link:
        (tmp_path / "usr/bin/python3").symlink_to(link)
    found = host.python(tmp_path, has_apt)
    assert found["python_path"] == path
    assert found["python_replaced"].removeprefix(str(tmp_path)) == replaced
