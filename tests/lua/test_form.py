"""form.lua finds a field of a form as the servers behind do, and refuses what two readers could understand in two ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import requests
from ansible_collections.gpufleet.llm.plugins.module_utils.sound_form import form as sound_form
from ansible_collections.gpufleet.llm.plugins.module_utils.sound_form import half_a_second

from tests.lua.luajit import Lua

FORM = """
local form = require "form"
return {
    field = function(...) return form.field(...) end,
    splice = form.splice,
    stretch = function(bytes) form.STRETCH = bytes end,
    timed = function(body, content_type, name)
        local last, longest, pauses = os.clock(), 0, 0
        local function pause()
            longest, pauses = math.max(longest, os.clock() - last), pauses + 1
            last = os.clock()
        end
        local field = assert(form.field(body, content_type, name, pause))
        pause()
        return longest, pauses, field.from
    end,
}
"""
TYPE = "multipart/form-data; boundary=b"
MIB = 1024 * 1024

Form = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def form(lua: Lua) -> Form:
    """The functions of the module."""
    return dict(lua.run(FORM))


def value(body: bytes, found: Any) -> bytes | None:
    """The value at the positions; None where there is none. Fails when the form was refused."""
    assert not isinstance(found, tuple), found
    return None if found is None else body[int(found["from"]) - 1 : int(found["to"])]


def part(name: str, text: bytes, disposition: str = 'form-data; name="{}"', *headers: str) -> bytes:
    """A part of a form with the boundary b."""
    lines = [f"Content-Disposition: {disposition.format(name)}", *headers]
    return b"--b\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + text + b"\r\n"


def whole(*parts: bytes) -> bytes:
    """A form with the boundary b."""
    return b"".join(parts) + b"--b--\r\n"


def test_what_clients_send_is_understood(form: Form) -> None:
    """Those of Python's requests, of this collection's own question, and as .NET, Go, Node and browsers write them."""
    prepared = requests.Request(
        "POST",
        "http://gateway",
        data={"model": "whisper", "language": "en"},
        files={"file": ("sound;model.wav", half_a_second())},
    ).prepare()
    body, content_type = prepared.body, prepared.headers["Content-Type"]
    assert isinstance(body, bytes)
    assert value(body, form["field"](body, content_type, "model")) == b"whisper"
    body, content_type = sound_form({"model": "whisper", "temperature": 0}, half_a_second())
    assert value(body, form["field"](body, content_type, "model")) == b"whisper"
    sound = part("file", half_a_second(), 'form-data; name="{}"; filename="a.wav"', "Content-Type: audio/wav")
    for disposition in ('form-data; name="{}"', "form-data; name={}", 'form-data;name="{}"', 'FORM-DATA; NAME="{}"'):
        body = whole(
            sound, part("model", b"whisper", disposition, "Content-Type: text/plain; charset=utf-8"), part("x", b"1")
        )
        assert value(body, form["field"](body, TYPE, "model")) == b"whisper"
    for content_type in (
        'multipart/form-data; boundary="b"',
        "Multipart/Form-Data;boundary=b",
        TYPE + "; charset=UTF-8",
    ):
        assert value(body, form["field"](body, content_type, "model")) == b"whisper"


@pytest.mark.parametrize("stretch", [MIB, 1, 5])
def test_any_bytes_are_found(form: Form, stretch: int) -> None:
    """Wherever the search pauses, and however much the values look like a boundary."""
    form["stretch"](stretch)
    for seed in range(2000):
        chance = random.Random(seed)
        pieces = [b"\r", b"\n", b"-", b"--b", b"\r\n--", b"\r\n-b", b"b", b"\x00", b"model", b"whisper"]
        values = [b"".join(chance.choices(pieces, k=chance.randrange(8))) for _ in range(3)]
        values = [text for text in values if b"\r\n--b" not in b"\r\n" + text + b"\r\n"]
        names = chance.sample(["model", "file", "language"], len(values))
        body = whole(*(part(name, text) for name, text in zip(names, values, strict=True)))
        wanted = dict(zip(names, values, strict=True)).get("model")
        if values:
            assert value(body, form["field"](body, TYPE, "model")) == wanted, body
    form["stretch"](MIB)


MODEL = part("model", b"a")


@pytest.mark.parametrize(
    ("body", "content_type", "why"),
    [
        (whole(MODEL), "multipart/form-data", "its Content-Type has no plain boundary"),
        (whole(MODEL), TYPE + "; boundary=c", "its Content-Type has no plain boundary"),
        (whole(MODEL), TYPE + "; charset=utf-16", "its Content-Type has no plain boundary"),
        (whole(MODEL), "multipart/form-data; boundary*=utf-8''b", "its Content-Type has no plain boundary"),
        (whole(MODEL), "multipart/mixed; boundary=b", "its Content-Type has no plain boundary"),
        (b"\r\n" + whole(MODEL), TYPE, "it does not begin with its boundary"),
        (whole(MODEL)[:-6], TYPE, "part 1 is not understood"),
        (whole(MODEL) + MODEL, TYPE, "part 1 is not understood"),
        (whole(MODEL, part("model", b"b")), TYPE, "part 2 is not understood"),
        (whole(part("model", b"a", 'form-data; name="{}"; filename="a"')), TYPE, "part 1 is not understood"),
        (whole(part("model", b"a", "form-data; name*=utf-8''{}")), TYPE, "part 1 is not understood"),
        (whole(part("model", b"a", 'form-data; name="x"; name="{}"')), TYPE, "part 1 is not understood"),
        (whole(part("mo\\\\del", b"a")), TYPE, "part 1 is not understood"),
        (whole(part("x", b"a", 'form-data; name="{}"; filename="\\\\"; name="model"')), TYPE, "part 1 is not understood"),
        (whole(part("x", b"a", 'form-data; name="{}"', 'Content-Disposition: form-data; name="model"')), TYPE, "part 1 is not understood"),
        (whole(part("x", b"a", 'form-data; name="{}"', " folded: model")), TYPE, "part 1 is not understood"),
        (whole(part("x", b"a\r\n--bb")), TYPE, "part 1 is not understood"),
        (whole(part("x", b"a" * 3, "form-data; name={}" + ";" * 9000)), TYPE, "part 1 is not understood"),
        (whole(*[part("x", b"a")] * 1001), TYPE, "it has more than 1000 parts"),
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(form: Form, body: bytes, content_type: str, why: str) -> None:
    """In words that a client gets to read."""
    assert form["field"](body, content_type, "model") == (None, why.encode())


def test_the_name_is_replaced_and_nothing_else(form: Form) -> None:
    """An alias becomes the name that vLLM knows."""
    sound = part("file", half_a_second(), 'form-data; name="{}"; filename="a.wav"')
    body = whole(sound, part("model", b"whisper-1"), part("x", b"1"))
    found = form["field"](body, TYPE, "model")
    changed = form["splice"](body, [{**found, "text": b"whisper-large"}])
    assert changed == whole(sound, part("model", b"whisper-large"), part("x", b"1"))


@pytest.mark.parametrize(
    "unit", [b"\x00" * 4096, b"\r\n--", b"\r\n--\r\n--b" * 10 + b" "], ids=["zeros", "near", "nearer"]
)
def test_a_long_sound_never_holds_up_the_others(form: Form, unit: bytes) -> None:
    """25 MiB: measured at a millisecond a stretch; here the machine is busy."""
    sound = b"RIFF" + (unit * (25 * MIB // len(unit)))
    body = whole(
        part("file", sound.replace(b"\r\n--b", b"\r\n--a"), 'form-data; name="{}"; filename="a.wav"'),
        part("model", b"whisper"),
    )
    longest, pauses, begins = form["timed"](body, TYPE, "model")
    assert value(body, {"from": begins, "to": begins + 6}) == b"whisper"
    assert pauses >= 20
    assert longest < 0.05
