"""The program `vllm`: `vllm serve --config FILE`, and `vllm --version`."""

from __future__ import annotations

import sys

from ... import __version__
from ...stand_in.configuration import ConfigurationError, Served, told
from ...stand_in.server import serve
from ...stand_in.settings import Settings
from ...utils.argparse_utils import FlexibleArgumentParser
from .serve import ServeSubcommand


def main() -> int:
    """Do what the command line says. Returns the exit status."""
    words = sys.argv[1:]
    if words[:1] in (["--version"], ["-v"]):
        print(__version__)
        return 0
    if words[:1] != ["serve"]:
        print("usage: vllm serve [MODEL] [--config FILE] [OPTIONS]", file=sys.stderr)
        return 2
    parser, command = FlexibleArgumentParser(prog="vllm"), ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(words)
    command.validate(args)
    options = told(args)
    try:
        Settings.current().start()
        served = Served.of(options)
    except (ConfigurationError, RuntimeError) as error:
        # the engine says so, and the server after it
        print(f"(EngineCore pid=0) ERROR [core.py] {type(error).__name__}: {error}", file=sys.stderr)
        print(
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return serve(served)


if __name__ == "__main__":
    sys.exit(main())
