"""What `vllm serve` accepts: the table of options that the real vLLM printed, as a parser."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[2] / "stand_in" / "options.json"


def make_arg_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options to a parser."""
    parser.add_argument("model_tag", nargs="?")
    kinds: dict[str, Any] = json.loads(TABLE.read_text())
    for name, kind in kinds.items():
        option = f"--{name}"
        if name == "middleware":
            parser.add_argument(option, action="append", default=[])
        elif kind == "bool":
            parser.add_argument(option, action=argparse.BooleanOptionalAction)
        elif kind == "list":
            parser.add_argument(option, nargs="+")
        elif isinstance(kind, list):
            parser.add_argument(option, choices=kind)
        else:
            parser.add_argument(option, type={"int": int, "float": float}.get(kind, str))
    return parser
