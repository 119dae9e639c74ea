"""Every public variable in every wrong shape is answered by its name, and by what would be right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(["playbooks", *(file.parents[1].name for file in ROOT.glob("roles/*/meta/argument_specs.yml"))])
# What an answer may not be made of.
FORBIDDEN = re.compile(
    r"cannot be checked|does not fit|Traceback|object|NoneType|has no attribute|not iterable|not supported between|unhashable|gpufleet\.llm|"
    r"plugin|Error\b|expected str|argument of type|indices must be|AnsibleLazy|-vvvvv"
)


@pytest.fixture(scope="session")
def cases() -> list[dict[str, Any]]:
    """What tests/shapes.py found."""
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests/shapes.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_there_is_a_case_for_each_role(cases: list[dict[str, Any]]) -> None:
    assert sorted({case["role"] for case in cases}) == ROLES
    assert len(cases) > 2500
    assert [case for case in cases if case["option"] == "" and case["said"]] == [], "the values that the cases change"


@pytest.mark.parametrize("role", ROLES)
def test_a_wrong_shape_is_answered_by_name(cases: list[dict[str, Any]], role: str) -> None:
    bad = []
    for case in cases:
        what = f"{case['option']}, {case['shape']}"
        if case["role"] != role or not case["option"]:
            continue
        if case["wrong"] and not case["said"]:
            bad.append(f"{what}: passes")
        for sentence in case["said"]:
            if case["option"] not in sentence or FORBIDDEN.search(
                sentence.replace(case["shown"], "").replace(case["option"], "")
            ):
                bad.append(f"{what}: {sentence}")
    assert bad == []


@pytest.mark.parametrize(("release", "refused"), [("22.04", True), ("24.04", False)])
def test_a_gateway_needs_a_release_with_the_lua_module(release: str, refused: bool) -> None:
    facts = json.dumps({"distribution": "Ubuntu", "release": release})
    command = [sys.executable, "-P", str(ROOT / "tests/shapes.py"), "gateway", facts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert ["whose archive has no Lua module for Nginx" in sentence for sentence in said] == [True] * refused
