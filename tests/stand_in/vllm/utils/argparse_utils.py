"""The parser that vLLM's options are given to."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def human_readable_int(text: str) -> int:
    """A number that may end in k, m or g, or in K, M or G for powers of 1024; `auto` is -1."""
    if text in ("auto", "-1"):
        return -1
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1:] in units else int(text)


def read_json(text: str) -> Any:
    """JSON, or the complaint of the parser."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"Invalid JSON: {error}") from error


def value_of(text: str) -> Any:
    """What stands behind the name of an option: YAML, as far as the role writes it."""
    if text.startswith("'") and text.endswith("'"):
        return text[1:-1].replace("''", "'")
    value = read_json(text)
    # YAML 1.1 knows a number with an exponent by its dot
    return (
        json.loads(text, parse_float=lambda number: float(number) if "." in number else number)
        if isinstance(value, dict)
        else value
    )


class FlexibleArgumentParser(ArgumentParser):
    """vLLM's own takes more spellings of a name; a configuration file has one."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> Namespace:
        """Read a command line, and the file that it names in the place of its name."""
        words = list(args or [])
        if "--config" in words:
            place = words.index("--config")
            words = [words[0], *self.load_config_file(words[place + 1]), *words[1:place], *words[place + 2 :]]
        return super().parse_args(words, namespace)

    def load_config_file(self, file: str) -> list[str]:
        """The options of a configuration file as words of a command line.

        As vLLM reads it: `true` is the bare name, `false` is dropped where this very parser has no opposite, and what is in a list is spelt by Python.
        """
        found: list[str] = []
        for line in Path(file).read_text().splitlines():
            name, colon, text = line.partition(": ")
            if not colon or line.startswith("#"):
                continue
            value = value_of(text)
            if value is False:
                found += [f"--no-{name}"] if f"--no-{name}" in self._option_string_actions else []
            elif value is True:
                found.append(f"--{name}")
            elif isinstance(value, list):
                found += [f"--{name}", *map(str, value)] if value else []
            else:
                found += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return found
