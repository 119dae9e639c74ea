"""The real vLLM (its CPU build) with a real small model, under the unit that runs in production.

What cannot be shown here: GPUs, and on a machine with cgroup v1 the device rules of the unit (they have no effect there).
Tests that change the host come last and build on each other's end state.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from typing import Any

import pytest
from testinfra.host import Host

from tests.roles import applied, apply_role, refused

KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
OPTIONS = {"max-model-len": 1024, "dtype": "bfloat16", "enforce-eager": True}
CHAT: dict[str, Any] = {
    "name": "chat",
    "model": "smollm2-135m-instruct",
    "port": 8000,
    "cpus": [0],
    "options": OPTIONS,
    "environment": {"VLLM_CPU_KVCACHE_SPACE": 1},
}
OTHER: dict[str, Any] = {
    **CHAT,
    "name": "other",
    "port": 8001,
    "cpus": [1],
    "options": {**OPTIONS, "served-model-name": ["other-name"]},
    "environment": {"VLLM_CPU_KVCACHE_SPACE": 1, "QUOTED": 'a "b" $c \\d'},
}
UNITS = ("chat", "other")


def ask(
    host: Host, port: int = 8000, model: str = "smollm2-135m-instruct", tokens: int = 4, key: str = KEY
) -> tuple[int, Any]:
    """Ask an instance from its own host for exactly so many tokens; returns the status and the answer."""
    request = {
        "model": model,
        "prompt": "The capital of France is",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    body = json.dumps(request)
    done = host.run(
        "curl -sS -m 60 -w '\\n%%{http_code}' -H %s -H 'Content-Type: application/json' -d %s http://127.0.0.1:%s/v1/completions",
        f"Authorization: Bearer {key}",
        body,
        str(port),
    )
    answer, status = done.stdout.rsplit("\n", 1)
    return int(status), json.loads(answer) if answer.startswith("{") else answer


def main_pid(host: Host, name: str) -> int:
    return int(host.check_output("systemctl show --property=MainPID --value vllm@%s", name))


def generation(host: Host, name: str) -> str:
    """Number of the generation that runs."""
    return str(host.check_output("cat /run/vllm/%s/generation", name))


@pytest.mark.parametrize(("port", "model"), [(8000, "smollm2-135m-instruct"), (8001, "other-name")])
def test_an_instance_answers_by_its_name(host: Host, port: int, model: str) -> None:
    status, answer = ask(host, port, model)
    assert status == 200, answer
    assert "Paris" in answer["choices"][0]["text"]


def test_nothing_is_answered_without_the_key(host: Host) -> None:
    assert ask(host, key="wrong")[0] == 401


def test_vllm_listens_on_loopback_only(host: Host) -> None:
    sockets = host.check_output("ss -Hltn 'sport = :8000 or sport = :8001'")
    assert sockets
    assert all(line.split()[3].startswith("127.0.0.1:") for line in sockets.splitlines()), sockets


def test_nothing_of_vllm_listens_on_the_network(host: Host) -> None:
    """PyTorch and ZMQ open ports of their own; none may be reachable from another host."""
    pids = host.check_output("pgrep -u vllm").split()
    assert len(pids) >= 4
    for line in host.check_output("ss -Hltnp").splitlines():
        if any(f"pid={pid}," in line for pid in pids):
            assert line.split()[3].startswith(("127.0.0.1:", "[::1]:")), line


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_is_hardened(host: Host, name: str) -> None:
    told = host.check_output("systemd-analyze security --no-pager vllm@%s | tail -1", name)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", told)
    assert found, told
    assert float(found[1]) <= 2.0


PROBE = r"""
import ctypes, os, socket, sys
def refused(what, attempt):
    try:
        attempt()
    except OSError as error:
        print(what, "refused", error.errno)
    else:
        print(what, "ALLOWED")
write = lambda path: open(path, "w").close()
for path in ("/etc/probe", "/usr/probe", "/opt/vllm/probe", "/srv/models/probe", "/var/lib/probe", "/var/cache/vllm/chat/probe",
             "/home/probe", "/root/probe", "/proc/sys/kernel/hostname", "/sys/probe"):
    refused("write " + path, lambda: write(path))
for name, family, kind in (("packet", socket.AF_PACKET, socket.SOCK_RAW), ("raw", socket.AF_INET, socket.SOCK_RAW),
                           ("vsock", socket.AF_VSOCK, socket.SOCK_STREAM), ("bluetooth", 31, socket.SOCK_RAW)):
    refused("socket " + name, lambda: socket.socket(family, kind))
