"""What requests use: asked for, counted, logged, charged; and no client sees that a stream was asked."""

from __future__ import annotations

import concurrent.futures
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.gateway.backends import Asked, Backend, Handler
from tests.gateway.harness import CHAT, KEY, NAME, Gateway, document, route, running

ONLY = Backend("chat@gpu-1")
CLIENTS: dict[str, dict[str, Any]] = {
    "team-a": {"tokens_per_minute": 1000000}, "minute": {"tokens_per_minute": 600}, "day": {"tokens_per_day": 100}, "month": {"tokens_per_month": 100},
    "urgent": {"priority": -5},
}  # fmt: skip
KEYS = {
    KEY: {"client": "team-a"},
    **{f"{name}-0123456789abcdef": {"client": name} for name in CLIENTS if name != "team-a"},
}
PATHS = [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions"]
FLEET = document([route("small", [ONLY], aliases=["alias"], paths=PATHS)], [ONLY], CLIENTS, KEYS)
LABELS = 'client="team-a",model="small",instance="chat"'


def account_of(prompt: int, completion: int) -> dict[str, Any]:
    """As vLLM tells it."""
    details = {"cached_tokens": prompt // 2}
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": details,
    }


def event(data: dict[str, Any] | str) -> bytes:
    """An event of a stream."""
    return b"data: " + (data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))).encode() + b"\n\n"


