"""What is said of collections that are missing or too old."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"ours.posix": ">=2.1.0", "ours.general": ">=11.0.0"}
PROGRAM = (
    "import importlib.util, json, sys\n"
    "spec = importlib.util.spec_from_file_location('collections_filter', sys.argv[1])\n"
    "module = importlib.util.module_from_spec(spec)\n"
    "spec.loader.exec_module(module)\n"
    "print(json.dumps(module.collection_problems('ours.app')))"
)


def problems(directory: Path, **versions: str) -> list[str]:
    """What is said where these collections are installed, in an interpreter that knows no others."""
    described: dict[str, dict[str, Any]] = {"app": {"version": "1.0.0", "dependencies": NEEDS}}
    described.update({name: {"version": version} for name, version in versions.items()})
    for name, info in described.items():
        place = directory / "ansible_collections" / "ours" / name
        place.mkdir(parents=True)
        (place / "MANIFEST.json").write_text(json.dumps({"collection_info": info}))
    file = str(ROOT / "plugins/filter/collections.py")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, file],
        text=True,
        capture_output=True,
        check=True,
        env={"PYTHONPATH": str(directory)},
    )
    said: list[str] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("version", ["2.1.0", "2.10.0", "3.0.0-beta.1"])
def test_new_enough_is_no_problem(tmp_path: Path, version: str) -> None:
    assert problems(tmp_path, posix=version, general="11.4.2") == []


def test_all_that_is_wrong_is_told(tmp_path: Path) -> None:
    said = problems(tmp_path, posix="2.0.9")
    assert len(said) == 2
    assert said[0].startswith("The collection ours.posix is 2.0.9, but must be 2.1.0 or newer: install")
    assert said[1].startswith("The collection ours.general is not installed; it must be 11.0.0 or newer: install")
