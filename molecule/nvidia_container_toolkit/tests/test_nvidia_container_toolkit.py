"""Containers get what the specification of the GPUs says, and it is what the GPUs are.

There is no GPU here: nvidia-repository.sh says what stands in for what. The engine is a real one, Debian's, and it reads the specification itself.
That a real GPU is still allowed after a daemon-reload, by the kernel and not only by its name, is shown on one (tests/gpu).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.roles import applied, changed, refused

ROLE = "nvidia_container_toolkit"
PACKAGES = [
    "libnvidia-container-tools",
    "libnvidia-container1",
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
]
SPEC = "/var/run/cdi/nvidia.yaml"
G0, G1 = "GPU-00000000-aaaa-0000-0000-000000000000", "GPU-11111111-aaaa-0000-0000-000000000000"
M0, M1 = "MIG-22222222-aaaa-0000-0000-000000000000", "MIG-33333333-aaaa-0000-0000-000000000000"
# What is written to /dev/full does not fit, whatever it is called.
FULL = "busybox sh -c 'for gpu in /dev/nvidia*; do busybox echo x >$gpu; done' 2>&1"


@pytest.fixture(autouse=True, scope="module")
def image(host: Host) -> None:
    """An image with a shell, and nothing of NVIDIA's."""
    host.check_output(
        "mkdir -p /srv/image/bin && cp $(command -v busybox) /srv/image/bin/busybox && for name in sh cat; do ln -sf busybox /srv/image/bin/$name; done"
        " && tar -C /srv/image -c . | docker import - busybox"
    )


@pytest.fixture
def gpus(host: Host) -> Iterator[Host]:
    """The GPUs of the host, which a test may change."""
    host.check_output("cp /srv/gpus /srv/gpus.before")
    yield host
    host.check_output("cp /srv/gpus.before /srv/gpus")
    applied(host, ROLE)


def names(host: Host) -> list[str]:
    """What a container can ask for."""
    return sorted(line.partition("=")[2] for line in host.check_output("nvidia-ctk cdi list").splitlines())


def versions(host: Host) -> set[str]:
    """The versions of the four packages."""
    return set(host.check_output(f"dpkg-query -W -f '${{Version}}\\n' {' '.join(PACKAGES)}").split())


def started(host: Host) -> str:
    """Which starts of the units these are."""
    told: str = host.check_output("systemctl show --property=InvocationID --value docker containerd nvidia-cdi-refresh")
    return told


