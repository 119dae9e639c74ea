# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine is told on its command line. It does not start when its file says something about the same, be it the very same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence

SHORT = {
    "-D": "debug", "-G": "group", "-H": "host", "-b": "bridge", "-g": "data-root", "-l": "log-level", "-p": "pidfile", "-s": "storage-driver",
}  # fmt: skip
# Of the only one that may be said twice, moby asks the name of its option (daemon/config, findConfigurationConflicts).
MAY_BE_TWICE = {"add-runtime"}
ARGV = re.compile(r"argv\[\]=(.*?) ; \w+=")
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def command_line(unit: Mapping[str, str], files: Mapping[str, str]) -> list[str]:
    """The words that a unit runs, from what `systemctl show` says of it. `files` are its EnvironmentFile=s with their texts."""
    found = ARGV.search(unit.get("ExecStart", ""))
    variables = dict(word.split("=", 1) for word in words(unit.get("Environment", "")) if "=" in word)
    for text in files.values():
        lines = [line.strip() for line in text.splitlines() if "=" in line and line.strip()[:1] not in "#;"]
        variables |= {line.partition("=")[0]: " ".join(words(line.partition("=")[2])) for line in lines}
    told = VARIABLE.sub(lambda match: variables.get(match[1] or match[2], ""), found[1] if found else "")
    return words(told)


def words(text: str) -> list[str]:
    """The words of a command or of the values of a variable; what has an open quote is taken as it is."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def options(command: Sequence[str]) -> dict[str, str]:
    """The long names of the options of a command, with their values, which may be secrets: addresses with a password."""
    found = {}
    given = command[1:]
    for word, value in zip(given, [*given, ""][1:], strict=True):
        if word.startswith("--"):
            name, equals, own = word[2:].partition("=")
            found[name] = own if equals else value
        elif word[:2] in SHORT:
            found[SHORT[word[:2]]] = word[2:] or value
    return found


def key(name: str, keys: Collection[str]) -> str:
    """What an option is called in the file, empty when the file does not have it: one that may be given several times is plural there."""
    plurals = (name, f"{name}s", f"{name[:-1]}ies" if name.endswith("y") else name)
    return next((one for one in plurals if one in keys), "") if name not in MAY_BE_TWICE else ""


def clashes(command: Sequence[str], wanted: Mapping[str, object], file: str) -> list[str]:
    """The options of a command that are in the file as well, or that name another file, by their names."""
    return [
        f"--{name}"
        for name, value in options(command).items()
        if key(name, wanted) or (name == "config-file" and value != file)
    ]
