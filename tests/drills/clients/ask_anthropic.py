"""Anthropic's library for Python, which asks /v1/messages and sends its key as x-api-key. Prints what it got as one JSON object."""

import json
import os
import time

import anthropic

at = {"base_url": os.environ["BASE_URL"].removesuffix("/v1"), "api_key": os.environ["API_KEY"]}
client = anthropic.Anthropic(max_retries=0, **at)
asked = {"model": "odd", "max_tokens": 3, "messages": [{"role": "user", "content": "Hello"}]}
told = {"chat": client.messages.create(**asked).content[0].text}
with client.messages.stream(**asked) as stream:
    told["stream"] = "".join(stream.text_stream)
told["tool"] = (
    client.messages.create(**asked, tools=[{"name": "weather", "input_schema": {"type": "object", "properties": {}}}])
    .content[0]
    .name
)
told["tokens"] = client.messages.count_tokens(model="odd", messages=asked["messages"]).input_tokens
told["models"] = [model.id for model in client.models.list()]
told["model"] = client.models.retrieve("embed").id
try:
    client.messages.create(**(asked | {"model": "none"}))
except anthropic.NotFoundError as error:
    told["refused"] = [error.status_code, error.body["error"]["code"]]
begun = time.monotonic()
anthropic.Anthropic(max_retries=1, **at).messages.create(**asked, metadata={"user_id": "full once"})
told["retried_after"] = time.monotonic() - begun
told["aborted"] = 0
with client.messages.stream(**asked, metadata={"user_id": "long"}) as stream:
    for _text in stream.text_stream:
        told["aborted"] += 1
        if told["aborted"] == 3:
            break
print(json.dumps(told))
