"""OpenAI's own library for Python against a gateway, with stand-ins for vLLM behind it. Other libraries: tests/drills/test_clients.py."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.gateway.backends import Asked, Backend, Handler, breaking, failing, held, right, tokens
from tests.gateway.harness import KEY, Gateway
from tests.gateway.stand_ins import FEW, served

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": []},
    },
}
EMPTY_RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "call-1", "content": "[]"}
ODD = Backend("odd@gpu-2")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with served(tmp_path_factory.mktemp("clients"), ODD) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh() -> None:
    ODD.reset()


def client(gateway: Gateway, key: str = KEY, retries: int = 0) -> openai.OpenAI:
    tls = ssl.create_default_context(cafile=str(gateway.ca_file))
    http = openai.DefaultHttpxClient(verify=tls)
    return openai.OpenAI(base_url=gateway.base_url, api_key=key, max_retries=retries, timeout=10, http_client=http)


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_chat(gateway: Gateway) -> None:
    answer = client(gateway).chat.completions.create(model="generate", messages=say("Hello"), max_tokens=3)
    assert answer.choices[0].message.content == "Paris is the"
    assert answer.usage
    assert answer.usage.completion_tokens == 3
    assert answer.model == "generate"


def test_an_alias(gateway: Gateway) -> None:
    assert (
        client(gateway).chat.completions.create(model="gpt-4o", messages=say("Hello"), max_tokens=1).model == "generate"
    )


@pytest.mark.parametrize("usage", [False, True])
def test_stream(gateway: Gateway, usage: bool) -> None:
    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    events = list(
        client(gateway).chat.completions.create(
            model="generate", messages=say("Hello"), max_tokens=5, stream=True, **more
        )
    )
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == " Paris is the capital of"
    # the account comes to who asked for it, and to nobody else
    assert [event.usage.completion_tokens for event in events if event.usage] == ([5] if usage else [])
    assert all(event.choices for event in events[: -1 if usage else None])


def test_completions(gateway: Gateway) -> None:
    asked = client(gateway).completions
    assert asked.create(model="generate", prompt="Hello", max_tokens=2).choices[0].text == " Paris is"
    streamed = asked.create(model="generate", prompt="Hello", max_tokens=2, stream=True)
    assert "".join(event.choices[0].text for event in streamed if event.choices) == " Paris is"


def test_embeddings(gateway: Gateway) -> None:
    """In base64 by default of the library, which the stand-in does not do: asked for as floats."""
    answer = client(gateway).embeddings.create(model="embed", input=["one", "two"], encoding_format="float")
    assert [len(entry.embedding) for entry in answer.data] == [16, 16]


def test_models(gateway: Gateway) -> None:
    asked = client(gateway).models
    assert [model.id for model in asked.list()] == ["generate", "embed", "odd"]
    assert asked.retrieve("embed").id == "embed"
    assert asked.retrieve("gpt-4o").id in ("gpt-4o", "generate")
    with pytest.raises(openai.NotFoundError) as caught:
        asked.retrieve("none")
    assert caught.value.code == "model_not_found"
    assert [model.id for model in client(gateway, FEW).models.list()] == ["odd"]


def test_tools(gateway: Gateway) -> None:
    """A call of a tool as vLLM answers it, and what it gave back: no empty list becomes an object on the way."""
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Paris"}'}}

    def calling(handler: Handler, _asked: Asked) -> None:
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        handler.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "odd",
                            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})  # fmt: skip

    ODD.answer = calling
    messages = [*say("Weather?"), {"role": "assistant", "content": "", "tool_calls": [call]}, EMPTY_RESULT]
    tools: list[Any] = [TOOL]
    answer = client(gateway).chat.completions.create(model="odd", messages=messages, tools=tools, seed=2**60 + 1)
    (called,) = answer.choices[0].message.tool_calls or []
    assert called.type == "function"
    assert json.loads(called.function.arguments) == {"place": "Paris"}
    (asked,) = ODD.asked
    assert asked.json == {"model": "odd", "messages": messages, "tools": [TOOL], "seed": 2**60 + 1}


@pytest.mark.parametrize(("key", "model", "error", "code"), [
    ("wrong-0123456789abcdef", "generate", openai.AuthenticationError, "invalid_api_key"), (KEY, "none", openai.NotFoundError, "model_not_found"),
    (FEW, "generate", openai.NotFoundError, "model_not_found"), (KEY, "embed", openai.NotFoundError, "not_served"),
])  # fmt: skip
def test_refusals(gateway: Gateway, key: str, model: str, error: type[openai.APIStatusError], code: str) -> None:
    with pytest.raises(error) as caught:
        client(gateway, key).chat.completions.create(model=model, messages=say("Hello"))
    assert caught.value.code == code
    assert caught.value.request_id


def test_what_vllm_refuses(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
        client(gateway).chat.completions.create(model="generate", messages=say("Hello"), max_tokens=0)


def test_it_tries_again_when_all_are_full(gateway: Gateway) -> None:
    """503 of vLLM: the library waits as long as the gateway says."""

    def full_once(handler: Handler, asked: Asked) -> None:
        (failing(503) if len(ODD.asked) == 1 else right)(handler, asked)

    ODD.answer = full_once
    begun = time.monotonic()
    client(gateway, retries=1).chat.completions.create(model="odd", messages=say("Hello"))
    assert len(ODD.asked) == 2
    assert 2 <= time.monotonic() - begun < 4
    ODD.answer = failing(503)
    with pytest.raises(openai.InternalServerError) as caught:
        client(gateway).chat.completions.create(model="odd", messages=say("Hello"))
    assert caught.value.status_code == 503


def test_it_tries_again_when_it_asks_too_much_at_once(gateway: Gateway) -> None:
    ODD.answer = held(0.6)

    async def both() -> list[Any]:
        tls = ssl.create_default_context(cafile=str(gateway.ca_file))
        http = openai.DefaultAsyncHttpxClient(verify=tls)
        async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=FEW, max_retries=2, http_client=http) as asked:
            return await asyncio.gather(
                *(asked.chat.completions.create(model="odd", messages=say("Hello")) for _ in range(2))
            )

    begun = time.monotonic()
    assert len(asyncio.run(both())) == 2
    assert len(ODD.asked) == 2, "the refused one did not reach the backend"
    assert time.monotonic() - begun > 1.5


def test_a_server_that_fails(gateway: Gateway) -> None:
    ODD.answer = failing(500)
    with pytest.raises(openai.InternalServerError):
        client(gateway).chat.completions.create(model="odd", messages=say("Hello"))

    ODD.answer = breaking
    seen = 0
    with pytest.raises(openai.APIConnectionError):
        for _event in client(gateway).chat.completions.create(model="odd", messages=say("Hello"), stream=True):
            seen += 1
    assert seen == 3, "an answer that began is what it is, and breaks off"


def test_abort(gateway: Gateway) -> None:
    ODD.answer = lambda handler, _asked: handler.stream(tokens(200, 0.02))
    with client(gateway, FEW) as asked:
        for _ in range(3):  # each frees its only slot
            ODD.cut.clear()
            stream = asked.chat.completions.create(model="odd", messages=say("Hello"), stream=True)
            next(iter(stream))
            stream.close()
            assert ODD.cut.wait(2)
            gateway.until(lambda: gateway.admin("/in_flight")["in_flight"][ODD.id] == 0, 1)


def test_limits_are_told_as_openai_tells_them(gateway: Gateway) -> None:
    told = (
        client(gateway)
        .chat.completions.with_raw_response.create(model="generate", messages=say("Hello"), max_tokens=1)
        .headers
    )
    assert int(told["x-ratelimit-limit-requests"]) > int(told["x-ratelimit-remaining-requests"]) >= 0
    assert told["x-ratelimit-reset-requests"]
    assert told["x-request-id"]