def chunks(completion: int) -> list[bytes]:
    """The events of a chat without the account."""
    frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "small"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": f'"usage":{number}'} for number in range(completion))]
    return [event({**frame, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) for delta in deltas]


def counting(handler: Handler, asked: Asked) -> None:
    """Uses as much as `user` says, "prompt/completion/seconds between the tokens", and tells it where vLLM would."""
    body = asked.json
    prompt, completion, seconds = (float(part) for part in body["user"].split("/"))
    used = account_of(int(prompt), int(completion))
    if not body.get("stream"):
        return handler.reply(
            200, {"object": "chat.completion", "choices": [{"message": {"content": "x"}}], "usage": used, "z": None}
        )

    def parts() -> Iterator[bytes]:
        for chunk in chunks(int(completion)):
            yield chunk
            time.sleep(seconds)
        if (body.get("stream_options") or {}).get("include_usage"):
            yield event({"id": "c", "object": "chat.completion.chunk", "model": "small", "choices": [], "usage": used})
        yield event("[DONE]")

    return handler.stream(parts())


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    ONLY.reset()
    ONLY.answer = counting
    with running(tmp_path, FLEET, [ONLY.id]) as gateway:
        yield gateway


def used(line: dict[str, Any]) -> tuple[str, str, str, str]:
    return line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"], line["estimated"]


def key(name: str) -> str:
    return f"{name}-0123456789abcdef"


def test_an_answer_is_counted(gateway: Gateway) -> None:
    answer = gateway.ask(CHAT, {"model": "alias", "user": "20/7/0"})
    assert answer.json["usage"]["total_tokens"] == 27
    line = gateway.logged(answer.headers["x-request-id"])
    assert used(line) == ("20", "10", "7", "")
    assert 0 <= float(line["first_token"]) <= float(line["request_time"]) + 0.1
    found = gateway.metrics()
    for name, count in {"prompt_tokens": 20, "cached_tokens": 10, "completion_tokens": 7}.items():
        assert found[f"vllm_gateway_{name}_total{{{LABELS}}}"] == count
    assert found[f'vllm_gateway_requests_total{{status="200",{LABELS}}}'] == 1
    assert found['vllm_gateway_duration_seconds_count{model="small",instance="chat"}'] == 1
    assert found[f'vllm_gateway_backend_used{{backend="{ONLY.id}"}}'] == 1
    assert found[f'vllm_gateway_in_flight{{backend="{ONLY.id}"}}'] == 0


def test_a_stream_is_asked_and_its_client_does_not_see_it(gateway: Gateway) -> None:
    answer = gateway.ask(CHAT, {"model": "small", "user": "20/7/0", "stream": True})
    assert ONLY.asked[-1].json["stream_options"] == {"include_usage": True}
    assert answer.body == b"".join([*chunks(7), event("[DONE]")])
    assert used(gateway.logged(answer.headers["x-request-id"])) == ("20", "10", "7", "")
    assert gateway.metrics()['vllm_gateway_first_token_seconds_count{model="small",instance="chat"}'] == 1


def test_a_client_that_asks_gets_its_account(gateway: Gateway) -> None:
    body = {"model": "small", "user": "20/7/0", "stream": True, "stream_options": {"include_usage": True}}
    answer = gateway.ask(CHAT, body)
    assert ONLY.asked[-1].json == body
    assert b'"choices":[],"usage":{"prompt_tokens":20' in answer.body
    assert used(gateway.logged(answer.headers["x-request-id"])) == ("20", "10", "7", "")


def test_the_openai_client_sees_the_same_as_without_a_gateway(gateway: Gateway) -> None:
    context = gateway.tls
    context.check_hostname = False
    through = openai.OpenAI(
        base_url=f"https://127.0.0.1:{gateway.port}/v1", api_key=KEY, default_headers={"Host": NAME},
        http_client=openai.DefaultHttpxClient(verify=context),
    )  # fmt: skip
    straight = openai.OpenAI(base_url=f"http://127.0.0.1:{ONLY.port}/v1", api_key="x")
    for options in ({}, {"stream_options": {"include_usage": True}}, {"stream_options": {"include_usage": False}}):
        both = [
            [
                chunk.model_dump()
                for chunk in client.chat.completions.create(
                    model="small", messages=[], user="20/7/0", stream=True, **options  # type: ignore[call-overload]
                )
            ]
            for client in (through, straight)
        ]  # fmt: skip
        assert both[0] == both[1]
        assert len(both[0]) == 8 + (options == {"stream_options": {"include_usage": True}})
    whole = [
        client.chat.completions.create(model="small", messages=[], user="20/7/0").model_dump()
        for client in (through, straight)
    ]
    assert whole[0] == whole[1]


def test_an_aborted_stream_is_estimated(gateway: Gateway) -> None:
    """By its events; its prompt by what others of its route had for their bytes."""
    gateway.ask(CHAT, {"model": "small", "user": "20/7/0", "stream": True, "pad": "x" * 900})
    body = json.dumps({"model": "small", "user": "99/500/0.02", "stream": True, "pad": "x" * 1900}).encode()
    with gateway.connect() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {NAME}\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        received = b""
        while received.count(b"data: ") < 10:
            received += connection.recv(65536)
    (request,) = (
        line.split(": ")[1] for line in received.decode().split("\r\n") if line.lower().startswith("x-request-id")
    )
    assert ONLY.cut.wait(5)
    prompt, _, completion, estimated = used(gateway.logged(request))
    assert estimated == "true"
    assert 10 <= int(completion) <= 30
    # twice the bytes of the one before
    assert 36 <= int(prompt) <= 44
    assert gateway.metrics()[f"vllm_gateway_estimated_total{{{LABELS}}}"] == 1


def ends(gateway: Gateway) -> dict[str, int]:
    """How requests ended at backends."""
    name = "vllm_gateway_backend_requests_total"
    return {
        series.removeprefix(name): int(count) for series, count in gateway.metrics().items() if series.startswith(name)
    }


def test_how_requests_end_at_a_backend_is_counted(gateway: Gateway) -> None:
    """For the comparison after a turn. Of streams also when they began; what a client did wrong is no fault of the backend's."""
    gateway.ask(CHAT, {"model": "small", "user": "20/7/0", "stream": True})
    gateway.ask(CHAT, {"model": "small", "user": "20/7/0"})
    ONLY.answer = lambda handler, _asked: handler.reply(400, {"error": {"message": "no"}})
    assert gateway.ask(CHAT, {"model": "small"}).status == 400
    wanted = {f'{{backend="{ONLY.id}",outcome="ok"}}': 3}
    gateway.until(lambda: ends(gateway) == wanted)
    assert gateway.metrics()[f'vllm_gateway_backend_first_token_seconds_count{{backend="{ONLY.id}"}}'] == 1
    for status in (500, 503):
        ONLY.answer = lambda handler, _asked, status=status: handler.reply(status, {"error": {"message": "no"}})  # type: ignore[misc]
        assert gateway.ask(CHAT, {"model": "small"}).status == status
    wanted[f'{{backend="{ONLY.id}",outcome="error"}}'] = 2
    gateway.until(lambda: ends(gateway) == wanted)


def test_a_stream_that_its_backend_does_not_end_is_cut(gateway: Gateway) -> None:
    """One that goes away, and one that says that its engine died: both have said 200."""
    broken = [[chunks(7)[0]], [chunks(7)[0], event({"error": {"message": "EngineCore", "code": 500}}), event("[DONE]")]]
    for parts in broken:

        def answer(handler: Handler, _asked: Asked, parts: list[bytes] = parts) -> None:
            handler.stream(iter(parts))

        ONLY.answer = answer
        gateway.ask(CHAT, {"model": "small", "stream": True})
    gateway.until(lambda: ends(gateway) == {f'{{backend="{ONLY.id}",outcome="cut"}}': 2})


def test_an_error_counts_where_it_was_made(tmp_path: Path) -> None:
    """Though its client got an answer, from another backend."""
    bad, good = Backend("chat@gpu-1"), Backend("chat@gpu-2")
    bad.answer = lambda handler, _asked: handler.reply(502, {"error": {"message": "no"}})
    good.answer = lambda handler, _asked: handler.reply(200, {"choices": []})
    with running(tmp_path, document([route("small", [bad, good])], [bad, good]), [bad.id, good.id]) as gateway:
        for _ in range(20):
            assert gateway.ask(CHAT, {"model": "small"}).status == 200
        errors = len(bad.asked)
        assert errors
        gateway.until(
            lambda: (
                ends(gateway)
                == {'{backend="chat@gpu-1",outcome="error"}': errors, '{backend="chat@gpu-2",outcome="ok"}': 20}
            )
        )


def test_other_kinds_are_counted_too(gateway: Gateway) -> None:
    answers = {
        "/v1/embeddings": ({"data": [{"embedding": [0.5] * 2000}] * 8, "usage": {"prompt_tokens": 6, "total_tokens": 6}}, ("6", "", "", "")),
        "/v1/responses": ({"output": [], "usage": {"input_tokens": 9, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 4}}}, ("9", "4", "5", "")),
        "/v1/messages": ({"type": "message", "usage": {"input_tokens": 5, "output_tokens": 3, "cache_read_input_tokens": 4}}, ("9", "4", "3", "")),
        "/v1/audio/transcriptions": ({"text": "hello", "usage": {"type": "duration", "seconds": 11}}, ("", "", "", "")),
    }  # fmt: skip
    for path, (said, wanted) in answers.items():
        ONLY.answer = lambda handler, _asked, said=said: handler.reply(200, said)  # type: ignore[misc]
        answer = gateway.ask(path, {"model": "small", "input": "x"})
        assert answer.json == said
        assert used(gateway.logged(answer.headers["x-request-id"])) == wanted
    assert gateway.metrics()[f"vllm_gateway_sound_seconds_total{{{LABELS}}}"] == 11


