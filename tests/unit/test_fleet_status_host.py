"""What the status of the fleet sees of a host: recorded outputs, files that are broken, and parts that hang."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet_status_host as look
from ansible_collections.gpufleet.llm.plugins.module_utils import host_agent

from tests.certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
METRICS = (ROOT / "tests/stand_in/vllm-0.32.0-cpu.prom").read_text()
SYSTEMD = """\
Result=success
NRestarts=0
ExecMainStartTimestampMonotonic={main}
Id=vllm@chat.service
LoadState=loaded
ActiveState={active}
SubState=running
UnitFileState=enabled
InactiveExitTimestampMonotonic={main}

Result=success
NRestarts=0
Id=vllm-fleet-agent.service
LoadState=loaded
ActiveState=active

Id=nginx.service
LoadState=not-found
ActiveState=inactive
"""
SMI = "0, 71234, 81559, 64, 98\n1, 1, 81559, [N/A], [Not Supported]\n"


# --- texts


def test_gpus_tell_what_they_can() -> None:
    first, second = look.gpus(SMI)
    assert first == {
        "index": 0,
        "memory_used_mib": 71234,
        "memory_total_mib": 81559,
        "temperature_c": 64,
        "utilization": 98,
    }
    assert (second["temperature_c"], second["utilization"]) == (None, None)
    assert look.gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.") == []
    assert look.use_of([first, second]) == {
        "memory_used_mib": 71235, "memory_total_mib": 163118, "temperature_c": 64, "utilization": 98,
    }  # fmt: skip
    assert look.use_of([]) is None


def test_real_metrics_are_read() -> None:
    found = look.metrics(METRICS)
    assert set(found) == {"running", "waiting", "generated", "prompt", "kv_use"}
    assert found["running"] == 0


def test_engines_are_added_up_and_what_is_no_number_is_not() -> None:
    text = (
        'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 4.0\n'
        'vllm:num_requests_waiting{engine="0"} NaN\nvllm:num_requests_waiting_by_reason{reason="capacity"} 9.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.5\n'
        'vllm:generation_tokens_total{engine="0"} 100.0\n'
    )
    assert look.metrics(text) == {"running": 7, "kv_use": 0.5, "generated": 100}


def test_tokens_per_second_need_two_looks() -> None:
    first, second = {"generated": 100.0, "running": 1.0}, {"generated": 150.0, "running": 2.0}
    told = look.rates(first, second, 2.0)
    assert (told["generated_tokens_per_second"], told["running"], told["prompt_tokens_per_second"]) == (25.0, 2, None)
    assert look.rates(first, {}, 0.0)["generated_tokens_per_second"] is None
    assert look.rates(second, first, 1.0)["generated_tokens_per_second"] == 0, "an engine that was started in between"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2026-11-30T12:00:00Z", 1796040000), ("2026-11-30 12:00:00 UTC", 1796040000), (1796040000, 1796040000), ("soon", None), (None, None), (True, None)],
)  # fmt: skip
def test_moments(value: object, expected: float | None) -> None:
    assert look.moment(value) == expected


def test_updates_of_both_distributions() -> None:
    ubuntu = "\n12 updates can be applied immediately.\n3 of these updates are standard security updates.\n"
    assert look.updates(ubuntu, {"linux-image": {}}, True, "linux-base\nlinux-base\n") == {
        "waiting": 12, "security": 3, "held_security": ["linux-image"], "reboot_required": True, "reboot_for": ["linux-base"],
    }  # fmt: skip
    assert look.updates("", {}, False, "")["waiting"] is None


def test_what_others_wrote_may_have_any_form() -> None:
    assert look.findings({}) == look.findings({"findings": "none"}) == look.findings({"findings": [7]}) == []
    told = {
        "key": "gpu",
        "level": "critical",
        "what": "GPU 3 fell\noff the bus",
        "gpu": {"index": 3},
        "since": 5,
        "advice": "Reboot it.",
    }
    assert look.findings({"findings": [told]}) == [
        {
            "key": "gpu",
            "level": "critical",
            "what": "GPU 3 fell off the bus",
            "since": 5.0,
            "instances": [],
            "gpu": 3,
            "do": "Reboot it.",
        }
    ]
    assert look.listed_turns("") == look.listed_turns("{}") == look.listed_turns("[7]") == []
    assert look.disk("/", "6ea1 4096 1000 250") == {
        "id": "6ea1", "path": "/", "size_bytes": 4096000, "free_bytes": 1024000,
    }  # fmt: skip
    assert look.disk("/", "stat: cannot read") is None


TURN = {"ended": "1970-01-01T01:23:20Z", "act": "upgrade", "instances": ["chat"], "seconds": 100}


@pytest.mark.parametrize(
    ("unit", "at", "acts", "expected"),
    [
        ({"NRestarts": "3"}, 1000, look.Acts(), ("restart", "systemd, restart 3")),
        ({}, 100, look.Acts(), ("boot", "boot")),
        ({}, 100, look.Acts(-50), ("boot", "boot")),
        ({}, 100, look.Acts(50), ("switch", "new generation")),
        ({}, 5000, look.Acts(4900), ("switch", "new generation")),
        ({}, 5000, look.Acts(5100), ("command", "by hand")),
        ({}, 5000, look.Acts(4000), ("command", "by hand")),
        ({}, 4950, look.Acts(4900, turns=[TURN]), ("turn", "upgrade")),
        ({}, 4950, look.Acts(4900, turns=[{**TURN, "instances": ["embed"]}]), ("switch", "new generation")),
        ({}, 5001, look.Acts(turns=[TURN]), ("command", "by hand")),
        ({}, 5001, look.Acts(turns=[TURN], word={"turn": "restart", "since": "1970-01-01T01:23:20Z"}), ("turn", "restart")),
        ({}, 100, look.Acts(word={"turn": "reboot", "since": "1970-01-01T00:00:00Z"}), ("turn", "reboot")),
        ({}, 5000, look.Acts(healed={"last": "1970-01-01T01:23:15Z", "why": "hung"}), ("watch", "watch: hung")),
        ({}, 9000, look.Acts(healed={"last": "1970-01-01T01:23:15Z", "why": "hung"}), ("command", "by hand")),
    ],
)  # fmt: skip
def test_why_it_started(unit: dict[str, str], at: float, acts: look.Acts, expected: tuple[str, str]) -> None:
    assert look.why_it_started("chat", unit, at, 0, acts) == expected


# --- a whole host


class Module:
    """As far as the code for generations needs it."""

    def __init__(self, path: Path, **change: Any) -> None:
        self.params = {"config_path": str(path), "patience": 1.0, "sample_seconds": 0.1, **change}

    def run_command(self, command: list[str], **_options: Any) -> tuple[int, str, str]:
        raise AssertionError(f"{command}: a program without a limit in time")


def put(root: Path, path: str, content: object) -> None:
    """A file of the host."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that stand for those of the host; systemctl is there."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    micros = int((time.monotonic() - 5) * 1e6)
    program(place, "systemctl", f"cat <<'EOF'\n{SYSTEMD.format(main=micros, active='active')}EOF")
    return place


