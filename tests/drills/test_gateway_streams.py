"""Many streams through one gateway, for as long as it takes: the long forms of tests/gateway/test_changes.py, test_slow_clients.py and test_large.py.

By hand, on a quiet machine (three minutes; needs Nginx with its Lua module):

    .venv/bin/pytest tests/drills/test_gateway_streams.py -s
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import Backend
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running
from tests.gateway.streams import Process, Stream, process, watch
from tests.gateway.test_changes import change, fleet, followed
from tests.gateway.test_large import answer, key_of, large, seconds_of_requests
from tests.gateway.test_slow_clients import memory


@pytest.fixture(scope="module")
def backend() -> Iterator[Process]:
    with process("chat@gpu-1") as backend:
        yield backend


def quantiles(streams: Sequence[Stream]) -> str:
    """How late events came, in milliseconds."""
    late = [one * 1000 for stream in streams for one in stream.lateness]
    percent = statistics.quantiles(late, n=100)
    return f"p50 {percent[49]:.1f} p99 {percent[98]:.1f} max {max(late):.1f} ms"


def longest_gap(streams: Sequence[Stream], seconds: float) -> float:
    """By how much an event came later, after the one before it, than it was sent after that."""
    return (
        max(
            later - before
            for stream in streams
            for before, later in zip(stream.lateness, stream.lateness[1:], strict=False)
        )
        if seconds
        else 0.0
    )


def test_100_streams_and_50_reloads(tmp_path: Path, backend: Process) -> None:
    """100 changes of the state and 50 reloads in 20 seconds."""
    with running(tmp_path, fleet(backend), [backend.id], gateway_drain_seconds=120) as gateway:
        before = memory(gateway)
        quiet, quiet_past = asyncio.run(followed(gateway, backend, 100, 10, nothing))
        through, past = asyncio.run(followed(gateway, backend, 100, 24, change(gateway, backend, 100, 50, 20)))
        print(f"\nwithout changes: {quantiles(quiet)}, past the gateway {quantiles(quiet_past)}")
        print(
            f"with changes:    {quantiles(through)}, past the gateway {quantiles(past)}; longest gap {longest_gap(through, 1) * 1000:.1f} ms"
        )
        gateway.until(lambda: len(gateway.workers()) == os.cpu_count(), 30)
        print(f"memory: {before} KB before, {memory(gateway)} KB after, {gateway.workers()}")
        assert [stream.whole for stream in through] == [True] * 100
        assert all(stream.events == 240 for stream in through)
        assert longest_gap(through, 1) < longest_gap(past, 1) + 0.05


async def nothing() -> None:
    """No change."""


def test_2000_streams(tmp_path: Path, backend: Process) -> None:
    """A token a second each; 20 seconds."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
    with running(
        tmp_path,
        document([route("small", [backend])], [backend], {"team-a": {"concurrent_requests": 5000, "burst": 5000}}),
        [backend.id],
    ) as gateway:
        before = memory(gateway)

        async def every() -> tuple[list[Stream], int]:
            body: dict[str, object] = {"model": "small", "events": 20, "seconds": 1}
            tasks = []
            for _ in range(2000):
                tasks.append(asyncio.create_task(watch(gateway, body)))
                await asyncio.sleep(0.002)
            await asyncio.sleep(2)
            told = await asyncio.to_thread(lambda: gateway.admin("/in_flight")["in_flight"][backend.id])
            used = await asyncio.to_thread(memory, gateway)
            print(f"\n{told} in flight, {(used - before) / max(told, 1):.0f} KB each")
            return await asyncio.gather(*tasks), told

        streams, told = asyncio.run(every())
        print(f"{sum(stream.whole for stream in streams)} of 2000 whole, {quantiles(streams)}")
        assert told == 2000
        assert [stream.whole for stream in streams] == [True] * 2000


def test_a_revoked_key(tmp_path: Path, backend: Process) -> None:
    """How long it works after the reload was asked for, on new connections and on one that stays; with 10,000 clients."""
    one = Backend("all@gpu-1", answer=answer)
    for clients in (2, 10_000):
        told = large(one, 500 if clients > 2 else 2, clients)
        with running(tmp_path / str(clients), told, list(told["backends"])) as gateway:
            milliseconds = [revoked_after(gateway, told) for _ in range(5)]
            print(f"\n{clients} clients: {', '.join(f'{value:.0f}' for value in milliseconds)} ms until 401")
            assert max(milliseconds) < 1000


def revoked_after(gateway: Gateway, told: dict[str, Any]) -> float:
    name = next(name for name, entry in told["keys"].items() if entry["client"] == "client-1")
    entry = told["keys"].pop(name)
    gateway.write("etc/vllm-gateway/fleet.json", json.dumps(told))
    begun = time.monotonic()
    gateway.process.send_signal(signal.SIGHUP)
    while gateway.ask(CHAT, {"model": "model-0"}, key=key_of(1)).status != 401:
        time.sleep(0.005)
    taken = (time.monotonic() - begun) * 1000
    told["keys"][name] = entry
    gateway.configure(told)
    return taken


def test_a_large_fleet(tmp_path: Path) -> None:
    one = Backend("all@gpu-1", answer=answer)
    print()
    for routes, clients in ((1, 1), (50, 100), (500, 10_000)):
        told = large(one, routes, clients)
        begun = time.monotonic()
        with running(tmp_path / str(routes), told, list(told["backends"])) as gateway:
            start = time.monotonic() - begun
            costs = [seconds_of_requests(gateway, [f"model-{number * 37 % routes}" for number in range(500)],
                                         [key_of(number * 97 % clients) for number in range(500)]) for _ in range(3)]  # fmt: skip
            begun = time.monotonic()
            told["settings"]["changed"] = True
            gateway.configure(told)
            reload = time.monotonic() - begun
            print(f"{routes} routes, {clients} clients: start {start:.2f} s, reload {reload:.2f} s, request {min(costs) * 1000:.2f} ms, "
                  f"{len(json.dumps(told)) >> 10} KB, memory {memory(gateway)} KB")  # fmt: skip
            assert (start, reload, min(costs)) < (5, 5, 0.02)


def test_who_never_reads_is_let_go(tmp_path: Path, backend: Process) -> None:
    """A minute after the last byte that went out."""
    with running(tmp_path, fleet(backend), [backend.id]) as gateway, gateway.connect(90) as connection:
        body = json.dumps({"model": "small", "events": 50000, "bytes": 1000}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        begun = time.monotonic()
        gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][backend.id] == 1)
        gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][backend.id] == 0, 90)
        print(f"\nlet go after {time.monotonic() - begun:.0f} s")
        assert 55 < time.monotonic() - begun < 75
