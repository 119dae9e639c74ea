"""The command `vllm serve`: the table of options that the real vLLM printed, as a parser, and what is judged before an engine starts."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

from ...utils.argparse_utils import human_readable_int, read_json

TABLE = Path(__file__).resolve().parents[2] / "stand_in" / "options.json"
# Of those whose type the table does not tell.
JSON = (
    "allowed-headers",
    "allowed-methods",
    "allowed-origins",
    "attention-config",
    "compilation-config",
    "hf-overrides",
    "speculative-config",
)
UNDECIDED = ("enable-prefix-caching", "enable-chunked-prefill")
NUMBERS = ("max-model-len", "max-num-batched-tokens", "kv-cache-memory-bytes")
TOOL_PARSERS = ("hermes", "llama3_json", "mistral", "pythonic")


def make_arg_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options to a parser."""
    parser.add_argument("model_tag", nargs="?")
    kinds: dict[str, Any] = json.loads(TABLE.read_text())
    for name, kind in kinds.items():
        option = f"--{name}"
        if kind == "bool":
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=None if name in UNDECIDED else False
            )
        elif kind == "flag":
            parser.add_argument(option, action="store_true")
        elif kind == "append":
            parser.add_argument(option, action="append")
        elif kind == "list":
            parser.add_argument(option, nargs="+")
        elif isinstance(kind, list):
            parser.add_argument(option, choices=kind)
        elif name in (*JSON, *NUMBERS):
            parser.add_argument(option, type=read_json if name in JSON else human_readable_int)
        else:
            parser.add_argument(option, type={"int": int, "float": float}.get(kind, str))
    return parser


class ServeSubcommand:
    """The command, as the program `vllm` has it."""

    name = "serve"

    def subparser_init(self, subparsers: Any) -> argparse.ArgumentParser:
        """Add it to the commands of a parser."""
        return make_arg_parser(subparsers.add_parser(self.name))

    def validate(self, args: argparse.Namespace) -> None:
        """What is judged by the options alone."""
        if args.enable_auto_tool_choice and not args.tool_call_parser:
            raise TypeError("Error: --enable-auto-tool-choice requires --tool-call-parser")


def cmd_init() -> list[ServeSubcommand]:
    """The commands of this module."""
    return [ServeSubcommand()]


def setup_server(args: argparse.Namespace, *, reuse_port: bool) -> tuple[str, socket.socket]:
    """Judge what the server itself needs, and listen."""
    if args.enable_auto_tool_choice and args.tool_call_parser not in TOOL_PARSERS:
        raise KeyError(f"invalid tool call parser: {args.tool_call_parser} (chose from {{ {','.join(TOOL_PARSERS)} }})")
    listener = socket.create_server((args.host or "", int(args.port or 8000)), reuse_port=reuse_port)
    scheme = "https" if args.ssl_keyfile and args.ssl_certfile else "http"
    return f"{scheme}://{args.host}:{args.port}", listener
