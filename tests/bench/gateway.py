"""What the gateway costs beside plain Nginx with TLS, and beside others: the same requests to the same two backends, in turns, in one run.

    python -m tests.bench.gateway [--ways plain fleet fleet-tls envoy vllm-router litellm] [--rounds 5] [--streams 64]

Everything is on loopback: the backends (Nginx with Lua, so that they cost little), the gateways, h2load for short calls and a client of its own
for streams, whose events carry the moment at which the backend sent them. Each round asks every way once, in changing order; told are the medians of
the rounds and their range. `fleet` is the role's own nginx.conf and program (tests/gateway/harness.py), `fleet-tls` the same with TLS to its backends.
"cpu" is what the gateway uses for a short call, in microseconds; "cpu of all" has the client and the backends, too, so that the number of processors
divided by it is what this machine could do if nothing else ran on it: what to compare on a busy one.

Duties differ, and the table says which has what: plain Nginx has TLS, one key and a log; Envoy the same and the route by the model in the
body; vLLM's router has neither TLS nor a log of requests; LiteLLM has TLS, keys and the route. Needs h2load (package nghttp2-client).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import resource
import selectors
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.certificates import Authority, make_pair
from tests.gateway import harness
from tests.ports import free_port

HERE = Path(__file__).parent / "gateways"
UV = Path(sys.executable).with_name("uv")
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".cache" / "bench-gateways"
KEY = harness.KEY
BODY = {"model": "small", "messages": [{"role": "user", "content": "word " * 100}]}
TOKENS = 60
WAYS = ("plain", "fleet", "fleet-tls", "envoy", "vllm-router", "litellm")


@dataclass
class Way:
    """A way to the backends."""

    name: str
    port: int
    tls: bool = True
    pids: Callable[[], list[int]] = list
    # of the short calls, so that a slow one does not take the whole time
    share: float = 1.0


@dataclass
class Streams:
    """What came of the streams of one round, in seconds."""

    first: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    bad: int = 0


def children(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Processor time that these have used."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(stat[11]) + int(stat[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(pids: list[int]) -> float:
    """Their memory, what they share counted once (PSS)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE).group(1))  # type: ignore[union-attr]
    return total / 1024


