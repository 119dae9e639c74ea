"""An engine as it runs: what it keeps going, what it opens to whom, and what apt may do with it.

docker-archive has Debian 13's own engine, from Debian's archive. docker-vendor takes Docker's packages from a repository that is made on the
host (docker-repository.sh says what stands in for what): their names, versions, dependencies and conflicts are Docker's, the programs are Debian's.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from testinfra.host import Host

from tests.network import scan
from tests.roles import applied, changed, refused, told

FILE = "/etc/docker/daemon.json"
VENDOR = ["containerd.io", "docker-buildx-plugin", "docker-ce", "docker-ce-cli", "docker-compose-plugin"]
ARCHIVE = ["containerd", "docker-cli", "docker-compose", "docker.io", "runc"]
VERSION = "5:{}-1~debian.13~trixie"
WITH_KEY = "/etc/apt/keyrings/docker.asc"


def info(host: Host) -> dict[str, Any]:
    """What the engine says of itself."""
    said: dict[str, Any] = json.loads(host.check_output("docker info --format '{{json .}}'"))
    return said


def engine(host: Host) -> str:
    """The process of the engine."""
    pid: str = host.check_output("systemctl show docker --property=MainPID --value")
    return pid


def version(host: Host, package: str) -> str:
    """The version of a package."""
    said: str = host.check_output(f"dpkg-query -W -f '${{Version}}' {package}")
    return said


@pytest.fixture(scope="module", autouse=True)
def image(archive: Host, vendor: Host) -> None:
    """An image with a shell."""
    for one in (archive, vendor):
        one.check_output("tar -C / -c bin/busybox usr/bin/busybox | docker import - busybox")


@pytest.fixture(params=["archive", "vendor"])
def host(request: pytest.FixtureRequest) -> Host:
    """One host after the other."""
    found: Host = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def web(archive: Host) -> Iterator[str]:
    """A container that serves, and its process."""
    archive.check_output("docker run --detach --name web --publish 8090:80 busybox busybox httpd -f -p 80")
    yield archive.check_output("docker inspect --format '{{.State.Pid}}' web")
    archive.check_output("docker rm --force web")


def process(host: Host) -> str:
    """The process of that container, empty when it does not run."""
    said: str = host.check_output("docker inspect --format '{{if .State.Running}}{{.State.Pid}}{{end}}' web")
    return said


def serve(host: Host, ports: Iterable[int]) -> None:
    """Wait until containers serve at these ports of the host itself."""
    wanted, until = sorted(ports), time.monotonic() + 60
    while scan(host, "127.0.0.1", wanted)["open"] != wanted:
        assert time.monotonic() < until, f"nobody serves at {wanted}"
        time.sleep(0.2)


# --- as it was asked for


def test_a_run_that_changes_nothing_looks_once(archive: Host, vendor: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the role beside the one that brings the facts of the host, and nothing is restarted."""
    before = [engine(archive), engine(vendor)]
    monkeypatch.setenv("ANSIBLE_CALLBACKS_ENABLED", "gpufleet.llm.remote_calls")
    said = applied([archive, vendor], "docker")
    assert not changed(said)
    assert re.findall(r"remote calls: \S+ (\d+) ", said) == ["2", "2"], said
    assert [engine(archive), engine(vendor)] == before


def test_the_engine_has_what_was_asked_for(host: Host) -> None:
    said = info(host)
    assert (said["LiveRestoreEnabled"], said["LoggingDriver"]) == (True, "local")
    assert "name=no-new-privileges" in said["SecurityOptions"]
    assert said["DefaultAddressPools"] == [{"Base": "172.17.0.0/16", "Size": 24}]
    assert host.check_output("systemctl is-enabled docker") == "enabled"
    # the first network was made with the first start: nothing was started before its configuration was there
    assert (
        host.check_output("docker network inspect bridge --format '{{(index .IPAM.Config 0).Subnet}}'")
        == "172.17.0.0/24"
    )


def test_a_published_port_is_on_loopback_unless_it_says_otherwise(host: Host, archive: Host, vendor: Host) -> None:
    """On the network that is there, and on one that is made."""
    other = vendor if host is archive else archive
    httpd = "busybox busybox httpd -f -p 80"
    host.check_output("docker network create made")
    try:
        host.check_output(f"docker run --detach --name one --publish 8091:80 {httpd}")
        host.check_output(f"docker run --detach --name two --publish 8092:80 --network made {httpd}")
        host.check_output(f"docker run --detach --name three --publish 0.0.0.0:8093:80 {httpd}")
        serve(host, [8091, 8092, 8093])
        assert scan(other, host, [8091, 8092, 8093])["open"] == [8093]
    finally:
        host.check_output("docker rm --force one two three && docker network rm made")


