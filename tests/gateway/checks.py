"""The checks of a gateway as a process, with the files of a gateway below a directory, and agents of hosts that say what a test wants.

Times are a tenth of the real ones, by the program's own options.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.certificates import Authority
from tests.stand_in.local import KEY

ROOT = Path(__file__).resolve().parents[2]
INTERVAL, RETRY, TIMEOUT = 0.5, 0.1, 2.0
MODEL = "small"
# Below the directory of a test; credentials as systemd gives them.
FILES = {
    "fleet": "fleet.json", "state": "run/state.json", "memory": "memory", "admin": "run/admin.sock",
    "credentials": "credentials", "certificate": "cert.pem", "tls-certificate": "fullchain.pem",
}  # fmt: skip


class AgentHandler(http.server.BaseHTTPRequestHandler):
    """The agent of a host."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """POST /state, on a connection that is kept."""
        agent: Agent = self.server.agent  # type: ignore[attr-defined]
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/state"
        if agent.stopped:
            self.close_connection = True
            return
        subject = dict(pair[0] for pair in self.connection.getpeercert()["subject"])
        assert subject["commonName"] == told["gateway"] == "gw-1"
        agent.told.append(told)
        agent.connections.add(self.client_address[1])
        text = json.dumps({"host": "a", "instances": agent.instances}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


@dataclass
class Agent:
    """What an agent says, and was told."""

    instances: dict[str, Any] = field(default_factory=dict)
    told: list[dict[str, Any]] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)
    port: int = 0
    stopped: bool = False
    stop: Callable[[], None] = lambda: None

    def says(self, instance: str, operator: str = "up", leaving: bool = False, **more: Any) -> None:
        self.instances = {
            **self.instances,
            instance: {
                "operator": operator, "by": "alice", "since": "", "reason": "", "leaving": leaving, "unit": "active", **more,
            },
        }  # fmt: skip


def serve(agent: Agent, authority: Authority, directory: Path, port: int = 0) -> None:
    """Have an agent listen."""
    cert, key = authority.sign("a")
    for name, text in (("agent.pem", cert + key), ("agent-ca.pem", authority.pem)):
        (directory / name).write_text(text)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(directory / "agent-ca.pem"))
    context.load_cert_chain(directory / "agent.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), AgentHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.agent = agent  # type: ignore[attr-defined]
    server.daemon_threads = True
    agent.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    agent.stopped = False

    def stop() -> None:
        agent.stopped = True
        server.shutdown()
        server.server_close()

    agent.stop = stop


# Runs a program of the role host_agent, with the files of a host below a directory.
ON_A_HOST = """
import runpy, sys
from pathlib import Path
directory, program, *words = sys.argv[1:]
sys.path[:0] = [str(Path(program).parent), {modules!r}, {collections!r}]
import agent_files, asyncio, importlib, instance_tls
from ansible_collections.gpufleet.llm.plugins.module_utils import instance_tls as of_the_watch
def below(module):
    for name, value in vars(module).items():
        if isinstance(value, Path):
            setattr(module, name, Path(directory + str(value)))
    return module
for module in (agent_files, instance_tls, of_the_watch):
    below(module)
sys.argv = [program, *words]
if program.endswith(("agent.py", "watch.py")):
    asyncio.run(below(importlib.import_module(Path(program).stem)).main())
elif program.endswith("heal.py"):
    below(importlib.import_module("heal")).main()
else:
    runpy.run_path(program, run_name="__main__")
