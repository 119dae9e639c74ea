"""metrics.lua counts what several workers tell at once, and writes what Prometheus reads."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lua.luajit import Lua

SHARED = Path(__file__).with_name("shared.lua").read_text()
METRICS = """
local new = (...)
local metrics = require "metrics"
local tools = {}

function tools.new(most)
    tools.dict = new()
    tools.dict.most = most
end

function tools.count(name, labels, n) metrics.count(tools.dict, name, metrics.labels(unpack(labels)), n) end
function tools.observe(name, labels, n) metrics.observe(tools.dict, name, metrics.labels(unpack(labels)), n) end

function tools.render()
    local parts, pauses = {}, 0
    metrics.render(tools.dict, function(text) parts[#parts + 1] = text end, function() pauses = pauses + 1 end)
    return table.concat(parts), pauses
end

-- Workers whose operations on the dictionary alternate; each calls count(unpack(call)) for its calls.
function tools.together(workers, order)
    local routines = {}
    for index, calls in ipairs(workers) do
        routines[index] = coroutine.create(function()
            for _, call in ipairs(calls) do tools.count(unpack(call)) end
        end)
    end
    tools.dict.before = function() coroutine.yield() end
    for _, index in ipairs(order) do coroutine.resume(routines[index]) end
    for _, routine in ipairs(routines) do
        while coroutine.status(routine) ~= "dead" do assert(coroutine.resume(routine)) end
    end
    tools.dict.before = function() end
end

return tools
"""
REQUESTS = "vllm_gateway_requests_total"
DURATION = "vllm_gateway_duration_seconds"
LINE = re.compile(r'^(\w+)\{((?:\w+="(?:[^"\\\n]|\\.)*",?)*)\} (\S+)$')

Metrics = dict[str, Callable[..., Any]]


@pytest.fixture
def metrics(lua: Lua) -> Metrics:
    """The functions of the module, with an empty dictionary."""
    tools = dict(lua.run(METRICS, lua.run(SHARED)))
    tools["new"]()
    return tools


def read(metrics: Metrics) -> dict[str, float]:
    """What was written, by series. Fails when a series is there twice, or what is of one metric does not stand together."""
    text, _ = metrics["render"]()
    found: dict[str, float] = {}
    metric, seen = "", set()
    for line in text.decode().splitlines():
        if line.startswith("# HELP "):
            metric = line.split()[2]
            assert metric not in seen
            seen.add(metric)
        elif not line.startswith("# TYPE "):
            name, labels, value = LINE.fullmatch(line).groups()  # type: ignore[union-attr]
            assert name in (metric, f"{metric}_bucket", f"{metric}_sum", f"{metric}_count")
            assert f"{name}{{{labels}}}" not in found
            found[f"{name}{{{labels}}}"] = float(value)
    return found


def test_counters(metrics: Metrics) -> None:
    """Each set of labels is a series."""
    for client, status, times in (("a", 200, 3), ("a", 429, 1), ("b", 200, 2)):
        for _ in range(times):
            metrics["count"](REQUESTS, ["client", client, "status", status], 1)
    metrics["count"]("vllm_gateway_sound_seconds_total", ["client", "a"], 0.5)
    assert read(metrics) == {
        f'{REQUESTS}{{client="a",status="200"}}': 3,
        f'{REQUESTS}{{client="a",status="429"}}': 1,
        f'{REQUESTS}{{client="b",status="200"}}': 2,
        'vllm_gateway_sound_seconds_total{client="a"}': 0.5,
    }


def test_histograms(metrics: Metrics) -> None:
    """Buckets have what is in the smaller ones, too; what lies on a limit is in its bucket."""
    for seconds in (0.01, 0.05, 0.2, 0.2, 7, 5000):
        metrics["observe"](DURATION, ["model", "m"], seconds)
    found = read(metrics)
    bucket = {
        limit: found[f'{DURATION}_bucket{{model="m",le="{limit}"}}']
        for limit in ("0.05", "0.1", "0.25", "5", "10", "1280", "+Inf")
    }
    assert bucket == {"0.05": 2, "0.1": 2, "0.25": 4, "5": 4, "10": 5, "1280": 5, "+Inf": 6}
    assert found[f'{DURATION}_count{{model="m"}}'] == 6
    assert found[f'{DURATION}_sum{{model="m"}}'] == pytest.approx(5007.46)


def test_values_cannot_break_out_of_their_quotes(metrics: Metrics) -> None:
    """Names of models have nearly anything in them."""
    metrics["count"](REQUESTS, ["model", 'a"} 1\nb\\'], 1)
    assert read(metrics) == {REQUESTS + '{model="a\\"} 1\\nb\\\\"}': 1}


def test_nothing_is_lost_between_workers(metrics: Metrics) -> None:
    """Whoever counts a series first, at whatever moment: it is there once, with everything."""
    for seed in range(200):
        metrics["new"]()
        chance = random.Random(seed)
        clients = [[chance.choice("abc") for _ in range(5)] for _ in range(3)]
        workers = [[[REQUESTS, ["client", client], 1] for client in worker] for worker in clients]
        metrics["together"](workers, [chance.randrange(1, 4) for _ in range(60)])
        counts = Counter(client for worker in clients for client in worker)
        assert read(metrics) == {f'{REQUESTS}{{client="{client}"}}': count for client, count in counts.items()}


def test_a_full_dictionary_keeps_what_it_has(metrics: Metrics) -> None:
    """New series are not counted any more; the others go on, and none is written twice."""
    metrics["new"](20)
    for _ in range(2):
        for client in range(100):
            metrics["count"](REQUESTS, ["client", client], 1)
    found = read(metrics)
    assert 5 <= len(found) <= 10
    assert set(found.values()) == {2}


def test_a_scrape_is_written_in_slices(metrics: Metrics) -> None:
    """Others get their turn after some series."""
    for client in range(3000):
        metrics["count"](REQUESTS, ["client", client], 1)
    for model in range(100):
        metrics["observe"](DURATION, ["model", model], 1)
    assert len(read(metrics)) == 3000 + 100 * 18
    assert metrics["render"]()[1] >= 3000 / 200 + 100 / 20
