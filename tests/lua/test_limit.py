"""limit.lua lets through what a client may have, and no more, also when several workers count at the same moment."""

from __future__ import annotations

import calendar
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lua.luajit import Function, Lua

SHARED = Path(__file__).with_name("shared.lua").read_text()
LIMIT = """
local new = (...)
local limit = require "limit"
local tools = { duration = limit.duration }
for name, call in pairs(limit) do
    tools[name] = tools[name] or function(...) return call(tools.dict, ...) end
end

function tools.new() tools.dict = new() end

function tools.at(now, name, ...)
    tools.dict.now = now
    return tools[name](...)
end

-- Requests at their times, those of one time by as many workers at once, whose operations on the dictionary alternate at random.
function tools.storm(times, per_minute, burst, seed)
    tools.new()
    local random, admitted, at = tools.random(seed), {}, 1
    tools.dict.before = function() if coroutine.running() then coroutine.yield() end end
    while at <= #times do
        local now, workers = times[at], {}
        tools.dict.now = now
        while times[at] == now do
            workers[#workers + 1] = coroutine.create(function()
                if limit.rate(tools.dict, "team", per_minute, burst, now) then admitted[#admitted + 1] = now end
            end)
            at = at + 1
        end
        while #workers > 0 do
            local index = random(#workers)
            assert(coroutine.resume(workers[index]))
            if coroutine.status(workers[index]) == "dead" then table.remove(workers, index) end
        end
    end
    tools.dict.before = function() end
    return admitted
end

-- Workers that let requests begin and end, some of which are killed in between two operations; returns the most that ran at once, and what is left.
function tools.turmoil(most, workers, steps, seed)
    tools.new()
    local random, running, highest, alive = tools.random(seed), 0, 0, {}
    local function work(owner)
        local mine = 0
        for _ = 1, steps do
            if mine > 0 and random(2) == 1 then
                mine, running = mine - 1, running - 1
                limit.leave(tools.dict, "team", owner, 1)
            elseif limit.enter(tools.dict, "team", owner, most) then
                mine, running = mine + 1, running + 1
                highest = math.max(highest, running)
            end
            coroutine.yield("between requests", mine)
        end
        running = running - mine
        for _ = 1, mine do limit.leave(tools.dict, "team", owner, 1) end
    end
    local routines = {}
    for owner = 1, workers do routines[owner], alive[owner] = coroutine.create(work), true end
    tools.dict.before = function() if coroutine.running() then coroutine.yield() end end
    local left = workers
    while left > 0 do
        local owner = random(workers)
        if alive[owner] then
            local _, where, mine = assert(coroutine.resume(routines[owner], owner))
            if coroutine.status(routines[owner]) == "dead" then
                alive[owner], left = false, left - 1
            elseif where == "between requests" and random(steps) == 1 then
                alive[owner], left, running = false, left - 1, running - mine
                tools.dict.before = function() end
                limit.sweep(tools.dict, function(one) return alive[one] end)
                tools.dict.before = function() if coroutine.running() then coroutine.yield() end end
            end
        end
    end
    tools.dict.before = function() end
    limit.sweep(tools.dict, function() return false end)
    return highest, limit.running(tools.dict, "team")
end

function tools.random(seed)
    local state = seed
    return function(most)
        state = (state * 16807) % 2147483647
        return state % most + 1
    end
end

function tools.keys()
    local count = 0
    for key in pairs(tools.dict.values) do if tools.dict:peek(key) ~= nil then count = count + 1 end end
    return count
end

return tools
"""


ALIVE = """
local alive = {}
for _, pid in ipairs(...) do alive[pid] = true end
return function(pid) return alive[pid] == true end
"""


