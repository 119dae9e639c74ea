"""Ask a fleet for a while, as its clients do, and say what came of it.

    python -m tests.load https://10.0.0.5 https://10.0.0.6 --model small --key-file key --ca ca.pem --seconds 60

Ends with 1 when a request failed. By Ctrl-C it lets running requests end and reports.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from tests.load.load import Gateway, Load

EVERY = 5  # seconds between two lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m tests.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("gateways", nargs="+", metavar="URL")
    made.add_argument("--model", action="append", required=True, help="a model; several times for several")
    made.add_argument("--key-file", type=Path, required=True, help="a file that has a client's key")
    made.add_argument("--ca", default="", help="certificates of the authority that the gateways' are of")
    made.add_argument("--insecure", action="store_true", help="take any certificate")
    made.add_argument("--seconds", type=float, default=math.inf, help="how long; without it until Ctrl-C")
    made.add_argument("--streams", type=int, default=12, help="clients that stream (%(default)s)")
    made.add_argument("--whole", type=int, default=4, help="clients that want their answers whole (%(default)s)")
    made.add_argument(
        "--tokens", type=int, nargs=2, default=(1, 200), metavar=("SHORTEST", "LONGEST"), help="of an answer (1 200)"
    )
    made.add_argument("--silence", type=float, default=30, help="seconds in which nothing comes (%(default)g)")
    made.add_argument("--longest-pause", type=float, default=math.inf, help="a longer pause in a stream is a failure")
    made.add_argument("--record", type=Path, help="write a line of JSON for each request to this file")
    return made


def main(*words: str) -> int:
    """Read the command line and ask."""
    given = parser().parse_args(words or None)
    load = Load(
        [Gateway.of(url, given.ca, given.insecure) for url in given.gateways],
        given.model,
        given.key_file.read_text().strip(),
        streams=given.streams,
        whole=given.whole,
        tokens=tuple(given.tokens),
        silence=given.silence,
        longest_pause=given.longest_pause,
        record=given.record,
    )
    end = time.monotonic() + given.seconds
    try:
        load.start()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(EVERY, left))
            print(load.summary(time.time() - EVERY).told(), flush=True)
    except KeyboardInterrupt:
        print("letting running requests end ...", flush=True)
    except AssertionError as error:
        print(error)
        return 1
    load.stop()
    print(load.summary().told())
    if failed := load.failures():
        print(load.report())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
