"""What the gateway adds: time to first token and jitter of tokens, through it against straight to what stands behind it.

    python -m tests.bench.gateway [--write]

Needs a running demo (`DEMO_HOSTS=2 make demo`, or another fleet by DEMO_FLEET). Asks twice at 1 and at 32 streams:
  - a token stream that stands in for vLLM, on the gateway's own host, behind a second Nginx with the same configuration;
  - the real vLLM behind the real gateway. On a CPU its own pace and noise are hundreds of times what the gateway adds.
Both ways take turns, from this machine, over kept connections. --write puts the result into docs/results/gateway-latency.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import ssl
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.hosts import hosts

ROOT = Path(__file__).resolve().parents[2]
FLEET = os.environ.get("DEMO_FLEET", "demo")
DIRECTORY = ROOT / (".demo" if FLEET == "demo" else f".cache/{FLEET}")
RESULT = ROOT / "docs/results/gateway-latency.md"
STREAM_PORT, TLS_PORT, HTTP_PORT = 9100, 9101, 9102
TOKENS = 40
PATH = "/v1/completions"
WORK = "/tmp/bench"  # noqa: S108 - on a test host


@dataclass(frozen=True)
class Way:
    """One way to the tokens."""

    address: str
    port: int
    key: str
    tls: ssl.SSLContext | None = None


@dataclass
class Sample:
    """What was seen on one way, in seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)

    def add(self, began: float, moments: Sequence[tuple[float, float | None]]) -> None:
        """Count one stream: (when a token came, when it was sent if it says so)."""
        self.first.append(moments[0][0] - began)
        self.gaps += [after[0] - before[0] for before, after in pairwise(moments)]
        self.delays += [came - sent for came, sent in moments if sent is not None]


class Connection:
    """A kept connection."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def stream(self, body: dict[str, Any], sample: Sample | None) -> None:
        """Ask once and read the answer to its end, chunk by chunk as it comes."""
        if not self.reader or not self.writer:
            self.reader, self.writer = await asyncio.open_connection(
                self.way.address,
                self.way.port,
                ssl=self.way.tls,
                server_hostname="localhost" if self.way.tls else None,
            )
        data = json.dumps(body).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.way.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        began = time.monotonic()
        self.writer.write(head.encode() + data)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"{self.way.address}:{self.way.port} answers {answer.splitlines()[0].decode()}")
        moments: list[tuple[float, float | None]] = []
        while size := int(await self.reader.readline(), 16):
            chunk = await self.reader.readexactly(size + 2)
            now = time.monotonic()
            for event in re.findall(rb"data: (\{.*\})", chunk):
                sent = re.search(rb'"sent": ([0-9.]+)', event)
                moments.append((now, float(sent[1]) if sent else None))
        await self.reader.readline()
        if sample:
            sample.add(began, moments)

    def close(self) -> None:
        """Hang up."""
        if self.writer:
            self.writer.close()


async def compare(ways: dict[str, list[Way]], streams: int, rounds: int, body: dict[str, Any]) -> dict[str, Sample]:
    """Let the ways take turns, `streams` at a time; those of one way are spread over its addresses."""
    samples = {name: Sample() for name in ways}
    connections = {name: [Connection(there[i % len(there)]) for i in range(streams)] for name, there in ways.items()}
    for number in range(-1, rounds):  # the first round opens the connections
        for name, opened in connections.items():
            sample = samples[name] if number >= 0 else None
            await asyncio.gather(*(connection.stream(body, sample) for connection in opened))
    for opened in connections.values():
        for connection in opened:
            connection.close()
    return samples


@contextmanager
def stand_in(gateway: str) -> Iterator[None]:
    """The token stream, and an Nginx before it that differs from the gateway's in ports, paths and backends alone."""
    # S602-like quoting is avoided: everything goes through stdin
    here = Path(__file__).with_name("token_stream.py").read_text()
    script = f"""
set -e
rm -rf {WORK}; mkdir -p {WORK}; cat >{WORK}/token_stream.py
sed -e 's,^\\( *server \\)[0-9.]*:[0-9]*\\( max_fails.*\\),\\1127.0.0.1:{STREAM_PORT}\\2,' \\
    -e 's,listen \\(\\[::\\]:\\)*443 ,listen \\1{TLS_PORT} ,' -e 's,listen \\(\\[::\\]:\\)*80\\b,listen \\1{HTTP_PORT},' \\
    -e 's,/run/nginx.pid,{WORK}/nginx.pid,' -e 's,/var/log/nginx,{WORK},' /etc/nginx/nginx.conf >{WORK}/nginx.conf
nginx -q -t -c {WORK}/nginx.conf
nginx -c {WORK}/nginx.conf
"""
    hosts.run("docker", "exec", "--interactive", gateway, "sh", "-c", script, input=here)
    serve = ["docker", "exec", gateway, "python3", f"{WORK}/token_stream.py", str(STREAM_PORT), str(TOKENS)]
    with subprocess.Popen(serve) as server:
        try:
            time.sleep(1)
            yield
        finally:
            stop = f"kill $(cat {WORK}/nginx.pid); pkill -f '[t]oken_stream.py {STREAM_PORT}'; rm -rf {WORK}"
            hosts.run("docker", "exec", gateway, "sh", "-c", stop, check=False)
            server.wait(timeout=10)


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile, in milliseconds."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] * 1000


