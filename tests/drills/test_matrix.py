"""Every test of every scenario on every host of it: what `make molecule` leaves to the first host, because nothing should differ between them.

By hand, as root (an hour and more on two cores):

    .venv/bin/pytest tests/drills/test_matrix.py -s
"""

from __future__ import annotations

from tests.drills import passes


def test_every_test_passes_on_every_host() -> None:
    assert passes("tests/run.py", "molecule", MATRIX="1")
