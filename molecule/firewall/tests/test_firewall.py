"""What is open and to whom, as it shows from the network; and that nobody is ever locked out for good."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.network import address_of, scan
from tests.roles import ROOT, applied, changed, environment, host_name, refused, role_command
from tests.ssh_logins import wait

DIRECTORY = ROOT / ".cache/molecule-firewall"  # made by tests/hosts/hosts.py
EVERY_PORT = range(1, 65536)
# Those that listen somewhere, those that would if something went wrong, and a good many beside them.
SOME_PORTS = [*range(1, 1025), 2375, *range(5000, 5010), *range(7990, 8100), 9100, 9400, 9440, 50000]
TABLE = "nft --stateless list table inet vllm_fleet"
TIMER = "vllm-fleet-firewall-rollback.timer"


def ssh(host: Host, family: int = 4, *options: str) -> subprocess.CompletedProcess[str]:
    """Log in from the controller by a connection of its own."""
    command = [
        "timeout", "20", "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=3", "-o", "IdentitiesOnly=yes", "-i", str(DIRECTORY / "id_ed25519"),
        "-o", f"UserKnownHostsFile={DIRECTORY}/known_hosts", *options, f"fleet@{address_of(host, family)}",
    ]  # fmt: skip
    return subprocess.run([*command, "true"], text=True, capture_output=True, check=False)


def lets_in(host: Host, family: int = 4) -> bool:
    """Whether one can log in from the controller."""
    return ssh(host, family).returncode == 0


def network_of(host: Host, family: int) -> str:
    """The network of a host, and so of the controller, which is the first address of it."""
    address = address_of(host, family)
    return address.rpartition(".")[0] + ".0/24" if family == 4 else address.rpartition("::")[0] + "::/64"


# --- from the outside


def test_of_a_gateway_an_outsider_sees_ssh_and_the_two_ports_for_clients(gateway: Host, outsider: Host) -> None:
    assert scan(outsider, gateway, EVERY_PORT) == {"open": [22, 80, 443], "refused": 0}


def test_of_an_inference_host_an_outsider_sees_ssh_only(inference: Host, outsider: Host) -> None:
    assert scan(outsider, inference, EVERY_PORT) == {"open": [22], "refused": 0}


def test_by_ipv6_it_is_the_same(gateway: Host, inference: Host, outsider: Host) -> None:
    assert scan(outsider, gateway, SOME_PORTS, family=6) == {"open": [22, 80, 443], "refused": 0}
    assert scan(outsider, inference, SOME_PORTS, family=6) == {"open": [22], "refused": 0}


def test_the_gateway_reaches_vllm_and_the_agent_and_nothing_else(gateway: Host, inference: Host) -> None:
    assert scan(gateway, inference, SOME_PORTS) == {"open": [22, 8000, 9440], "refused": 0}
    assert scan(inference, gateway, SOME_PORTS) == {"open": [22, 80, 443], "refused": 0}


def test_the_scan_would_see_what_is_open(inference: Host, outsider: Host) -> None:
    """Without the rules all of it is there: the scans above can fail."""
    inference.check_output("systemctl stop vllm-fleet-firewall")
    try:
        for family in (4, 6):
            found = scan(outsider, inference, SOME_PORTS, family)
            assert found["open"] == [22, 80, 443, 2375, 8000, 9100, 9440, 50000]
            assert found["refused"] == len(SOME_PORTS) - 8
    finally:
        inference.check_output("systemctl start vllm-fleet-firewall")
    assert scan(outsider, inference, SOME_PORTS)["open"] == [22]


def test_what_a_host_needs_itself_goes_on(inference: Host, outsider: Host) -> None:
    """Its own connections, and loopback; and an error that the network reports comes through."""
    assert scan(inference, outsider, [22])["open"] == [22]
    assert scan(inference, "127.0.0.1", [50000])["open"] == [50000]
    assert scan(inference, "::1", [50000])["open"] == [50000]


def test_metrics_and_further_rules_are_open_to_those_who_are_named(
    inference: Host, outsider: Host, gateway: Host
) -> None:
    four, six = address_of(outsider), address_of(outsider, 6)
    rule = {"name": "one by one", "ports": ["49990-50000"], "networks": [four, six]}
    applied(inference, "firewall", firewall_monitoring_networks=[four], firewall_allow=[rule])
    try:
        assert scan(outsider, inference, SOME_PORTS)["open"] == [22, 9100, 9440, 50000]
        assert scan(outsider, inference, SOME_PORTS, family=6)["open"] == [22, 50000]
        assert scan(gateway, inference, SOME_PORTS)["open"] == [22, 8000, 9440]
    finally:
        applied(inference, "firewall")
    assert scan(outsider, inference, SOME_PORTS)["open"] == [22]


# --- containers


@pytest.fixture(scope="module")
def docker(inference: Host) -> Host:
    """A real Docker engine on the inference host, and an image that is made there."""
    inference.check_output(
        "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends"
        "  docker.io docker-cli iptables busybox-static"
        " && tar -C / -c bin/busybox usr/bin/busybox 2>/dev/null | docker import - busybox"
        " && docker run --detach --restart always --name web --publish 8090:80 busybox busybox httpd -f -p 80"
    )
    return inference


def test_a_published_port_is_no_way_in(docker: Host, outsider: Host, gateway: Host) -> None:
    assert scan(docker, "127.0.0.1", [8090])["open"] == [8090]
    for family in (4, 6):
        assert scan(outsider, docker, SOME_PORTS, family) == {"open": [22], "refused": 0}
    assert scan(gateway, docker, SOME_PORTS) == {"open": [22, 8000, 9440], "refused": 0}
    # without the rules it is one
    docker.check_output("systemctl stop vllm-fleet-firewall")
    opened = scan(outsider, docker, [8090])["open"]
    docker.check_output("systemctl start vllm-fleet-firewall")
    assert opened == [8090]


def test_nor_is_it_after_a_restart_of_docker(docker: Host, outsider: Host) -> None:
    docker.check_output("systemctl restart docker && until docker exec web busybox true; do sleep 0.5; done")
    assert scan(docker, "127.0.0.1", [8090])["open"] == [8090]
    assert scan(outsider, docker, SOME_PORTS) == {"open": [22], "refused": 0}
    assert not changed(applied(docker, "firewall"))


def test_a_container_is_not_reached_past_its_published_port(docker: Host, outsider: Host) -> None:
    """Whoever is on the same network can ask the host to pass a packet on to the container."""
    address = docker.check_output("docker inspect --format '{{.NetworkSettings.IPAddress}}' web")
    outsider.check_output(f"ip route replace {address} via {address_of(docker)}")
    try:
        assert scan(outsider, address, [80]) == {"open": [], "refused": 0}
    finally:
        outsider.check_output(f"ip route delete {address}")


def test_containers_reach_out(docker: Host, gateway: Host) -> None:
    ask = "docker run --rm busybox busybox wget -T 5 -q -O - http://{}:80/tzdata.zi"
    assert docker.run(ask.format(address_of(gateway))).rc == 0
    assert docker.run(f"docker exec web busybox wget -T 5 -q -O - http://{address_of(gateway)}/tzdata.zi").rc == 0


def test_containers_of_an_instance_that_fetches_reach_the_fleet_only(
    docker: Host, gateway: Host, outsider: Host
) -> None:
    instance = {"name": "see", "port": 8000, "runtime": "docker", "options": {"allowed-media-domains": ["img.example"]}}
    ask = "docker exec web busybox nc -w 3 {} {} </dev/null"
    assert docker.run(ask.format(address_of(outsider), 22)).rc == 0
    applied(docker, "firewall", vllm_instances=[instance])
    try:
        assert docker.run(ask.format(address_of(outsider), 22)).rc != 0
        assert docker.run(ask.format(address_of(gateway), 80)).rc == 0
        # answers of a published port, and containers among themselves
        assert scan(docker, "127.0.0.1", [8090])["open"] == [8090]
        address = docker.check_output("docker inspect --format '{{.NetworkSettings.IPAddress}}' web")
        assert docker.run(f"docker run --rm busybox busybox nc -w 3 {address} 80 </dev/null").rc == 0
    finally:
        applied(docker, "firewall")


def test_a_published_port_that_is_allowed_is_open_to_those_who_are_named(
    docker: Host, outsider: Host, gateway: Host
) -> None:
    """By the port that is asked for, not by the container's."""
    rule = {"name": "web", "ports": ["8090"], "networks": [address_of(outsider)]}
    applied(docker, "firewall", firewall_allow=[rule])
    try:
        assert scan(outsider, docker, SOME_PORTS)["open"] == [22, 8090]
        assert scan(gateway, docker, [8090])["open"] == []
    finally:
        applied(docker, "firewall")


