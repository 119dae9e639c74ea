"""usage.lua finds what an answer used wherever it is cut into chunks, and takes out of a stream what only the gateway asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lua.luajit import Lua

USAGE = """
local usage = require "usage"
local scan = require "scan"
return {
    of_json = function(text) return usage.of_json(text) end,
    pieces = function(chunks)
        local answer = usage.answer()
        for _, chunk in ipairs(chunks) do answer:feed(chunk) end
        return answer:result()
    end,
    stream = function(ours, chunks, guess, cut)
        local stream, out = usage.stream(ours), {}
        for index, chunk in ipairs(chunks) do out[index] = stream:feed(chunk, index == #chunks and not cut) end
        return table.concat(out), stream:result(guess), out
    end,
    ask = function(text)
        local fields = assert(scan.scan(text, { stream = true, stream_options = true }))
        return usage.ask(text, fields)
    end,
    speed = function(chunk, times, ours)
        local stream, before = usage.stream(ours), os.clock()
        for _ = 1, times do stream:feed(chunk) end
        return (os.clock() - before) / times * 1e6
    end,
    whole_speed = function(text)
        local before = os.clock()
        local answer = usage.answer()
        for at = 1, #text, 32768 do answer:feed(text:sub(at, at + 32767)) end
        return answer:result(), os.clock() - before
    end,
}
"""

Usage = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def usage(lua: Lua) -> Usage:
    """The functions of the module."""
    return dict(lua.run(USAGE))


CHAT = {"prompt_tokens": 9, "total_tokens": 14, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
PLAIN = {"prompt_tokens": 9, "total_tokens": 14, "completion_tokens": 5, "prompt_tokens_details": None}
RESPONSES = {
    "input_tokens": 9, "input_tokens_details": {"cached_tokens": 4, "input_tokens_per_turn": [9]}, "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 1}, "total_tokens": 14,
}  # fmt: skip
ANTHROPIC = {"input_tokens": 3, "output_tokens": 5, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 2}
NINE = {"prompt": 9, "cached": 4, "completion": 5}
TRAP = 'She said: "usage":{"prompt_tokens":1} \\" and }{ ][ \\\\'


@pytest.mark.parametrize(
    ("answer", "used"),
    [
        (
            {
                "choices": [{"message": {"content": TRAP, "usage": {"prompt_tokens": 7}}}],
                "usage": CHAT,
                "prompt_logprobs": None,
            },
            NINE,
        ),
        ({"choices": [{"text": TRAP}], "usage": PLAIN, "x": {"y": []}}, {"prompt": 9, "completion": 5}),
        (
            {"data": [{"embedding": [0.1, -2e-05] * 50}], "usage": {"prompt_tokens": 6, "total_tokens": 6}},
            {"prompt": 6},
        ),
        ({"usage": {"prompt_tokens": 6, "total_tokens": 6}, "results": [{"document": {"text": TRAP}}]}, {"prompt": 6}),
        (
            {
                "output": [{"content": [{"text": TRAP}]}],
                "metadata": {"usage": {"prompt_tokens": 1}},
                "usage": RESPONSES,
            },
            NINE,
        ),
        ({"type": "message", "content": [{"text": TRAP}], "usage": ANTHROPIC}, NINE),
        ({"text": TRAP, "usage": {"type": "duration", "seconds": 11}}, {"seconds": 11}),
        ({"embeddings": {"float": [[0.5]]}, "meta": {"billed_units": {"input_tokens": 6}}}, {"prompt": 6}),
        ({"model": "usage", "tools": [{"usage": {"prompt_tokens": 1}}], "usage": None}, None),
        ({"error": {"message": TRAP, "usage": {"prompt_tokens": 1}}}, None),
        ({"input_tokens": 12}, None),
    ],
)
def test_answers(usage: Usage, answer: dict[str, Any], used: dict[str, int] | None) -> None:
    """Of every kind, whole and cut in two anywhere; what a client or a model wrote is no account."""
    for separators in ((",", ":"), (", ", ": ")):
        text = json.dumps(answer, separators=separators).encode()
        assert usage["of_json"](text) == used
        for at in range(len(text)):
            assert usage["pieces"]([text[:at], text[at:]]) == used, text[:at]
    assert usage["pieces"]([text[at : at + 1] for at in range(len(text))]) == used


def event(data: dict[str, Any] | str, name: str = "", end: str = "\n") -> bytes:
    """An event as vLLM writes it."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"{f'event: {name}{end}' if name else ''}data: {text}{end}{end}".encode()


def chat_chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A chunk of a chat."""
    return {
        "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}], **more,
    }  # fmt: skip


def chat(words: int, end: str = "\n", **more: Any) -> list[bytes]:
    """The events of a chat, without account and end."""
    chunks = [
        chat_chunk({"role": "assistant", "content": ""}),
        *(chat_chunk({"content": f"{TRAP} {n}"}, **more) for n in range(words)),
    ]
    return [event(chunk, end=end) for chunk in chunks]


def account(kind: str = "chat.completion.chunk", end: str = "\n") -> bytes:
    """The event that only tells the usage."""
    return event({"id": "c", "object": kind, "model": "m", "choices": [], "usage": CHAT}, end=end)


DONE = event("[DONE]")
TEXTS = [
    event({"id": "c", "object": "text_completion", "choices": [{"index": 0, "text": f"{TRAP} {n}"}]}) for n in range(4)
]
RESPONSE = [
    event(
        {"type": "response.created", "response": {"id": "r", "usage": None, "tools": [{"usage": {"input_tokens": 1}}]}},
        "response.created",
    ),
    *(
        event({"type": "response.output_text.delta", "delta": f"{TRAP} {n}"}, "response.output_text.delta")
        for n in range(3)
    ),
]
COMPLETED = event(
    {"type": "response.completed", "response": {"id": "r", "output": [TRAP], "usage": RESPONSES}}, "response.completed"
)
STARTED = {"type": "message_start", "message": {"id": "m", "content": [], "usage": ANTHROPIC | {"output_tokens": 0}}}
MESSAGE = [
    event(STARTED, "message_start"),
    *(
        event({"type": "content_block_delta", "delta": {"text": f"{TRAP} {n}"}}, "content_block_delta")
        for n in range(3)
    ),
]
STOPPED = [
    event(
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}}, "message_delta"
    ),
    event({"type": "message_stop"}, "message_stop"),
]
RUNNING = {
    "prompt_tokens": 9,
    "total_tokens": 10,
    "completion_tokens": 1,
    "prompt_tokens_details": {"cached_tokens": 4},
}

STREAMS: dict[str, tuple[bool, list[bytes], list[bytes], dict[str, Any]]] = {
    # what was asked by the gateway, what comes, what goes on, what was used
    "chat": (True, [*chat(5), account(), DONE], [*chat(5), DONE], NINE),
    "chat of a client that asked": (False, [*chat(5), account(), DONE], [*chat(5), account(), DONE], NINE),
    "chat with CRLF": (True, [*chat(3, "\r\n"), account(end="\r\n"), DONE], [*chat(3, "\r\n"), DONE], NINE),
    "chat with comments": (True, [b": ping\n\n", *chat(2), b": ping\n\n", account(), b"\n\n", DONE], [b": ping\n\n", *chat(2), b": ping\n\n\n\n", DONE], NINE),
    "completion": (True, [*TEXTS, account("text_completion"), DONE], [*TEXTS, DONE], NINE),
    "accounts all along": (False, [*chat(5, usage=RUNNING), account(), DONE], [*chat(5, usage=RUNNING), account(), DONE], NINE),
    "a forced account": (True, [*chat(5, usage=RUNNING), account(), DONE], [*chat(5, usage=RUNNING), DONE], NINE),
    "response": (False, [*RESPONSE, COMPLETED], [*RESPONSE, COMPLETED], NINE),
    "message": (False, [*MESSAGE, *STOPPED], [*MESSAGE, *STOPPED], NINE),
}  # fmt: skip


def cuts(text: bytes) -> Iterator[list[bytes]]:
    """Whole, in two at every place, byte by byte, and in random pieces."""
    yield [text]
    yield from ([text[:at], text[at:]] for at in range(1, len(text)))
    yield [text[at : at + 1] for at in range(len(text))]
    for seed in range(30):
        chance = random.Random(seed)
        places = sorted(chance.sample(range(1, len(text)), chance.randrange(2, 12)))
        yield [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", STREAMS)
def test_streams(usage: Usage, name: str) -> None:
    """However they are cut: the same account, and the same bytes for the client."""
    ours, comes, goes, used = STREAMS[name]
    for chunks in cuts(b"".join(comes)):
        assert usage["stream"](ours, chunks)[:2] == (b"".join(goes), used), chunks


def test_the_end_may_come_on_its_own(usage: Usage) -> None:
    """Nginx says that there is no more with an empty chunk."""
    text = b"".join([*chat(2), account(), DONE])
    assert usage["stream"](True, [text, b""])[:2] == (b"".join([*chat(2), DONE]), NINE)
    assert usage["stream"](True, [text[:-1], b""])[0] == b"".join([*chat(2), DONE])[:-1]


def test_what_only_the_gateway_wants_is_the_only_thing_that_waits(usage: Usage) -> None:
    """A chunk that ends an event goes on at once; when the client asked itself, every chunk does."""
    chunks = [*chat(3), account(), DONE]
    assert usage["stream"](True, chunks)[2] == [*chat(3), b"", DONE]
    halves = [half for chunk in chunks for half in (chunk[:20], chunk[20:])]
    assert usage["stream"](False, halves)[2] == halves


@pytest.mark.parametrize("name", ["chat", "completion", "response", "message", "accounts all along"])
def test_an_aborted_stream_is_estimated(usage: Usage, name: str) -> None:
    """By its events, and for the prompt by what the caller guesses; with an account so far by that."""
    ours, comes, _, _ = STREAMS[name]
    tokens = sum(b'"delta"' in one or b'"text_completion"' in one for one in comes[:4])
    used = usage["stream"](ours, [b"".join(comes[:4]), comes[4][:10]], 77, True)[1]
    assert used["estimated"] is True
    assert used["completion"] == tokens
    assert used["prompt"] == (9 if name in ("message", "accounts all along") else 77)
    assert usage["stream"](ours, [comes[0][:10]], 77, True)[1] == {"prompt": 0, "completion": 0, "estimated": True}


def test_a_cut_after_the_account_is_no_estimate(usage: Usage) -> None:
    """The client hung up before [DONE]: everything is known."""
    assert usage["stream"](True, [*chat(5), account()], 77, True)[1] == NINE


def test_a_stream_with_an_error_goes_on_unchanged(usage: Usage) -> None:
    """What it used is estimated."""
    text = b"".join([*chat(2), event({"error": {"message": TRAP, "code": 500}}), DONE])
    out, used, _ = usage["stream"](True, [text], 77)
    assert (out, used["estimated"]) == (text, True)


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"stream": True}, {"include_usage": True}),
        ({"stream": True, "stream_options": None}, {"include_usage": True}),
        ({"stream": True, "stream_options": {}}, {"include_usage": True}),
        ({"stream": True, "stream_options": {"include_usage": False, "x": [1]}}, {"include_usage": True, "x": [1]}),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, {"include_usage": True}),
        ({"stream": True, "stream_options": {"include_usage": True}}, None),
        ({"stream": True, "stream_options": {"include_usage": 1}}, None),
        ({"stream": True, "stream_options": 3}, None),
        ({"stream": False}, None),
        # what vLLM takes for true, by pydantic's rules, and what it does not
        ({"stream": 1}, {"include_usage": True}),
        ({"stream": 1.0}, {"include_usage": True}),
        ({"stream": "Yes"}, {"include_usage": True}),
        ({"stream": "on"}, {"include_usage": True}),
        ({"stream": 0}, None),
        ({"stream": 2}, None),
        ({"stream": "off"}, None),
        ({"stream": " yes"}, None),
        ({"stream": [1]}, None),
        ({}, None),
    ],
)
def test_usage_is_asked_for_where_the_client_does_not(
    usage: Usage, body: dict[str, Any], asked: dict[str, Any] | None
) -> None:
    """And nothing that would change its other events."""
    found = usage["ask"](json.dumps(body).encode())
    assert (None if found is None else json.loads(found)) == asked


def test_it_costs_microseconds(usage: Usage) -> None:
    """An event, and 20 MiB of vectors in chunks: measured at 1 us and 20 ms; here the machine is busy."""
    usage["speed"](chat(1)[1], 10000, True)
    assert usage["speed"](chat(1)[1], 100000, True) < 20
    vectors = b'{"data":[' + b"-0.012345678," * (20 * 1024 * 1024 // 13) + b'0],"usage":{"prompt_tokens":6}}'
    used, seconds = usage["whole_speed"](vectors)
    assert used == {"prompt": 6}
    assert seconds < 1