def program(place: Path, name: str, text: str) -> None:
    """One program."""
    (place / name).write_text(f"#!/bin/sh\n{text}\n")
    (place / name).chmod(0o755)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with one instance, of which generation 2 runs."""
    root = tmp_path / "root"
    put(root, "proc/1/stat", Path("/proc/1/stat").read_text())
    for number in (1, 2):
        base = f"etc/vllm/chat/{number}"
        put(root, f"{base}/config.yaml", 'model: "/srv/models/tiny"\nport: 8000\n')
        put(root, f"{base}/environment", 'CUDA_VISIBLE_DEVICES="0"\nSECRET=hunter2\n')
        put(
            root,
            f"{base}/gate.json",
            {"name": "chat", "unit": "vllm@chat.service", "url": "http://127.0.0.1:8000", "model": "tiny"},
        )
        put(root, f"{base}/inputs", "x")
        put(root, f"{base}/confirmed", "")
        (root / base / "release").symlink_to("/opt/vllm/releases/0.33.0-abc")
    (root / "etc/vllm/chat/current").symlink_to("2")
    put(
        root,
        "var/lib/vllm-fleet/chat.json",
        {"operator": "drained", "by": "ann", "since": "2026-11-30T12:00:00Z", "reason": "new fan"},
    )
    put(root, "etc/vllm-fleet/agent.json", {"gateways": ["gw-1"], "instances": {}})
    now = time.monotonic()
    put(
        root,
        "run/vllm-fleet/agent/gw-1.json",
        {"time": now, "out": ["chat"], "kept": {}, "in_flight": {"chat": 2}, "told": []},
    )
    put(
        root,
        "run/vllm-fleet/lease.json",
        {"run": "r", "who": "ann", "controller": "ctl", "pid": 7, "place": "p", "since": "2026-11-30 12:00:00"},
    )
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
    put(
        root,
        "var/lib/vllm-fleet/turn/silence.json",
        {"until": until, "by": "ann", "turn": "upgrade", "reason": "new vLLM"},
    )
    return root


def looked(root: Path, **change: Any) -> tuple[dict[str, Any], float]:
    """What is found, and how long it took."""
    began = time.monotonic()
    found = look.Look(Module(root / "etc/vllm", **change), root).everything()
    json.dumps(found)
    return found, time.monotonic() - began


@pytest.fixture
def engine(root: Path) -> Iterator[list[bytes]]:
    """Something that listens in the place of the instance; what it answers, one after the other, or nothing ever."""
    answers: list[bytes] = []
    listening = socket.create_server(("127.0.0.1", 0))
    for number in (1, 2):
        port = listening.getsockname()[1]
        put(root, f"etc/vllm/chat/{number}/config.yaml", f'model: "/srv/models/tiny"\nport: {port}\n')

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            if answers:
                body = answers.pop(0)
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                connection.close()
            else:
                held.append(connection)

    held: list[socket.socket] = []
    threading.Thread(target=serve, daemon=True).start()
    yield answers
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    for connection in held:
        connection.close()


def test_a_host(root: Path, programs: Path, engine: list[bytes]) -> None:
    program(programs, "nvidia-smi", f"cat <<'EOF'\n{SMI}EOF")
    for tokens in (100, 150):
        engine.append(f'vllm:num_requests_running{{engine="0"}} 3\nvllm:generation_tokens_total {tokens}\n'.encode())
    found, _ = looked(root)
    [one] = found["instances"]
    assert (one["generation"], one["running_generation"], one["previous"], one["confirmed"]) == (2, None, 1, True)
    assert (one["model"], one["runs"]) == ("tiny", "/opt/vllm/releases/0.33.0-abc")
    assert one["unit"]["active"] == "active"
    assert abs(one["start"]["at"] - time.time() + 5) < 3
    assert one["start"]["kind"] == "switch", "its generation was made the current one just now"
    assert one["word"]["by"] == "ann"
    assert one["gateways"]["gw-1"]["use"] == "out"
    assert one["gateways"]["gw-1"]["in_flight"] == 2
    assert one["metrics"]["running"] == 3
    assert one["metrics"]["generated_tokens_per_second"] > 0
    assert one["gpu"]["memory_used_mib"] == 71234
    assert found["lease"] == {"who": "ann", "controller": "ctl", "pid": 7, "since": "2026-11-30 12:00:00"}
    assert found["silence"]["turn"] == "upgrade"
    assert found["agent"] == {"gateways": ["gw-1"]}
    assert found["units"] == {"vllm-fleet-agent.service": "active"}
    assert found["disks"]
    assert found["missing"] == {}, "nothing that is absent is missed"
    assert "hunter2" not in json.dumps(found)


def test_a_bare_host_misses_nothing(tmp_path: Path, programs: Path) -> None:
    put(tmp_path / "empty", "proc/1/stat", Path("/proc/1/stat").read_text())
    found, _ = looked(tmp_path / "empty")
    assert found["instances"] == found["gpus"] == []
    assert (found["gateway"], found["lease"], found["agent"], found["silence"]) == (None, None, None, None)
    assert found["missing"] == {}


def test_when_the_certificate_of_the_fleet_and_its_authority_end(root: Path, programs: Path) -> None:
    mine, other = Authority(), Authority()
    certificate, _key = mine.sign("gpu-1", days=30)
    put(root, "etc/ssl/vllm-fleet/fleet/cert.pem", certificate)
    put(root, "etc/ssl/vllm-fleet/fleet/ca.pem", mine.pem + other.pem)
    found, _ = looked(root)
    days = {name: round((end - time.time()) / 86400) for name, end in found["certificates"].items()}
    assert days == {"fleet": 30, "authority": 3650}
    put(root, "etc/ssl/vllm-fleet/fleet/ca.pem", "torn")
    found, _ = looked(root)
    assert found["certificates"]["authority"] is None
    assert "certificate authority" in found["missing"]


def test_an_engine_and_programs_that_hang_hold_nobody_up(root: Path, programs: Path, engine: list[bytes]) -> None:
    program(programs, "nvidia-smi", "sleep 60")
    found, seconds = looked(root)
    assert not engine
    assert found["instances"][0]["metrics"] == {"why": "no answer within 1 s", "listens": True}
    assert "did not answer within" in found["missing"]["gpus"]
    assert found["instances"][0]["gpu"] is None
    assert seconds < 5
    program(programs, "systemctl", "sleep 60")
    found, seconds = looked(root)
    assert "did not answer within" in found["missing"]["units"]
    assert (found["instances"][0]["unit"]["active"], found["instances"][0]["generation"]) == (None, 2)
    assert seconds < 5


def test_an_engine_that_sends_for_ever_is_given_up(
    root: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, engine: list[bytes]
) -> None:
    monkeypatch.setattr(host_agent, "METRICS_BYTES", 1000)
    engine.append(b"x" * 5000)
    found, _ = looked(root)
    assert found["instances"][0]["metrics"] == {"why": "the answer is too long", "listens": True}


def test_a_broken_part_takes_no_other_with_it(root: Path, programs: Path) -> None:
    put(root, "etc/vllm/chat/2/gate.json", "{")
    put(root, "run/vllm-fleet/lease.json", "[]")
    put(root, "run/vllm-fleet/agent/gw-1.json", "[1]")
    put(root, "run/vllm-fleet/watch/health.json", "no")
    put(root, "etc/vllm-gateway/fleet.json", {"routes": 7})
    found, _ = looked(root)
    assert {"instance chat", "gateway"} <= set(found["missing"])
    [one] = found["instances"]
    assert (one["name"], one["unit"]["active"], one["word"]["operator"]) == ("chat", "active", "drained")


# --- a gateway


def test_a_gateway(root: Path, programs: Path, tmp_path: Path) -> None:
    put(root, "etc/vllm-gateway/fleet.json", {
        "gateway": "gw-1", "backends": {"chat@gpu-1": {}, "chat@gpu-2": {}}, "keys": {"deadbeef": {}}, "clients": {},
        "routes": [{"model": "tiny", "instance": "chat", "backends": ["chat@gpu-1", "chat@gpu-2"], "min_available": 1}],
    })  # fmt: skip
    use = {"use": True, "why": "", "check": "ok", "operator": "up", "leaving": False, "kept": False, "since": 5.0}
    out = {**use, "use": False, "why": "it refuses connections", "check": "failed"}
    put(root, "run/vllm-gateway/state.json", {
        "serial": 3, "time": time.time() - 7, "backends": {"chat@gpu-1": use, "chat@gpu-2": out}, "certificates": {"tls": 99},
    })  # fmt: skip
    found, _ = looked(root)
    gateway = found["gateway"]
    assert not gateway["answers"]
    assert (gateway["routes"][0]["used"], gateway["in_flight"], gateway["certificates"]) == (1, None, {"tls": 99})
    assert gateway["backends"]["chat@gpu-2"]["why"] == "it refuses connections"
    assert 6 < gateway["state_age_seconds"] < 10
    assert "deadbeef" not in json.dumps(found), "not even hashes of keys"

    status = {
        "configuration": gateway["configuration"],
        "routes": [{"backends": [{"id": "chat@gpu-1", "in_flight": 4}]}],
    }
    body = json.dumps(status).encode()
    address = root / "run/vllm-gateway/admin.sock"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(address))
    listening.listen()

    def serve() -> None:
        connection, _ = listening.accept()
        assert connection.recv(4096).startswith(b"GET /status.json")
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    found, _ = looked(root)
    listening.close()
    assert (found["gateway"]["answers"], found["gateway"]["in_flight"]) == (True, 4)
    assert found["gateway"]["configuration_used"] == found["gateway"]["configuration"]