def test_rules_as_dockers_nftables_backend_makes_them_open_nothing(docker: Host, outsider: Host) -> None:
    """Debian's engine has no such backend: these are its kinds of rules, made by hand."""
    address = docker.check_output("docker inspect --format '{{.NetworkSettings.IPAddress}}' web")
    rules = f"""table ip docker-bridges {{
        chain nat {{ type nat hook prerouting priority dstnat; fib daddr type local tcp dport 5000 dnat to {address}:80; }}
        chain filter-FORWARD {{ type filter hook forward priority filter; oifname docker0 tcp dport 80 accept; }}
    }}"""
    docker.check_output(f"echo '{rules}' | nft --file -")
    try:
        assert scan(outsider, docker, [5000])["open"] == []
        docker.check_output("systemctl stop vllm-fleet-firewall")
        opened = scan(outsider, docker, [5000])["open"]
        docker.check_output("systemctl start vllm-fleet-firewall")
        assert opened == [5000]
    finally:
        docker.check_output("nft delete table ip docker-bridges")


def test_what_others_own_is_not_touched(docker: Host) -> None:
    docker.check_output(
        "nft add table inet theirs && nft add chain inet theirs input '{ type filter hook input priority 10; }'"
        " && nft add rule inet theirs input tcp dport 7 drop"
    )
    # everything but our table; --stateless leaves the counters out
    others = "nft --stateless list ruleset 2>/dev/null | awk '/^table/ {ours = /inet vllm_fleet/} !ours'"
    before = docker.check_output(others)
    assert "table inet theirs" in before
    assert "DOCKER" in before
    try:
        applied(docker, "firewall", firewall_log_drops=True)
        assert "log prefix" in docker.check_output(TABLE)
        applied(docker, "firewall")
        assert docker.check_output(others) == before
    finally:
        docker.check_output("nft delete table inet theirs")


