"""Changes of the state and of the configuration, and workers that die, while streams run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running, sha256
from tests.gateway.streams import Process, Stream, process, watch

OTHER = "team-b-0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def backend() -> Iterator[Process]:
    with process("chat@gpu-1") as backend:
        yield backend


def fleet(backend: Process, **client: Any) -> dict[str, Any]:
    keys = {KEY: {"client": "team-a"}, OTHER: {"client": "team-b"}}
    return document([route("small", [backend])], [backend], {"team-a": client, "team-b": {}}, keys)


async def followed(
    gateway: Gateway, backend: Process, streams: int, seconds: float, changes: Any
) -> tuple[list[Stream], list[Stream]]:
    """Streams through the gateway, and some past it, to know what the machine itself makes late; meanwhile the changes."""
    body: dict[str, object] = {"model": "small", "events": int(seconds / 0.1), "seconds": 0.1}
    through = [asyncio.create_task(watch(gateway, body)) for _ in range(streams)]
    past = [asyncio.create_task(watch(gateway, body, port=backend.port)) for _ in range(5)]
    await asyncio.sleep(0.5)
    await changes()
    return await asyncio.gather(*through), await asyncio.gather(*past)


def late(streams: list[Stream]) -> float:
    """The lateness that one event of a hundred exceeds."""
    return statistics.quantiles([one for stream in streams for one in stream.lateness], n=100)[98]


def change(gateway: Gateway, backend: Process, states: int, reloads: int, seconds: float) -> Any:
    """So many changes of the state, which take another backend in and out, and so many of the configuration, evenly in that time."""

    async def changes() -> None:
        for number in range(states):
            told = {
                "serial": number + 10,
                "time": time.time(),
                "backends": {backend.id: {"use": True}, "other@gpu-2": {"use": number % 2 == 0}},
            }
            gateway.write("run/vllm-gateway/state.json", json.dumps(told))
            if number * reloads // states != (number + 1) * reloads // states:
                gateway.configure(fleet(backend, burst=1000 + number), reload=False)
                gateway.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(seconds / states)

    return changes


def test_no_change_cuts_a_stream(tmp_path: Path, backend: Process) -> None:
    """100 changes of the state and 20 reloads in 50 streams."""
    with running(tmp_path, fleet(backend), [backend.id]) as gateway:
        through, past = asyncio.run(followed(gateway, backend, 50, 6, change(gateway, backend, 100, 20, 4)))
        assert [(stream.status, stream.events, stream.whole) for stream in through] == [(200, 60, True)] * 50
        assert late(through) < late(past) + 0.25
        # and the last of them is the one in use
        gateway.until(lambda: gateway.admin("/in_flight") == {"serial": 109, "in_flight": {backend.id: 0}})
        wanted = sha256(json.dumps(fleet(backend, burst=1099)))[:12]
        gateway.until(lambda: gateway.ask("/healthz", key=None).json["configuration"] == wanted)


def test_a_killed_worker_leaks_nothing(tmp_path: Path, backend: Process) -> None:
    """Neither what it had in flight nor the slots of its clients. What others have stays counted."""
    with running(tmp_path, fleet(backend, concurrent_requests=20), [backend.id]) as gateway:
        seen = asyncio.run(killing(gateway, backend))
        cut = [stream for stream in seen if not stream.whole]
        assert cut, "the killed worker had no stream: nothing was tried"
        assert all(stream.events < 60 for stream in cut)
        gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][backend.id] == 0)
        # all twenty slots are there again, and not one more
        assert slots(gateway) == [200] * 20 + [429] * 2


async def killing(gateway: Gateway, backend: Process) -> list[Stream]:
    def in_flight() -> int:
        return int(gateway.admin("/in_flight")["in_flight"][backend.id])

    body: dict[str, object] = {"model": "small", "events": 60, "seconds": 0.1}
    tasks = [asyncio.create_task(watch(gateway, body)) for _ in range(20)]
    await asyncio.sleep(1)
    assert await asyncio.to_thread(in_flight) == 20
    # the kernel may give all of the connections to one of the workers
    busiest = max(gateway.workers(), key=lambda pid: len(list(Path(f"/proc/{pid}/fd").iterdir())))
    os.kill(busiest, signal.SIGKILL)
    await asyncio.sleep(1)
    left = sum(not task.done() for task in tasks)
    await asyncio.to_thread(gateway.until, lambda: in_flight() == left)
    return await asyncio.gather(*tasks)


def slots(gateway: Gateway) -> list[int]:
    """The statuses of 22 streams at once."""

    async def every() -> list[Stream]:
        body: dict[str, object] = {"model": "small", "events": 2, "seconds": 2}
        return await asyncio.gather(*(watch(gateway, body) for _ in range(22)))

    return sorted(stream.status for stream in asyncio.run(every()))


def test_all_workers_killed_one_after_the_other(tmp_path: Path, backend: Process) -> None:
    """Requests come in all the time; each of them is answered or breaks off, and the count is right at the end."""
    with running(tmp_path, fleet(backend), [backend.id]) as gateway:

        async def every() -> list[Stream]:
            body: dict[str, object] = {"model": "small", "events": 3, "seconds": 0.1}
            tasks = []
            for number in range(60):
                tasks.append(asyncio.create_task(watch(gateway, body)))
                if number % 12 == 6:
                    os.kill(gateway.workers()[number // 12 % 2], signal.SIGKILL)
                await asyncio.sleep(0.03)
            return [
                stream for stream in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(stream, Stream)
            ]

        assert {stream.status for stream in asyncio.run(every())} <= {0, 200}
        gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][backend.id] == 0)
        assert gateway.ask(CHAT, {"model": "small", "events": 1}).status == 200
