"""page.lua: whatever is in a value, the page has it as text and nothing else."""

from __future__ import annotations

import html
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lua.luajit import Lua, LuaError

PAGE = """
local page = require "page"
return function(text, values)
    local parts, pauses = {}, 0
    page.render(page.compile(text), values, function(part) parts[#parts + 1] = part end, function() pauses = pauses + 1 end)
    return table.concat(parts), pauses
end
"""
TABLE = '<b class="{{tone}}">{{name}}</b><each rows><i>{{name}}<each cells><u title="{{text}}">{{text}}</u></each cells></i></each rows>.'

Render = Callable[..., Any]


@pytest.fixture(scope="module")
def render(lua: Lua) -> Render:
    return lua.run(PAGE)  # type: ignore[no-any-return]


def test_lists_in_lists(render: Render) -> None:
    rows = [{"name": "a", "cells": [{"text": 1}, {"text": "x"}]}, {"name": "b", "cells": []}]
    text, _ = render(TABLE, {"tone": "good", "name": "n", "rows": rows})
    assert text.decode() == (
        '<b class="good">n</b><i>a<u title="1">1</u><u title="x">x</u></i><i>b</i>.'
    )  # fmt: skip


class Parts(HTMLParser):
    """The elements of a page, their attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, Any]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(deadline=None)
@given(
    st.text(
        alphabet=st.one_of(st.sampled_from("<>&\"'/= {}%"), st.characters(codec="ascii", exclude_characters="\r\0"))
    )
)
def test_a_value_is_text_whatever_is_in_it(lua: Lua, value: str) -> None:
    text, _ = lua.run(PAGE)(
        TABLE, {"tone": value, "name": value, "rows": [{"name": value, "cells": [{"text": value}]}]}
    )
    parts = Parts()
    parts.feed(text.decode())
    parts.close()
    assert parts.elements == [("b", [("class", value)]), ("i", []), ("u", [("title", value)])]
    assert parts.text == value * 3 + "."
    assert html.unescape(text.decode()).count("<b") >= 1


def test_a_long_list_has_pauses(render: Render) -> None:
    text, pauses = render("<each rows>{{name}};</each rows>", {"rows": [{"name": number} for number in range(520)]})
    assert text.decode() == "".join(f"{number};" for number in range(520))
    assert pauses == 10


def test_a_value_that_is_missing_is_an_error(render: Render) -> None:
    with pytest.raises(LuaError, match="name"):
        render("{{name}}", {"other": 1})


@pytest.mark.parametrize("text", ["<each rows>{{name}}", "{{name}}</each rows>", "<each a></each b>"])
def test_a_template_that_is_broken_is_an_error(render: Render, text: str) -> None:
    with pytest.raises(LuaError, match="has no end"):
        render(text, {"name": "n", "rows": []})