def table(title: str, streams: int, samples: dict[str, Sample]) -> list[str]:
    """Rows of the result."""
    straight, through = samples["straight"], samples["gateway"]
    measures = [("time to first token", "first"), ("gap between tokens", "gaps"), ("a token's way", "delays")]
    rows = []
    for name, attribute in measures:
        for percent in (50, 99):
            here, there = getattr(straight, attribute), getattr(through, attribute)
            if not here:
                continue
            before, after = percentile(here, percent), percentile(there, percent)
            rows.append(
                f"| {title} | {streams} | {name} p{percent} | {before:.2f} | {after:.2f} | {after - before:+.2f} |"
            )
    rows.append(
        f"| {title} | {streams} | jitter (standard deviation of the gap) | {statistics.stdev(straight.gaps) * 1000:.2f}"
        f" | {statistics.stdev(through.gaps) * 1000:.2f}"
        f" | {(statistics.stdev(through.gaps) - statistics.stdev(straight.gaps)) * 1000:+.2f} |"
    )
    return rows


def machine(gateway: str) -> str:
    """Where this was measured."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.+)", info)
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) // 1024**2  # type: ignore[index]
    nginx = hosts.run("docker", "exec", gateway, "nginx", "-v").stderr.strip()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), {memory} GiB, Linux {platform.release()}, "
        f"{nginx.removeprefix('nginx version: ')}; load average before: {load}. Client, Nginx, the token stream and vLLM share"
        " these cores."
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--only-stand-in", action="store_true", help="leave vLLM out")
    arguments = parser.parse_args()
    access = json.loads((DIRECTORY / "access.json").read_text())
    gateway = f"{FLEET}-gateway"
    address = access["hosts"][gateway]
    tls = ssl.create_default_context(cafile=access["ca_file"])
    internal = (DIRECTORY / "internal_key").read_text()
    about = machine(gateway)
    rows = []
    with stand_in(gateway):
        ways = {
            "straight": [Way(address, STREAM_PORT, "none")],
            "gateway": [Way(address, TLS_PORT, access["api_key"], tls)],
        }
        # the client `demo` may ask 10 times a second: 32 streams take 4 s of that
        for streams, rounds in ((1, 200), (32, 8)):
            samples = asyncio.run(compare(ways, streams, rounds, {"stream": True}))
            rows += table("10 ms token stream", streams, samples)
            print("\n".join(rows[-7:]), flush=True)
            time.sleep(10)
    if not arguments.only_stand_in:
        ways = {
            "straight": [Way(there, 8000, internal) for name, there in access["hosts"].items() if name != gateway],
            "gateway": [Way(address, 443, access["api_key"], tls)],
        }
        body = {
            "model": access["model"],
            "prompt": "Count: one, two,",
            "max_tokens": 16,
            "ignore_eos": True,
            "stream": True,
        }
        for streams, rounds in ((1, 40), (32, 4)):
            samples = asyncio.run(compare(ways, streams, rounds, body))
            rows += table("vLLM on CPU", streams, samples)
            print("\n".join(rows[-5:]), flush=True)
    header = ["| what | streams | milliseconds | straight | through the gateway | added |", "|---|---|---|---|---|---|"]
    if arguments.write:
        text = f"""# What the gateway adds

Measured {time.strftime("%Y-%m-%d")} by `python -m tests.bench.gateway --write`, over kept connections, both ways taking turns.
Machine: {about}

{chr(10).join([*header, *rows])}

- The token stream is a small server on the gateway's host that sends {TOKENS} tokens, one each 10 ms, the first at once; each says
  when it was sent, so "a token's way" is exact. The Nginx before it has the gateway's configuration with other ports and this backend.
- Through the gateway means TLS as well; straight is plain HTTP.
- vLLM's rows are the real service. Its engine needs whole cores for a token, so what the gateway adds is below its noise.
"""
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