# --- nobody is locked out


@pytest.mark.parametrize(
    ("variables", "messages"),
    [
        (
            {
                "firewall_admin_networks": ["192.0.2.0/24"], "firewall_ssh_ports": [2222],
                "firewall_container_interfaces": ["eth*"], "firewall_take_over": True,
            },
            [
                r"3 problems with the variables of firewall-outsider; nothing has been changed",
                r"from \S+, which is not in firewall_admin_networks \(192.0.2.0/24\): these rules would lock it out; add \S+\.1, or",
                r"at port 22, which is not in firewall_ssh_ports \(2222\): these rules would lock it out; add 22",
                r"has eth\*, but eth0 leads out of firewall-outsider",
            ],
        ),
        (
            {
                "firewall_admin_networks": [], "firewall_rollback_seconds": 3, "firewall_admin_network": [],
                "firewall_monitoring_networks": ["10.0.0.5/8"], "firewall_allow": [{"name": "x", "ports": [70000], "networks": ["::/0"]}],
            },
            [
                "firewall_admin_networks is empty, so nobody could log in any more",
                "firewall_rollback_seconds is 3; it must be between 10 and 3600",
                "firewall_admin_network is not a variable of the role firewall; did you mean firewall_admin_networks",
                "neither a network nor one address; write 10.0.0.0/8 or 10.0.0.5",
                r"firewall_allow\[0\] \(x\): ports has '70000'; a port is a number from 1 to 65535",
            ],
        ),
        ({"firewall_allow": [{"name": "x", "ports": [7]}]}, ["missing required arguments: networks"]),
    ],
    ids=["lock-out", "mistakes", "incomplete"],
)  # fmt: skip
def test_what_would_lock_out_or_makes_no_sense_is_refused(
    outsider: Host, variables: dict[str, object], messages: list[str]
) -> None:
    before = outsider.check_output(TABLE)
    told = refused(outsider, "firewall", **variables)
    assert [message for message in messages if not re.search(message, told)] == [], told
    assert outsider.check_output(TABLE) == before
    assert outsider.run(f"systemctl is-active {TIMER}").stdout.strip() == "inactive"