@contextlib.contextmanager
def process(*command: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process until the end of the block."""
    started = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **more
    )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def written(directory: Path, name: str, **values: Any) -> str:
    """A configuration with its places filled in."""
    text = (HERE / name).read_text()
    for key, value in {"DIR": directory, "KEY": KEY, **values}.items():
        text = text.replace(f"@{key}@", str(value))
    place = directory / name.removesuffix(".in")
    place.write_text(text)
    return str(place)


def context() -> ssl.SSLContext:
    """A client that does not judge the certificate: that costs the same everywhere, and is not the subject."""
    made = ssl.create_default_context()
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    return made


def request(body: dict[str, Any]) -> bytes:
    """An HTTP request as it goes over the wire."""
    data = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {harness.NAME}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def drained(one: socket.socket) -> tuple[bytes, bool]:
    """What has come, and whether the other side has ended. Read until nothing is left: what TLS has decrypted wakes nobody up."""
    parts = []
    with contextlib.suppress(ssl.SSLWantReadError, BlockingIOError):
        while part := one.recv(65536):
            parts.append(part)
        return b"".join(parts), True
    return b"".join(parts), False


def streams(way: Way, count: int, seconds: float) -> Streams:
    """So many streams all the time: each begins again when it has ended. One thread, so that its own lateness is the same for all ways."""
    result = Streams()
    tls = context()
    data = request({**BODY, "stream": True, "max_tokens": TOKENS})
    selector = selectors.DefaultSelector()
    asked: dict[socket.socket, float] = {}
    rest: dict[socket.socket, bytes] = {}
    begin: list[tuple[float, socket.socket]] = []
    now = time.monotonic()
    for number in range(count):
        raw = socket.create_connection(("127.0.0.1", way.port))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one = tls.wrap_socket(raw, server_hostname=harness.NAME) if way.tls else raw
        one.setblocking(False)
        selector.register(one, selectors.EVENT_READ)
        begin.append((now + 0.5 + number * 0.6 / count, one))
    end = now + seconds
    while asked or begin:
        now = time.monotonic()
        while begin and begin[0][0] <= now:
            one = begin.pop(0)[1]
            if now < end:
                asked[one] = -1.0
                rest[one] = b""
                started = time.monotonic()
                one.send(data)
                asked[one] = started
        wait = max(0.0, begin[0][0] - now) if begin else 1.0
        for key, _events in selector.select(wait):
            one = key.fileobj  # type: ignore[assignment]
            text, ended = drained(one)
            now = time.monotonic()
            if one not in asked:
                # the end of the answer before, or of the connection
                if ended:
                    selector.unregister(one)
                continue
            if asked[one] > 0 and text:
                result.first.append(now - asked[one])
                asked[one] = 0.0
            text = rest[one] + text
            for sent in re.findall(rb'"content":"(\d+\.\d+) "', text):
                result.late.append(now - float(sent))
            rest[one] = text[text.rfind(b"\n\n") + 2 :] if b"\n\n" in text else text
            if b"data: [DONE]" in text:
                del asked[one]
                begin.append((now + 0.02, one))
            elif ended:
                result.bad += 1
                del asked[one]
                selector.unregister(one)
    for registered in list(selector.get_map().values()):
        registered.fileobj.close()  # type: ignore[union-attr]
    return result


def calls(way: Way, count: int, clients: int) -> float:
    """Short calls a second."""
    with tempfile.NamedTemporaryFile(suffix=".json") as body:
        body.write(json.dumps(BODY).encode())
        body.flush()
        told = subprocess.run(
            [
                "h2load", "--h1", "-n", str(count), "-c", str(clients), "-t", "1", "-d", body.name,
                "-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json", f"--connect-to=127.0.0.1:{way.port}",
                f"{'https' if way.tls else 'http'}://{harness.NAME}:{way.port}/v1/chat/completions",
            ],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    good = re.search(r"status codes: (\d+) 2xx", told)
    if not good or int(good.group(1)) != count:
        raise SystemExit(f"{way.name}: {told}")
    return float(re.search(r"finished in .*?, ([\d.]+) req/s", told).group(1))  # type: ignore[union-attr]


def wait_for(way: Way, seconds: float = 300) -> None:
    """Until it answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            calls(way, 1, 1)
            return
        except (SystemExit, subprocess.CalledProcessError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def nginx(configuration: str, directory: Path) -> tuple[str, ...]:
    return ("nginx", "-p", str(directory), "-c", configuration, "-e", f"{directory}/start.log", "-g", "daemon off;")


class Running:
    """The ways, each started once."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory, self.stack = directory, stack
        certificate, key = make_pair(name=harness.NAME)
        (directory / "fullchain.pem").write_text(certificate)
        (directory / "privkey.pem").write_text(key)
        self.ports = {"FIRST": free_port(), "SECOND": free_port()}
        self.tls_ports = {"FIRST_TLS": free_port(), "SECOND_TLS": free_port()}
        self.authority = Authority()
        (directory / "ca.pem").write_text(self.authority.pem)
        (directory / "backend.pem").write_text("".join(self.authority.sign("gpu-0", names=["gpu-0"])))
        conf = written(directory, "upstream.conf", **self.ports, **self.tls_ports)
        self.backends = stack.enter_context(process(*nginx(conf, directory)))

    def start(self, name: str) -> Way:
        """Start one of them, and wait until it answers."""
        way: Way = getattr(self, name.replace("-", "_"))()
        wait_for(way)
        return way

    def run(self, name: str, port: int, command: tuple[str, ...], tls: bool = True, **more: Any) -> Way:
        started = self.stack.enter_context(process(*command, **more))
        return Way(name, port, tls, lambda: children(started.pid))

    def plain(self) -> Way:
        port = free_port()
        return self.run(
            "plain", port, nginx(written(self.directory, "plain.conf", PORT=port, **self.ports), self.directory)
        )

    def gateway(self, name: str, ports: dict[str, int], **more: Any) -> Way:
        tls = bool(more)
        backends = [Known(f"chat{number}@gpu-0", port, tls) for number, port in enumerate(ports.values())]
        directory = self.directory / name
        directory.mkdir()
        data = harness.document([harness.route("small", backends)], backends)  # type: ignore[arg-type]
        gateway = self.stack.enter_context(harness.running(directory, data, **more))
        gateway.state({one.id: {"tls": tls} for one in backends})
        return Way(name, gateway.port, pids=lambda: children(gateway.process.pid))

    def fleet(self) -> Way:
        return self.gateway("fleet", self.ports)

    def fleet_tls(self) -> Way:
        cert, key = self.authority.sign("gw-1")
        return self.gateway("fleet-tls", self.tls_ports, shows={"ca": self.authority.pem, "cert": cert, "key": key})

    def envoy(self) -> Way:
        port = free_port()
        conf = written(self.directory, "envoy.yaml.in", PORT=port, **self.ports)
        return self.run(
            "envoy", port, (f"{ENVIRONMENT}/bin/envoy", "-c", conf, "--concurrency", str(os.cpu_count()), "-l", "error")
        )

    def vllm_router(self) -> Way:
        port = free_port()
        urls = [f"http://127.0.0.1:{one}" for one in self.ports.values()]
        command: tuple[str, ...] = (
            f"{ENVIRONMENT}/bin/vllm-router",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--policy",
            "power_of_two",
        )
        command += (
            "--api-key",
            KEY,
            "--prometheus-port",
            str(free_port()),
            "--log-level",
            "error",
            "--worker-urls",
            *urls,
        )
        return self.run("vllm-router", port, command, tls=False)

    def litellm(self) -> Way:
        port = free_port()
        conf = written(self.directory, "litellm.yaml.in", **self.ports)
        command: tuple[str, ...] = (
            f"{ENVIRONMENT}/bin/litellm",
            "--config",
            conf,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        )
        command += (
            "--run_gunicorn",
            "--num_workers",
            str(os.cpu_count()),
            "--ssl_keyfile_path",
            f"{self.directory}/privkey.pem",
        )
        command += ("--ssl_certfile_path", f"{self.directory}/fullchain.pem")
        environment = {
            **os.environ,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "PATH": f"{ENVIRONMENT}/bin:{os.environ['PATH']}",
        }
        way = self.run("litellm", port, command, env=environment)
        way.share = 0.1
        return way


@dataclass
class Known:
    """A backend that somebody else runs."""

    id: str
    port: int
    tls: bool = False

    def described(self) -> dict[str, Any]:
        """Its entry in fleet.json."""
        instance, _, host = self.id.partition("@")
        return {
            "instance": instance,
            "host": host,
            "address": "127.0.0.1",
            "port": self.port,
            "agent": None,
            "tls": self.tls,
        }


def install() -> None:
    """What is compared with, in an environment of its own."""
    if not (ENVIRONMENT / "bin" / "litellm").exists():
        subprocess.run([str(UV), "venv", "-q", "--clear", str(ENVIRONMENT), "--python", sys.executable], check=True)
        subprocess.run(
            [
                str(UV),
                "pip",
                "install",
                "-q",
                "--python",
                f"{ENVIRONMENT}/bin/python",
                "-r",
                str(HERE / "requirements.in"),
            ],
            check=True,
        )


def quantile(values: list[float], share: float) -> float:
    """In milliseconds; no number when nothing came in time."""
    if not values:
        return math.nan
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000


def told(values: list[float], digits: int = 2) -> str:
    """Median and range of the rounds."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ended_seconds() -> float:
    """Processor time of the processes of this one that have ended: h2load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(way: Way, backends: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One round of one way."""
    before, others = cpu_seconds(way.pids()), cpu_seconds(children(backends)) + ended_seconds()
    count = int(arguments.calls * way.share)
    rate = calls(way, count, 16)
    used = (cpu_seconds(way.pids()) - before) / count * 1e6
    rest = (cpu_seconds(children(backends)) + ended_seconds() - others) / count * 1e6
    came = streams(way, arguments.streams, arguments.seconds)
    if came.bad:
        print(f"{way.name}: {came.bad} streams were cut", file=sys.stderr)
    return {
        "calls": rate, "cpu": used, "cpu of all": used + rest, "memory": memory_mib(way.pids()),
        "first p50": quantile(came.first, 0.5), "first p99": quantile(came.first, 0.99),
        "token p50": quantile(came.late, 0.5), "token p99": quantile(came.late, 0.99),
    }  # fmt: skip


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--calls", type=int, default=4000)
    arguments = parser.parse_args()
    if set(arguments.ways) - {"plain", "fleet", "fleet-tls"}:
        install()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.ways}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        running = Running(Path(name), stack)
        ways = [running.start(way) for way in arguments.ways]
        for number in range(arguments.rounds):
            for way in random.sample(ways, len(ways)):
                rows[way.name].append(measure(way, running.backends.pid, arguments))
                print(f"round {number + 1}: {way.name} {rows[way.name][-1]}", file=sys.stderr, flush=True)
    names = list(next(iter(rows.values()))[0])
    print(f"| way | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for way_name, found in rows.items():
        print(f"| {way_name} | {' | '.join(told([one[name] for one in found]) for name in names)} |")


if __name__ == "__main__":
    main()