def test_a_run_that_changes_nothing_looks_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the role beside the one that brings the facts of the host; nothing is started again, and the specification is left as it is."""
    before = started(host), host.check_output(f"stat -c %Y-%i {SPEC}")
    monkeypatch.setenv("ANSIBLE_CALLBACKS_ENABLED", "gpufleet.llm.remote_calls")
    told = applied(host, ROLE)
    assert not changed(told)
    assert re.findall(r"remote calls: \S+ (\d+) ", told) == ["2"], told
    assert (started(host), host.check_output(f"stat -c %Y-%i {SPEC}")) == before


def test_the_packages_are_of_one_version_from_one_repository_and_held(host: Host) -> None:
    assert versions(host) == {"1.20.0-1"}
    assert [name for name in PACKAGES if name not in host.check_output("apt-mark showhold").splitlines()] == []
    told = host.check_output("apt-cache policy nvidia-container-toolkit")
    assert "1.22.0-1 -1" in told, "the packages of the repository for CUDA"
    assert "1.21.0-1 700" in told, "a newer one of the same repository"
    # neither with the pins nor by the holds alone
    for pins in ("", "-o Dir::Etc::PreferencesParts=/nowhere"):
        assert "nvidia" not in host.check_output(f"apt-get --simulate {pins} dist-upgrade | grep ^Inst || true")


def test_a_container_has_the_gpus_that_it_asks_for(host: Host) -> None:
    assert names(host) == sorted(["0", "1", G0, G1, "all"])
    for asked, seen in (("all", "nvidia0 nvidia1"), ("0", "nvidia0"), (G1, "nvidia1")):
        told = host.check_output(
            f"docker run --rm --device nvidia.com/gpu={asked} busybox busybox sh -c 'cd /dev; echo nvidia*'"
        )
        assert told == seen
    assert host.check_output("docker run --rm busybox busybox sh -c 'cd /dev; echo nvidia*'") == "nvidia*"
    told = host.run(f"docker run --rm --device nvidia.com/gpu=all busybox {FULL}").stdout
    assert told.count("No space left on device") == 2


def test_hardened_containers_have_them_too(host: Host) -> None:
    hardened = "--cap-drop ALL --security-opt no-new-privileges --read-only --user 65534 --network none"
    told = host.run(f"docker run --rm {hardened} --device nvidia.com/gpu=all busybox {FULL}").stdout
    assert told.count("No space left on device") == 2


def test_docker_was_left_alone(host: Host) -> None:
    assert host.check_output("systemctl show docker --property=InvocationID --value") == host.check_output(
        "cat /srv/engine"
    )
    host.check_output("sha256sum --check /srv/daemon.sha256")
    assert "nvidia" not in host.check_output("docker info --format '{{json .Runtimes}}'")


def test_a_daemon_reload_takes_none_away(host: Host) -> None:
    """With the hook of before 1.18, NVML failed from here on (`Unknown Error`)."""
    host.check_output("docker run --detach --name holds --device nvidia.com/gpu=all busybox busybox sleep 600")
    try:
        for disturb in (
            "true",
            "systemctl daemon-reload",
            "systemctl restart nvidia-cdi-refresh",
            "systemctl restart docker",
        ):
            host.run(disturb)  # NVIDIA's unit does nothing here
            told = host.run(f"docker exec holds {FULL}").stdout
            assert told.count("No space left on device") == 2, disturb
    finally:
        host.check_output("docker rm --force holds")


def test_another_division_of_the_gpus_is_noticed(gpus: Host) -> None:
    divided = f"GPU 0: NVIDIA H100 (UUID: {G0})\n  MIG 3g.40gb     Device  0: (UUID: {M0})\n  MIG 3g.40gb     Device  1: (UUID: {M1})\n"
    gpus.check_output(f"printf %s {shlex.quote(divided)} >/srv/gpus")
    told = applied(gpus, ROLE)
    assert changed(told)
    assert f"{M0}, {M1} missing and {G0}, {G1} gone" in " ".join(told.split())
    assert names(gpus) == sorted(["0:0", "0:1", M0, M1, "all"])
    assert not changed(applied(gpus, ROLE))


def test_another_driver_is_noticed(host: Host) -> None:
    host.check_output("mv /usr/lib/nvidia/libcuda.so.580.159.04 /usr/lib/nvidia/libcuda.so.595.71.05")
    try:
        assert "it is of another driver" in " ".join(applied(host, ROLE).split())
    finally:
        host.check_output("mv /usr/lib/nvidia/libcuda.so.595.71.05 /usr/lib/nvidia/libcuda.so.580.159.04")
        told = applied(host, ROLE)
    assert "it is of another driver" in " ".join(told.split())


def test_where_the_kernel_has_the_driver_its_unit_makes_the_specification(host: Host) -> None:
    """In the runs above there was no such directory, so the unit did nothing and the role made it itself."""
    assert host.run("test -e /lib/modules/$(uname -r)/modules.dep").rc != 0
    # which sees that file, too: it must not be faster than the role
    host.check_output("systemctl stop nvidia-cdi-refresh.path")
    host.check_output(
        f"mkdir -p /lib/modules/$(uname -r) && echo updates/dkms/nvidia.ko: >/lib/modules/$(uname -r)/modules.dep && rm {SPEC}"
    )
    try:
        assert changed(applied(host, ROLE))
        assert host.check_output("systemctl show nvidia-cdi-refresh --property=Result,ActiveState").split() == [
            "Result=success",
            "ActiveState=active",
        ]
        assert host.file(SPEC).exists
    finally:
        host.check_output("rm -r /lib/modules/$(uname -r)")


def test_the_gpus_are_counted_in_a_container(gpus: Host) -> None:
    gpus.check_output(f"rm {SPEC}")
    assert changed(applied(gpus, ROLE, nvidia_container_toolkit_verify_image="busybox"))
    # An image whose own nvidia-smi comes first in the path stands in for a container that is given one GPU too few.
    gpus.check_output(f"rm {SPEC}")
    gpus.check_output(
        "mkdir -p /srv/image/usr/local/bin && printf '#!/bin/sh\\nbusybox grep \"GPU 0\" /srv/gpus\\n' >/srv/image/usr/local/bin/nvidia-smi"
        " && chmod 755 /srv/image/usr/local/bin/nvidia-smi && tar -C /srv/image -c . | docker import - sees-one"
        " && rm -r /srv/image/usr"
    )
    told = refused(gpus, ROLE, nvidia_container_toolkit_verify_image="sees-one")
    assert f"has the GPUs {G0}, {G1}, but a container that was given all of them sees {G0}." in told


def test_without_a_driver_there_is_no_specification(host: Host) -> None:
    host.check_output("mv /usr/bin/nvidia-smi /srv/nvidia-smi")
    try:
        told = refused(host, ROLE)
        assert "has no GPU of NVIDIA's (there is no driver (nvidia-smi), and none on the PCI bus)" in told
        assert host.file(SPEC).exists
        told = applied(host, ROLE, nvidia_container_toolkit_without_gpu="skip")
        assert not changed(told)
        assert "so nothing is done there" in " ".join(told.split())
        assert changed(applied(host, ROLE, nvidia_container_toolkit_without_gpu="install"))
        assert not host.file(SPEC).exists
        assert not changed(applied(host, ROLE, nvidia_container_toolkit_without_gpu="install"))
    finally:
        host.check_output("mv /srv/nvidia-smi /usr/bin/nvidia-smi")
        applied(host, ROLE)
    assert names(host) == sorted(["0", "1", G0, G1, "all"])


def test_another_key_is_not_trusted_and_lists_that_break_apt_are_disabled(host: Host) -> None:
    key = "/etc/apt/keyrings/nvidia-container-toolkit.asc"
    good = host.check_output(f"sha256sum {key}")
    host.check_output(f"cp /srv/keys/other {key}")
    assert "is not the key of this repository" in refused(
        host, ROLE, nvidia_container_toolkit_repository_key_url="file:///srv/keys/other"
    )
    lists = {
        "nvidia-docker.list": "deb https://nvidia.github.io/nvidia-docker/ubuntu18.04/$(ARCH) /",
        "libnvidia-container.list": "deb https://nvidia.github.io/libnvidia-container/stable/ubuntu18.04/$(ARCH) /",
        "nvidia-container-runtime.list": "deb https://nvidia.github.io/nvidia-container-runtime/stable/ubuntu18.04/$(ARCH) /",
        "nvidia-container-toolkit.list": "deb [signed-by=/usr/share/keyrings/old.gpg] http://127.0.0.1:8081/deb/$(ARCH)/ /",
    }
    for name, line in lists.items():
        host.check_output(f"echo {shlex.quote(line)} >/etc/apt/sources.list.d/{name}")
    assert "Conflicting values set for option Signed-By" in host.run("apt-get update").stderr
    assert changed(applied(host, ROLE))
    assert host.check_output(f"sha256sum {key}") == good
    assert host.run("apt-get update").rc == 0
    assert [name for name in lists if not host.file(f"/etc/apt/sources.list.d/{name}.disabled").exists] == []
    # another repository of NVIDIA's is not this one
    assert host.file("/etc/apt/sources.list.d/cuda.sources").exists
    assert not changed(applied(host, ROLE))


def test_what_cannot_work_is_refused(host: Host) -> None:
    told = refused(
        host,
        ROLE,
        nvidia_container_toolkit_version="1.19.0",
        docker_daemon_options={"runtimes": {"nvidia": {"path": "x"}}},
    )
    assert "version is 1.19.0, and 1.19.1 is the oldest without a known way out of a container" in told
    assert "docker_daemon_options has the runtime nvidia" in told
    told = refused(host, ROLE, nvidia_container_toolkit_version="1.30.0")
    assert "the repository has no nvidia-container-toolkit 1.30.0-1, only 1.21.0-1, 1.20.0-1" in told
    assert versions(host) == {"1.20.0-1"}


def test_what_is_left_of_before_is_named(host: Host) -> None:
    spec, hook = "/etc/cdi/nvidia.yaml", "/usr/share/containers/oci/hooks.d/oci-nvidia-hook.json"
    host.check_output(f"mkdir -p /etc/cdi $(dirname {hook}) && cp {SPEC} {spec} && echo '{{}}' >{hook}")
    told = refused(host, ROLE)
    host.check_output(f"rm {spec} {hook}")
    assert f"{spec} of nvidia-container-toolkit-debian13 is another specification of the same GPUs" in told
    assert f"{hook} of nvidia-container-toolkit-debian13 is the hook by which containers got GPUs before CDI" in told


def test_a_mixture_becomes_one_version_and_a_newer_one_is_kept(host: Host) -> None:
    """After everything else: there is no way back."""
    host.check_output(
        "apt-mark unhold libnvidia-container1 && dpkg --force-depends --install /srv/nvidia/deb/*/libnvidia-container1_1.17.8-1_*.deb"
    )
    assert versions(host) == {"1.17.8-1", "1.20.0-1"}
    assert changed(applied(host, ROLE, nvidia_container_toolkit_version="1.21.0"))
    assert versions(host) == {"1.21.0-1"}
    told = applied(host, ROLE)
    assert not changed(told)
    assert "is 1.21.0-1, newer than nvidia_container_toolkit_version (1.20.0); it is kept" in " ".join(told.split())
