"""What gateways counted of a backend that came back: whether it is worse than the others, and when nothing can be said."""

from __future__ import annotations

import math
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import soak
from ansible_collections.gpufleet.llm.plugins.module_utils.soak import Counts, Rules

RULES = Rules()
LIMITS = ["0.1", "0.25", "0.5", "1", "2.5", "+Inf"]
METRICS = """
# HELP vllm_gateway_backend_requests_total Requests.
# TYPE vllm_gateway_backend_requests_total counter
vllm_gateway_backend_requests_total{backend="chat@gpu-1",outcome="ok"} 12
vllm_gateway_backend_requests_total{backend="chat@gpu-1",outcome="error"} 2
vllm_gateway_requests_total{status="200",client="a",model="m",instance="chat"} 99
vllm_gateway_backend_first_token_seconds_bucket{backend="chat@gpu-1",le="0.1"} 3
vllm_gateway_backend_first_token_seconds_bucket{backend="chat@gpu-1",le="+Inf"} 5
vllm_gateway_backend_first_token_seconds_sum{backend="chat@gpu-1"} 1.5
"""


def gateway(**backends: Any) -> dict[str, Any]:
    """What a gateway told: of each backend ok, error, cut, and the streams by bucket. chat_1 is chat@gpu-1."""
    found = {}
    for name, (ok, error, cut, *streams) in backends.items():
        sums, below = {}, 0
        for limit, count in zip(LIMITS, streams, strict=False):
            below += count
            sums[limit] = below
        sums |= dict.fromkeys(LIMITS[len(streams) :], below)
        instance, _, host = name.partition("_")
        found[f"{instance}@gpu-{host}"] = {"outcomes": {"ok": ok, "error": error, "cut": cut}, "first_token": sums}
    return found


def result(item: str, backends: dict[str, Any]) -> dict[str, Any]:
    return {"item": item, "backends": backends, "problem": ""}


def judge(before: dict[str, Any], after: dict[str, Any], new: tuple[str, ...] = ("chat@gpu-1",)) -> dict[str, Any]:
    [verdict] = soak.judged([(before, after)], ["chat@gpu-1"], new, RULES)
    return verdict


NOTHING = gateway(chat_1=(0, 0, 0), chat_2=(0, 0, 0))


def test_a_scrape_is_read() -> None:
    assert soak.read(METRICS) == {
        "chat@gpu-1": {"outcomes": {"ok": 12, "error": 2}, "first_token": {"0.1": 3, "+Inf": 5}}
    }


def test_a_median_lies_between_the_limits_of_its_bucket() -> None:
    counted = soak.counts(gateway(chat_1=(10, 0, 0, 2, 4, 4))["chat@gpu-1"])
    assert counted.median() == pytest.approx(0.1 + 0.15 * 3 / 4)
    assert soak.counts(gateway(chat_1=(1, 0, 0, 0, 0, 0, 0, 0, 9))["chat@gpu-1"]).median() == 2.5, (
        "beyond the last limit"
    )
    assert Counts().median() == 0


def test_a_gateway_that_started_anew_counts_from_zero() -> None:
    before = soak.counts(gateway(chat_1=(100, 0, 0, 50))["chat@gpu-1"])
    now = soak.counts(gateway(chat_1=(30, 1, 0, 20))["chat@gpu-1"])
    assert now.since(before) == now
    later = soak.counts(gateway(chat_1=(130, 1, 0, 60))["chat@gpu-1"])
    assert (later.since(before).requests, later.since(before).streams) == (31, 10)


def test_few_requests_say_nothing() -> None:
    found = judge(NOTHING, gateway(chat_1=(18, 1, 0), chat_2=(100, 0, 0)))
    assert (found["verdict"], found["reasons"]) == ("none", [])
    assert "19 requests came, and 20 are needed" in found["line"]
    assert soak.judged([({}, {})], ["chat@gpu-1"], [], RULES)[0]["verdict"] == "none"


def test_who_fails_is_asked_less_and_is_judged_by_the_little_there_is() -> None:
    """Gateways avoid it: of hundreds of requests two or three come there in half a minute."""
    assert judge(NOTHING, gateway(chat_1=(0, 2, 0), chat_2=(500, 0, 0)))["verdict"] == "bad"
    assert judge(NOTHING, gateway(chat_1=(0, 1, 0), chat_2=(500, 0, 0)))["verdict"] == "none", "that happens"
    assert judge(NOTHING, gateway(chat_1=(0, 2, 0), chat_2=(300, 200, 0)))["verdict"] == "none", "to the others, too"


