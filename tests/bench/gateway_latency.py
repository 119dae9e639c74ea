"""What the gateway adds: the same streams through it and straight to the backend, in turns, in one run.

    python -m tests.bench.gateway_latency [--streams 1 32] [--rounds 40] [--tokens 100] [--real-model]

Uses the running demo fleet (`make demo`) and nothing else. On a CPU the model takes most of the time and of the processors, so
that its noise hides the gateway: for the time of the measurement the stand-in takes the place of vLLM on demo-gpu1 and sends
a token every 10 ms, as a GPU would (vLLM is started again at the end). `--real-model` asks vLLM itself.

Each round asks once straight and once through the gateway, in changing order, so that a slow moment of the machine hits both.
Connections are kept, as clients keep them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import ssl
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.stand_in import wheel

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / ".demo"


def stream(connection: http.client.HTTPConnection, key: str, body: dict[str, Any]) -> tuple[float, list[float]]:
    """One streamed completion: seconds to the first byte of the answer, and the gaps between its pieces."""
    begun = time.perf_counter()
    headers = {"Host": "localhost", "Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    moments = []
    while line := response.readline():
        if line.startswith(b"data: {"):
            moments.append(time.perf_counter())
    if response.status != http.client.OK or not moments:
        raise RuntimeError(f"HTTP {response.status}")
    return moments[0] - begun, [later - earlier for earlier, later in itertools.pairwise(moments)]


def measure(
    connect: Callable[[], http.client.HTTPConnection], key: str, body: dict[str, Any], streams: int
) -> tuple[list[float], list[float]]:
    """So many streams side by side, each on a connection that is open already; they begin 10 ms apart, as clients do not agree."""
    first: list[float] = []
    gaps: list[float] = []
    failed: list[str] = []
    connections = [connect() for _ in range(streams)]
    for connection in connections:
        connection.connect()

    def one(connection: http.client.HTTPConnection) -> None:
        try:
            begun, between = stream(connection, key, body)
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            failed.append(str(error))
            return
        first.append(begun)
        gaps.extend(between)

    threads = [threading.Thread(target=one, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    for connection in connections:
        connection.close()
    if failed:
        raise SystemExit(f"{len(failed)} of {streams} streams failed: {failed[0]}")
    return first, gaps


def on_worker(module: str, arguments: str) -> None:
    """Run a module on demo-gpu1, the way Ansible reaches it."""
    subprocess.run(
        ["ansible", "demo-gpu1", "-i", "inventories/demo", "-b", "-m", f"ansible.builtin.{module}", "-a", arguments],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@contextlib.contextmanager
def stand_in(address: str, model: str) -> Iterator[None]:
    """Let the stand-in for vLLM answer in its place, with a token every 10 ms."""
    with tempfile.TemporaryDirectory() as directory:
        made, _lock = wheel.write(Path(directory))
        on_worker("copy", f"src={made} dest=/run/stand-in.whl mode=0644")
    on_worker(
        "shell",
        "python3 -m zipfile -e /run/stand-in.whl /run/stand-in && echo {} >/run/stand-in/config.json && systemctl stop vllm@chat",
    )
    settings = f"--setenv=PYTHONPATH=/run/stand-in --setenv=STAND_IN='{json.dumps({'seconds_per_token': 0.01})}'"
    serve = f"/usr/bin/python3 -m vllm.entrypoints.cli.main serve /run/stand-in --host {address} --served-model-name {model}"
    try:
        on_worker("shell", f"systemd-run --quiet --unit=stand-in {settings} {serve}; sleep 2")
        yield
    finally:
        on_worker(
            "shell",
            "systemctl stop stand-in; systemctl start --no-block vllm@chat; rm -r /run/stand-in /run/stand-in.whl",
        )


def percentile(values: list[float], percent: int) -> float:
    """A percentile, in milliseconds."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] * 1000


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--real-model", action="store_true")
    arguments = parser.parse_args()
    access = json.loads((DEMO / "access.json").read_text())
    internal_key = (DEMO / "internal_key").read_text()
    hosts = access["hosts"]
    gateway, worker = hosts["demo-gateway"], hosts["demo-gpu1"]
    context = ssl.create_default_context(cafile=access["ca_file"])

    class Named(http.client.HTTPSConnection):
        """Connects to the gateway's own address (no published port in between) by its name in the certificate."""

        def connect(self) -> None:
            http.client.HTTPConnection.connect(self)
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost")

    ways: dict[str, tuple[Callable[[], http.client.HTTPConnection], str]] = {
        "straight": (lambda: http.client.HTTPConnection(worker, 8000, timeout=120), internal_key),
        "through the gateway": (lambda: Named(gateway, 443, timeout=120, context=context), access["api_key"]),
    }
    body = {
        "model": access["model"], "prompt": "Count: one, two,", "max_tokens": arguments.tokens, "ignore_eos": True,
        "stream": True, "temperature": 0,
    }  # fmt: skip
    with contextlib.nullcontext() if arguments.real_model else stand_in(worker, access["model"]):
        print(
            f"{'streams':>7}  {'way':<20}  {'TTFB p50':>9}  {'TTFB p99':>9}  {'token p50':>9}  {'token p99':>9}  (ms)"
        )
        for streams in arguments.streams:
            found: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in ways}
            rounds = max(10, arguments.rounds // streams)
            for number in range(rounds + 1):
                for way in sorted(ways, reverse=bool(number % 2)):
                    first, gaps = measure(*ways[way], body, streams)
                    if number:  # the first round warms both ways up
                        found[way][0].extend(first)
                        found[way][1].extend(gaps)
            for way, (first, gaps) in found.items():
                figures = [percentile(first, 50), percentile(first, 99), percentile(gaps, 50), percentile(gaps, 99)]
                print(f"{streams:>7}  {way:<20}  " + "  ".join(f"{figure:>9.2f}" for figure in figures))


if __name__ == "__main__":
    main()