""".format(modules=str(ROOT / "plugins/module_utils"), collections=str(ROOT / ".collections"))


@dataclass
class Host:
    """A host whose agent is the real one."""

    directory: Path
    port: int
    process: subprocess.Popen[str] | None = None

    def start(self, authority: Authority, instance: str, instance_port: int, kept_seconds: float = 60) -> None:
        """Start the agent for one instance."""
        for name in ("etc/vllm-fleet", "etc/ssl/vllm-fleet/fleet", "var/lib/vllm-fleet", "run/vllm-fleet/agent"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        certificates = zip(("cert", "key", "ca"), (*authority.sign(self.directory.name), authority.pem), strict=True)
        for name, text in certificates:
            (self.directory / f"etc/ssl/vllm-fleet/fleet/{name}.pem").write_text(text)
        told = {
            "host": self.directory.name, "address": "127.0.0.1", "port": self.port, "gateways": ["gw-1"], "monitoring": [],
            "instances": {
                instance: {"address": "127.0.0.1", "port": instance_port, "config": str(self.directory / "etc/vllm/config.yaml")},
            },
            "leave": {"seconds": 60, "kept_seconds": kept_seconds},
        }  # fmt: skip
        (self.directory / "etc/vllm").mkdir(exist_ok=True)
        (self.directory / "etc/vllm-fleet/agent.json").write_text(json.dumps(told))
        self.process = self.run("agent.py")

    def run(self, program: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Run one of its programs."""
        place = ROOT / "roles/host_agent/templates/usr/local/lib/vllm-fleet" / program
        return subprocess.Popen(
            [sys.executable, "-c", ON_A_HOST, str(self.directory), str(place), *words],
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def says(self, instance: str, **word: str) -> None:
        """The operator's word."""
        place = self.directory / f"var/lib/vllm-fleet/{instance}.json"
        place.with_suffix(".new").write_text(json.dumps(word))
        place.with_suffix(".new").rename(place)

    def end(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(5)


@dataclass
class Checks:
    """They, and the files that they read and write."""

    directory: Path
    authority: Authority
    process: subprocess.Popen[str] | None = None
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, float] = field(default_factory=dict)
    # Other places than those of FILES.
    files: dict[str, str] = field(default_factory=dict)
    key: str = KEY
    # Whether Nginx could ask by TLS.
    backend_tls: bool = True

    def path(self, name: str) -> Path:
        return self.directory / name

    def has(self, name: str, url: str, agent: Agent | None = None) -> None:
        """A backend, in fleet.json from the next configure() on; by https it is one that speaks TLS, as the inventory has it."""
        address = urlsplit(url)
        instance, _, host = name.partition("@")
        self.backends[name] = {
            "instance": instance, "host": host, "address": address.hostname, "port": address.port,
            "agent": f"127.0.0.1:{agent.port}" if agent else None, "tls": address.scheme == "https",
        }  # fmt: skip

    def configure(self, least: int = 0, key: str = KEY) -> None:
        """Write fleet.json, with one route to all backends."""
        route = {"model": MODEL, "backends": list(self.backends), "min_available": least}
        told = {
            "internal_key_sha256": hashlib.sha256(key.encode()).hexdigest(), "gateway": "gw-1",
            "backends": self.backends, "routes": [route],
        }  # fmt: skip
        partial = self.path("fleet.new")
        partial.write_text(json.dumps(told))
        partial.rename(self.path("fleet.json"))

    def prepare(self, certificate: bool = True) -> None:
        """Directories, and credentials as systemd gives them."""
        for name in ("credentials", "run", "memory"):
            self.path(name).mkdir(exist_ok=True)
        (self.path("credentials") / "internal_key").write_text(f"{self.key}\n")
        cert, key = self.authority.sign("gw-1") if certificate else ("none", "none")
        for name, text in (("ca", self.authority.pem), ("cert", cert), ("key", key)):
            (self.path("credentials") / f"fleet_{name}").write_text(text)
        self.path("cert.pem").write_text(cert)

    def start(self) -> None:
        """Start the checks, and wait until they are ready, as systemd does."""
        times = {"interval": INTERVAL, "retry": RETRY, "timeout": TIMEOUT, "agent-interval": 0.1, "alive": 0.5}
        times |= self.options
        options = [f"--{name}={value}" for name, value in times.items()]
        options += [f"--{name}={self.path(file)}" for name, file in {**FILES, **self.files}.items()]
        options += ["--backend-tls"] if self.backend_tls else []
        ready = self.path("notify")
        ready.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, self.path("log").open("a") as log:
            channel.bind(str(ready))
            channel.settimeout(15)
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "roles/gateway/files/checks.py"), *options],
                env={"PYTHONPATH": str(ROOT / ".collections"), "NOTIFY_SOCKET": str(ready)},
                stdout=log, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert channel.recv(100) == b"READY=1", self.log

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait(5)

    @property
    def log(self) -> str:
        return self.path("log").read_text()

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads(self.path(self.files.get("state", FILES["state"])).read_text()))

    def use(self, name: str) -> dict[str, Any]:
        """What the state says of a backend."""
        return dict(self.state["backends"][name])

    def until(self, what: Callable[[], Any], seconds: float = 10) -> float:
        """Wait until it is so. Returns how long that took."""
        begun = time.monotonic()
        while not what():
            assert self.process and self.process.poll() is None, self.log
            assert time.monotonic() - begun < seconds, f"{self.state}\n{self.log}"
            time.sleep(0.01)
        return time.monotonic() - begun

    def used(self, name: str) -> bool:
        return bool(self.use(name)["use"])

    def stays(self, what: Callable[[], bool], seconds: float) -> None:
        """It is so all the time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert what(), f"{self.state}\n{self.log}"
            time.sleep(0.02)