@pytest.mark.parametrize(
    ("mine", "others", "bad"),
    [
        ((100, 0, 0), (100, 0, 0), False),
        ((19, 1, 0), (100, 0, 0), False),  # one of twenty happens by chance, where 1 % is allowed
        ((17, 3, 0), (100, 0, 0), True),
        ((90, 10, 0), (90, 10, 0), False),  # the others fail as often
        ((50, 50, 0), (90, 10, 0), True),
        ((9900, 100, 0), (10000, 0, 0), False),  # within what is allowed
        ((9800, 200, 0), (10000, 0, 0), True),
        ((60, 0, 40), (60, 0, 40), False),  # clients give up everywhere
        ((20, 0, 80), (60, 0, 40), True),
        ((0, 30, 0), (0, 0, 0), True),  # nobody to compare with
    ],
)
def test_bad_ends_are_compared_with_the_others(mine: tuple[int, ...], others: tuple[int, ...], bad: bool) -> None:
    found = judge(NOTHING, gateway(chat_1=mine, chat_2=others, other_2=(0, 500, 0)))
    assert (found["verdict"] == "bad") == bad, found


def test_the_reason_says_what_was_compared() -> None:
    [reason] = judge(NOTHING, gateway(chat_1=(50, 50, 0), chat_2=(90, 10, 0)))["reasons"]
    assert (
        reason
        == "50 of 100 requests ended with an error (50 %); at the others meanwhile it is 10 %, and 11 % are allowed"
    )


def test_without_others_it_is_compared_with_before() -> None:
    before = gateway(chat_1=(900, 100, 0, 400, 100))
    after = gateway(chat_1=(985, 115, 0, 450, 100))
    assert judge(before, after)["verdict"] == "good"
    worse = judge(before, gateway(chat_1=(950, 150, 0, 450, 100)))
    assert worse["reasons"] == [
        "50 of 100 requests ended with an error (50 %); before it is 10 %, and 11 % are allowed"
    ]


def test_those_that_came_back_together_are_no_reference() -> None:
    """Else a batch of two bad ones passed, each like the other."""
    before = gateway(chat_1=(500, 0, 0), chat_2=(500, 0, 0))
    after = gateway(chat_1=(550, 50, 0), chat_2=(550, 50, 0))
    both = ("chat@gpu-1", "chat@gpu-2")
    assert judge(before, after, both)["verdict"] == "bad"
    assert judge(before, after)["verdict"] == "good", "so it is seen that this is what makes the difference"


@pytest.mark.parametrize(
    ("mine", "others", "bad"),
    [
        ((30,), (30,), False),
        ((0, 0, 30), (30,), True),
        ((0, 30), (30,), False),  # 0.18 s and 0.05 s: hardly anybody sees it
        ((0, 0, 10), (30,), False),  # too few streams
        ((0, 0, 0, 30), (0, 0, 30), False),  # within the factor
        ((0, 0, 0, 0, 30), (0, 0, 30), True),
    ],
)
def test_the_first_token_is_compared_with_the_others(mine: tuple[int, ...], others: tuple[int, ...], bad: bool) -> None:
    found = judge(NOTHING, gateway(chat_1=(30, 0, 0, *mine), chat_2=(30, 0, 0, *others)))
    assert (found["verdict"] == "bad") == bad, found
    if bad:
        assert "of its streams began after" in found["reasons"][0]


def test_chance() -> None:
    """The sum of a binomial distribution, by another way of counting."""
    n, p = 30, 0.1
    for bad in range(8):
        tail = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(bad, n + 1))
        assert soak.by_chance(bad, n, p) == pytest.approx(tail)
    assert soak.by_chance(20000, 1000000, 0.01) == pytest.approx(0, abs=1e-9)


def test_all_gateways_count_together_and_silent_ones_are_named() -> None:
    first = [
        result("gw-1", gateway(chat_1=(0, 0, 0), chat_2=(0, 0, 0))),
        result("gw-2", gateway(chat_1=(0, 0, 0), chat_2=(0, 0, 0))),
        {"item": "gw-3", "unreachable": True, "msg": "no route"},
        {"item": "gw-4", "backends": {}, "problem": "no gateway answers at /run/x: No such file or directory"},
    ]
    second = [
        result("gw-1", gateway(chat_1=(9, 2, 0), chat_2=(60, 0, 0))),
        result("gw-2", gateway(chat_1=(7, 2, 0), chat_2=(60, 0, 0))),
        result("gw-3", gateway(chat_1=(1000, 0, 0))),
        *first[3:],
    ]
    found = soak.summary(first, second, ["chat@gpu-1"], ["chat@gpu-1"], RULES)
    assert found["wrong"][0].startswith("chat@gpu-1: 4 of 20 requests ended with an error")
    assert found["silent"] == [
        "gw-3: it cannot be reached",
        "gw-4: no gateway answers at /run/x: No such file or directory",
    ]
    assert found["lines"] == ["chat@gpu-1: 20 requests, 4 errors, 0 cut"]


def test_where_nobody_asks_there_is_nothing_to_watch() -> None:
    quiet = [result("gw-1", gateway(chat_1=(0, 0, 0), other_2=(5, 0, 0))), {"item": "gw-2", "unreachable": True}]
    assert soak.idle(quiet, ["chat@gpu-1"]) == [
        "gw-2: it cannot be reached",
        "no gateway has ever had a request for chat: nothing is watched",
    ]
    assert soak.idle(quiet, ["other@gpu-1"]) == []
    assert soak.idle(quiet[1:], ["chat@gpu-1"])[-1] == "no gateway says what it counts: nothing is watched"
