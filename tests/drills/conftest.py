"""What the fleets of the end-to-end tests measure is told here, too."""

from tests.e2e.conftest import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]