def test_a_refused_question_uses_nothing(gateway: Gateway) -> None:
    ONLY.answer = lambda handler, _asked: handler.reply(
        400, {"error": {"message": "no", "usage": {"prompt_tokens": 5}}}
    )
    answer = gateway.ask(CHAT, {"model": "small"})
    assert answer.status == 400
    assert used(gateway.logged(answer.headers["x-request-id"])) == ("", "", "", "")
    found = gateway.metrics()
    assert found[f'vllm_gateway_requests_total{{status="400",{LABELS}}}'] == 1
    assert not any("tokens_total" in series for series in found)


def test_tokens_of_a_minute(gateway: Gateway) -> None:
    """The answer may use more than there was; then the next one waits as long as that takes to flow back."""
    first = gateway.ask(CHAT, {"model": "small", "user": "100/50/0"}, key=key("minute"))
    told = {name: first.headers[f"x-ratelimit-{name}-tokens"] for name in ("limit", "remaining", "reset")}
    assert told == {"limit": "600", "remaining": "600", "reset": "0ms"}
    second = gateway.ask(CHAT, {"model": "small", "user": "400/100/0"}, key=key("minute"))
    assert 450 <= int(second.headers["x-ratelimit-remaining-tokens"]) <= 460
    assert second.headers["x-ratelimit-reset-tokens"].startswith(("14", "15s"))
    third = gateway.ask(CHAT, {"model": "small", "user": "1/1/0"}, key=key("minute"))
    assert third.status == 429
    assert third.error["code"] == "rate_limit_exceeded"
    assert "tokens per minute" in third.error["message"]
    assert 4 <= int(third.headers["retry-after"]) <= 6
    assert len(ONLY.asked) == 2
    assert gateway.ask("/v1/models", key=key("minute")).status == 200
    assert gateway.metrics()['vllm_gateway_limited_total{client="minute",limit="tokens_per_minute"}'] == 1
    assert gateway.ask(CHAT, {"model": "small", "user": "1/1/0"}).status == 200


