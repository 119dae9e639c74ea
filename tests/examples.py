"""The examples that stand in comments of an inventory: where they are, and a file with some of them taken out of their comments.

An example is a paragraph of comment lines that are YAML: a key, or an entry of a list, and what is below it. Prose ends it. What does not work
alone says so behind its first line: `# with NAME`, and what does not work together with another one: `# not with NAME`. The name of an example
is its first key, that of an entry of a list its `name`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

START = re.compile(r"^(?P<indent> *)# (?P<dash>- )?(?P<key>[a-z][\w.-]*):(?: +(?P<value>.*?))?(?:  # (?P<mark>.*))?$")
BELOW = re.compile(r"^ *#  +\S")


@dataclass(frozen=True)
class Example:
    """One of them."""

    name: str
    file: Path
    lines: tuple[int, ...]
    needs: frozenset[str]
    excludes: frozenset[str]


def read_mark(text: str) -> dict[str, list[str]]:
    """What `with a, b, not with c` says."""
    found: dict[str, list[str]] = {"with": [], "not with": []}
    kind = ""
    for word in text.split(", ") if text else []:
        match = re.fullmatch(r"(?:(not with|with) )?(\S+)", word)
        if not match or not (match[1] or kind):
            raise ValueError(f"'# {text}' says neither `with NAME` nor `not with NAME`")
        kind = match[1] or kind
        found[kind].append(match[2])
    return found


def begins(line: str, indent: str) -> bool:
    """Whether an entry of this indentation begins in a line."""
    found = START.match(line)
    return bool(found and found["indent"] == indent)


def examples(file: Path) -> list[Example]:
    """Those of a file, in their order."""
    found: list[Example] = []
    lines = file.read_text().splitlines()
    number = 0
    while number < len(lines):
        start = START.match(lines[number])
        if not start:
            number += 1
            continue
        end = number + 1
        while end < len(lines) and (BELOW.match(lines[end]) or begins(lines[end], start["indent"])):
            end += 1
        marks = read_mark(start["mark"] or "")
        name = start["value"] if start["dash"] and start["key"] == "name" else start["key"]
        found.append(
            Example(
                name, file, tuple(range(number, end)),
                frozenset(marks["with"]), frozenset(marks["not with"]),
            )
        )  # fmt: skip
        number = end
    return found


def uncommented(file: Path, chosen: Collection[Example]) -> str:
    """The text of a file with these examples taken out of their comments."""
    lines = file.read_text().splitlines()
    for example in chosen:
        for number in example.lines if example.file == file else ():
            lines[number] = re.sub(r"^( *)# ?", r"\1", lines[number])
    return "\n".join([*lines, ""])


def conflict(one: Example, other: Example) -> bool:
    """Whether the two exclude each other."""
    return other.name in one.excludes or one.name in other.excludes


def with_needs(example: Example, everything: Sequence[Example]) -> list[Example]:
    """An example and those that it does not work without."""
    found = [example]
    for one in found:
        found += [other for other in everything if other.name in one.needs and other not in found]
    return found


def largest_sets(everything: Sequence[Example]) -> list[list[Example]]:
    """For each example a set that has it and as many of the others as do not exclude each other; each set once."""
    sets: list[list[Example]] = []
    for example in everything:
        chosen = with_needs(example, everything)
        for other in everything:
            together = [one for one in with_needs(other, everything) if one not in chosen]
            if not any(conflict(one, two) for one in together for two in chosen):
                chosen = [*chosen, *together]
        ordered = [one for one in everything if one in chosen]
        if ordered not in sets:
            sets.append(ordered)
    return sets