@pytest.fixture
def by_another_way(outsider: Host) -> Iterator[dict[str, object]]:
    """A run whose open connection came by IPv6, while new ones come by IPv4: rules for IPv6 look right from there, and are not.

    As when an administrator's address changes: what is open goes on, and nothing new gets in.
    """
    socket = DIRECTORY / "other-way"
    master = ssh(outsider, 6, "-M", "-S", str(socket), "-o", "ControlPersist=300")
    assert master.returncode == 0, master.stderr
    yield {"ansible_control_path": str(socket), "firewall_admin_networks": [network_of(outsider, 6)]}
    subprocess.run(["ssh", "-S", str(socket), "-O", "exit", "fleet@x"], capture_output=True, check=False)


def test_rules_that_let_no_new_connection_in_are_undone_at_once(
    outsider: Host, by_another_way: dict[str, object]
) -> None:
    before = outsider.check_output(TABLE)
    began = time.monotonic()
    told = refused(outsider, "firewall", firewall_rollback_seconds=600, **by_another_way)
    assert time.monotonic() - began < 60
    assert "A new ssh connection to firewall-outsider does not get in" in told
    assert "timed out" in told
    assert "The rules that firewall-outsider had before are back." in told
    assert outsider.check_output(TABLE) == before
    assert outsider.run(f"systemctl is-active {TIMER}").stdout.strip() == "inactive"
    assert lets_in(outsider)
    assert not changed(applied(outsider, "firewall"))


