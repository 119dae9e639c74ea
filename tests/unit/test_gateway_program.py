"""The role puts in place every file of its program."""

from __future__ import annotations

from pathlib import Path

import yaml

ROLE = Path(__file__).resolve().parents[2] / "roles" / "gateway"


def test_every_file_of_the_program_is_put_in_place() -> None:
    tasks = yaml.safe_load((ROLE / "tasks" / "configure.yml").read_text())
    files = [file for task in tasks for file in task.get("gpufleet.llm.tree", {}).get("files", [])]
    named = [file["source"] for file in files if str(file.get("source", "")).startswith("lua/")]
    assert named == [f"lua/{path.name}" for path in sorted((ROLE / "files" / "lua").iterdir())]
