"""Runs `vllm bench serve` several times in one process, which saves its start: bench.py PLAN RESULTS, by the Python of a vLLM release.

PLAN is a JSON list of {"name", "arguments"}; {rate:NAME} in an argument stands for the requests a second that the run NAME reached. RESULTS
gets one JSON object a line, so that what was measured is there although a later run fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path


def main(plan: Path, results: Path) -> None:
    """Carry out the plan."""
    from vllm.benchmarks import serve  # type: ignore[import-not-found]

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    rates: dict[str, float] = {}
    for run in json.loads(plan.read_text()):
        arguments = [
            re.sub(r"\{rate:(\w+)(?:\*([0-9.]+))?\}", lambda m: str(round(rates[m[1]] * float(m[2] or 1), 2)), argument)
            for argument in run["arguments"]
        ]
        # The number of prompts is a whole one.
        arguments = [
            str(round(float(argument))) if previous == "--num-prompts" else argument
            for previous, argument in zip(["", *arguments], arguments, strict=False)
        ]
        found = serve.main(parser.parse_args(arguments))
        rates[run["name"]] = found["request_throughput"]
        kept = {key: value for key, value in found.items() if isinstance(value, int | float | str)}
        with results.open("a") as file:
            file.write(json.dumps({**run, "arguments": arguments, "result": kept}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
