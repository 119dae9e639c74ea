"""Write the wheel of the stand-in and a lock that names it, for the variables uv_find_links and vllm_lock_file."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.stand_in.wheel import VERSION, write


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.stand_in", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--version", default=VERSION)
    arguments = parser.parse_args()
    for file in write(arguments.directory, arguments.version):
        print(file)


if __name__ == "__main__":
    main()
