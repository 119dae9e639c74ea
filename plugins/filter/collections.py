"""Whether the collections that this one builds on are there and new enough."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

REMEDY = "install what is needed with: ansible-galaxy collection install --upgrade -r requirements.yml"


def _directory(name: str) -> Path | None:
    """Where Ansible finds a collection."""
    try:
        found = importlib.util.find_spec(f"ansible_collections.{name}")
    except ImportError:
        return None
    places = list(found.submodule_search_locations or ()) if found else []
    return Path(places[0]) if places else None


def _described(directory: Path) -> Mapping[str, Any]:
    """What a collection says of itself: its manifest when it was installed, its galaxy.yml when it is a clone."""
    manifest = directory / "MANIFEST.json"
    if manifest.is_file():
        described: Mapping[str, Any] = json.loads(manifest.read_text())["collection_info"]
        return described
    source = directory / "galaxy.yml"
    return yaml.safe_load(source.read_text()) if source.is_file() else {}


def _numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare; what follows the third, such as -beta, is left out."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def collection_problems(name: str) -> list[str]:
    """What is wrong with the dependencies of an installed collection, one sentence each.

    Ansible itself checks them only when a collection is installed, not when it is used.
    """
    own = _directory(name)
    if own is None:
        return [f"The collection {name} is not installed; {REMEDY}"]
    problems = []
    for dependency, wanted in (_described(own).get("dependencies") or {}).items():
        minimum = str(wanted).removeprefix(">=")
        directory = _directory(dependency)
        if directory is None:
            problems.append(f"The collection {dependency} is not installed; it must be {minimum} or newer: {REMEDY}")
            continue
        version = str(_described(directory).get("version") or "0")
        if _numbers(version) < _numbers(minimum):
            problems.append(f"The collection {dependency} is {version}, but must be {minimum} or newer: {REMEDY}")
    return problems


class FilterModule:
    """Tells Ansible the names."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name -> function."""
        return {"collection_problems": collection_problems}
