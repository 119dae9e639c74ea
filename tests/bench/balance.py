"""How much of their prompts engines find in their caches, by the `balance` of a route: two engines of the real vLLM (its CPU build), one gateway.

    python -m tests.bench.balance [--rounds 3] [--system-tokens 600] [--cache-tokens 8192] [--conversations 24] [--turns 4]

A round of a way is some conversations with a few system prompts between them. Each asks its turns one after the other, in streams, with all that was said
before; which one goes on next is drawn, so that turns of others come between those of one. System prompts are new in each round of each way: nothing
of a former one is found. Each round asks every way once, in changing order. Told are the medians of the rounds and their range:

    found            share of the prompts' tokens that came from a cache, of both engines (vllm:prefix_cache_hits_total / queries_total)
    first token      milliseconds from the request to the first token, median and the 95th percentile
    seconds          for all of a round
    requests, computed    of these, the share of the engine that had more: 0.5 is even. Computed are the tokens that were in no cache

One engine has one core, and the gateway and the client share the two: what is told of time is for comparing the ways with each other. `--cache-tokens`
is what one engine's cache holds. The first run builds the release and the model in .cache (a minute, or what the downloads take).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.__main__ import build_model
from tests.bench.gateway import Known, process, quantile, told
from tests.gateway import harness
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.32.0"
RELEASE = ROOT / ".cache" / f"bench-vllm-{VERSION}"
WAYS = ("least", "prefix", "session")
SESSION = "x-session"
BLOCK = 32
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family", "student", "group",
    "country", "problem", "hand", "part", "place", "case", "week",
)  # fmt: skip
# Tokens, as many as words: the tokenizer has one for each of those, with the space before it.
QUESTION, ANSWER = 40, 24


@dataclass
class Conversation:
    """What one client says and hears."""

    name: str
    messages: list[dict[str, str]]
    left: int


@dataclass
class Round:
    """What came of one way in one round."""

    first: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass
class Engine:
    """An engine that runs."""

    port: int
    process: subprocess.Popen[bytes]

    def counted(self) -> dict[str, float]:
        """What it has counted so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        names = {
            "asked": "vllm:prefix_cache_queries_total",
            "found": "vllm:prefix_cache_hits_total",
            "requests": "vllm:request_success_total",
        }
        return {
            name: sum(float(value) for value in re.findall(rf"^{series}{{.*}} (\S+)$", text, re.MULTILINE))
            for name, series in names.items()
        }


