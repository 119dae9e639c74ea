"""A gateway as a process of its own on loopback: the role's nginx.conf, rendered as the role does, and its very Lua files.

    with running(directory, [Backend("chat@gpu-1")]) as gateway:
        assert gateway.ask("/v1/chat/completions", {"model": "small"}).status == 200

What Nginx has below /etc, /run and /var is below the directory. fleet.json and state.json are the test's: gateway.configure() writes the one and
reloads, gateway.decide() writes the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import platform
import re
import signal
import socket
import ssl
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from tests.certificates import make_pair
from tests.gateway.backends import INTERNAL, Backend
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles" / "gateway"
NAME = "llm.test"
# The name that libraries find an address for.
RESOLVED = "localhost"
KEY = "team-a-0123456789abcdef0123456789abcdef"
CHAT = "/v1/chat/completions"
# Where a gateway has its files; a test has them below its directory.
PLACES = (
    "/etc/vllm-gateway",
    "/etc/ssl/vllm-fleet",
    "/run/vllm-gateway",
    "/var/lib/vllm-gateway-budgets",
    "/run/nginx.pid",
    "/var/log/nginx",
)
OTHERS = ("proxy", "fastcgi", "uwsgi", "scgi")
NUMBERS: dict[str, Any] = {
    "gateway_ipv6": False, "gateway_server_names": [NAME, RESOLVED], "gateway_address_requests_per_minute": 600000, "gateway_address_burst": 10000,
    "gateway_address_concurrent_requests": 10000, "gateway_unauthorized_requests_per_minute": 600000, "gateway_unauthorized_burst": 10000,
    "gateway_read_timeout_seconds": 3, "gateway_connect_timeout_seconds": 1, "gateway_drain_seconds": 20, "gateway_worker_connections": 8192,
    "ansible_managed": "A test",
}  # fmt: skip
CLIENT = {
    "requests_per_minute": 600000, "burst": 10000, "concurrent_requests": 1000, "models": None, "tokens_per_minute": None,
    "tokens_per_day": None, "tokens_per_month": None, "priority": None,
}  # fmt: skip


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def route(model: str, backends: Sequence[Backend], **more: Any) -> dict[str, Any]:
    """An entry of the routes."""
    return {
        "model": model, "aliases": [], "instance": backends[0].id.partition("@")[0] if backends else "none",
        "backends": [backend.id for backend in backends], "paths": [CHAT, "/v1/completions"], "clients": None, "weight": 1,
        "balance": "least", "session_header": None, "min_available": 0, "retry": True, **more,
    }  # fmt: skip


def document(
    routes: Sequence[dict[str, Any]],
    backends: Sequence[Backend],
    clients: dict[str, dict[str, Any]] | None = None,
    keys: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A fleet.json. `keys` are keys by their text, with what it is to say of each."""
    return {
        "version": 1, "internal_key_sha256": sha256(INTERNAL), "gateway": "gw-1",
        "settings": {"cors_origins": []},
        "backends": {backend.id: backend.described() for backend in backends}, "routes": list(routes),
        "clients": {name: {**CLIENT, **client} for name, client in (clients or {"team-a": {}}).items()},
        "keys": {sha256(key): {"expires": None, **entry} for key, entry in (keys or {KEY: {"client": "team-a"}}).items()},
    }  # fmt: skip


def release() -> dict[str, str]:
    """What decides what this machine's Nginx can do."""
    told = platform.freedesktop_os_release()
    return {"distribution": told["ID"].capitalize(), "release": told["VERSION_ID"]}


def rendered(name: str, variables: dict[str, Any]) -> str:
    """A template of the role, as the role renders it."""
    every: dict[str, Any] = {"ansible_facts": {"gpufleet": release()}, "__gateway_program_id": "of-the-test"}
    for place in ("defaults", "vars"):
        every = DataLoader().load_from_file(str(ROLE / place / "main.yml"), trusted_as_template=True) | every
    every |= variables
    templar = Templar(DataLoader()).copy_with_new_env(searchpath=[str(ROLE / "templates")], available_variables=every)
    text = trust_as_template((ROLE / "templates" / name).read_text())
    overrides = {"trim_blocks": True, "lstrip_blocks": False, "newline_sequence": "\n"}
    return str(templar.template(text, escape_backslashes=False, overrides=overrides))


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) >= {"message", "type", "param", "code"}, error
        assert self.headers["content-type"] == "application/json"
        return dict(error)


