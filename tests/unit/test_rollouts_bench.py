"""The bench of rollouts: what it makes of what it was told, and its picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from tests.bench.rollouts import Rollout, edges, table
from tests.bench.timeline import FAILED, Panel, Span, picture, spans_of

# time, whether it listens, where the link leads
LISTENING = [[0.0, True, "1"], [20.0, False, "1"], [21.0, False, "2"], [26.0, True, "2"]]


def test_a_turn_is_told_by_who_listens_and_who_is_used() -> None:
    used = [(0.0, True), (10.0, False), (30.0, True)]
    found = edges(LISTENING, used, [], 5, 40)
    assert found == [
        (5, "serves"), (10.0, "drains"), (20.0, "down"), (21.0, "down"), (26.0, "returns"), (30.0, "serves new"),
    ]  # fmt: skip
    spans = spans_of("gpu1", found, 40)
    assert [(span.state, span.begin, span.end) for span in spans] == [
        ("serves", 5, 10), ("drains", 10, 20), ("down", 20, 26), ("returns", 26, 30), ("serves new", 30, 40),
    ]  # fmt: skip


def test_a_restart_refuses_until_it_listens_no_more() -> None:
    found = edges(LISTENING, [], [15.0], 5, 40)
    assert found == [(5, "serves"), (15.0, "refuses"), (20.0, "down"), (21.0, "down"), (26.0, "serves new")]


def test_the_picture_has_what_was_measured() -> None:
    spans = [Span("gpu1", 0, 10, "serves"), Span("gpu1", 10, 15, "down"), Span("gpu1", 15, 30, "serves new")]
    good = Panel("good & fast", 0, 30, spans, [1.0, 1.5, 20.0], [])
    bad = Panel("bad", 0, 15, [Span("gpu1", 0, 15, "refuses")], [1.0], [2.0, 2.1])
    text = picture([good, bad])
    root = ElementTree.fromstring(text)  # noqa: S314 - it is ours
    rects = [one for one in root.iter() if one.tag.endswith("rect")]
    told = [one.text or "" for one in root.iter() if one.tag.endswith("text")]
    assert {"good & fast", "3 requests, 0 failed", "3 requests, 2 failed", "failed requests", "gpu1"} <= set(told)
    titles = [one.text for one in root.iter() if one.tag.endswith("title")]
    assert titles == [
        "serves, 10.0 s",
        "stopped, starts, 5.0 s",
        "serves the new version, 15.0 s",
        "stops, and refuses what comes, 15.0 s",
    ]
    widths = [float(one.get("width", "0")) for one in rects if len(one)]
    assert abs(widths[0] - 2 * widths[1]) < 0.2, "to scale"
    assert sum(one.get("fill") == FAILED for one in rects) == 2, "one second, and the legend"


def test_the_table_counts() -> None:
    one = Rollout("fleet", 0, 60, 100, 0, 0.2, {"gpu1": 10.0, "gpu2": 12.0})
    two = Rollout("fleet", 0, 70, 100, 1, 0.4, {"gpu1": 11.0, "gpu2": 14.0})
    assert table([one, two])[2:] == ["| fleet | 1 of 2 | 200 | 1 | 0.40 s | 11.5 s (10.0 to 14.0) | 65 s |"]
