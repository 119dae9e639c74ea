"""scan.lua reads a JSON object as Python's json does, and changes no byte that it was not asked to."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.lua.luajit import Lua

WANTED = ("model", "stream", "priority", "stream_options", "user", "é")
SCAN = """
local scan = require "scan"
local wanted = {}
for _, name in ipairs(...) do wanted[name] = true end
return {
  scan = function(text) return scan.scan(text, wanted) end,
  string = scan.string, splice = scan.splice, without = scan.without, with = scan.with, edit = scan.edit,
  stretch = function(bytes) scan.STRETCH = bytes end,
  timed = function(text)
    local last, longest, pauses = os.clock(), 0, 0
    local function pause()
      longest, pauses = math.max(longest, os.clock() - last), pauses + 1
      last = os.clock()
    end
    assert(scan.scan(text, wanted, pause))
    pause()
    return longest, pauses
  end,
}
"""
MIB = 1024 * 1024

Scan = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def scan(lua: Lua) -> Scan:
    """The functions of the module."""
    return dict(lua.run(SCAN, list(WANTED)))


class Texts:
    """Makes JSON texts, and texts that nearly are."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def spaces(self) -> str:
        """What may stand between two parts."""
        return self.random.choice(["", "", "", " ", "\n", "\t \r"])

    def string(self, text: str | None = None) -> str:
        """A string with some of its characters escaped."""
        if text is None:
            characters = 'abc"\\/\b\f\n\r\té\u20ac\U0001f600{}[]:, '
            text = "".join(self.random.choices(characters, k=self.random.choice([0, 1, 3, 9, 30])))
        return '"' + "".join(self.character(character) for character in text) + '"'

    def character(self, character: str) -> str:
        """A character of a string as one may write it."""
        if self.random.random() < 0.15:
            return "".join(f"\\u{ord(unit):04x}" for unit in utf16(character))
        return json.dumps(character, ensure_ascii=self.random.random() < 0.3)[1:-1]

    def number(self) -> str:
        """A number."""
        return self.random.choice(["0", "-0", "7", "-12", "1e5", "0.25", "-1.5E-3", "12345678901234567890", "3.0e+2"])

    def value(self, depth: int = 0) -> str:
        """Any value."""
        kind = self.random.randrange(9 if depth < 4 else 6)
        if kind < 2:
            return self.string()
        if kind < 4:
            return self.number()
        if kind < 6:
            return self.random.choice(["true", "false", "null"])
        items = [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return self.joined(items, "[]") if kind < 8 else self.joined([self.member(depth + 1) for _ in items], "{}")

    def member(self, depth: int, name: str | None = None) -> str:
        """A member of an object."""
        return f"{self.spaces()}{self.string(name)}{self.spaces()}:{self.spaces()}{self.value(depth)}{self.spaces()}"

    def joined(self, parts: list[str], around: str) -> str:
        """An array or an object."""
        inside = ",".join(f"{self.spaces()}{part}{self.spaces()}" for part in parts) or self.spaces()
        return around[0] + inside + around[1]

    def body(self) -> str:
        """An object as clients send it, some of the wanted members in it, maybe more than once."""
        names = [self.random.choice([*WANTED, None, "mode", "models", ""]) for _ in range(self.random.randrange(7))]
        return self.spaces() + self.joined([self.member(1, name) for name in names], "{}") + self.spaces()

    def spoiled(self, text: str) -> str:
        """A text with one or two characters lost, added or replaced."""
        for _ in range(self.random.choice([1, 1, 2])):
            at = self.random.randrange(len(text) + 1)
            more = self.random.choice(
                [
                    '"',
                    "\\",
                    "{",
                    "}",
                    "[",
                    "]",
                    ",",
                    ":",
                    "0",
                    "1",
                    ".",
                    "-",
                    "e",
                    "\x00",
                    "\x1f",
                    "\n",
                    "u",
                    "t",
                    "\ufeff",
                ]
            )
            text = self.random.choice(
                [text[:at] + text[at + 1 :], text[:at] + more + text[at:], text[:at] + more + text[at + 1 :]]
            )
        return text


def utf16(character: str) -> list[str]:
    """The UTF-16 units of a character, each as one."""
    raw = character.encode("utf-16-be", "surrogatepass")
    return [chr(int.from_bytes(raw[at : at + 2], "big")) for at in range(0, len(raw), 2)]


def constant(name: str) -> None:
    """NaN and the infinities, which only Python takes for numbers."""
    raise ValueError(name)


def by_python(text: bytes) -> dict[str, Any] | None:
    """The object, or None where Python's json finds none; the value is a string where there is one, decoded."""
    try:
        value = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def found(scan: Scan, text: bytes) -> dict[str, Any] | None:
    """The values of the wanted members as the module finds them."""
    fields = scan["scan"](text)
    if not isinstance(fields, tuple) or fields[0] is None:
        return None
    return {
        name: json.loads(text[int(field["from"]) - 1 : int(field["to"])]) for name, field in dict(fields[0]).items()
    }


def wanted(values: dict[str, Any]) -> dict[str, Any]:
    """Those that the module is asked for."""
    return {name: value for name, value in values.items() if name in WANTED}


@pytest.mark.parametrize("stretch", [131072, 1, 3])
def test_it_finds_what_python_finds(scan: Scan, stretch: int) -> None:
    """Wherever it pauses: of two members with one name the last one counts, escapes in names are read."""
    scan["stretch"](stretch)
    for seed in range(3000):
        text = Texts(seed).body().encode()
        values = by_python(text)
        assert values is not None
        assert found(scan, text) == wanted(values), text
    scan["stretch"](131072)


def test_it_refuses_what_python_refuses(scan: Scan) -> None:
    """A text that only one of them understood would be read in two ways."""
    refused = 0
    for seed in range(30000):
        texts = Texts(seed)
        text = texts.spoiled(texts.body()).encode()
        values = by_python(text)
        refused += values is None
        assert found(scan, text) == (None if values is None or text.startswith(b"\xef\xbb\xbf") else wanted(values)), (
            text
        )
    assert 10000 < refused < 29000


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "the JSON ends too early"),
        (b"[]", "the JSON is broken at byte 1"),
        (b'"model"', "the JSON is broken at byte 1"),
        (b'\xef\xbb\xbf{"model":"a"}', "the JSON is broken at byte 1"),
        ('{"model":"a"}'.encode("utf-16"), "the JSON is broken at byte 1"),
        (b'{"model":"a"', "the JSON ends too early"),
        (b'{"model":"a', "the JSON ends too early"),
        (b'{"model":"a\\', "the JSON is broken at byte 12"),
        (b'{"model":"a"} {}', "the JSON is broken at byte 15"),
        (b'{"model":NaN}', "the JSON is broken at byte 10"),
        (b'{"n":[-Infinity]}', "the JSON is broken at byte 8"),
        (b'{"model":"a\nb"}', "the JSON is broken at byte 12"),
        (b'{"model":"\\x"}', "the JSON is broken at byte 11"),
        (b'{"model":"\\u12g4"}', "the JSON is broken at byte 11"),
        (b'{"n":01}', "the JSON is broken at byte 7"),
        (b'{"n":[1,]}', "the JSON is broken at byte 9"),
        (b'{"n":[1}}', "the JSON is broken at byte 8"),
        (b'{"n":1,}', "the JSON is broken at byte 8"),
        (b"{'n':1}", "the JSON is broken at byte 2"),
        (b'{"n":' + b"[" * 2000 + b"]" * 2000 + b"}", "the JSON is nested more than 1024 deep"),
        (b"{" + b'"model":1,' * 50 + b'"n":1}', "the JSON has model more than 32 times"),
    ],
)
def test_it_says_what_is_wrong(scan: Scan, text: bytes, why: str) -> None:
    """In words that a client gets to read."""
    assert scan["scan"](text) == (None, why.encode())


