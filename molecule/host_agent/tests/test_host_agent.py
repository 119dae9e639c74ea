"""The agent as gateways and monitoring see it, the operator's word, and how an instance leaves before it stops."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.certificates import Authority
from tests.host_agent import PORT, Gateway, connection, obeys
from tests.network import address_of
from tests.roles import applied, changed, host_name, refused, until


def stopped_in(host: Host, command: str = "systemctl stop vllm@chat") -> float:
    """How long a stop takes."""
    begin = time.monotonic()
    host.check_output(command)
    return time.monotonic() - begin


# --- who is answered


def test_nobody_is_answered_without_a_certificate_or_by_plain_http(
    host: Host, tmp_path: Path, authority: Authority
) -> None:
    for stranger in (
        connection(host, tmp_path, authority, None),
        http.client.HTTPConnection(address_of(host), PORT, timeout=5),
    ):
        with pytest.raises((OSError, http.client.HTTPException)):
            stranger.request("GET", "/metrics")
            stranger.getresponse()


def test_a_certificate_of_another_authority_is_worth_nothing(host: Host, tmp_path: Path, authority: Authority) -> None:
    context = ssl.create_default_context(cadata=authority.pem)
    (tmp_path / "both.pem").write_text("".join(Authority(name="vLLM Fleet CA").sign("gw-1")))
    context.load_cert_chain(tmp_path / "both.pem")
    peer = http.client.HTTPSConnection(address_of(host), PORT, context=context, timeout=5)
    with pytest.raises((OSError, http.client.HTTPException)):
        peer.request("POST", "/state", "{}")
        peer.getresponse()


@pytest.mark.parametrize(
    ("name", "method", "path", "status"),
    [
        ("gw-1", "POST", "/state", 200),
        ("watch", "GET", "/metrics", 200),
        ("watch", "POST", "/state", 403),
        ("host-agent-debian12", "GET", "/metrics", 403),
        ("llm.example.com", "POST", "/state", 403),
        ("gw-1", "GET", "/../etc/passwd", 404),
        ("gw-1", "DELETE", "/state", 405),
    ],
)  # fmt: skip
def test_who_may_ask_what(
    host: Host, tmp_path: Path, authority: Authority, name: str, method: str, path: str, status: int
) -> None:
    peer = connection(host, tmp_path, authority, name)
    peer.request(method, path, json.dumps({"gateway": name}))
    assert peer.getresponse().status == status


def test_metrics_of_all_instances_come_with_one_that_is_dead(host: Host, tmp_path: Path, authority: Authority) -> None:
    host.check_output("systemctl stop vllm@embed")
    peer = connection(host, tmp_path, authority, "watch")
    peer.request("GET", "/metrics")
    text = peer.getresponse().read().decode()
    host.check_output("systemctl start vllm@embed")
    assert 'running{instance_name="chat"} 1' in text
    assert 'vllm_fleet_instance_up{instance_name="embed"} 0' in text


def test_it_has_no_rights(host: Host) -> None:
    pid = host.check_output("systemctl show --property=MainPID --value vllm-fleet-agent")
    status = host.file(f"/proc/{pid}/status").content_string
    assert "CapEff:\t0000000000000000" in status
    assert host.check_output(f"stat --format %U /proc/{pid}") == "vllm-fleet"
    exposed = host.check_output("systemd-analyze security --no-pager vllm-fleet-agent | tail -n 1")
    assert float(exposed.split(":")[1].split()[0]) <= 2.0, exposed


def test_a_renewed_certificate_is_shown_without_a_restart(host: Host, authority: Authority) -> None:
    def shown() -> bytes:
        return ssl.get_server_certificate((address_of(host), PORT)).encode()

    before, pid = shown(), host.check_output("systemctl show --property=MainPID --value vllm-fleet-agent")
    host.check_output("rm /etc/ssl/vllm-fleet/fleet/cert.pem")
    applied(host, "host_agent", role_under_test="fleet_authority")
    assert shown() != before
    assert host.check_output("systemctl show --property=MainPID --value vllm-fleet-agent") == pid


# --- the operator's word


def test_the_operators_word_reaches_the_gateways(host: Host, gateway: Gateway) -> None:
    said = host.check_output("SUDO_USER=ada vllm-fleet state chat drained --reason 'new fan'")
    assert "chat: drained (by ada, since 2" in said
    assert "new fan" in said
    assert "gw-1: out, 0 in flight" in said
    chat = gateway.told["chat"]
    assert (chat["operator"], chat["by"], chat["reason"], chat["unit"]) == ("drained", "ada", "new fan", "active")
    assert gateway.told["embed"]["operator"] == "up"
    assert host.file("/var/lib/vllm-fleet/chat.json").mode == 0o644
    assert "chat: up (by root" in host.check_output("env --unset=SUDO_USER vllm-fleet state chat up")
    until(lambda: gateway.told["chat"]["operator"] == "up", 5, "the gateway does not hear of it")


def test_the_operators_word_outlives_a_run_and_the_agent(host: Host, gateway: Gateway) -> None:
    host.check_output("vllm-fleet state chat stopped")
    assert not changed(applied(host, "host_agent"))
    assert "chat: stopped" in host.check_output("vllm-fleet state chat")
    host.check_output("vllm-fleet state chat up")


def test_the_command_refuses_what_it_does_not_know(host: Host) -> None:
    assert "no instance other; it has busy, chat, embed, hung" in host.run("vllm-fleet state other drained").stderr
    assert host.run("vllm-fleet state chat sideways").rc == 2
    assert "only root" in host.run("runuser --user daemon -- vllm-fleet state chat drained").stderr
    assert "chat: up" in host.check_output("runuser --user daemon -- vllm-fleet state")


# --- leaving


def test_a_stop_waits_until_the_gateway_has_taken_it_out_and_requests_have_ended(host: Host, gateway: Gateway) -> None:
    gateway.says = obeys(running=3)
    stop = threading.Thread(target=stopped_in, args=(host,))
    stop.start()
    until(lambda: gateway.told.get("chat", {}).get("leaving"), 5, "it does not say that it leaves")
    time.sleep(2)
    assert gateway.told["chat"]["unit"] == "deactivating"
    assert not gateway.told["embed"]["leaving"]
    assert (
        host.check_output("curl --silent --output /dev/null --write-out '%{http_code}' 127.0.0.1:8000/health") == "200"
    )
    gateway.says = obeys()
    stop.join(3)
    assert not stop.is_alive()
    assert host.run("systemctl is-active vllm@chat").stdout.strip() == "inactive"
    # and it is back with the next start
    host.check_output("systemctl start vllm@chat")
    until(lambda: not gateway.told["chat"]["leaving"], 5, "it goes on to say that it leaves")


def test_a_stop_has_an_end(host: Host, gateway: Gateway) -> None:
    """The gateway keeps it for its last host, then has requests that do not end, then is gone."""
    gateway.says = lambda instances: {"kept": dict.fromkeys(instances, "it is the last one")}
    assert 4 <= stopped_in(host) < 8
    host.check_output("systemctl start vllm@chat && sleep 1")
    gateway.says = obeys(running=1)
    assert 8 <= stopped_in(host, "systemctl restart vllm@chat") < 13
    host.check_output("sleep 1")
    gateway.end()
    assert stopped_in(host) < 12
    assert "it stops all the same: 8 s (host_agent_leave_seconds)" in host.check_output("journalctl --unit vllm@chat")


def test_nobody_waits_where_no_gateway_asks_or_nothing_answers(host: Host, gateway: Gateway) -> None:
    gateway.says = obeys(running=1)
    # a crash: the engine is gone, and systemd starts the next one
    pid = host.check_output("systemctl show --property=MainPID --value vllm@chat")
    host.check_output(f"kill -KILL {pid}")
    until(
        lambda: host.check_output("systemctl show --property=MainPID --value vllm@chat") not in ("0", pid), 4,
        "the next one is not there",
    )  # fmt: skip
    # no answer at its port
    host.check_output("until curl --silent 127.0.0.1:8000/health; do sleep 0.1; done; echo 8009 >/srv/engine/chat.port")
    gateway.says = obeys()
    host.check_output("systemctl restart vllm@chat; sleep 1; echo 8000 >/srv/engine/chat.port")
    gateway.says = obeys(running=1)
    assert stopped_in(host) < 2
    gateway.end()
    host.check_output("rm -f /run/vllm-fleet/agent/*.json; systemctl start vllm@chat; sleep 1")
    assert stopped_in(host) < 2


def test_without_an_agent_a_stop_is_a_stop(host: Host) -> None:
    host.check_output(
        "systemctl stop vllm-fleet-agent; mv /usr/local/lib/vllm-fleet /srv/aside; systemctl start vllm@chat; sleep 1"
    )
    begin = host.check_output("date +%s")
    try:
        assert stopped_in(host) < 2
        said = host.check_output(f"journalctl --unit vllm@chat --since @{begin} --output cat")
        # the control groups of a test host are not those of a machine
        told = [line for line in said.splitlines() if "compat systemd cgroup" not in line]
        assert told
        assert [line for line in told if "leave" in line or "ailed" in line] == []
    finally:
        host.check_output("mv /srv/aside /usr/local/lib/vllm-fleet; systemctl start vllm-fleet-agent vllm@chat")


@pytest.mark.one_host
def test_bad_input_is_refused_before_anything_changes(host: Host) -> None:
    for variables, message in (
        ({"vllm_instances": [{"name": "firewall", "port": 8000}]}, "vllm_instances has firewall, a name"),
        ({"host_agent_port": 8000}, "the port of an instance"),
        ({"host_agent_leave_seconds": -1}, "host_agent_leave_seconds is -1"),
    ):
        said = refused(host, "host_agent", **variables)
        assert message in said
        assert "changed=0" in said
    assert host_name(host)
