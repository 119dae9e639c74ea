"""What the gateway counts against what clients count themselves: 10,000 requests at once and over reloads. tests/gateway/test_account.py has 600."""

from __future__ import annotations

from pathlib import Path

from tests.gateway import test_account as short
from tests.gateway.harness import running


def test_nothing_of_10000_requests_is_lost(tmp_path: Path) -> None:
    """By the counters and by the log, to the last token."""
    short.ONLY.reset()
    short.ONLY.answer = short.counting
    with running(tmp_path, short.FLEET, [short.ONLY.id]) as gateway:
        short.nothing_is_lost(gateway, 10000)