def test_deep_schemas_pass(scan: Scan) -> None:
    """A thousand levels are no problem, of arrays or of objects."""
    for opened, closed in ((b"[", b"]"), (b'{"a":', b"}")):
        text = b'{"n":' + opened * 1000 + b"1" + closed * 1000 + b',"model":"a"}'
        fields, _ = scan["scan"](text)
        assert text[fields["model"]["from"] - 1 : fields["model"]["to"]] == b'"a"'


def test_strings_are_read_as_python_reads_them(scan: Scan) -> None:
    """Escapes and pairs of surrogates included; half a pair is what Python's surrogatepass makes of it."""
    for seed in range(3000):
        text = b'{"model":' + Texts(seed).string().encode() + b"}"
        fields, _ = scan["scan"](text)
        assert scan["string"](text, fields["model"]).decode() == json.loads(text)["model"]
    lone = b'{"model":"\\ud800\\u0041\\udc00"}'
    fields, _ = scan["scan"](lone)
    assert scan["string"](lone, fields["model"]) == json.loads(lone)["model"].encode("utf-8", "surrogatepass")


def pairs(text: bytes) -> list[tuple[str, Any]]:
    """All members of an object, duplicates too."""
    found: list[tuple[str, Any]] = []

    def note(members: list[tuple[str, Any]]) -> dict[str, Any]:
        found[:] = members  # the outermost comes last
        return dict(members)

    json.loads(text, object_pairs_hook=note)
    return found