@dataclass
class Gateway:
    """A gateway that runs."""

    directory: Path
    port: int
    http_port: int
    process: subprocess.Popen[bytes]
    tls: ssl.SSLContext = field(repr=False)
    serial: int = 0

    @property
    def base_url(self) -> str:
        """What a library is told."""
        return f"https://{RESOLVED}:{self.port}/v1"

    @property
    def ca_file(self) -> Path:
        return self.directory / "etc/ssl/vllm-fleet/fullchain.pem"

    def connect(self, seconds: float = 15) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), seconds)
        # a header and a body go out in two writes, and the second must not wait for the first one's acknowledgement
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.tls.wrap_socket(plain, server_hostname=NAME)

    def raw(self, data: bytes) -> bytes:
        """Send bytes and return everything that comes back."""
        with self.connect() as connection:
            connection.sendall(data)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    received += part
        return received

    def connection(self, seconds: float = 15) -> http.client.HTTPConnection:
        """A connection that can be used for several requests."""
        made = http.client.HTTPConnection(NAME)
        made.sock = self.connect(seconds)
        return made

    def ask(
        self,
        path: str,
        body: Any = None,
        key: str | None = KEY,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own; what is no bytes becomes JSON."""
        connection = self.connection()
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        everything = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {key}"} if key else {}),
            **(headers or {}),
        }
        connection.request(method or ("GET" if data is None else "POST"), path, data, everything)
        response = connection.getresponse()
        answer = Answer(
            response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        )
        connection.close()
        return answer

    def median_seconds(self, questions: Iterable[tuple[bytes | str, str]]) -> float:
        """Of chats with these bodies and keys, one after the other over one connection, each of which is answered."""
        connection, seconds = self.connection(), []
        for body, key in questions:
            begun = time.monotonic()
            connection.request("POST", CHAT, body, {"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            seconds.append(time.monotonic() - begun)
        connection.close()
        return statistics.median(seconds)

    def admin(self, path: str) -> Any:
        """What the socket for this host says, in JSON."""
        return json.loads(self.admin_text(path))

    def admin_text(self, path: str) -> str:
        """What the socket for this host says."""
        connection = http.client.HTTPConnection("admin")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.directory / "run/vllm-gateway/admin.sock"))
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def until(self, what: Callable[[], object], seconds: float = 30) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"not so within {seconds} s; {self.errors()}"
            time.sleep(0.02)

    def configure(self, fleet: dict[str, Any], reload: bool = True) -> None:
        """Put another fleet.json in place, and wait until it is the one in use."""
        text = json.dumps(fleet)
        self.write("etc/vllm-gateway/fleet.json", text)
        if reload:
            former = self.workers()
            self.process.send_signal(signal.SIGHUP)
            self.until(lambda: self.ask("/healthz", key=None).json["configuration"] == sha256(text)[:12])
            # for a moment both listen
            self.until(lambda: not any(listens(pid) for pid in former))

    def decide(self, **backends: Any) -> None:
        """Put another state in place and wait until it is the one in use. Ids with `_at_` for the @ and `_` for a dash: chat_at_gpu_1=False."""
        named = {name.replace("_at_", "@").replace("_", "-"): said for name, said in backends.items()}
        self.state({name: said if isinstance(said, dict) else {"use": said} for name, said in named.items()})

    def state(self, backends: dict[str, dict[str, Any]], **more: Any) -> None:
        """The same, with whole entries, and more than the backends."""
        self.serial += 1
        usual = {"use": True, "why": "", "check": "ok", "operator": "up", "leaving": False, "kept": False, "since": 0.0}
        told = {
            "serial": self.serial,
            "time": time.time(),
            "backends": {name: {**usual, **said} for name, said in backends.items()},
            **more,
        }
        self.write("run/vllm-gateway/state.json", json.dumps(told))
        self.until(lambda: self.admin("/in_flight")["serial"] == self.serial)

    def write(self, name: str, text: str) -> None:
        """Write a file by renaming it."""
        place = self.directory / name
        aside = place.with_name(f".{place.name}.new")
        aside.write_text(text)
        aside.rename(place)

    def log(self, count: int) -> list[dict[str, Any]]:
        """The last lines of the access log, once there are so many in all."""
        place = self.directory / "var/log/nginx/access.log"
        self.until(lambda: len(place.read_text().splitlines()) >= count)
        return [json.loads(line) for line in place.read_text().splitlines()]

    def logged(self, request_id: str) -> dict[str, Any]:
        """The line of a request, once it is there to its end."""
        place = self.directory / "var/log/nginx/access.log"
        found: list[str] = []

        def there() -> bool:
            found[:] = [line for line in place.read_text().split("\n")[:-1] if request_id in line]
            return bool(found)

        self.until(there)
        return dict(json.loads(found[0]))

    def metrics(self) -> dict[str, float]:
        """What Prometheus would read, by series."""
        lines = self.admin_text("/metrics").splitlines()
        return {
            series: float(value)
            for series, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
        }

    def restart(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop Nginx and start it again."""
        self.process.send_signal(how)
        self.process.wait(20)
        # one that was killed has left it
        (self.directory / "run/vllm-gateway/admin.sock").unlink(missing_ok=True)
        self.process = nginx(self.directory)
        self.until(lambda: answers(self))

    def errors(self) -> str:
        return (self.directory / "var/log/nginx/error.log").read_text()[-3000:]

    def workers(self) -> list[int]:
        """The process ids of all workers, those of former configurations included."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


def nginx(directory: Path) -> subprocess.Popen[bytes]:
    """Start Nginx with the configuration of the directory."""
    log = str(directory / "var/log/nginx/error.log")
    return subprocess.Popen(
        ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", log, "-g", "daemon off;"]
    )


def configuration(directory: Path, variables: dict[str, Any]) -> str:
    """nginx.conf with the paths of this test."""
    text = rendered("etc/nginx/nginx.conf.j2", variables)
    for place in PLACES:
        text = text.replace(place, f"{directory}{place}")
    text = text.replace("/usr/local/share/vllm-gateway/lua", str(ROLE / "files" / "lua"))
    # the directory of a test is its user's
    text = text.replace("user www-data;", "user root;" if os.geteuid() == 0 else "")
    elsewhere = "".join(f"    {name}_temp_path {directory}/run/{name};\n" for name in OTHERS)
    return re.sub(r"^http \{\n", f"http {{\n{elsewhere}", text, count=1, flags=re.MULTILINE)


@contextlib.contextmanager
def running(
    directory: Path,
    fleet: dict[str, Any],
    used: Sequence[str] | None = None,
    pair: tuple[str, str] | None = None,
    **variables: Any,
) -> Iterator[Gateway]:
    """A gateway with this fleet.json, whose state says that these backends are used; without any, there is no state. Further variables of the role; and
    `shows`, ca, cert and key of the fleet, PEM, by which it asks instances.

    `pair` is its certificate, with those up to the one that clients trust, and its key; without one it signs itself.
    """
    for place in (
        "etc/vllm-gateway",
        "etc/ssl/vllm-fleet",
        "run/vllm-gateway",
        "var/lib/vllm-gateway-budgets",
        "var/log/nginx",
    ):
        (directory / place).mkdir(parents=True)
    certificate, key = pair or make_pair(30, NAME, RESOLVED)
    (directory / "etc/ssl/vllm-fleet/fullchain.pem").write_text(certificate)
    (directory / "etc/ssl/vllm-fleet/privkey.pem").write_text(key)
    (directory / "etc/vllm-gateway/internal_key").write_text(INTERNAL + "\n")
    (directory / "etc/vllm-gateway/fleet.json").write_text(json.dumps(fleet))
    if shows := variables.pop("shows", None):
        variables["__gateway_backend_tls"] = True
        (directory / "etc/ssl/vllm-fleet/fleet").mkdir()
        for name, text in shows.items():
            (directory / f"etc/ssl/vllm-fleet/fleet/{name}.pem").write_text(text)
    ports = {"gateway_https_port": free_port(), "gateway_http_port": free_port()}
    conf = directory / "nginx.conf"
    conf.write_text(configuration(directory, {**NUMBERS, **ports, **variables}))
    process = nginx(directory)
    tls = ssl.create_default_context(cadata=certificate)
    gateway = Gateway(directory, ports["gateway_https_port"], ports["gateway_http_port"], process, tls)
    try:
        gateway.until(lambda: process.poll() is not None or answers(gateway))
        assert process.poll() is None, gateway.errors()
        if used is not None:
            gateway.state({name: {} for name in used})
        yield gateway
    finally:
        gateway.process.terminate()
        gateway.process.wait(20)


def listens(pid: int) -> bool:
    """Whether a worker takes new connections."""
    with contextlib.suppress(OSError):
        return "shutting down" not in Path(f"/proc/{pid}/cmdline").read_text()
    return False


def answers(gateway: Gateway) -> bool:
    try:
        return gateway.ask("/healthz", key=None).status == 200
    except OSError:
        return False
