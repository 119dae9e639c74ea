"""The load generator sees every kind of failure, and nothing where there is none. What it asks here misbehaves as the name of the model says."""

from __future__ import annotations

import json
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import make_pair
from tests.gateway.backends import Asked, Backend, Handler
from tests.load import Gateway, Load
from tests.load.__main__ import main

KEY = "k" * 40
WORDS = (" Paris", " is", " the", " capital")


def event(content: object) -> bytes:
    """An event of a stream."""
    return b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n"


def member(asked: Asked, text: str) -> dict[str, Any]:
    """A piece of text in the words of a completion or of a chat, whole or streamed."""
    if not asked.path.endswith("/chat/completions"):
        return {"text": text}
    return {("delta" if asked.json.get("stream") else "message"): {"content": text}}


def pieces(asked: Asked) -> list[bytes]:
    """The events of a right stream: a token each, the account, [DONE]."""
    tokens = asked.json["max_tokens"]
    ends = [None] * (tokens - 1) + ["length"]
    made = [
        {"choices": [{"finish_reason": end, **member(asked, WORDS[number % 4])}]} for number, end in enumerate(ends)
    ]
    return [*map(event, [*made, {"choices": [], "usage": {"completion_tokens": tokens}}]), event(b"[DONE]")]


def says(tokens: int) -> str:
    """The right answer."""
    return "".join(WORDS[number % 4] for number in range(tokens))


def whole(asked: Asked) -> dict[str, Any]:
    """A right answer."""
    tokens = asked.json["max_tokens"]
    choice = {"finish_reason": "length", **member(asked, says(tokens))}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


def late(parts: list[bytes], number: int, seconds: float) -> Iterator[bytes]:
    """A pause in front of a piece."""
    for place, part in enumerate(parts):
        time.sleep(seconds if place == number else 0)
        yield part


def cut(handler: Handler, asked: Asked) -> None:
    """The connection ends after three events."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for part in pieces(asked)[:3]:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
    handler.close_connection = True


def short(handler: Handler, asked: Asked) -> None:
    """The connection ends before the answer does."""
    data = json.dumps(whole(asked)).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[:-10])
    handler.close_connection = True


def closes(handler: Handler, asked: Asked) -> None:
    """A right answer, behind which the connection ends without a word: as a server's does that has been idle for too long."""
    answer(handler, asked)
    handler.close_connection = True


def answer(handler: Handler, asked: Asked) -> None:
    """What is right."""
    if asked.json.get("stream"):
        handler.stream(iter(pieces(asked)))
    else:
        handler.reply(200, whole(asked))


Answer = Callable[[Handler, Asked], None]


def streamed(made: Callable[[list[bytes]], Iterable[bytes]]) -> Answer:
    """A stream made from a right one."""
    return lambda handler, asked: handler.stream(iter(made(pieces(asked))))


def replied(status: int, made: Callable[[dict[str, Any]], dict[str, Any] | str]) -> Answer:
    """An answer made from a right one."""
    return lambda handler, asked: handler.reply(status, made(whole(asked)))


def slow(handler: Handler, asked: Asked) -> None:
    """Late by longer than the client waits."""
    time.sleep(1.5)
    answer(handler, asked)


FAULT = event({"error": {"message": "EngineCore"}})
# Name -> how it is broken, and what the report says.
STREAMS: dict[str, tuple[Answer, str]] = {
    "cut": (cut, "the connection ended in the middle of the answer"),
    "no reason": (
        streamed(lambda parts: (part.replace(b'"length"', b"null") for part in parts)),
        "no event has a finish reason",
    ),
    "no done": (streamed(lambda parts: parts[:-1]), r"it has no \[DONE\]"),
    "500": (replied(500, lambda _right: {"error": {"message": "of vLLM"}}), "the status is 500.*of vLLM"),
    "no JSON": (streamed(lambda parts: (part.replace(b"}", b"", 1) for part in parts)), "it is no JSON"),
    "error": (streamed(lambda parts: [*parts[:2], FAULT, parts[-1]]), "it is an error"),
    "fewer": (
        streamed(lambda parts: (part.replace(b'_tokens": 8', b'_tokens": 7') for part in parts)),
        "8 tokens were asked for, its account says 7",
    ),
    "no account": (streamed(lambda parts: [*parts[:-2], parts[-1]]), "its account says None"),
    "no text": (
        streamed(lambda parts: (re.sub(rb" (Paris|is|the|capital)", b"", part) for part in parts)),
        "it has no text",
    ),
    "nonsense": (
        streamed(lambda parts: (part.replace(b"capital", b"kapital") for part in parts)),
        "its text is not what this model says",
    ),
    "half an event": (streamed(lambda parts: [*parts[:-1], b"data: [DONE]"]), "its last event is cut"),
    "no event": (streamed(lambda parts: [b"<html>\n\n", *parts]), "it has an event that is none"),
    "more": (streamed(lambda parts: parts * 2), r"something came after \[DONE\]"),
    "reset": (lambda handler, asked: handler.reset(), "ConnectionResetError"),
    "pause": (streamed(lambda parts: late(parts, 4, 0.6)), r"it paused for 0\.[6-9]"),
    "silence": (streamed(lambda parts: late(parts, 4, 1.5)), "nothing came for 1 s"),
}
WHOLE: dict[str, tuple[Answer, str]] = {
    "cut": (short, "the connection ended in the middle of the answer"),
    "no reason": (
        replied(200, lambda right: json.dumps(right).replace('"length"', "null")),
        "its finish reason is None",
    ),
    "500": STREAMS["500"],
    "429": (replied(429, lambda _right: {"error": {"message": "too many"}}), "the status is 429"),
    "no JSON": (replied(200, lambda right: json.dumps(right)[:-1]), "it is no JSON"),
    "no choices": (replied(200, lambda right: {**right, "choices": []}), "it has no choice"),
    "no account": (replied(200, lambda right: {**right, "usage": None}), "its account says None"),
    "silence": (slow, "nothing came for 1 s"),
}


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """What answers as it should, or as a test says."""
    backend = Backend("server", answer=getattr(request, "param", answer))
    yield backend
    backend.close()


