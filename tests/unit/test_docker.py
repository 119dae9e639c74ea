"""What is done about an engine: packages, its file, reloads and restarts. The engine itself is played here, by a socket that answers."""

from __future__ import annotations

import json
import os
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.filter.docker import (
    docker_host_problems,
    docker_plan,
    docker_problems,
    docker_route_conflicts,
)
from ansible_collections.gpufleet.llm.plugins.module_utils import docker, docker_flags
from ansible_collections.gpufleet.llm.plugins.module_utils.docker_host import (
    CONTAINERD,
    UNIT,
    Engine,
    EngineError,
    decided,
)

VENDOR = ["docker-ce", "docker-ce-cli", "containerd.io", "docker-buildx-plugin", "docker-compose-plugin"]
DISTRIBUTION = ["docker.io", "docker-cli", "docker-compose"]
TRIXIE = "-1~debian.13~trixie"
OLD, GOOD, NEW = f"5:28.3.2{TRIXIE}", f"5:28.5.2{TRIXIE}", f"5:29.1.3{TRIXIE}"
FLOORS = {"docker-ce": "5:28.3.3", "docker.io": "26.1.5"}


def asked(source: str = "docker", **more: Any) -> dict[str, Any]:
    """What the role asks for."""
    vendor = source == "docker"
    return {
        "host": "gpu1", "release": "Debian 13", "source": source, "packages": VENDOR if vendor else DISTRIBUTION,
        "same_version": VENDOR[:2] if vendor else [], "others": ["docker.io", "containerd", "runc"] if vendor else VENDOR,
        "version": "", "upgrade": False, "floors": FLOORS, "archive": {}, **more,
    }  # fmt: skip


def offered(*versions: str, others: str = "1.7.29-1") -> dict[str, Any]:
    """What apt can have: versions of the engine, and one of everything else."""
    engine = {"candidate": versions[0], "versions": list(versions)}
    return {
        **dict.fromkeys(VENDOR[:2], engine),
        **{name: {"candidate": others, "versions": [others]} for name in VENDOR[2:]},
    }


def there(version: str) -> dict[str, str]:
    return {**dict.fromkeys(VENDOR[:2], version), **dict.fromkeys(VENDOR[2:], "1.7.29-1")}