def test_setuid_programs_give_nothing(host: Host) -> None:
    said = host.check_output("docker run --rm busybox busybox grep NoNewPrivs /proc/self/status")
    assert said.split() == ["NoNewPrivs:", "1"]


def test_what_a_container_logs_stays_small(host: Host) -> None:
    said = host.check_output(
        "docker run --name talker busybox busybox sh -c 'busybox echo hello' && docker inspect --format '{{json .HostConfig.LogConfig}}' talker"
        " && docker rm talker"
    )
    log = json.loads(said.splitlines()[1])
    assert log == {"Type": "local", "Config": {"max-file": "5", "max-size": "100m"}}


# --- what runs goes on


def test_containers_go_on_and_a_restart_waits_for_them(archive: Host, web: str) -> None:
    before, small = engine(archive), {"docker_log_max_size": "50m"}
    serve(archive, [8090])
    labelled = {"storage-driver": "vfs", "labels": ["rack=b"]}
    assert changed(applied(archive, "docker", docker_daemon_options=labelled))
    assert (info(archive)["Labels"], engine(archive), process(archive)) == (["rack=b"], before, web)

    # A reload is enough for a label, though not to be rid of it; and for the logs it never is.
    waits = (
        "has to be restarted: daemon.json has other values than the engine runs with (labels, log-opts). It was not, because web runs. Drain the "
        "host and run this again, or with docker_restart: true, which leaves containers running where live-restore is in use (here it is)"
    )
    assert waits in told(applied(archive, "docker", **small), archive)
    # It is due in the next run as well, which has nothing to change.
    again = applied(archive, "docker", **small)
    assert waits in told(again, archive)
    assert not changed(again)
    assert (engine(archive), process(archive)) == (before, web)

    assert changed(applied(archive, "docker", **small, docker_restart=True))
    assert engine(archive) != before
    assert process(archive) == web
    assert info(archive)["Labels"] in (None, [])
    serve(archive, [8090])

    # When none runs it is done without a word.
    before = engine(archive)
    archive.check_output("docker stop --time 1 web")
    assert changed(applied(archive, "docker"))
    assert engine(archive) != before
    assert not changed(applied(archive, "docker"))


def test_a_configuration_that_docker_refuses_is_not_kept(archive: Host, web: str) -> None:
    before = (archive.check_output(f"cat {FILE}"), engine(archive))
    said = refused(archive, "docker", docker_daemon_options={"storage-driver": "vfs", "no-such-option": True})
    assert "no-such-option" in said
    assert (archive.check_output(f"cat {FILE}"), engine(archive)) == before
    assert process(archive) == web


def test_an_engine_that_was_stopped_is_started(archive: Host) -> None:
    archive.check_output("systemctl stop docker.socket docker.service")
    assert changed(applied(archive, "docker"))
    assert info(archive)["LiveRestoreEnabled"] is True


def test_a_file_that_somebody_changed_is_put_right(archive: Host) -> None:
    before = archive.check_output(f"cat {FILE}")
    archive.check_output(
        f"""sed -i 's/"live-restore": true/"live-restore": false/' {FILE} && systemctl reload docker"""
    )
    assert changed(applied(archive, "docker"))
    assert archive.check_output(f"cat {FILE}") == before
    # and not only the file: the engine had read the other one
    assert info(archive)["LiveRestoreEnabled"] is True
    assert not changed(applied(archive, "docker"))


def test_a_file_of_somebody_else_is_not_taken_away(archive: Host) -> None:
    """As it is on a host that the role has never seen."""
    archive.check_output(f"mv /var/lib/vllm-fleet/tree/docker /srv/tree && cp -a {FILE} /srv/daemon.json")
    other = json.dumps({"data-root": "/srv/elsewhere", "storage-driver": "vfs"})
    archive.check_output(f"echo {shlex.quote(other)} >{FILE}")
    said = refused(archive, "docker")
    archive.check_output(f"rm {FILE} && mv /srv/daemon.json {FILE} && mv /srv/tree /var/lib/vllm-fleet/tree/docker")
    assert "has data-root, which this role would take out" in said
    assert "docker_take_over: true drops the rest" in said


