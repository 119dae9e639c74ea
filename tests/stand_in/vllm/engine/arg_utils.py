"""From options to the configuration of an engine, without an engine."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..stand_in.configuration import Served, told
from ..usage.usage_lib import UsageContext


@dataclass(frozen=True)
class AsyncEngineArgs:
    """The options of an engine."""

    options: dict[str, Any]

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> AsyncEngineArgs:
        """Those of a command line."""
        return cls(told(args))

    def create_engine_config(self, usage_context: UsageContext | None = None) -> Served:
        """Judge them with the model at hand. Raises ConfigurationError."""
        return Served.of(self.options)
