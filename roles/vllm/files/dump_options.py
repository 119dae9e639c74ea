"""Prints as JSON what `vllm serve` of the environment that runs this file accepts: option -> type or list of choices.

Types: bool, flag (a bool without an opposite), int, float, list, append (a list, named once for each entry), any. Run once, when a release
is built; what is in an inventory is then checked against it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from vllm import platforms
from vllm.entrypoints.cli import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser


def kind(action: argparse.Action) -> Any:
    """The type that a value in the configuration file must have; `any` where vLLM parses it itself."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "bool"
    if isinstance(action, argparse._StoreTrueAction):  # the only trace of what is on or not there
        return "flag"
    if isinstance(action, argparse._AppendAction):
        return "append"
    if action.nargs in ("+", "*"):
        return "list"
    if action.choices:
        return sorted(str(choice) for choice in action.choices)
    return {int: "int", float: "float"}.get(action.type, "any")  # type: ignore[arg-type]


def main() -> None:
    """Walk through the parser's actions."""
    if platforms.current_platform.is_unspecified():  # built where no GPU is visible: the options are the same
        from vllm.platforms.cpu import CpuPlatform

        platforms.current_platform = CpuPlatform()
    parser = serve.make_arg_parser(FlexibleArgumentParser())
    options: dict[str, Any] = {}
    for action in parser._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        if isinstance(action, argparse.BooleanOptionalAction):  # --no-x and --disable-x are spelt `x: false` in a file
            names = [name for name in names if name == names[0] or not name.startswith(("--no-", "--disable-"))]
        options.update((name.removeprefix("--"), kind(action)) for name in names)
    options.pop("help", None)
    json.dump(dict(sorted(options.items())), sys.stdout, indent=0)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