def test_edits_change_what_they_should_and_no_other_byte(scan: Scan) -> None:
    """Replaced, added and removed in one go: the members are those, in their order, and what was between them is still there."""
    for seed in range(5000):
        texts = Texts(seed)
        text = texts.body().encode()
        names = texts.random.sample(WANTED, texts.random.randrange(len(WANTED)))
        wishes = {name: texts.random.choice([False, '"new"', '{"a":[]}']) for name in names}
        fields, whole = scan["scan"](text)
        changed = scan["edit"](text, fields, whole, wishes)
        assert pairs(changed) == expected(pairs(text), wishes), (text, wishes, changed)
        kept = [name for name in WANTED if name in (fields or {}) and name not in wishes]
        after, _ = scan["scan"](changed)
        for name in kept:
            before_text = text[fields[name]["key_from"] - 1 : fields[name]["to"]]
            assert changed[after[name]["key_from"] - 1 : after[name]["to"]] == before_text
        if not wishes:
            assert changed == text


def expected(members: list[tuple[str, Any]], wishes: dict[str, Any]) -> list[tuple[str, Any]]:
    """The members as the wishes have them: the last of namesakes is replaced, all of them are removed, new ones come last."""
    names = [name for name, _ in members]
    last = {name: at for at, name in enumerate(names)}
    kept = []
    for at, (name, value) in enumerate(members):
        wish = wishes.get(name)
        if wish is not False:
            kept.append((name, json.loads(wish) if wish and at == last[name] else value))
    new = sorted((name for name, wish in wishes.items() if wish and name not in names), key=str.encode)
    return [*kept, *((name, json.loads(str(wishes[name]))) for name in new)]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b'{"priority":1}', b"{}"),
        (b'{ "priority" : 1 }', b"{  }"),
        (b'{"priority":1, "a":2}', b'{ "a":2}'),
        (b'{"a":2 , "priority":[1, 2] }', b'{"a":2  }'),
        (b'{"a":[ 1 ],"priority":1,"b":{ }}', b'{"a":[ 1 ],"b":{ }}'),
        (b'{"priority":1,"priority":2,"a":0}', b'{"a":0}'),
        (b'{"a":0,"priority":1 , "pri\\u006frity":2}', b'{"a":0}'),
        (b'{"priority":1,"a":0,"priority":2}', b'{"a":0}'),
    ],
)
def test_a_member_goes_with_its_comma_and_its_namesakes(scan: Scan, text: bytes, left: bytes) -> None:
    """What is left is as it was, byte for byte."""
    fields, _ = scan["scan"](text)
    assert scan["without"](text, fields["priority"]) == left


@pytest.mark.parametrize(
    ("text", "more"),
    [
        (b"{}", b'{"n":[1]}'),
        (b" { } ", b' { "n":[1]} '),
        (b'{"a":1 }\n', b'{"a":1 ,"n":[1]}\n'),
        (b'{"a":{}}', b'{"a":{},"n":[1]}'),
    ],
)
def test_a_member_is_added_at_the_end(scan: Scan, text: bytes, more: bytes) -> None:
    """Where it is the one that counts."""
    assert scan["with"](text, "n", "[1]") == more


def test_splicing_leaves_the_rest(scan: Scan) -> None:
    """Changes in any order, insertions too."""
    changes = [{"from": 5, "to": 6, "text": "<>"}, {"from": 1, "to": 0, "text": "^"}, {"from": 9, "to": 8, "text": "$"}]
    assert scan["splice"](b"abcdefgh", changes) == b"^abcd<>gh$"


@pytest.mark.parametrize(
    ("head", "unit", "tail"),
    [
        ('{"model":"m","prompt":"', "abcdefghijklmnopqrstuvwxyz+/0123", '"}'),
        ('{"model":"m","prompt":"', "\\n", '"}'),
        ('{"model":"m","prompt":[', "12345,", "1]}"),
        ('{"model":"m","prompt":[', '"a",', "1]}"),
        ('{"model":"m","prompt":[', '{"a":{}},', "1]}"),
        ('{"model":"m"', ',"a":1', "}"),
        ('{"model":"m","prompt":1', "      ", "}"),
    ],
)
def test_a_large_body_never_holds_up_the_others(scan: Scan, head: str, unit: str, tail: str) -> None:
    """20 MiB of anything: the longest stretch without a pause took a few milliseconds when it was measured (docs/gateway.md); here the machine is busy."""
    text = head + unit * ((20 * MIB - len(head) - len(tail)) // len(unit)) + tail
    longest, pauses = scan["timed"](text)
    assert pauses >= 160
    assert longest < 0.05
