"""Throughput of one release in a container and under systemd: the same model on the same host, in turns, in one run.

    .venv/bin/molecule converge -s vllm_docker      # its host has both; `make molecule` says what it needs in the environment
    python -m tests.bench.runtimes [--rounds 12] [--streams 4] [--tokens 96]

Each round asks one and then the other, in changing order, so that a slow moment of the machine hits both. The clients are processes of the host
itself: what they add is the same for both. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess

HOST = "vllm-docker-debian13"
PORTS = {"docker": 8000, "systemd": 8001}
# Runs on the host: so many streams at once, each of so many tokens; prints how long it took.
CLIENT = r"""
import http.client, json, sys, threading, time
port, streams, tokens, key, model = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
failed = []
def one():
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"model": model, "prompt": "Count: one, two,", "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Authorization": "Bearer " + key, "Content-Type": "application/json"})
    response = connection.getresponse()
    lines = [line for line in iter(response.readline, b"") if line.startswith(b"data: ")]
    if response.status != 200 or lines[-1] != b"data: [DONE]\n":
        failed.append(response.status)
threads = [threading.Thread(target=one) for _ in range(streams)]
begun = time.perf_counter()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"seconds": time.perf_counter() - begun, "failed": failed}))
"""


def ask(runtime: str, streams: int, tokens: int, key: str, model: str) -> float:
    """Tokens a second."""
    command = [
        "docker",
        "exec",
        "--interactive",
        HOST,
        "python3",
        "-",
        str(PORTS[runtime]),
        str(streams),
        str(tokens),
        key,
        model,
    ]
    done = subprocess.run(command, input=CLIENT, text=True, capture_output=True, check=True)
    told = json.loads(done.stdout)
    if told["failed"]:
        raise SystemExit(f"{runtime}: HTTP {told['failed']}")
    return streams * tokens / float(told["seconds"])


def spread(values: list[float]) -> str:
    """Median, and from where to where."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    read = ["docker", "exec", HOST, "cat"]
    key = subprocess.run([*read, "/etc/vllm/internal_key"], text=True, capture_output=True, check=True).stdout
    gate = subprocess.run(
        [*read, "/etc/vllm/chat/current/gate.json"], text=True, capture_output=True, check=True
    ).stdout
    model = json.loads(gate)["model"]
    for streams in arguments.streams:
        found: dict[str, list[float]] = {runtime: [] for runtime in PORTS}
        for runtime in PORTS:  # the first answer is slower
            ask(runtime, streams, 16, key, model)
        for number in range(arguments.rounds):
            for runtime in list(PORTS)[:: 1 if number % 2 else -1]:
                found[runtime].append(ask(runtime, streams, arguments.tokens, key, model))
        ratios = [one / other for one, other in zip(found["docker"], found["systemd"], strict=True)]
        print(f"{streams} stream(s), {arguments.rounds} rounds, {arguments.tokens} tokens each")
        for runtime, values in found.items():
            print(f"  {runtime:<8} {spread(values)} tokens/s")
        print(
            f"  docker / systemd {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True
        )


if __name__ == "__main__":
    main()