def load(backend: Backend, streams: int = 2, whole: int = 0, **more: Any) -> Load:
    """A few clients of it, one answer of eight tokens after the other."""
    gateway = Gateway("gw-1", "127.0.0.1", backend.port)
    told: dict[str, Any] = {"tokens": (8, 8), "silence": 1, "longest_pause": 0.5, "think": 0.05, **more}
    return Load([gateway], ["small"], KEY, streams=streams, whole=whole, says=says, **told)


def failing(load: Load, expected: str) -> str:
    """What it says when the server is broken."""
    with pytest.raises(AssertionError) as failed, load:
        pytest.fail("it got going")
    told = str(failed.value)
    assert re.search(r"\n  \d\d:\d\d:\d\d\.\d{3} #\d+ gw-1: a(n answer| stream) of 8 tokens of small by /v1/", told)
    assert re.search(expected, told), told
    return told


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_is_broken_is_seen(server: Backend, name: str) -> None:
    server.answer, expected = STREAMS[name]
    failing(load(server), expected)


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_that_is_broken_is_seen(server: Backend, name: str) -> None:
    server.answer, expected = WHOLE[name]
    failing(load(server, 0, 2), expected)


def test_a_server_that_is_not_there_is_seen(server: Backend) -> None:
    clients = load(server)
    server.close()
    assert "nothing came" in failing(clients, "ConnectionRefusedError")


def test_what_is_right_passes_and_is_measured(server: Backend, tmp_path: Path) -> None:
    server.answer = lambda handler, asked: (
        handler.stream(late(pieces(asked), 3, 0.2)) if asked.json.get("stream") else answer(handler, asked)
    )
    with load(server, 3, 2, tokens=(4, 40), record=tmp_path / "record") as clients:
        time.sleep(1)
    summary = clients.summary()
    assert summary.failed == 0 and summary.streams > 5
    assert 0.19 < summary.longest_pause < 0.5, summary.told()
    assert {outcome.question.path for outcome in clients.outcomes} == {"/v1/completions", "/v1/chat/completions"}
    assert len({outcome.question.tokens for outcome in clients.outcomes}) > 5, "of many lengths"
    lines = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert len(lines) == summary.requests
    assert {line["gateway"] for line in lines} == {"gw-1"}


def test_a_failure_in_the_middle_is_one_failure(server: Backend) -> None:
    """Later than the first answers, and with the right ones around it."""
    clients = load(server, 2, 2)
    clients.start()
    server.answer = STREAMS["cut"][0]
    time.sleep(0.3)
    server.answer = answer
    time.sleep(0.3)
    clients.stop()
    assert 1 <= len(clients.failures()) < len(clients.outcomes)
    assert not clients.failures(since=time.time())
    with pytest.raises(AssertionError, match="requests failed"):
        clients.check()


def test_a_connection_that_was_closed_between_two_requests_is_opened_anew(server: Backend) -> None:
    server.answer = closes
    with load(server, 1, 1, think=0.3) as clients:
        time.sleep(1)
    assert any(outcome.reconnected for outcome in clients.outcomes)


def test_each_failure_names_its_gateway_and_one_that_is_left_out_is_not_asked(server: Backend) -> None:
    bad = Backend("bad", answer=answer)
    gateways = [Gateway("good", "127.0.0.1", server.port), Gateway("bad", "127.0.0.1", bad.port)]
    clients = Load(gateways, ["small"], KEY, streams=2, whole=2, tokens=(8, 8), think=0.05)
    clients.start()
    bad.answer = STREAMS["500"][0]
    time.sleep(0.5)
    clients.leave_out("bad")
    time.sleep(0.3)
    quiet = time.time()
    time.sleep(0.3)
    clients.stop()
    bad.close()
    assert {outcome.gateway for outcome in clients.failures()} == {"bad"}
    assert "bad: a" in clients.report()
    assert {outcome.gateway for outcome in clients.outcomes if outcome.begun > quiet} == {"good"}


def test_a_certificate_of_somebody_else_is_a_failure(server: Backend, tmp_path: Path) -> None:
    for name, text in zip(("cert.pem", "key.pem"), make_pair(), strict=True):
        (tmp_path / name).write_text(text)
    context = ssl.create_default_context()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(*(str(tmp_path / name) for name in ("cert.pem", "key.pem")))
    server.server.socket = serving.wrap_socket(server.server.socket, server_side=True)
    clients = load(server)
    clients.gateways = [Gateway("gw-1", "127.0.0.1", server.port, context)]
    failing(clients, "SSLCertVerificationError")


def test_by_hand_it_ends_with_one_when_a_request_failed(
    server: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    url = f"http://127.0.0.1:{server.port}"
    words = (
        url,
        "--model",
        "small",
        "--key-file",
        str(tmp_path / "key"),
        "--seconds",
        "0.5",
        "--streams",
        "1",
        "--whole",
        "1",
    )
    assert main(*words, "--tokens", "1", "8") == 0
    assert re.search(r"requests in \d+ s, 0 failed", capsys.readouterr().out)
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    server.answer = STREAMS["500"][0]
    assert main(*words) == 1
    assert "the status is 500" in capsys.readouterr().out