def test_flags_of_a_drop_in_are_refused_by_name(archive: Host) -> None:
    """As DGX OS has them: with both, the engine would be gone after its next start."""
    path = "/etc/systemd/system/docker.service.d/flags.conf"
    lines = "[Service]\\nExecStart=\\nExecStart=/usr/sbin/dockerd -H fd:// --log-driver=journald\\n"
    before = archive.check_output(f"cat {FILE}")
    archive.check_output(f"printf '{lines}' >{path} && systemctl daemon-reload")
    said = refused(archive, "docker")
    starts = archive.run(f"dockerd --validate --config-file {FILE} --log-driver=journald")
    archive.check_output(f"rm {path} && systemctl daemon-reload")
    assert f"dockerd of docker-archive is started with --log-driver ({path}), which daemon.json says as well" in said
    assert "specified both as a flag and in the configuration file: log-driver" in starts.stderr + starts.stdout
    assert archive.check_output(f"cat {FILE}") == before


def test_an_engine_that_does_not_start_runs_on_with_its_former_file(archive: Host) -> None:
    """dockerd --validate accepts what no start does."""
    before = archive.check_output(f"cat {FILE}")
    said = refused(archive, "docker", docker_daemon_options={"storage-driver": "zfs"})
    assert "The daemon.json of before is back, and the engine runs with it" in said
    assert archive.check_output(f"cat {FILE}") == before
    assert info(archive)["Driver"] == "vfs"
    assert changed(applied(archive, "docker")) is False


def test_a_route_of_the_host_keeps_its_network(archive: Host) -> None:
    archive.check_output("ip route add 172.17.128.0/20 dev eth0")
    try:
        said = refused(archive, "docker")
        assert "docker_address_pools has 172.17.0.0/16, and the host has a route to 172.17.128.0/20" in said
        assert "a route to 172.17.128.0/20" in told(applied(archive, "docker", docker_route_conflicts="warn"), archive)
    finally:
        archive.check_output("ip route delete 172.17.128.0/20")


def test_what_cannot_work_is_refused(archive: Host) -> None:
    before = (engine(archive), archive.check_output(f"cat {FILE}"))
    wrong = {
        "docker_publish_address": "everywhere", "docker_log_max_size": "100", "docker_log_max_files": 0,
        "docker_address_pools": [{"base": "172.17.0.1/16", "size": 24}, {"base": "172.17.0.0/16", "size": 24}], "docker_daemon_option": {},
        "docker_daemon_options": {"hosts": ["tcp://0.0.0.0:2375"]}, "fleet_address": "172.17.4.4", "docker_source": "docker",
    }  # fmt: skip
    messages = [
        "8 problems with the variables of docker-archive; nothing has been changed",
        "docker_publish_address is 'everywhere'; it is one IPv4 address",
        "docker_log_max_size is 100; Docker takes sizes such as 100m",
        "docker_log_max_files is 0",
        r"docker_address_pools\[0\]: base is '172.17.0.1/16'",
        "172.17.4.4 is the address of a host",
        "docker_daemon_option is not a variable of the role docker; did you mean docker_daemon_options",
        "docker_daemon_options has hosts",
        r"has docker.io 26\S+, .* from the distribution, and docker_source is docker",
    ]
    said = refused(archive, "docker", **wrong)
    assert [message for message in messages if not re.search(message, said)] == [], said
    assert (engine(archive), archive.check_output(f"cat {FILE}")) == before


def test_an_engine_that_is_too_old_is_refused(archive: Host) -> None:
    """As on Debian 12, whose own engine the role refuses before any change."""
    before = (engine(archive), archive.check_output(f"cat {FILE}"))
    said = refused(archive, "docker", docker_minimum_versions={"distribution": {"docker.io": "99"}})
    assert re.search(
        r"docker_source is distribution, but Debian 13 has docker.io 26\S+, and 99 is the oldest .* Set docker_source: docker",
        said,
    )
    assert (engine(archive), archive.check_output(f"cat {FILE}")) == before


# --- the vendor's packages


def test_the_packages_are_those_of_the_vendor_and_held(vendor: Host, archive: Host) -> None:
    assert version(vendor, "docker-ce") == version(vendor, "docker-ce-cli") == VERSION.format("28.5.2")
    assert vendor.check_output("apt-mark showhold").splitlines() == VENDOR
    assert archive.check_output("apt-mark showhold").split() == ARCHIVE


def test_no_upgrade_touches_them(vendor: Host) -> None:
    """The repository has a newer engine. The pins keep it away, and so do the holds without them."""
    without_pins = "-o Dir::Etc::PreferencesParts=/nowhere"
    assert "Candidate: " + VERSION.format("28.5.2") in vendor.check_output("apt-cache policy docker-ce")
    assert "Candidate: " + VERSION.format("29.1.3") in vendor.check_output(f"apt-cache {without_pins} policy docker-ce")
    assert "Inst docker" not in vendor.check_output("apt-get --simulate dist-upgrade")
    assert "Inst docker" not in vendor.check_output(f"apt-get --simulate {without_pins} dist-upgrade")
    vendor.check_output(
        "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends unattended-upgrades"
    )
    # allowed to take anything from anywhere
    vendor.check_output(
        """echo 'Unattended-Upgrade::Origins-Pattern { "origin=*"; }; Dir::Etc::PreferencesParts "/nowhere";' >/etc/apt/apt.conf.d/99test"""
        " && unattended-upgrade --verbose && rm /etc/apt/apt.conf.d/99test"
    )
    assert version(vendor, "docker-ce") == VERSION.format("28.5.2")


