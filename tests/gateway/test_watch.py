"""The watch of a host with its real agent, real checks and a real Nginx: an engine that hangs, and a GPU that fails, under requests of clients.

Stand-ins for systemctl, journalctl and nvidia-smi are programs on the path of the watch; what starts an instance again is a thread of the test.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import INTERNAL
from tests.gateway.checks import Host
from tests.gateway.test_checks import Clients, Fleet, Instance, fleet, hosts, site
from tests.stand_in.local import start

__all__ = ["fleet", "hosts", "site"]
RECORDINGS = Path(__file__).resolve().parents[1] / "unit/recordings"
HUNG_SECONDS = 4.0
# What systemd says of the unit of the instance, and how it kills what runs there.
SYSTEMCTL = """#!{python}
import json, os, pathlib, sys
told = json.loads(pathlib.Path({unit!r}).read_text())
if sys.argv[1] == "kill":
    os.kill(told["pid"], 9)
else:
    print("Id=vllm@chat.service\\nActiveState=" + told["state"] + "\\nInvocationID=" + told["invocation"])
    print("ActiveEnterTimestampMonotonic=" + str(told["started"]))
"""


@dataclass
class Watched:
    """A host with a watch, and the unit of its one instance."""

    host: Host
    instance: Instance
    site: Path
    process: subprocess.Popen[str] | None = None
    # What heal.py said, a run each.
    healed: list[str] = field(default_factory=list)
    ends: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    number: int = 0

    def path(self, name: str) -> Path:
        return self.host.directory / name

    def prepare(self, **settings: Any) -> None:
        """Programs, configuration and directories of the host."""
        for name in ("bin", "credentials", "run/vllm-fleet/watch", "run/vllm-fleet/heal", "run/vllm"):
            self.path(name).mkdir(parents=True, exist_ok=True)
        (self.path("credentials") / "internal_key").write_text(INTERNAL)
        self.path("journal").write_text("")
        shutil.copy(RECORDINGS / "nvidia/h100x8/nvidia-smi.xml", self.path("nvidia-smi.xml"))
        programs = {
            "systemctl": SYSTEMCTL.format(python=sys.executable, unit=str(self.path("unit.json"))),
            "journalctl": f"#!/bin/sh\nexec tail --lines=+1 --follow {self.path('journal')}\n",
            "nvidia-smi": f"#!/bin/sh\nexec cat {self.path('nvidia-smi.xml')}\n",
        }
        for name, text in programs.items():
            (self.path("bin") / name).write_text(text)
            (self.path("bin") / name).chmod(0o755)
        told = {
            "host": "gpu-1", "restart": True, "restarts": 2, "restart_seconds": 3600, "hung_seconds": HUNG_SECONDS, "start_seconds": 60,
            "interval_seconds": 0.3, "gpu_seconds": 1, "disks": {"root": "/"}, "disk_warn_percent": 101, "disk_critical_percent": 102,
            "instances": {"chat": {"address": "127.0.0.1", "port": self.instance.server.port, "config": "/nothing",
                                   "model": "small", "gpus": [1]}},
        }  # fmt: skip
        self.path("etc/vllm-fleet/watch.json").write_text(json.dumps(told | settings))

    def unit(self, state: str = "active") -> None:
        """What systemd says from now on."""
        told = {
            "state": state, "pid": self.instance.server.process.pid, "invocation": f"{self.number:032x}",
            "started": int(time.monotonic() * 1e6),
        }  # fmt: skip
        self.path("unit.new").write_text(json.dumps(told))
        self.path("unit.new").rename(self.path("unit.json"))

    def supervise(self) -> None:
        """As systemd: what ends is started again, which takes a moment, and heal.py is run when there is a request."""
        while not self.ends.wait(0.05):
            server = self.instance.server
            if server.process.poll() is not None:
                self.number += 1
                self.unit("activating")
                time.sleep(0.5)
                server.process, _port, server.output = start(self.site, server.home, INTERNAL, port=server.port)
                self.unit()

    def heals(self) -> None:
        while not self.ends.wait(0.05):
            if list(self.path("run/vllm-fleet/watch/restart").glob("[!.]*.json")):
                output, _ = self.program("heal.py").communicate(timeout=60)
                self.healed.append(output)

    def program(self, name: str) -> subprocess.Popen[str]:
        return self.host.run(
            name, PATH=f"{self.path('bin')}:{os.environ['PATH']}", CREDENTIALS_DIRECTORY=str(self.path("credentials"))
        )

    def start(self, **settings: Any) -> None:
        self.prepare(**settings)
        self.unit()
        self.threads = [threading.Thread(target=one) for one in (self.supervise, self.heals)]
        for thread in self.threads:
            thread.start()
        self.process = self.program("watch.py")
        self.until(lambda: 'vllm_fleet_instance_answers{instance_name="chat"} 1' in self.metrics(), 20)

    def metrics(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.path("run/vllm-fleet/watch/watch.prom").read_text()
        return ""

    def findings(self) -> list[dict[str, Any]]:
        return list(json.loads(self.path("run/vllm-fleet/watch/health.json").read_text())["findings"])

    def until(self, what: Any, seconds: float) -> float:
        begun = time.monotonic()
        while not what():
            assert self.process and self.process.poll() is None, self.process and self.process.communicate()
            assert time.monotonic() - begun < seconds, f"{self.metrics()}\n{self.healed}"
            time.sleep(0.05)
        return time.monotonic() - begun

    def end(self) -> str:
        """Returns what the watch said."""
        self.ends.set()
        for thread in self.threads:
            thread.join()
        if not self.process:
            return ""
        self.process.terminate()
        return self.process.communicate(timeout=10)[0]


@pytest.fixture
def watched(fleet: Fleet, hosts: dict[str, Host], site: Path) -> Iterator[Watched]:
    made = Watched(hosts[fleet.one.id], fleet.one, site)
    yield made
    made.end()


def test_a_hung_engine_is_out_of_traffic_and_back_by_itself(fleet: Fleet, watched: Watched) -> None:
    watched.start()
    clients = Clients(fleet.gateway, 4)
    time.sleep(1)
    first = watched.instance.server.process.pid
    watched.instance.server.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    fleet.checks.until(lambda: not fleet.checks.used(fleet.one.id), 20)
    moved = time.monotonic() - begun
    watched.until(lambda: watched.instance.server.process.pid != first, 30)
    restarted = time.monotonic() - begun
    fleet.checks.until(lambda: fleet.checks.used(fleet.one.id), 30)
    healed = time.monotonic() - begun
    print(f"hung: out of traffic after {moved:.1f} s, restarted after {restarted:.1f} s, back after {healed:.1f} s")
    assert moved < restarted < HUNG_SECONDS + 10
    clients.end()
    assert (
        fleet.gateway.ask(
            "/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}
        ).status
        == 200
    )
    watched.until(lambda: 'vllm_fleet_restarts_total{instance_name="chat",cause="hung"} 1' in watched.metrics(), 15)
    watched.until(lambda: not [one for one in watched.findings() if one["instances"] == ["chat"]], 15)
    assert len(watched.healed) == 1 and "1 restarts are left within 60 min" in watched.healed[0]
    said = watched.end()
    assert said.count("critical: chat hangs (no answer for") == 1
    assert "over: chat hangs" in said


def test_an_engine_that_hangs_again_and_again_is_left_alone_in_the_end(fleet: Fleet, watched: Watched) -> None:
    """Its answers are commanded: the process lives, /health and /metrics answer, and no token comes. A start heals it for a moment."""
    watched.start()
    server = watched.instance.server
    for number in (1, 2):
        pid = server.process.pid
        server.command(answers="hang")
        watched.until(lambda pid=pid: server.process.pid != pid, 40)
        server.command(answers="right")
        answered = f'vllm_fleet_restarts_left{{instance_name="chat"}} {2 - number}'
        watched.until(lambda line=answered: line in watched.metrics(), 20)
        watched.until(lambda: 'vllm_fleet_instance_answers{instance_name="chat"} 1' in watched.metrics(), 20)
    pid = server.process.pid
    server.command(answers="hang")
    watched.until(lambda: any("is left alone for" in one["what"] for one in watched.findings()), 30)
    time.sleep(HUNG_SECONDS + 2)
    assert server.process.pid == pid
    assert len(watched.healed) == 2


def test_a_long_prompt_an_operator_and_a_turn_keep_the_watch_off(fleet: Fleet, watched: Watched) -> None:
    watched.start()
    server, pid = watched.instance.server, watched.instance.server.process.pid
    long = {"model": "small", "prompt": "Hi", "max_tokens": 2, "stand_in": {"prefill_seconds": 2.5 * HUNG_SECONDS}}
    assert server.ask("/v1/completions", long, key=INTERNAL).status == 200
    for word, why in (
        ({"operator": "drained", "turn": "upgrade"}, "the turn upgrade is at work"),
        ({"operator": "stopped"}, "it is said to be stopped"),
        ({"operator": "drained", "by": "ada"}, "it is drained"),
    ):
        watched.host.says("chat", **word)
        server.command(answers="hang")
        watched.until(lambda why=why: any(why in one["what"] for one in watched.findings()), 40)
        server.command(answers="right")
        os.kill(server.process.pid, signal.SIGCONT)
    assert (server.process.pid, watched.healed) == (pid, [])


def test_a_gpu_that_needs_a_reset_takes_its_instance_out_of_traffic(fleet: Fleet, watched: Watched) -> None:
    watched.start()
    shutil.copy(RECORDINGS / "gpu_health/r580-reset.xml", watched.path("nvidia-smi.xml"))
    fleet.checks.until(lambda: not fleet.checks.used(fleet.one.id), 20)
    why = fleet.checks.use(fleet.one.id)["why"]
    assert why == "its host wants it out: GPU 1 (0000:3d:00.0): the driver says what it needs: Reset"
    assert fleet.checks.use(fleet.one.id)["operator"] == "up"
    # an operator's word is told before it, and stays his
    watched.host.says("chat", operator="drained", by="ada", reason="new fan")
    fleet.checks.until(lambda: fleet.checks.use(fleet.one.id)["why"] == "drained by ada: new fan")
    watched.host.says("chat", operator="up")
    fleet.checks.until(lambda: fleet.checks.use(fleet.one.id)["why"] == why)
    # the last one of a route stays, and says why it would rather not
    fleet.two.server.process.kill()
    time.sleep(3)
    shutil.copy(RECORDINGS / "nvidia/h100x8/nvidia-smi.xml", watched.path("nvidia-smi.xml"))
    fleet.checks.until(lambda: fleet.checks.used(fleet.one.id), 20)
    shutil.copy(RECORDINGS / "gpu_health/r580-reset.xml", watched.path("nvidia-smi.xml"))
    fleet.checks.until(lambda: fleet.checks.use(fleet.one.id)["kept"], 20)
    assert fleet.checks.used(fleet.one.id)


def test_an_error_of_its_gpu_restarts_an_engine_that_it_hit_and_no_other(fleet: Fleet, watched: Watched) -> None:
    """XID 94: the memory that was hit is given up, and whoever used it has to start anew. Who still answers was not hit."""
    watched.start(hung_seconds=300)
    server, pid = watched.instance.server, watched.instance.server.process.pid

    def xid(number: int) -> None:
        text = f"NVRM: Xid (PCI:0000:3d:00): {number}, pid=1, name=VLLM::EngineCore, Contained: CE User Channel (0x9). RST: No, D-RST: No"
        entry = {
            "__CURSOR": f"c{time.monotonic()}",
            "__MONOTONIC_TIMESTAMP": str(int(time.monotonic() * 1e6)),
            "MESSAGE": text,
        }
        with watched.path("journal").open("a") as journal:
            journal.write(json.dumps(entry) + "\n")

    xid(94)
    watched.until(lambda: 'xid="94"} 1' in watched.metrics(), 15)
    watched.until(lambda: any("XID 94" in one["what"] for one in watched.findings()), 10)
    time.sleep(2)
    assert server.process.pid == pid
    server.command(answers="500")
    watched.until(lambda: server.process.pid != pid, 20)
    server.command(answers="right")
    watched.until(lambda: 'vllm_fleet_restarts_total{instance_name="chat",cause="gpu"} 1' in watched.metrics(), 15)


def test_what_the_agent_hands_out_has_what_the_watch_found(fleet: Fleet, watched: Watched) -> None:
    watched.start()
    silence = watched.path("var/lib/vllm-fleet/turn/silence.json")
    silence.parent.mkdir()
    silence.write_text(json.dumps({"until": "2026-11-30T14:00:00Z", "turn": "upgrade"}))
    context = ssl.create_default_context(cadata=fleet.checks.authority.pem)
    watched.path("peer.pem").write_text("".join(fleet.checks.authority.sign("gw-1")))
    context.load_cert_chain(watched.path("peer.pem"))
    context.check_hostname = False
    peer = http.client.HTTPSConnection("127.0.0.1", watched.host.port, context=context, timeout=15)
    peer.request("GET", "/metrics")
    text = peer.getresponse().read().decode()
    assert 'vllm_fleet_gpu_level{gpu="1"' in text
    assert "vllm_fleet_silenced_until_timestamp_seconds 1796047200" in text
    assert 'vllm_fleet_instance_up{instance_name="chat"} 1' in text
