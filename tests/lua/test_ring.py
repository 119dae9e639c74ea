"""ring.lua: few keys move when backends come and go, nobody gets more than its share allows, and a conversation stays where it is."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lua.luajit import Lua

RING = """
local ring = require "ring"
local scan = require "scan"
return {
    orders = function(names, keys)
        local one, orders = ring.new(names), {}
        for index, key in ipairs(keys) do orders[index] = one:order(key) end
        return orders
    end,
    firsts = function(names, keys)
        local one, firsts = ring.new(names), {}
        for index, key in ipairs(keys) do firsts[index] = one:order(key)[1] end
        return firsts
    end,
    pick = function(names, key, loads, usable, factor)
        return ring.new(names):pick(key, function(name) return usable[name] and (loads[name] or 0) or nil end, factor)
    end,
    -- Puts keys onto names, one after another; some of what runs ends. Returns the highest load in relation to what is allowed.
    run = function(names, keys, factor, ends)
        local one, loads, running, sum, worst = ring.new(names), {}, {}, 0, 0
        for index, key in ipairs(keys) do
            local name = one:pick(key, function(each) return loads[each] or 0 end, factor)
            loads[name] = (loads[name] or 0) + 1
            sum, running[#running + 1] = sum + 1, name
            worst = math.max(worst, loads[name] - math.ceil(factor * sum / #names))
            if ends[index] > 0 then
                local ended = table.remove(running, (ends[index] - 1) % #running + 1)
                loads[ended], sum = loads[ended] - 1, sum - 1
            end
        end
        return worst
    end,
    key = function(text, bytes)
        local fields = assert(scan.scan(text, { model = true, messages = true, prompt = true, input = true }))
        return ring.prompt_key(text, fields, bytes)
    end,
}
"""
KEYS = [f"key {number}" for number in range(1500)]

Ring = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def ring(lua: Lua) -> Ring:
    """The functions of the module."""
    return dict(lua.run(RING))


def names(count: int) -> list[str]:
    """Backends."""
    return [f"chat@gpu-{number}" for number in range(1, count + 1)]


@pytest.mark.parametrize("count", [2, 3, 4, 8, 16, 50])
def test_keys_are_shared_evenly(ring: Ring, count: int) -> None:
    """Nobody has twice its share, or less than half."""
    counts: Counter[bytes] = Counter(ring["firsts"](names(count), KEYS))
    assert len(counts) == count
    assert max(counts.values()) < 1.6 * len(KEYS) / count
    assert min(counts.values()) > 0.5 * len(KEYS) / count


@pytest.mark.parametrize("count", [2, 3, 4, 8, 16, 50])
def test_few_keys_move(ring: Ring, count: int) -> None:
    """When one comes, only to it, about one in n; when one goes, only from it. Whoever is next for a key then has it."""
    before, after = (ring["orders"](names(number), KEYS) for number in (count, count + 1))
    new = names(count + 1)[-1].encode()
    moved = [key for key, (old, now) in enumerate(zip(before, after, strict=True)) if old[0] != now[0]]
    assert {after[key][0] for key in moved} == {new}
    assert 0.5 / (count + 1) < len(moved) / len(KEYS) < 1.6 / (count + 1)
    assert all([name for name in now if name != new] == old for old, now in zip(before, after, strict=True))


def test_the_order_of_the_names_does_not_matter(ring: Ring) -> None:
    """Gateways that were told them in another order agree."""
    shuffled = names(9)
    random.Random(1).shuffle(shuffled)
    assert ring["orders"](shuffled, KEYS[:100]) == ring["orders"](names(9), KEYS[:100])


def test_an_order_has_every_name_once(ring: Ring) -> None:
    """So that there is always somebody else to ask."""
    assert all(
        sorted(order) == sorted(name.encode() for name in names(7)) for order in ring["orders"](names(7), KEYS[:200])
    )


@given(
    count=st.integers(1, 12),
    factor=st.sampled_from([1, 1.1, 1.25, 2]),
    seed=st.integers(0, 10**6),
    favourite=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_nobody_has_more_than_the_factor_allows(
    ring: Ring, count: int, factor: float, seed: int, favourite: float
) -> None:
    """However much one prompt is preferred, and whatever ends in between."""
    chance = random.Random(seed)
    keys = ["favourite" if chance.random() < favourite else chance.choice(KEYS) for _ in range(200)]
    ends = [chance.choice([0, chance.randrange(1, 1000)]) for _ in keys]
    assert ring["run"](names(count), keys, factor, ends) <= 0


def test_a_key_stays_while_there_is_room(ring: Ring) -> None:
    """And goes to the next in the order when there is none."""
    (order,) = ring["orders"](names(4), ["a"])
    everybody = dict.fromkeys(names(4), True)
    assert ring["pick"](names(4), "a", {}, everybody, 1.25) == order[0]
    assert ring["pick"](names(4), "a", dict.fromkeys(names(4), 3), everybody, 1.25) == order[0]
    assert ring["pick"](names(4), "a", {order[0].decode(): 2}, everybody, 1.25) == order[1]


def test_who_is_not_usable_is_passed_over(ring: Ring) -> None:
    """With nobody usable there is nobody."""
    (order,) = ring["orders"](names(4), ["a"])
    usable = dict.fromkeys(names(4), True)
    for name in order:
        assert ring["pick"](names(4), "a", {}, usable, 1.25) == name
        usable[name.decode()] = False
    assert ring["pick"](names(4), "a", {}, usable, 1.25) is None


@given(loads=st.lists(st.integers(0, 30), min_size=1, max_size=8), factor=st.sampled_from([0.5, 1, 1.25]))
@settings(max_examples=200, deadline=None)
def test_the_chosen_one_has_room_or_the_least_load(ring: Ring, loads: list[int], factor: float) -> None:
    """For any loads, those of failures included."""
    each = dict(zip(names(len(loads)), loads, strict=True))
    chosen = each[ring["pick"](list(each), "a", each, dict.fromkeys(each, True), factor).decode()]
    assert chosen < math.ceil(factor * (sum(loads) + 1) / len(loads)) or chosen == min(loads)


def chat(*turns: str, system: str = "You are a pirate.", **more: Any) -> bytes:
    """The body of a chat: the client's turns and the answers alternate."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
    return json.dumps({"model": "m", "messages": [{"role": "system", "content": system}, *messages], **more}).encode()


def test_a_conversation_keeps_its_key(ring: Ring) -> None:
    """While it grows, whatever the temperature is; another question or another model has another key."""
    key = ring["key"](chat("Hi"))
    assert ring["key"](chat("Hi", "Ahoy!", "Who are you?")) == key
    assert ring["key"](chat("Hi", "Ahoy!", "Who are you?", "A pirate", "Really?", temperature=0.7, stream=True)) == key
    assert ring["key"](chat("Hello")) != key
    assert ring["key"](chat("Hi").replace(b'"model": "m"', b'"model": "n"')) != key
    assert ring["key"](chat('"role": "assistant"', "x")) == ring["key"](chat('"role": "assistant"'))


def test_a_long_beginning_is_the_key_of_all_that_have_it(ring: Ring) -> None:
    """Only its first bytes count."""
    system = "You know these documents: " + "x" * 5000
    assert ring["key"](chat("a", system=system)) == ring["key"](chat("b", system=system))
    assert ring["key"](chat("a", system=system), 10000) != ring["key"](chat("b", system=system), 10000)


@pytest.mark.parametrize("name", ["prompt", "input"])
def test_other_prompts_have_keys_too(ring: Ring, name: str) -> None:
    """Completions, embeddings, responses; a body without any has none."""
    one, other, none = (json.dumps({"model": "m", **more}).encode() for more in ({name: "a"}, {name: ["b"]}, {}))
    assert ring["key"](one) != ring["key"](other)
    assert ring["key"](none) is None