def test_the_packages_of_the_distribution_cannot_get_in(vendor: Host, archive: Host) -> None:
    for package in ("docker.io", "containerd", "runc"):
        assert vendor.run(f"apt-get --simulate install --allow-change-held-packages {package}").rc != 0, package
    # and the vendor's could not there, if somebody added the repository
    assert "Pin-Priority: -1" in archive.check_output("cat /etc/apt/preferences.d/vllm-fleet-docker")
    assert "from Docker's repository, and docker_source is distribution" in refused(
        vendor, "docker", docker_source="distribution", docker_version=""
    )


def test_a_newer_engine_is_kept_and_a_missing_version_refused(vendor: Host) -> None:
    said = " ".join(applied(vendor, "docker", docker_version="28.3.2").split())
    assert "is newer than docker_version (28.3.2); it is kept" in said
    assert version(vendor, "docker-ce") == VERSION.format("28.5.2")
    said = refused(vendor, "docker", docker_version="30.0.0")
    assert (
        "docker_version is 30.0.0, but Docker's repository has docker-ce 5:29.1.3-1~debian.13~trixie, 5:28.5.2" in said
    )


def test_images_come_by_the_proxy_of_the_fleet(archive: Host) -> None:
    """Nobody is there, so the engine says whom it wanted to ask. The address has a password, which is shown nowhere."""
    proxy = {"http": "http://fleet:geheim1@127.0.0.1:9", "no_proxy": [".corp.example"]}
    said = applied(archive, "docker", "--diff", fleet_proxy=proxy, docker_restart=True)
    assert changed(said)
    assert "geheim1" not in said
    assert archive.file(FILE).mode == 0o600
    assert "proxyconnect tcp: dial tcp 127.0.0.1:9" in archive.run("docker pull registry.example/image").stderr
    assert info(archive)["NoProxy"].startswith("localhost,127.0.0.1,::1,")
    assert info(archive)["NoProxy"].endswith(".corp.example")
    assert not changed(applied(archive, "docker", fleet_proxy=proxy))
    applied(archive, "docker", docker_restart=True)
    assert info(archive)["HttpProxy"] == ""


def test_another_key_and_another_file_for_the_same_repository_are_put_away(vendor: Host) -> None:
    """Two keys for one repository make every call of apt fail."""
    path = "/etc/apt/sources.list.d/docker.list"
    good = vendor.check_output(f"sha256sum {WITH_KEY}")
    vendor.check_output(f"cp /srv/docker/other-key {WITH_KEY}")
    said = refused(vendor, "docker", docker_repository_key_url="file:///srv/docker/other-key")
    assert "file:///srv/docker/other-key is not the key of this repository: it holds the key" in said
    vendor.check_output(
        f"echo 'deb [signed-by=/usr/share/keyrings/other.gpg] file:///srv/docker/debian trixie stable' >{path}"
    )
    assert "Conflicting values set for option Signed-By" in vendor.run("apt-get update").stderr
    assert changed(applied(vendor, "docker"))
    assert vendor.check_output(f"sha256sum {WITH_KEY}") == good
    assert vendor.run("apt-get update").rc == 0
    assert vendor.file(f"{path}.disabled").exists
    assert not changed(applied(vendor, "docker"))


def test_an_upgrade_leaves_containers_and_the_old_engine_running_until_it_may(vendor: Host) -> None:
    """After everything else: there is no way back."""
    vendor.check_output("docker run --detach --name web busybox busybox httpd -f -p 80")
    pid, before = process(vendor), engine(vendor)
    said = " ".join(applied(vendor, "docker", docker_version="29.1.3").split())
    assert version(vendor, "docker-ce") == VERSION.format("29.1.3")
    assert vendor.check_output("apt-mark showhold").splitlines() == VENDOR
    assert "docker.service were upgraded, and the old ones still run. It was not, because web runs" in said
    assert (process(vendor), engine(vendor)) == (pid, before)
    assert changed(applied(vendor, "docker", docker_version="29.1.3", docker_restart=True))
    assert process(vendor) == pid
    assert engine(vendor) != before
    assert not changed(applied(vendor, "docker", docker_version="29.1.3"))
    vendor.check_output("docker rm --force web")