@pytest.mark.parametrize("name", ["day", "month"])
def test_tokens_of_a_day_and_a_month(gateway: Gateway, name: str) -> None:
    """They survive a reload, and a stop of Nginx."""
    for _ in range(2):
        assert gateway.ask(CHAT, {"model": "small", "user": "40/15/0", "stream": True}, key=key(name)).status == 200
    gateway.configure({**FLEET, "gateway": "gw-2"})
    assert gateway.ask(CHAT, {"model": "small", "user": "1/1/0"}, key=key(name)).status == 429
    gateway.restart()
    refused = gateway.ask(CHAT, {"model": "small", "user": "1/1/0"}, key=key(name))
    assert refused.status == 429
    assert refused.error["code"] == "insufficient_quota"
    now = time.gmtime()
    left = 86400 - (now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec)
    assert int(refused.headers["retry-after"]) % 86400 == pytest.approx(left % 86400, abs=5)


@pytest.mark.parametrize("heeded", [[True], [False], [True, False]])
def test_a_client_has_its_priority_where_it_is_heeded(gateway: Gateway, heeded: list[bool]) -> None:
    """And only that one, whatever it says; an instance without priorities would refuse the request."""
    gateway.configure(document([route("small", [ONLY], priority=heeds) for heeds in heeded], [ONLY], CLIENTS, KEYS))
    for said in ({}, {"priority": -100}, {"priority": "x"}):
        for name, wanted in (("team-a", {}), ("urgent", {"priority": -5} if all(heeded) else {})):
            body = {"model": "small", "user": "1/1/0"}
            assert gateway.ask(CHAT, {**said, **body}, key=KEY if name == "team-a" else key(name)).status == 200
            assert ONLY.asked[-1].json == {**body, **wanted}


class Own:
    """What clients count themselves, asking many times at once."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.lock = threading.Lock()
        self.counts: Counter[tuple[str, str]] = Counter()

    def ask(self, number: int) -> None:
        """One request of some client, streamed or not, asked for its account or not."""
        chance = random.Random(number)
        name = chance.choice([*list(CLIENTS)[:1], "urgent"])
        prompt, completion = chance.randrange(1, 90), chance.randrange(1, 9)
        body: dict[str, Any] = {
            "model": chance.choice(["small", "alias"]),
            "user": f"{prompt}/{completion}/0",
            "stream": chance.random() < 0.7,
        }
        if body["stream"] and chance.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
        answer = self.gateway.ask(CHAT, body, key=KEY if name == "team-a" else key(name))
        assert answer.status == 200
        with self.lock:
            self.counts[name, "requests"] += 1
            self.counts[name, "prompt_tokens"] += prompt
            self.counts[name, "completion_tokens"] += completion

    def by_metrics(self) -> Counter[tuple[str, str]]:
        """The same by the gateway."""
        found: Counter[tuple[str, str]] = Counter()
        for series, value in self.gateway.metrics().items():
            for name in CLIENTS:
                for what in ("requests", "prompt_tokens", "completion_tokens"):
                    if series.startswith(f"vllm_gateway_{what}_total{{") and f'client="{name}"' in series:
                        found[name, what] += int(value)
        return found


def test_nothing_is_lost(gateway: Gateway) -> None:
    nothing_is_lost(gateway, 600)


def nothing_is_lost(gateway: Gateway, requests: int) -> None:
    """By the counters, and by the log: what clients counted themselves, over reloads."""
    own = Own(gateway)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(own.ask, number) for number in range(requests)]
        for number in range(2):
            concurrent.futures.wait(futures[: (number + 1) * requests // 3])
            gateway.configure({**FLEET, "gateway": f"gw-{number}"})
        for future in futures:
            future.result()
    gateway.until(lambda: own.by_metrics() == own.counts)
    log: Counter[tuple[str, str]] = Counter()
    for text in (gateway.directory / "var/log/nginx/access.log").read_text().split("\n")[:-1]:
        line = json.loads(text)
        if line["uri"] == CHAT:
            log[line["client"], "requests"] += 1
            for what in ("prompt_tokens", "completion_tokens"):
                log[line["client"], what] += int(line[what])
            assert line["estimated"] == ""
    assert log == own.counts
