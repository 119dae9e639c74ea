"""Examples in comments are found as a reader sees them; molecule/cuda_toolkit has the preflight judge those of inventories/prod."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.examples import examples, largest_sets, uncommented, with_needs

TEXT = """---
# Prose, which has no key. Neither has this: a colon in it.
# one: 1
# its_second: 2
# Prose again.
list:
  - name: there
    # two: [1, 2]  # with three, not with one
  # - name: three
  #   below:
  #     - deep
kept: true
"""


def test_an_example_is_a_paragraph_of_yaml(tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_text(TEXT)
    found = examples(file)
    assert [(one.name, len(one.lines)) for one in found] == [("one", 2), ("two", 1), ("three", 3)]
    one, two, three = found
    assert (sorted(two.needs), sorted(two.excludes)) == (["three"], ["one"])
    assert yaml.safe_load(uncommented(file, [])) == {"list": [{"name": "there"}], "kept": True}
    assert yaml.safe_load(uncommented(file, with_needs(two, found))) == {
        "list": [{"name": "there", "two": [1, 2]}, {"name": "three", "below": ["deep"]}],
        "kept": True,
    }
    assert yaml.safe_load(uncommented(file, [one]))["its_second"] == 2
    assert largest_sets(found) == [[one, three], [two, three]]


def test_a_mark_that_says_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("# one: 1  # or two\n")
    with pytest.raises(ValueError, match="neither `with NAME` nor `not with NAME`"):
        examples(tmp_path / "x.yml")
