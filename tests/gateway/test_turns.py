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

from tests.gateway import harness
from tests.gateway.backends import Asked, Backend, Handler, right, tokens
from tests.gateway.harness import CHAT, KEY, NAME, Gateway, configuration, document, route, running

ONLY = Backend("chat@gpu-1")
MIB = 1 << 20
SIZE = 20 * MIB - 1000
# What a stream may wait for others, in seconds.
BODY, SCRAPE = 0.05, 0.005
# How long a worker is busy before it looks at its connections again: a timer fires in each of its rounds, and has the worker's processor time, not
# the clock's, so that it does not matter what else runs on this machine.
WATCH = """
        local ffi = require "ffi"
        ffi.cdef "typedef struct { long sec; long nsec; } moment; int clock_gettime(int clock, moment *now);"
        local now, CPU = ffi.new "moment", 2
        local function cpu()
            ffi.C.clock_gettime(CPU, now)
            return tonumber(now.sec) + tonumber(now.nsec) / 1e9
        end
        local last, watched = cpu(), ngx.shared.watched
        ngx.timer.every(0.001, function()
            local this = cpu()
            if this - last > (watched:get("longest") or 0) then
                watched:set("longest", this - last)
            end
            last = this
        end)
"""
ADMIN = """
        location = /longest {
            content_by_lua_block {
                local watched = ngx.shared.watched
                ngx.print(watched:get("longest") or 0)
                watched:delete("longest")
            }
        }
"""


def streaming(handler: Handler, asked: Asked) -> None:
    """A token every 10 ms for a stream; a short answer for anything else."""
    if asked.body.startswith(b'{"model":"small","stream":true'):
        handler.stream(tokens(200, 0.01))
    else:
        right(handler, Asked(asked.method, asked.path, asked.headers, b""))


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    def watched(directory: Path, variables: dict[str, Any]) -> str:
        text = configuration(directory, variables)
        for place, more in (
            ("    lua_shared_dict gateway_state", "    lua_shared_dict watched 1m;\n"),
            ("location = /in_flight", ADMIN),
        ):
            text = text.replace(place, more + place)
        return text.replace("init_worker_by_lua_block {", "init_worker_by_lua_block {" + WATCH)

    monkeypatch.setattr(harness, "configuration", watched)
    ONLY.reset()
    ONLY.answer = streaming
    clients: dict[str, dict[str, Any]] = {"team-a": {}}
    clients.update((f"client-{number}", {}) for number in range(2000))
    keys = {KEY: {"client": "team-a"}} | {
        f"client-{number:016}": {"client": f"client-{number}"} for number in range(2000)
    }
    with running(tmp_path, document([route("small", [ONLY])], [ONLY], clients, keys), [ONLY.id]) as gateway:
        yield gateway


def longest(gateway: Gateway, work: Callable[[], object]) -> float:
    """How long a worker was busy at most while eight streams ran and something else was done again and again."""
    threads = [threading.Thread(target=stream, args=(gateway,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    gateway.admin("/longest")
    while any(thread.is_alive() for thread in threads):
        work()
    return float(gateway.admin("/longest"))


def stream(gateway: Gateway) -> None:
    """One stream to its end."""
    connection = gateway.connection()
    connection.request("POST", CHAT, b'{"model":"small","stream":true}', {"Authorization": f"Bearer {KEY}"})
    lines = connection.getresponse().read().splitlines()
    assert len(lines) >= 400  # an event and a blank line for each token
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
    busy = longest(gateway, lambda: send(gateway, place))
    print(f"{shape}: 20 MiB bodies keep a worker busy for {busy * 1000:.1f} ms at most")
    assert busy < BODY
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
    busy = longest(gateway, gateway.metrics)
    print(f"a scrape of {len(gateway.metrics())} series keeps a worker busy for {busy * 1000:.1f} ms at most")
    assert busy < SCRAPE
