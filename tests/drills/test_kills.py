"""Runs that are killed, many of them: what `make test` does a few times.

By hand, as root (an hour on two cores):

    .venv/bin/pytest tests/drills/test_kills.py -s
"""

from __future__ import annotations

from tests.drills import passes


def test_twenty_runs_that_are_killed_lose_nothing() -> None:
    assert passes("-m", "pytest", "--verbose", "tests/e2e/test_interruptions.py", "tests/e2e/test_fleet.py", KILLS="20")