def killed_at(host: Host, task: str, **variables: object) -> None:
    """Apply the role, and kill the run with all its processes when this task begins."""
    with subprocess.Popen(
        role_command(host, "firewall", **variables), cwd=ROOT, env={**environment("firewall"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as run:  # fmt: skip
        said = ""
        for line in run.stdout or ():
            said += line
            if line.startswith("TASK [") and task in line:
                break
        else:
            pytest.fail(f"the run never came to: {task}\n{said}")
        os.killpg(run.pid, signal.SIGKILL)


def test_a_run_that_is_killed_before_the_proof_is_undone_by_the_timer(
    outsider: Host, by_another_way: dict[str, object]
) -> None:
    before = outsider.check_output(TABLE)
    killed_at(outsider, "A new connection gets in", **by_another_way)
    assert outsider.check_output(TABLE) != before
    assert not lets_in(outsider)
    assert lets_in(outsider, family=6)
    assert outsider.check_output(f"systemctl is-active {TIMER}") == "active"
    until = time.monotonic() + 20  # firewall_rollback_seconds is 12 here
    while not lets_in(outsider) and time.monotonic() < until:
        time.sleep(0.5)
    assert outsider.check_output(TABLE) == before
    assert lets_in(outsider)
    assert not changed(applied(outsider, "firewall"))


def test_the_run_after_one_that_was_killed_need_not_wait_for_the_timer(outsider: Host) -> None:
    rule = {"name": "new", "ports": ["50000"], "networks": ["0.0.0.0/0"]}
    killed_at(outsider, "A new connection gets in", firewall_allow=[rule], firewall_rollback_seconds=600)
    assert outsider.check_output(f"systemctl is-active {TIMER}") == "active"
    # what a person sees who looks now
    assert TIMER in outsider.check_output("systemctl list-timers --all --no-pager")
    applied(outsider, "firewall", firewall_allow=[rule])
    assert outsider.run(f"systemctl is-active {TIMER}").stdout.strip() == "inactive"
    assert 'dport 50000 accept comment "new"' in outsider.check_output(TABLE)
    applied(outsider, "firewall")
    assert "new" not in outsider.check_output(TABLE)


def test_a_reboot_undoes_rules_that_were_not_proved(outsider: Host, by_another_way: dict[str, object]) -> None:
    before = outsider.check_output(TABLE)
    killed_at(outsider, "A new connection gets in", firewall_rollback_seconds=600, **by_another_way)
    assert not lets_in(outsider)
    reboot(outsider)
    assert outsider.check_output(TABLE) == before
    assert lets_in(outsider)
    assert not changed(applied(outsider, "firewall"))


def reboot(host: Host) -> None:
    """Switch a host off and on. Its address stays, because nobody else takes it meanwhile."""
    name = host_name(host)
    subprocess.run(["docker", "restart", "--time", "5", name], check=True, capture_output=True)
    until = time.monotonic() + 30
    while host.run("systemctl is-system-running").stdout.strip() not in ("running", "degraded"):
        assert time.monotonic() < until, host.run("systemctl list-jobs").stdout
        time.sleep(0.5)


def test_the_rules_are_there_after_a_reboot_before_anything_listens(gateway: Host, outsider: Host) -> None:
    before = gateway.check_output(TABLE)
    reboot(gateway)
    assert gateway.check_output(TABLE) == before
    assert gateway.check_output("systemctl --failed --no-legend") == ""
    order = gateway.check_output("systemctl show --property=Before vllm-fleet-firewall")
    assert {"network-pre.target", "docker.service"} <= set(order.removeprefix("Before=").split())
    assert scan(outsider, gateway, [22, 2375, 50000])["open"] == [22]
    assert not changed(applied(gateway, "firewall"))


FORGET = (
    "systemctl disable --now vllm-fleet-firewall && rm /etc/vllm-fleet/firewall.nft /var/lib/vllm-fleet/firewall.json"
)
SERVER = """
import socket, time
server = socket.create_server(("", 7777))
while True:
    client, _ = server.accept()
    while True:
        try:
            client.sendall(b"x")
        except OSError:
            break
        time.sleep(0.2)
"""
CLIENT = """
import pathlib, socket, sys
one = socket.create_connection((sys.argv[1], 7777), timeout=4)
result, stop = pathlib.Path("/run/stream"), pathlib.Path("/run/stop")
try:
    while not stop.exists():
        one.recv(1)
    result.write_text("alive")
except OSError as error:
    result.write_text(str(error))
"""


def test_an_answer_that_is_streaming_survives_the_first_rules(outsider: Host, inference: Host) -> None:
    """The kernel counts connections only while a rule asks for it: one that is older would be taken for a new one, from the other side."""

    def start(host: Host, program: str, argument: str = "") -> None:
        host.check_output(f"systemd-run --quiet --collect --unit=stream python3 -c {shlex.quote(program)} {argument}")

    inference.check_output("systemctl stop vllm-fleet-firewall")
    try:
        start(inference, SERVER)
        # nothing of the host asks any more: the names that Docker gives to test hosts do, too
        outsider.check_output(f"{FORGET} && nft flush ruleset && rm -f /run/stream /run/stop")
        start(outsider, CLIENT, address_of(inference))
        time.sleep(1)
        assert not outsider.file("/run/stream").exists
        applied(outsider, "firewall")
        time.sleep(5)
        outsider.check_output("touch /run/stop && sleep 1")
        assert outsider.check_output("cat /run/stream") == "alive"
    finally:
        inference.check_output("systemctl stop stream; systemctl start vllm-fleet-firewall")
        reboot(outsider)


# --- other firewalls


def test_ufw_is_refused_and_taken_over_on_request(outsider: Host, inference: Host) -> None:
    outsider.check_output(
        FORGET
        + " && apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends ufw"
        " && ufw allow 22/tcp && ufw allow 9100/tcp && ufw --force enable"
    )
    assert "ufw is active on firewall-outsider" in refused(outsider, "firewall")
    assert outsider.run(TABLE).rc != 0
    assert scan(inference, outsider, SOME_PORTS)["open"] == [22, 9100]

    told = applied(outsider, "firewall", "--check", "--diff", firewall_take_over=True)
    assert "tcp dport { 22 } accept" in told
    assert outsider.run(TABLE).rc != 0

    applied(outsider, "firewall", firewall_take_over=True)
    assert outsider.check_output("ufw status") == "Status: inactive"
    assert outsider.run("systemctl is-enabled ufw").stdout.strip() == "disabled"
    assert scan(inference, outsider, SOME_PORTS) == {"open": [22], "refused": 0}
    assert not changed(applied(outsider, "firewall"))


def test_firewalld_is_refused_and_taken_over_on_request(outsider: Host) -> None:
    outsider.check_output(
        "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends firewalld"
    )
    # firewalld says that it has started before its rules are there
    assert wait(lambda: "table inet firewalld" in outsider.check_output("nft list tables"), 60)
    assert "firewalld is active on firewall-outsider" in refused(outsider, "firewall")
    applied(outsider, "firewall", firewall_take_over=True)
    assert "table inet firewalld" not in outsider.check_output("nft list tables")
    assert outsider.run("systemctl is-enabled firewalld").stdout.strip() == "disabled"
    assert not changed(applied(outsider, "firewall"))


def test_the_distributions_nftables_service_cannot_take_the_rules_away(outsider: Host, inference: Host) -> None:
    """Its file begins with `flush ruleset`: the rules of this role come back right after it."""
    assert "flush ruleset" in outsider.check_output("cat /etc/nftables.conf")
    outsider.check_output("systemctl enable nftables")
    try:
        for order, tables in (("start", 2), ("restart", 2), ("reload", 2), ("stop", 1), ("start", 2)):
            outsider.check_output(f"systemctl {order} nftables")
            found = outsider.check_output("nft list tables").split("\n")
            assert found == ["table inet filter", "table inet vllm_fleet"][-tables:], order
        assert scan(inference, outsider, SOME_PORTS)["open"] == [22]
        told = applied(outsider, "firewall")
        assert not changed(told)
        assert "/etc/nftables.conf begins with `flush ruleset`" in " ".join(told.split())
        reboot(outsider)
        assert "inet vllm_fleet" in outsider.check_output("nft list tables")
    finally:
        # Docker's names for these test hosts were among everybody's tables
        outsider.check_output("systemctl disable nftables")
        reboot(outsider)


# --- as it should be


def test_a_table_that_somebody_changed_is_put_right(inference: Host, outsider: Host) -> None:
    inference.check_output("nft insert rule inet vllm_fleet input tcp dport 50000 accept")
    assert scan(outsider, inference, [50000])["open"] == [50000]
    assert changed(applied(inference, "firewall"))
    assert scan(outsider, inference, [50000])["open"] == []
    inference.check_output("nft delete table inet vllm_fleet")
    assert changed(applied(inference, "firewall"))
    assert scan(outsider, inference, [50000])["open"] == []


def test_a_run_that_changes_nothing_looks_once(gateway: Host, inference: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the role beside the one that brings the facts of the host."""
    monkeypatch.setenv("ANSIBLE_CALLBACKS_ENABLED", "gpufleet.llm.remote_calls")
    told = applied([gateway, inference], "firewall")
    assert not changed(told)
    assert re.findall(r"remote calls: \S+ (\d+) ", told) == ["2", "2"], told


def test_fail2ban_bans_who_keeps_failing(outsider: Host, gateway: Host) -> None:
    applied(outsider, "firewall", firewall_fail2ban=True)
    gateway.check_output(
        "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends openssh-client"
    )
    assert scan(gateway, outsider, [22])["open"] == [22]
    target = address_of(outsider)
    for _ in range(6):
        # The ban may come while one of them is about to log in, and nobody would ever tell it.
        gateway.run(
            f"timeout 10 ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o ConnectTimeout=3 nobody-at-all@{target} true"
        )
    assert wait(lambda: scan(gateway, outsider, [22])["open"] == [], 60)
    assert address_of(gateway) in outsider.check_output("fail2ban-client status sshd")
    assert lets_in(outsider)
    assert not changed(applied(outsider, "firewall", firewall_fail2ban=True))