refused("read key", lambda: open("/etc/vllm/internal_key").read())
refused("read shadow", lambda: open("/etc/shadow").read())
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
refused("mount", lambda: call(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)))
refused("unshare", lambda: call(libc.unshare(0x10000000)))
refused("setuid", lambda: os.setuid(0) if False else call(libc.setuid(0)))
refused("chmod suid", lambda: (write("/tmp/s"), os.chmod("/tmp/s", 0o4755)))
refused("kill", lambda: os.kill(1, 0))
refused("reboot", lambda: call(libc.reboot(0)))
print("processes", sorted(int(p) for p in os.listdir("/proc") if p.isdigit() and os.stat("/proc/" + p).st_uid not in (os.getuid(), 65534)))
write(os.environ["HOME"] + "/probe"); write("/tmp/probe")
print("uid", os.getuid(), "home", oct(os.stat(os.environ["HOME"]).st_mode & 0o777))
"""


def test_the_sandbox_refuses_what_it_should(host: Host) -> None:
    """A program that tries is run by the very unit, as an instance of its own with another command."""
    probe = f"probe-{uuid.uuid4().hex[:8]}"
    drop_in = f"/run/systemd/system/vllm@{probe}.service.d"
    override = (
        "[Service]\nType=oneshot\nRestart=no\nEnvironmentFile=\nExecStart=\nExecStart=/usr/bin/python3 /opt/probe.py\n"
    )
    host.check_output(
        "mkdir -p %s && printf %%s %s >%s/probe.conf && printf %%s %s >/opt/probe.py", drop_in, override, drop_in, PROBE
    )
    host.check_output("systemctl daemon-reload")
    done = host.run("systemctl start vllm@%s", probe)
    told = host.check_output("journalctl --unit vllm@%s --output cat --no-pager --quiet", probe)
    host.run("rm -r %s /opt/probe.py; systemctl daemon-reload; rm -rf /var/cache/vllm/%s", drop_in, probe)
    assert done.rc == 0, told
    assert "ALLOWED" not in told, told
    assert told.count(" refused ") == 22, told
    assert "processes []" in told
    assert "home 0o700" in told
    assert 0 < int(told.split("\nuid ")[1].split()[0]) < 1000


def test_the_key_is_seen_by_nobody(host: Host) -> None:
    places = (
        "systemctl show vllm@chat vllm@other; systemctl cat vllm@chat; cat /etc/vllm/chat/*/* /opt/vllm/bin/*;"
        " journalctl --no-pager; cat /proc/[0-9]*/cmdline | tr '\\0' ' '; grep -r . /var/log /var/cache/vllm/*/vllm 2>/dev/null"
    )
    told = host.run(places).stdout
    assert "smollm2" in told
    assert KEY not in told
    assert host.file("/etc/vllm/internal_key").mode == 0o600


def test_the_environment_arrives_as_it_was_written(host: Host) -> None:
    pid = main_pid(host, "other")
    environment = host.check_output("tr '\\0' '\\n' </proc/%s/environ", str(pid)).splitlines()
    assert 'QUOTED=a "b" $c \\d' in environment
    assert "VLLM_CPU_OMP_THREADS_BIND=1" in environment
    assert "HF_HUB_OFFLINE=1" in environment


def test_caches_are_private_to_each_instance(host: Host) -> None:
    for name in UNITS:
        cache = host.file(f"/var/cache/vllm/{name}")
        assert (cache.mode, cache.user) == (0o700, "vllm")
        assert host.file(f"/var/cache/vllm/{name}/vllm").is_directory


def test_check_mode_shows_the_change_and_makes_none(host: Host) -> None:
    changed = {**OTHER, "options": {**OTHER["options"], "max-model-len": 512}}
    told = applied(host, "vllm", "--check", "--diff", vllm_instances=[CHAT, changed])
    assert "-max-model-len: 1024" in told
    assert "+max-model-len: 512" in told
    assert "QUOTED" not in told
    assert generation(host, "other") == "1"
    assert host.run("test -e /etc/vllm/other/2").rc != 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"options": {**OPTIONS, "max-model-length": 5}}, "did you mean 'max-model-len'?"),
        ({"model": "not-there"}, "model 'not-there' is not in model_store_models"),
        ({"prot": 1}, "prot"),
        ({"environment": {"VLLM_SERVER_DEV_MODE": 1}}, "VLLM_SERVER_DEV_MODE is refused"),
        ({"environment": {"VLLM_CPU_KVCACHE_SPACE": 4000}}, "GB of memory, but the host has"),
    ],
)
def test_a_mistake_is_refused_before_anything_changes(host: Host, change: dict[str, Any], expected: str) -> None:
    before = [main_pid(host, name) for name in UNITS]
    assert expected in refused(host, "vllm", vllm_instances=[CHAT, {**OTHER, **change}])
    assert [main_pid(host, name) for name in UNITS] == before
    assert host.run("test -e /etc/vllm/other/2").rc != 0


def test_a_port_that_something_else_holds_is_refused(host: Host) -> None:
    host.check_output("systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 8002")
    host.check_output("for i in $(seq 50); do ss -Hltn 'sport = :8002' | grep -q . && break; sleep 0.1; done")
    told = refused(host, "vllm", vllm_instances=[CHAT, {**OTHER, "port": 8002}])
    host.check_output("systemctl stop squatter")
    assert "port 8002 is taken by python3" in told


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"vllm_version": "0.26.0"}, "CVE-2026-114053"),
        ({"vllm_device": "cuda", "vllm_instances": [{**CHAT, "gpus": [0], "cpus": []}]}, "nvidia-smi is not there"),
        ({"vllm_internal_key": "short"}, "openssl rand -hex 32"),
    ],
)
def test_what_cannot_work_here_is_refused(host: Host, variables: dict[str, Any], expected: str) -> None:
    assert expected in refused(host, "vllm", **variables)


def test_a_running_request_ends_before_its_instance_stops(host: Host) -> None:
    """`other` is restarted under a request that takes some seconds: the request is answered to its end."""
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(ask(host, 8001, "other-name", tokens=120)))
    client.start()
    time.sleep(1.5)
    host.check_output("systemctl stop vllm@other")
    client.join()
    status, answer = answers[0]
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 120
    assert host.check_output("systemctl show --property=Result --value vllm@other") == "success"
    leftover = host.run("pgrep -u vllm -f VLLM::EngineCore -c").stdout.strip()
    assert leftover == "1", "only the engine of `chat` may be left"


def test_a_change_restarts_only_its_instance_and_starts_a_stopped_one(host: Host) -> None:
    """`other` is stopped here (by the test before): it is started with its new generation."""
    before = main_pid(host, "chat")
    changed = {**OTHER, "options": {**OTHER["options"], "max-model-len": 512}}
    applied(host, "vllm", vllm_instances=[CHAT, changed])
    assert main_pid(host, "chat") == before
    assert generation(host, "other") == "2"
    assert ask(host, 8001, "other-name")[0] == 200
    assert host.file("/etc/vllm/other/current").linked_to == "/etc/vllm/other/2"
    assert host.file("/etc/vllm/other/2/confirmed").exists


def test_a_configuration_that_vllm_refuses_goes_back(host: Host) -> None:
    """The option is known and of the right type; only the engine, when it starts, says no."""
    before = main_pid(host, "chat")
    broken = {**OTHER, "options": {**OTHER["options"], "max-model-len": 512, "quantization": "awq"}}
    told = refused(host, "vllm", vllm_instances=[CHAT, broken])
    assert "vLLM instance other" in told
    assert "did not come up" in told
    assert "awq" in told, "the lines of the journal that say why"
    assert "The previous generation is back and answers" in told
    assert generation(host, "other") == "2"
    assert ask(host, 8001, "other-name")[0] == 200
    assert host.run("test -e /etc/vllm/other/3").rc != 0
    assert main_pid(host, "chat") == before


def test_an_instance_that_nobody_wants_is_gone(host: Host) -> None:
    before = main_pid(host, "chat")
    applied(host, "vllm", vllm_instances=[CHAT])
    assert main_pid(host, "chat") == before
    assert host.run("systemctl is-active vllm@other").stdout.strip() == "inactive"
    assert host.run("systemctl is-enabled vllm@other").stdout.strip() != "enabled"
    assert not host.file("/etc/vllm/other").exists
    assert host.run("pgrep -u vllm -f VLLM::EngineCore -c").stdout.strip() == "1"


def test_a_run_that_died_half_way_is_finished_by_the_next(host: Host) -> None:
    """What a run leaves that dies between writing a generation and proving it, and a release that was half built."""
    host.check_output(
        "rm /etc/vllm/chat/current/confirmed && mkdir /etc/vllm/chat/.9.partial /opt/vllm/releases/0.1.0-half"
    )
    done = apply_role(host, "vllm", vllm_instances=[CHAT])
    assert done.returncode == 0, done.stdout
    assert host.file("/etc/vllm/chat/current/confirmed").exists
    assert not host.file("/etc/vllm/chat/.9.partial").exists
    assert not host.file("/opt/vllm/releases/0.1.0-half").exists
    again = applied(host, "vllm", vllm_instances=[CHAT])
    assert "changed=0" in again


def test_a_crash_is_followed_by_a_start(host: Host) -> None:
    host.check_output("pkill -9 -u vllm -f VLLM::EngineCore")
    deadline = time.monotonic() + 400  # a start takes 40 s; more on a machine that does other things
    while time.monotonic() < deadline:
        time.sleep(2)
        if ask(host)[0] == 200:
            return
    pytest.fail(host.run("systemctl status --no-pager --lines=40 vllm@chat").stdout)