REST = VENDOR[2:]
# what is there, what is asked for beside the defaults, what the repository has -> what is installed, a word of the problem or of the note
PLANS: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, Any], list[str], str]] = {
    "a bare host gets the newest": ({}, {}, offered(NEW, GOOD), [f"docker-ce={NEW}", f"docker-ce-cli={NEW}", *REST], ""),
    "or the version that is asked for": (
        {}, {"version": "28.5.2"}, offered(NEW, GOOD), [f"docker-ce={GOOD}", f"docker-ce-cli={GOOD}", *REST], "",
    ),
    "by the version of the package, too": (
        {}, {"version": GOOD}, offered(NEW, GOOD), [f"docker-ce={GOOD}", f"docker-ce-cli={GOOD}", *REST], "",
    ),
    "one that is not there is refused": (
        {}, {"version": "27.0.0"}, offered(NEW, GOOD), [], f"docker_version is 27.0.0, but Docker's repository has docker-ce {NEW}, {GOOD}",
    ),
    "one below the floor is refused": ({}, {"version": "28.3.2"}, offered(NEW, OLD), [], "is older than 5:28.3.3"),
    "a repository that is old as a whole": ({}, {}, offered(OLD), [], "is older than 5:28.3.3"),
    "with a lower floor it goes": (
        {}, {"floors": {}}, offered(OLD), [f"docker-ce={OLD}", f"docker-ce-cli={OLD}", *REST], "",
    ),
    "what is there stays": (there(GOOD), {}, offered(NEW, GOOD), [], ""),
    "unless an upgrade is asked for": (
        there(GOOD), {"upgrade": True}, offered(NEW, GOOD, others="1.7.30-1"), [f"docker-ce={NEW}", f"docker-ce-cli={NEW}", *REST], "",
    ),
    "an upgrade without anything newer": (there(NEW), {"upgrade": True}, offered(NEW, GOOD), [], "is as new as anything"),
    "what is there below the floor is upgraded": (
        there(OLD), {}, offered(NEW, OLD), [f"docker-ce={NEW}", f"docker-ce-cli={NEW}"], "",
    ),
    "a newer one is never downgraded": (
        there(NEW), {"version": "28.5.2"}, offered(NEW, GOOD), [], f"docker-ce {NEW} on gpu1 is newer than docker_version (28.5.2); it is kept",
    ),
    "the very one": (there(GOOD), {"version": "28.5.2"}, offered(NEW, GOOD), [], ""),
    "from one version to the next": (
        there(GOOD), {"version": "29.1.3"}, offered(NEW, GOOD), [f"docker-ce={NEW}", f"docker-ce-cli={NEW}"], "",
    ),
    "a part that is missing, at the engine's version": (
        {"docker-ce": GOOD, **dict.fromkeys(REST, "1.7.29-1")}, {}, offered(NEW, GOOD), [f"docker-ce-cli={GOOD}"], "",
    ),
    "a part that is missing, of an engine that cannot be had any more": (
        {"docker-ce": GOOD, **dict.fromkeys(REST, "1.7.29-1")}, {}, offered(NEW), ["docker-ce-cli"], "",
    ),
    "a part below its floor": (
        there(GOOD), {"floors": {**FLOORS, "containerd.io": "1.7.30"}}, offered(GOOD), ["containerd.io"], "",
    ),
    "the packages of the distribution are there": (
        {"docker.io": "26.1.5+dfsg1-9+b4", "runc": "1.1.15"}, {}, offered(NEW), [],
        "gpu1 has docker.io 26.1.5+dfsg1-9+b4, runc 1.1.15 from the distribution, and docker_source is docker",
    ),
    "those of Docker are there": (
        there(GOOD), {"source": "distribution"}, {}, [], "remove --allow-change-held-packages docker-ce docker-ce-cli",
    ),
    "the distribution of Debian 13": (
        {}, {"source": "distribution"}, {"docker.io": {"candidate": "26.1.5+dfsg1-9+b4", "versions": ["26.1.5+dfsg1-9+b4"]}},
        DISTRIBUTION, "",
    ),
    "that of Debian 12": (
        {}, {"source": "distribution", "release": "Debian 12"},
        {"docker.io": {"candidate": "20.10.24+dfsg1-1", "versions": ["20.10.24+dfsg1-1"]}}, [],
        "docker_source is distribution, but Debian 12 has docker.io 20.10.24+dfsg1-1, and 26.1.5 is the oldest",
    ),
    "that of Debian 12, whose lists are not there yet": (
        {}, {"source": "distribution", "release": "Debian 12", "archive": {"docker.io": "20.10.24+dfsg1-1"}}, {}, [],
        "Set docker_source: docker",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_what_is_installed(case: str) -> None:
    installed, more, available, wanted, word = PLANS[case]
    found = docker_plan(asked(**more), installed, available)
    said = " ".join(found["problems"] + found["notes"])
    assert found["install"] == wanted, found
    assert word in said if word else not said, said
    assert not (found["problems"] and found["install"])


def test_what_cannot_be_said_before_there_are_lists_is_pending() -> None:
    found = docker_plan(asked(), {}, {})
    assert found == {"problems": [], "install": VENDOR, "notes": [], "pending": True}
    assert not docker_plan(asked(), {}, offered(NEW))["pending"]
    # what is there and will not do has to be looked up as well
    for installed, more in ((there(OLD), {}), (there(GOOD), {"version": "29.1.3"}), (there(GOOD), {"upgrade": True})):
        found = docker_plan(asked(**more), installed, {})
        assert (found["pending"], found["install"]) == (True, VENDOR[:2])


# --- the file


def test_a_reload_is_enough_for_some_keys_only() -> None:
    base = {"live-restore": False, "log-driver": "json-file", "max-concurrent-downloads": 3}
    assert docker.due(base, base) == ("", [])
    assert docker.due(base, {**base, "live-restore": True, "debug": True}) == ("reload", ["debug", "live-restore"])
    assert docker.due(base, {**base, "live-restore": True, "log-driver": "local"}) == (
        "restart",
        ["live-restore", "log-driver"],
    )
    # taken out of the file, one goes back to its default, the other one stays as it was
    assert docker.due(base, {key: base[key] for key in ("live-restore", "log-driver")})[0] == "reload"
    assert docker.due(base, {"log-driver": "json-file", "max-concurrent-downloads": 3})[0] == "restart"
    assert docker.due(None, {"debug": True}) == ("restart", ["debug"])
    assert docker.after_reload(base, {"live-restore": True, "log-driver": "local"}) == {
        "live-restore": True,
        "log-driver": "json-file",
    }
    assert docker.after_reload(None, base) is None


@pytest.mark.parametrize(
    ("changes", "addresses", "message"),
    [
        ({}, ["10.0.0.1", "fd00::1", "gpu1.example.net", ""], ""),
        ({"version": "newest"}, [], "docker_version is 'newest'; it is a version such as 28.5.2"),
        ({"daemon_options": {"hosts": ["tcp://0.0.0.0"]}}, [], "docker_daemon_options has hosts: the unit says where"),
        ({"daemon_options": {"iptables": False}}, [], "docker_daemon_options has iptables: published ports"),
        ({"daemon_options": {"iptables": True}}, [], ""),
        (
            {"address_pools": [{"base": "172.17.0.5/16", "size": 24}]},
            [],
            "docker_address_pools[0]: base is '172.17.0.5/16'",
        ),
        ({"address_pools": [{"base": "172.17.0.0/16", "size": 12}]}, [], "docker_address_pools[0]: size is 12"),
        ({}, ["172.17.3.9"], "docker_address_pools has 172.17.0.0/16, and 172.17.3.9 is the address of a host"),
        ({"publish_address": "all"}, [], "docker_publish_address is 'all'; it is one IPv4 address"),
        ({"publish_address": "::1"}, [], "docker_publish_address is '::1'"),
        ({"publish_address": "0.0.0.0"}, [], ""),
    ],
)
def test_variables(changes: dict[str, Any], addresses: list[str], message: str) -> None:
    good = {
        "version": "", "daemon_options": {}, "address_pools": [{"base": "172.17.0.0/16", "size": 24}], "publish_address": "127.0.0.1",
    }  # fmt: skip
    found = docker_problems({**good, **changes}, addresses)
    assert len(found) == bool(message)
    assert message in " ".join(found)


def test_what_stands_in_the_way_on_the_host() -> None:
    look = {"flags": [], "foreign_keys": ["data-root"], "swarm": True, "apt": {"mixed": ["/etc/apt/sources.list"]}}
    told = docker_host_problems(look, "gpu1", take_over=False, live_restore=True)
    assert [text.split(";")[0] for text in told] == [
        "/etc/docker/daemon.json of gpu1 has data-root, which this role would take out: it writes that file as a whole. Put what is needed into "
        "docker_daemon_options",
        "gpu1 is in a Docker swarm, which excludes live-restore",
        "/etc/apt/sources.list of gpu1 names the repository that this role writes a file for",
    ]
    assert len(docker_host_problems(look, "gpu1", take_over=True, live_restore=False)) == 1


# --- the engine


class Daemon(socketserver.ThreadingUnixStreamServer):
    """The engine's socket."""

    daemon_threads = True
    allow_reuse_address = True


class Host:
    """Stands in for systemd and the engine: what the engine was told, its file, and its containers are all there is to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.engine = Engine(self.command, root=root, seconds_to_wait=0.3)
        self.state = {"ActiveState": "inactive", "UnitFileState": "disabled"}
        self.installed = True
        self.starts = 0
        self.told: dict[str, Any] = {}
        self.containers: list[str] = []
        self.commands: list[str] = []
        self.deaf = False  # takes no notice of a reload
        self.broken = False
        self.refuses = ""  # a file with this word
        self.routes: list[dict[str, str]] = []
        self.swarm = "inactive"
        for path in ("run", "etc/docker", "proc/41", "proc/42"):
            (root / path).mkdir(parents=True)
        self.programs(old=())

        host = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told: Any = [{"Names": [f"/{name}"]} for name in host.containers]
                if self.path == "/info":
                    told = {
                        "ServerVersion": "28.5.2", "LiveRestoreEnabled": host.told.get("live-restore", False),
                        "LoggingDriver": host.told.get("log-driver", "json-file"), "Swarm": {"LocalNodeState": host.swarm},
                    }  # fmt: skip
                body = json.dumps(told).encode()
                self.send_response(500 if host.broken else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

            def address_string(self) -> str:
                return "socket"

        self.server = Daemon(str(root / "run/docker.sock"), Answer)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def programs(self, old: tuple[str, ...]) -> None:
        """Which of the two programs were replaced under those that run."""
        for pid, unit in (("41", UNIT), ("42", CONTAINERD)):
            link = self.root / "proc" / pid / "exe"
            link.unlink(missing_ok=True)
            link.symlink_to("/usr/bin/program" + (" (deleted)" if unit in old else ""))

    def write(self, options: dict[str, Any]) -> None:
        """What the module tree does."""
        self.engine.file.write_text(json.dumps(options))

    def start(self) -> None:
        """The engine reads its file."""
        survives = self.told.get("live-restore") or self.state["ActiveState"] != "active"
        self.told = json.loads(self.engine.file.read_text()) if self.engine.file.exists() else {}
        self.containers = self.containers if survives else []
        self.state["ActiveState"] = "active"
        self.starts += 1
        self.programs(old=())

    def command(self, command: list[str]) -> tuple[int, str, str]:
        if command[0] == "ip":
            return 0, json.dumps(self.routes), ""
        if command[1] == "show":
            shared = {"LoadState": "loaded" if self.installed else "not-found", "InvocationID": f"id-{self.starts}"}
            if self.starts:
                # started well after anything in its file was written, unless a test sets the file's time
                shared["ExecMainStartTimestampMonotonic"] = str(int((time.monotonic() + 3600) * 1e6))
            units = {UNIT: {**shared, "MainPID": "41", **self.state}, CONTAINERD: {**shared, "MainPID": "42"}}
            return (
                0,
                "\n\n".join(
                    "\n".join([f"Id={name}", *(f"{k}={v}" for k, v in unit.items())]) for name, unit in units.items()
                ),
                "",
            )
        self.commands.append(" ".join(command[1:]))
        if command[1] == "enable":
            self.state["UnitFileState"] = "enabled"
        elif command[1] == "restart":
            refused = self.refuses and self.engine.file.exists() and self.refuses in self.engine.file.read_text()
            if self.broken or refused:
                return 1, "", "Job for docker.service failed."
            self.start()
        elif command[1] == "reload" and not self.deaf:
            wanted = json.loads(self.engine.file.read_text())
            self.told.update({key: value for key, value in wanted.items() if key in docker.RELOADABLE})
        elif command[0] == "journalctl":
            return 0, "unable to configure the Docker daemon\n", ""
        return 0, "", ""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.server.shutdown()
    host.server.server_close()


WANTED = {"live-restore": True, "log-driver": "local"}


def test_a_new_engine_is_started_with_its_file(host: Host) -> None:
    host.installed = False
    assert host.engine.look(WANTED)["due"] == "install"
    host.installed = True
    host.write(WANTED)
    look = host.engine.look(WANTED)
    assert (look["due"], look["due_reason"], look["active"]) == ("start", "docker.service is inactive", False)
    done = host.engine.apply(WANTED, restart=False)
    assert (done["action"], done["due"], done["active"], done["enabled"], done["live_restore"]) == (
        "started",
        "",
        True,
        True,
        True,
    )
    assert host.commands == ["enable --quiet docker.service", "reset-failed docker.service", "restart docker.service"]
    assert host.engine.apply(WANTED, restart=False)["action"] == ""


def test_what_a_reload_does_is_reloaded(host: Host) -> None:
    host.write({"live-restore": False, "log-driver": "local"})
    host.start()
    host.containers = ["web"]
    host.state["UnitFileState"] = "enabled"
    host.engine.look(WANTED)
    host.write(WANTED)
    done = host.engine.apply(WANTED, restart=False)
    assert (done["action"], done["due"], done["live_restore"], host.starts, done["lost"]) == (
        "reloaded",
        "",
        True,
        1,
        [],
    )


def test_a_reload_that_did_not_take_is_an_error(host: Host) -> None:
    host.write({"log-driver": "local"})
    host.start()
    host.engine.look(WANTED)
    host.write(WANTED)
    host.deaf = True
    with pytest.raises(EngineError, match=r"did not take over daemon\.json"):
        host.engine.apply(WANTED, restart=False)
    assert host.engine.look(WANTED)["due"] == "reload"


def test_a_restart_waits_for_the_containers_and_is_not_forgotten(host: Host) -> None:
    host.start()
    host.containers = ["web"]
    host.engine.look(WANTED)
    host.write(WANTED)
    for _ in range(2):
        done = host.engine.apply(WANTED, restart=False)
        assert (done["action"], done["due"], host.starts) == ("deferred", "restart", 1)
    # what a reload does was not left waiting
    assert done["live_restore"]
    assert done["due_keys"] == ["log-driver"]
    host.containers = []
    done = host.engine.apply(WANTED, restart=False)
    assert (done["action"], done["due"], host.starts) == ("restarted", "", 2)


def test_containers_outlive_a_restart_that_is_allowed(host: Host) -> None:
    host.start()
    host.containers = ["web"]
    host.engine.look(WANTED)
    host.write(WANTED)
    done = host.engine.apply(WANTED, restart=True)
    assert (done["action"], done["lost"], host.containers, host.starts) == ("restarted", [], ["web"], 2)
    assert host.commands.index("reload docker.service") < host.commands.index("restart docker.service")


def test_without_live_restore_those_that_ended_are_named(host: Host) -> None:
    host.start()
    host.containers = ["web"]
    host.engine.look({"debug": True})
    host.write({"log-driver": "local"})
    assert host.engine.apply({"log-driver": "local"}, restart=True)["lost"] == ["web"]


def test_a_file_that_was_changed_before_anybody_looked(host: Host) -> None:
    """By hand, or by a run that died: the engine may run with anything."""
    host.write(WANTED)
    host.start()
    os.utime(host.engine.file, (time.time() + 7200,) * 2)
    look = host.engine.look(WANTED)
    assert (look["due"], look["due_reason"]) == ("restart", "daemon.json was changed after the engine was started")
    assert host.engine.apply(WANTED, restart=False)["due"] == ""
    # what is known by now holds, whatever the time of the file is
    assert host.engine.look(WANTED)["due"] == ""


def test_somebody_elses_restart_counts(host: Host) -> None:
    host.start()
    host.containers = ["web"]
    host.engine.look(WANTED)
    host.write(WANTED)
    assert host.engine.apply(WANTED, restart=False)["action"] == "deferred"
    host.start()
    assert host.engine.look(WANTED)["due"] == "enable"


def test_what_somebody_else_had_reloaded_is_reloaded_again(host: Host) -> None:
    host.write(WANTED)
    host.start()
    host.engine.look(WANTED)
    host.state["UnitFileState"] = "enabled"
    host.told["live-restore"] = False
    assert host.engine.apply(WANTED, restart=False)["action"] == "reloaded"
    assert host.told["live-restore"]
    assert host.engine.apply(WANTED, restart=False)["action"] == ""
    # of other keys nobody can tell, so a file that was not as it should be is read in any case
    assert host.engine.apply(WANTED, restart=False, replaced=True)["action"] == "reloaded"


def test_upgraded_programs_are_due_for_a_restart(host: Host) -> None:
    host.write(WANTED)
    host.start()
    host.containers = ["web"]
    host.programs(old=(UNIT, CONTAINERD))
    look = host.engine.look(WANTED)
    assert (
        look["due_reason"]
        == "the programs of docker.service and containerd.service were upgraded, and the old ones still run"
    )
    assert host.engine.apply(WANTED, restart=False)["action"] == "deferred"
    done = host.engine.apply(WANTED, restart=True)
    assert (done["action"], done["due"], done["lost"]) == ("restarted", "", [])
    assert host.commands[-1] == "restart containerd.service docker.service"


def test_looking_only_leaves_no_trace(host: Host) -> None:
    host.start()
    host.engine.look(WANTED, remember=False)
    assert not host.engine.record.exists()


FILE = "/etc/docker/daemon.json"


def started(command: str, **more: str) -> dict[str, str]:
    """A unit with this command, as systemctl shows it."""
    return {
        "ExecStart": f"{{ path=/usr/sbin/dockerd ; argv[]={command} ; ignore_errors=no ; start_time=[n/a] }}",
        **more,
    }


@pytest.mark.parametrize(
    ("flags", "clash"),
    [
        ("-H fd:// --containerd=/run/containerd/containerd.sock", []),
        ("--log-driver=journald", ["--log-driver"]),
        ("--log-driver journald", ["--log-driver"]),
        ("--live-restore", ["--live-restore"]),
        # what may be given several times is plural in the file
        (
            "--log-opt max-size=10m --default-address-pool base=10.1.0.0/16,size=24",
            ["--log-opt", "--default-address-pool"],
        ),
        ("--insecure-registry=r.example", ["--insecure-registry"]),
        ("-g /data --debug", ["--data-root"]),
        ("--add-runtime x=/y", []),
        ("--config-file=/etc/docker/other.json", ["--config-file"]),
        (f"--config-file {FILE}", []),
    ],
)
def test_what_the_command_line_says_as_well(flags: str, clash: list[str]) -> None:
    keys = dict.fromkeys(
        [
            "live-restore",
            "log-driver",
            "log-opts",
            "default-address-pools",
            "insecure-registries",
            "data-root",
            "runtimes",
        ]
    )
    command = docker_flags.command_line(started(f"/usr/sbin/dockerd {flags}"), {})
    assert docker_flags.clashes(command, keys, FILE) == clash


def test_flags_are_found_where_a_distribution_keeps_them(host: Host) -> None:
    """Debian's unit has $DOCKER_OPTS of /etc/default/docker on its command line."""
    (host.root / "etc/default").mkdir()
    (host.root / "etc/default/docker").write_text(
        "# DOCKER_OPTS=--debug\nDOCKER_OPTS='--log-driver=journald -l warn'\n"
    )
    host.state |= started(
        "/usr/sbin/dockerd -H fd:// $DOCKER_OPTS", EnvironmentFiles="/etc/default/docker (ignore_errors=yes)"
    )
    look = host.engine.look(WANTED)
    assert (look["flags"], look["flags_from"]) == (["--log-driver"], ["/etc/default/docker"])
    (problem,) = docker_host_problems(look, "gpu1", take_over=False, live_restore=False)
    assert problem.startswith(
        "dockerd of gpu1 is started with --log-driver (/etc/default/docker), which daemon.json says as well"
    )


def test_flags_are_found_before_there_is_an_engine(host: Host) -> None:
    drop_in = host.root / "etc/systemd/system/docker.service.d/override.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nExecStart=\nExecStart=/usr/bin/dockerd -H fd:// --log-driver=journald\n")
    host.installed = False
    look = host.engine.look(WANTED)
    assert (look["flags"], look["flags_from"]) == (
        ["--log-driver"],
        ["/etc/systemd/system/docker.service.d/override.conf"],
    )


@pytest.mark.parametrize("before", [None, {"log-driver": "local"}])
def test_an_engine_that_does_not_start_gets_its_file_back(host: Host, before: dict[str, Any] | None) -> None:
    if before is not None:
        host.write(before)
    host.state = {"ActiveState": "active", "UnitFileState": "enabled"}
    host.start()
    host.engine.look({"log-driver": "fluentd"})
    host.write({"log-driver": "fluentd"})
    host.refuses = "fluentd"
    with pytest.raises(EngineError, match=r"The daemon.json of before is back, and the engine runs with it"):
        host.engine.apply({"log-driver": "fluentd"}, restart=True)
    assert host.engine.file.exists() == (before is not None)
    assert host.told == (before or {})
    # what was not seen to run is not put back
    host.engine.look({})
    host.engine.proved.unlink()
    host.refuses = "syslog"
    host.write({"log-driver": "syslog"})
    with pytest.raises(EngineError, match=r"Job for docker.service failed"):
        host.engine.apply({"log-driver": "syslog"}, restart=True)
    assert "syslog" in host.engine.file.read_text()


ROUTES = [
    {"dst": "default", "gateway": "172.17.4.1", "dev": "eth0"},
    {"dst": "172.17.4.0/22", "dev": "eth0", "protocol": "kernel"},
    {"dst": "10.0.0.0/8", "dev": "tun0", "table": "220"},
    {"dst": "172.18.0.0/16", "dev": "br-0123456789ab"},
    {"dst": "172.17.0.0/24", "dev": "docker0"},
    {"type": "local", "dst": "192.168.7.1", "dev": "eth0", "table": "local"},
]


@pytest.mark.parametrize(
    ("base", "options", "taken"),
    [
        ("172.17.0.0/16", {}, "docker_address_pools has 172.17.0.0/16, and the host has a route to 172.17.4.0/22"),
        ("10.200.0.0/16", {}, "docker_address_pools has 10.200.0.0/16, and the host has a route to 10.0.0.0/8"),
        ("172.18.0.0/16", {}, ""),
        ("192.168.0.0/16", {}, ""),
        ("fd00::/64", {}, ""),
        ("172.30.0.0/16", {"bip": "10.9.0.1/24"}, "docker_daemon_options (bip) has 10.9.0.1/24"),
    ],
)
def test_pools_that_the_host_reaches_something_else_by(
    host: Host, base: str, options: dict[str, Any], taken: str
) -> None:
    host.routes = ROUTES
    found = docker_route_conflicts(
        host.engine.look({}), {"address_pools": [{"base": base, "size": 24}], "daemon_options": options}
    )
    assert len(found) == bool(taken)
    assert "".join(found).startswith(taken)


def test_an_engine_that_does_not_answer_or_start_says_why(host: Host) -> None:
    host.broken = True
    host.write(WANTED)
    with pytest.raises(
        EngineError, match=r"`systemctl restart docker.service` failed: Job .* failed\.\nunable to configure"
    ):
        host.engine.apply(WANTED, restart=False)
    host.state["ActiveState"] = "active"
    with pytest.raises(EngineError, match="the engine answers /info with 500"):
        host.engine.look(WANTED)
    host.engine.socket = host.root / "run/nowhere.sock"
    with pytest.raises(EngineError, match=r"is active, but does not answer at .*No such file"):
        host.engine.look(WANTED)


def test_keys_of_others_in_the_file(host: Host) -> None:
    host.write({"data-root": "/srv/docker", "live-restore": False})
    assert host.engine.look(WANTED)["foreign_keys"] == ["data-root"]
    manifest = host.root / "var/lib/vllm-fleet/tree/docker/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"paths": ["/etc/docker/daemon.json"]}))
    assert host.engine.look(WANTED)["foreign_keys"] == []


def test_a_swarm_is_seen(host: Host) -> None:
    host.start()
    host.swarm = "active"
    assert host.engine.look(WANTED)["swarm"]


@pytest.mark.parametrize(
    ("due", "containers", "restart", "action"),
    [
        ("", [], False, ""),
        ("", ["web"], True, ""),
        ("install", [], False, "started"),
        ("start", [], False, "started"),
        ("enable", ["web"], False, "enabled"),
        ("reload", ["web"], False, "reloaded"),
        ("restart", [], False, "restarted"),
        ("restart", ["web"], False, "deferred"),
        ("restart", ["web"], True, "restarted"),
    ],
)
def test_what_is_done_about_what_is_due(due: str, containers: list[str], restart: bool, action: str) -> None:
    assert decided({"due": due, "containers": containers}, restart) == action
