"""What is long never holds up the streams of others: large bodies of every shape, and scrapes of many series."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import Asked, Backend, Handler, right, tokens
from tests.gateway.harness import CHAT, KEY, NAME, Gateway, document, route, running

ONLY = Backend("chat@gpu-1")
MIB = 1 << 20
SIZE = 20 * MIB - 1000
# What was measured on two quiet cores is below 50 ms for bodies and 5 ms for scrapes; here all tests run at once.
LONGEST = 0.5


def streaming(handler: Handler, asked: Asked) -> None:
    """A token every 10 ms for a stream; a short answer for anything else."""
    if asked.body.startswith(b'{"model":"small","stream":true'):
        handler.stream(tokens(200, 0.01))
    else:
        right(handler, Asked(asked.method, asked.path, asked.headers, b""))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    ONLY.reset()
    ONLY.answer = streaming
    clients: dict[str, dict[str, Any]] = {"team-a": {}}
    clients.update((f"client-{number}", {}) for number in range(2000))
    keys = {KEY: {"client": "team-a"}} | {
        f"client-{number:016}": {"client": f"client-{number}"} for number in range(2000)
    }
    with running(tmp_path, document([route("small", [ONLY])], [ONLY], clients, keys), [ONLY.id]) as gateway:
        yield gateway


def longest_gap(gateway: Gateway, meanwhile: Callable[[], object]) -> tuple[float, float]:
    """The longest gap between two tokens of eight streams, without anything else and while something else is done again and again."""
    longest = []
    for work in (lambda: time.sleep(0.2), meanwhile):
        gaps: list[float] = []
        threads = [threading.Thread(target=stream, args=(gateway, gaps)) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        while any(thread.is_alive() for thread in threads):
            work()
        longest.append(max(gaps))
    return longest[0], longest[1]


def stream(gateway: Gateway, gaps: list[float]) -> None:
    """One stream, whose gaps are noted."""
    connection = gateway.connection()
    connection.request("POST", CHAT, b'{"model":"small","stream":true}', {"Authorization": f"Bearer {KEY}"})
    response = connection.getresponse()
    last, count = time.monotonic(), 0
    while response.readline():
        now = time.monotonic()
        if count > 4:
            gaps.append(now - last)
        last, count = now, count + 1
    assert count >= 400  # an event and a blank line for each token
    connection.close()


SHAPES = {
    "picture": ('{"model":"small","messages":"', "iVBORw0KGgoAAAANSUhEUgAA", '"}'),
    "tokens": ('{"model":"small","prompt":[', "12345,", "1]}"),
    "objects": ('{"model":"small","messages":[', '{"a":{}},', "1]}"),
    "escapes": ('{"model":"small","messages":"', "\\n", '"}'),
    "members": ('{"model":"small"', ',"a":1', "}"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_body_does_not_hold_up_streams(gateway: Gateway, tmp_path: Path, shape: str) -> None:
    head, unit, tail = SHAPES[shape]
    body = (head + unit * ((SIZE - len(head) - len(tail)) // len(unit)) + tail).encode()
    place = tmp_path / "body"
    place.write_bytes(body)
    alone, beside = longest_gap(gateway, lambda: send(gateway, place))
    print(f"{shape}: longest gap {alone * 1000:.1f} ms, beside 20 MiB bodies {beside * 1000:.1f} ms")
    assert beside < LONGEST
    assert ONLY.asked[-1].body == body


def send(gateway: Gateway, body: Path) -> None:
    """A body, by a process of its own: this one has the clock."""
    url = f"https://{NAME}:{gateway.port}{CHAT}"
    name = ["--insecure", "--connect-to", f"{NAME}:{gateway.port}:127.0.0.1:{gateway.port}"]
    command = [
        "curl",
        "--silent",
        "--fail",
        *name,
        "--header",
        f"Authorization: Bearer {KEY}",
        "--header",
        "Expect:",
        "--data-binary",
        f"@{body}",
        url,
    ]
    subprocess.run(command, check=True, capture_output=True)


def test_a_scrape_does_not_hold_up_streams(gateway: Gateway) -> None:
    connection = gateway.connection()
    for number in range(2000):
        if number % 500 == 499:
            connection = gateway.connection()  # Nginx closes one after a thousand requests
        body = json.dumps({"model": "small"})
        connection.request("POST", CHAT, body, {"Authorization": f"Bearer client-{number:016}"})
        assert connection.getresponse().read()
    alone, beside = longest_gap(gateway, gateway.metrics)
    print(
        f"scrape of {len(gateway.metrics())} series: longest gap {alone * 1000:.1f} ms, beside scrapes {beside * 1000:.1f} ms"
    )
    assert beside < LONGEST