class Limits:
    """The module with one dictionary and one clock."""

    def __init__(self, lua: Lua) -> None:
        self.lua = lua
        new = lua.run(SHARED)
        assert isinstance(new, Function)
        self.tools = lua.run(LIMIT, new)
        self.tools["new"]()

    def new(self) -> None:
        """An empty dictionary."""
        self.tools["new"]()

    def at(self, now: float, name: str, *arguments: Any) -> Any:
        """Call a function of the module at a time."""
        return self.tools["at"](now, name, *arguments)

    def passes(self, now: float, per_minute: float, burst: int) -> bool:
        """Whether a request may come."""
        answer = self.at(now, "rate", "team", per_minute, burst, now)
        return bool(answer[0])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.tools:
            raise AttributeError(name)
        function: Callable[..., Any] = self.tools[name]
        return function


@pytest.fixture(scope="module")
def limits(lua: Lua) -> Limits:
    """The module with one dictionary and one clock."""
    return Limits(lua)


NOW = 1_790_000_000.0
arrivals = st.lists(st.integers(0, 4000), min_size=1, max_size=80).map(
    lambda gaps: [NOW + sum(gaps[: at + 1]) / 1000 for at in range(len(gaps))]
)


@given(times=arrivals, per_minute=st.integers(1, 6000), burst=st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_the_rate_is_that_of_a_bucket(limits: Limits, times: list[float], per_minute: int, burst: int) -> None:
    """Which is full at first, holds `burst`, and fills at the rate."""
    limits.new()
    level, before = float(burst), times[0]
    for now in times:
        level, before = min(burst, level + (now - before) * per_minute / 60), now
        answer = limits.at(now, "rate", "team", per_minute, burst, now)
        if 0.985 < level < 1.001:  # either is right
            level -= bool(answer[0])
            continue
        assert answer[0] == (level > 1)
        if answer[0]:
            level -= 1
            assert abs(answer[1] - level) < 1 + 1e-4
            assert answer[2] == pytest.approx((burst - level) * 60 / per_minute, abs=1e-3)
        else:
            assert answer[1] == pytest.approx((1 - level) * 60 / per_minute, abs=1e-3)


@given(per_minute=st.integers(1, 6000), burst=st.integers(1, 40), waited=st.floats(0, 100))
@settings(max_examples=200, deadline=None)
def test_retry_after_is_true(limits: Limits, per_minute: int, burst: int, waited: float) -> None:
    """A moment earlier the request is refused again, then it passes."""
    limits.new()
    while limits.passes(NOW, per_minute, burst):
        pass
    _, seconds = limits.at(NOW, "rate", "team", per_minute, burst, NOW)
    assert 0 < seconds <= 60 / per_minute + 1e-3
    assert not limits.passes(NOW + seconds - 60 / per_minute / 50, per_minute, burst)
    assert limits.passes(NOW + seconds + 1e-5, per_minute, burst)
    later = NOW + seconds + waited + (burst + 1) * 60 / per_minute + 1e-3
    assert [limits.passes(later, per_minute, burst) for _ in range(burst + 1)] == [True] * burst + [False]


@given(
    seed=st.integers(1, 2**31 - 2), per_minute=st.integers(1, 600), burst=st.integers(1, 10), workers=st.integers(2, 6)
)
@settings(max_examples=150, deadline=None)
def test_workers_at_the_same_moment_admit_no_more(
    limits: Limits, seed: int, per_minute: int, burst: int, workers: int
) -> None:
    """In no stretch of time more than the burst and what the rate gives."""
    chance = random.Random(seed)
    each = 60 / per_minute
    moments = sorted(NOW + chance.choice([at * each, chance.random() * 20 * each]) for at in range(30))
    admitted = limits.storm([moment for moment in moments for _ in range(workers)], per_minute, burst, seed) or []
    for first, start in enumerate(admitted):
        for last in range(first, len(admitted)):
            assert last - first + 1 <= burst + (admitted[last] - start) / each + 0.011
    assert len(admitted) >= min(burst, len(moments) * workers)


def test_no_rate_is_no_limit(limits: Limits) -> None:
    """A client without requests_per_minute."""
    limits.new()
    assert all(limits.at(NOW, "rate", "team", None, None, NOW) for _ in range(100))


def test_clients_do_not_share(limits: Limits) -> None:
    """The burst of one is not used up by another."""
    limits.new()
    assert limits.at(NOW, "rate", "a", 60, 1, NOW)[0]
    assert not limits.at(NOW, "rate", "a", 60, 1, NOW)[0]
    assert limits.at(NOW, "rate", "b", 60, 1, NOW)[0]


@given(seed=st.integers(1, 2**31 - 2), most=st.integers(1, 8), workers=st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_never_more_at_a_time_and_nothing_leaks(limits: Limits, seed: int, most: int, workers: int) -> None:
    """However the workers' operations alternate, and when some of them are killed."""
    highest, left = limits.turmoil(most, workers, 30, seed)
    assert 1 <= highest <= most
    assert left == 0


def test_a_killed_worker_gives_back_what_it_held(limits: Limits) -> None:
    """And only that, of all its clients."""
    limits.new()
    for name, owner in (("a", 11), ("a", 11), ("a", 12), ("b", 11)):
        assert limits.enter(name, owner, 3) is True
    assert limits.enter("a", 12, 3)[0] is False
    limits.sweep(alive(limits, 12))
    assert (limits.running("a"), limits.running("b")) == (1, 0)
    limits.leave("a", 12, 1)
    assert limits.running("a") == 0


def alive(limits: Limits, *pids: int) -> Function:
    """A function of Lua that says which processes live."""
    function = limits.lua.run(ALIVE, list(pids))
    assert isinstance(function, Function)
    return function


def test_generations_of_workers_leave_nothing_behind(limits: Limits) -> None:
    """After a thousand reloads the dictionary holds no more than after one."""
    limits.new()
    sizes = []
    for generation in range(1000):
        limits.enter("a", 100 + generation, 5)
        limits.leave("a", 100 + generation, 1)
        limits.sweep(alive(limits, 100 + generation))
        sizes.append(limits.keys())
    assert sizes[-1] <= sizes[10]


def test_the_wait_for_a_place_follows_how_long_requests_run(limits: Limits) -> None:
    """Of four that take eight seconds each, one ends every two seconds."""
    limits.new()
    for _ in range(4):
        assert limits.enter("a", 1, 4) is True
    for _ in range(100):
        limits.leave("a", 1, 8)
        limits.enter("a", 1, 4)
    within, seconds = limits.enter("a", 1, 4)
    assert not within
    assert seconds == pytest.approx(2)
    for _ in range(100):
        limits.leave("a", 1, 2)
        limits.enter("a", 1, 4)
    assert limits.enter("a", 1, 4)[1] == pytest.approx(0.5, rel=0.01)


BUDGETS = {"tokens_per_minute": 600, "tokens_per_day": 5000, "tokens_per_month": 9000}


def test_tokens_are_charged_afterwards(limits: Limits) -> None:
    """An answer may use more than there was; the next request waits until that has flowed back."""
    limits.new()
    minute = {"tokens_per_minute": 600}
    assert limits.at(NOW, "tokens", "a", minute, NOW) == (True, 600, 0)
    limits.at(NOW, "charge", "a", minute, 100, NOW)
    assert limits.at(NOW, "tokens", "a", minute, NOW) == (True, 500, pytest.approx(10))
    limits.at(NOW, "charge", "a", minute, 800, NOW)
    within, seconds, which = limits.at(NOW, "tokens", "a", minute, NOW)
    assert (within, which) == (False, b"minute")
    assert seconds == pytest.approx(30, abs=0.2)
    assert not limits.at(NOW + seconds - 0.2, "tokens", "a", minute, NOW + seconds - 0.2)[0]
    assert limits.at(NOW + seconds, "tokens", "a", minute, NOW + seconds)[:2] == (True, 1)
    assert limits.at(NOW + 500, "tokens", "a", minute, NOW + 500) == (True, 600, 0)


def utc(text: str) -> float:
    """Seconds of a time in UTC."""
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M:%S")))


@pytest.mark.parametrize(
    ("now", "limit", "back"),
    [
        ("2026-11-30 23:59:30", "day", "2026-12-01 00:00:00"),
        ("2026-11-30 00:00:00", "day", "2026-12-01 00:00:00"),
        ("2026-11-30 23:59:30", "month", "2026-12-01 00:00:00"),
        ("2026-12-01 00:00:00", "month", "2027-01-01 00:00:00"),
        ("2028-02-01 12:00:00", "month", "2028-03-01 00:00:00"),
    ],
)
def test_days_and_months_end_in_utc(limits: Limits, now: str, limit: str, back: str) -> None:
    """A budget is there again when the next day or month begins, and not a second earlier."""
    limits.new()
    begin, end = utc(now), utc(back)
    budget = {f"tokens_per_{limit}": 1000}
    limits.at(begin, "charge", "a", budget, 999, begin)
    assert limits.at(begin, "tokens", "a", budget, begin) is True
    limits.at(begin, "charge", "a", budget, 1, begin)
    assert limits.at(begin, "tokens", "a", budget, begin) == (False, end - begin, limit.encode())
    assert limits.at(end - 1, "tokens", "a", budget, end - 1) == (False, 1, limit.encode())
    assert limits.at(end, "tokens", "a", budget, end) is True
    assert limits.used("a", end)[limit] == 0


@pytest.mark.parametrize(
    ("then", "now", "day", "month"),
    [
        ("2026-11-30 00:00:00", "2026-11-30 23:59:59", 7, 50),
        ("2026-11-29 23:59:59", "2026-11-30 00:00:00", 0, 50),
        ("2026-11-30 23:59:59", "2026-12-01 00:00:00", 0, 0),
        ("2025-11-30 12:00:00", "2026-11-30 12:00:00", 0, 0),
    ],
)
def test_what_was_used_is_put_back_while_it_counts(limits: Limits, then: str, now: str, day: int, month: int) -> None:
    """A day or a month that is over is over, also when Nginx was not there at its end."""
    limits.new()
    limits.at(utc(now), "restore", "a", utc(then), {"day": 7, "month": 50}, utc(now))
    assert limits.used("a", utc(now)) == {"day": day, "month": month}
    later = utc("2027-01-01 00:00:00")
    assert limits.at(later, "used", "a", later) == {"day": 0, "month": 0}


@given(seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_budgets_are_those_of_a_simple_model(limits: Limits, seed: int) -> None:
    """A client that asks at random times over three days, each answer of a random size."""
    limits.new()
    chance = random.Random(seed)
    now = utc("2026-11-29 20:00:00") + 0.25
    level, before = 600.0, now
    days: dict[str, int] = {}
    for _ in range(60):
        now += chance.choice([0.5, 5, 60, 7200])
        level, before = min(600, level + (now - before) * 10), now
        day, month = (time.strftime(form, time.gmtime(now)) for form in ("%Y-%m-%d", "%Y-%m"))
        answer = limits.at(now, "tokens", "a", BUDGETS, now)
        over = [
            name
            for name, full in (
                ("month", days.get(month, 0) >= 9000), ("day", days.get(day, 0) >= 5000), ("minute", level < 1e-6),
            )
            if full
        ]  # fmt: skip
        assert answer[0] == (not over)
        if over:
            assert answer[2] == over[0].encode()
            continue
        used = chance.choice([1, 50, 700, 2000])
        limits.at(now, "charge", "a", BUDGETS, used, now)
        level -= used
        for key in (day, month):
            days[key] = days.get(key, 0) + used
        assert limits.used("a", now) == {"day": days[day], "month": days[month]}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.02, "20ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9994, "1m0s"),
        (360, "6m0s"),
        (3725, "1h2m5s"),
        (-1, "0ms"),
    ],
)
def test_durations_are_written_as_openai_writes_them(limits: Limits, seconds: float, text: str) -> None:
    """Rounded up: who waits so long has waited long enough."""
    assert limits.duration(seconds) == text.encode()