def install() -> Path:
    """The release, by the module of the role; and the model. Returns the directory of the model."""
    model = build_model()
    find_links = os.environ.get("PIP_FIND_LINKS", "")
    files = ROOT / "roles/vllm/files"
    arguments = {
        "path": str(RELEASE), "version": VERSION, "lock": str(files / f"locks/{VERSION}-cpu.txt"), "options_script": str(files / "dump_options.py"),
        "uv": str(Path(sys.executable).with_name("uv")), "torch_backend": "" if find_links else "cpu",
        "environment": {"UV_FIND_LINKS": find_links} if find_links else {},
    }  # fmt: skip
    ansible = str(Path(sys.executable).with_name("ansible"))
    command = [ansible, "localhost", "-c", "local", "-m", "gpufleet.llm.vllm_release", "-a", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return model


@contextlib.contextmanager
def engine(directory: Path, model: Path, core: int, cache_tokens: int) -> Iterator[Engine]:
    """An engine on a core, whose cache holds so many tokens; it may not answer yet."""
    directory.mkdir()
    port = free_port()
    options = {
        "model": str(model), "served-model-name": list(WAYS), "host": "127.0.0.1", "port": port, "max-model-len": 4096, "dtype": "bfloat16",
        "enforce-eager": True, "max-num-seqs": 8, "enable-prefix-caching": True, "block-size": BLOCK,
        "num-gpu-blocks-override": cache_tokens // BLOCK,
    }  # fmt: skip
    (directory / "config.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "HOME": str(directory),
    }  # fmt: skip
    command = (
        "sh",
        "-c",
        'exec "$0" serve --config "$1" >"$2" 2>&1',
        f"{RELEASE}/bin/vllm",
        f"{directory}/config.yaml",
        f"{directory}/log",
    )
    with process(*command, env=environment) as started:
        yield Engine(port, started)


def until_it_answers(one: Engine, directory: Path, seconds: float = 300) -> None:
    """Wait for the first answer, which is slower than others."""
    end = time.monotonic() + seconds
    while True:
        try:
            body = json.dumps({"model": WAYS[0], "prompt": "time", "max_tokens": 2}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{one.port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120):
                return
        except OSError:
            if time.monotonic() > end or one.process.poll() is not None:
                raise SystemExit((directory / "log").read_text()[-3000:]) from None
            time.sleep(1)


def text(tokens: int, drawn: random.Random) -> str:
    return " ".join(drawn.choice(WORDS) for _ in range(tokens))


def conversations(arguments: argparse.Namespace, seed: str) -> list[Conversation]:
    """Those of one round of one way."""
    drawn = random.Random(seed)
    systems = [text(arguments.system_tokens, drawn) for _ in range(arguments.systems)]
    return [
        Conversation(
            f"{seed} {number}", [{"role": "system", "content": systems[number % len(systems)]}], arguments.turns
        )
        for number in range(arguments.conversations)
    ]


def ask(connection: http.client.HTTPConnection, way: str, one: Conversation, result: Round) -> None:
    """One turn of a conversation."""
    body = {
        "model": way,
        "messages": one.messages,
        "max_tokens": ANSWER,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    headers = {"Authorization": f"Bearer {harness.KEY}", "Content-Type": "application/json", SESSION: one.name}
    begun = time.monotonic()
    connection.request("POST", harness.CHAT, json.dumps(body), headers)
    response = connection.getresponse()
    answer, ended = "", False
    for line in response:
        event = line.removeprefix(b"data: ").strip()
        if event == b"[DONE]":
            ended = True
        elif event.startswith(b"{") and (choices := json.loads(event).get("choices")):
            part = choices[0]["delta"].get("content") or ""
            if part and not answer:
                result.first.append(time.monotonic() - begun)
            answer += part
    if response.status != 200 or not ended:
        result.failed.append(f"{response.status} {answer}")
    one.messages.append({"role": "assistant", "content": answer})


def asked(gateway: harness.Gateway, way: str, waiting: list[Conversation], at_once: int, seed: str) -> Round:
    """All conversations to their ends, some of them at the same time. Which goes on next is drawn."""
    result, drawn, lock = Round(), random.Random(seed), threading.Lock()
    left = sum(one.left for one in waiting)

    def work() -> None:
        nonlocal left
        connection = gateway.connection(300)
        while True:
            with lock:
                if not left:
                    break
                one = waiting.pop(drawn.randrange(len(waiting))) if waiting else None
                left -= one is not None
            if one is None:
                time.sleep(0.01)
                continue
            one.messages.append({"role": "user", "content": text(QUESTION, random.Random(f"{one.name} {one.left}"))})
            ask(connection, way, one, result)
            one.left -= 1
            if one.left:
                with lock:
                    waiting.append(one)
        connection.close()

    workers = [threading.Thread(target=work) for _ in range(at_once)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return result


def measure(
    gateway: harness.Gateway, engines: list[Engine], way: str, number: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """One round of one way."""
    # a number that no former run had, so that nothing is found of it
    seed = f"{number} {way} {time.time()}"
    before = [one.counted() for one in engines]
    begun = time.monotonic()
    came = asked(gateway, way, conversations(arguments, seed), arguments.at_once, seed)
    seconds = time.monotonic() - begun
    if came.failed:
        raise SystemExit(f"{way}: {came.failed[0]}; {gateway.errors()}")
    # an engine counts a request a moment after its answer has ended
    end = time.monotonic() + 10
    while True:
        counted = [
            {name: value - former[name] for name, value in one.counted().items()}
            for one, former in zip(engines, before, strict=True)
        ]
        whole = {name: sum(one[name] for one in counted) for name in counted[0]}
        if whole["requests"] == arguments.conversations * arguments.turns:
            break
        if time.monotonic() > end:
            raise SystemExit(f"{way}: the engines answered {whole['requests']:.0f} requests")
        time.sleep(0.1)
    computed = [one["asked"] - one["found"] for one in counted]
    return {
        "found": whole["found"] / whole["asked"],
        "first token p50": quantile(came.first, 0.5), "first token p95": quantile(came.first, 0.95),
        "seconds": seconds,
        "requests": max(one["requests"] for one in counted) / whole["requests"],
        "computed": max(computed) / sum(computed),
    }  # fmt: skip


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--systems", type=int, default=8)
    parser.add_argument("--system-tokens", type=int, default=600)
    parser.add_argument("--cache-tokens", type=int, default=8192)
    parser.add_argument("--at-once", type=int, default=6)
    arguments = parser.parse_args()
    model = install()
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        places = [directory / f"engine-{core}" for core in range(2)]
        engines = [
            stack.enter_context(engine(place, model, core, arguments.cache_tokens)) for core, place in enumerate(places)
        ]
        for one, place in zip(engines, places, strict=True):
            until_it_answers(one, place)
        backends: list[Any] = [Known(f"chat@gpu-{number}", one.port) for number, one in enumerate(engines)]
        fleet = harness.document(
            [harness.route(way, backends, balance=way, session_header=SESSION) for way in WAYS], backends
        )
        gateway = stack.enter_context(
            harness.running(
                directory / "gateway", fleet, [one.id for one in backends], gateway_read_timeout_seconds=300
            )
        )
        for number in range(arguments.rounds):
            for way in random.sample(WAYS, len(WAYS)):
                rows[way].append(measure(gateway, engines, way, number, arguments))
                shown = {column: round(value, 3) for column, value in rows[way][-1].items()}
                print(f"round {number + 1}: {way} {shown}", file=sys.stderr, flush=True)
    names = list(next(iter(rows.values()))[0])
    print(f"| balance | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for way, found in rows.items():
        columns = [told([one[name] for one in found], 0 if name.startswith(("first", "sec")) else 2) for name in names]
        print(f"| `{way}` | {' | '.join(columns)} |")
    print(f"{statistics.fmean(value['seconds'] for found in rows.values() for value in found):.0f} s a round")


if __name__ == "__main__":
    main()
