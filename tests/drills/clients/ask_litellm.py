"""LiteLLM as a client. Prints what it got as one JSON object."""

import json
import os
import time

import litellm

at = {"api_base": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"], "max_retries": 0}
messages = [{"role": "user", "content": "Hello"}]
tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
told = {"chat": litellm.completion("openai/generate", messages, max_tokens=3, **at).choices[0].message.content}
parts = litellm.completion("openai/generate", messages, max_tokens=3, stream=True, **at)
told["stream"] = "".join(part.choices[0].delta.content or "" for part in parts)
told["tool"] = (
    litellm.completion("openai/odd", messages, tools=tools, **at).choices[0].message.tool_calls[0].function.name
)
told["embedding"] = len(
    litellm.embedding("openai/embed", ["Hello"], encoding_format="float", **at).data[0]["embedding"]
)
told["models"] = litellm.get_valid_models(
    check_provider_endpoint=True,
    custom_llm_provider="openai",
    api_key=at["api_key"],
    api_base=at["api_base"].removesuffix("/v1"),
)
try:
    litellm.completion("openai/none", messages, **at)
except litellm.NotFoundError as error:
    told["refused"] = [error.status_code, "model_not_found" if "does not exist" in str(error) else str(error)]
begun = time.monotonic()
litellm.completion("openai/odd", messages, extra_body={"user": "full once"}, **(at | {"max_retries": 1}))
told["retried_after"] = time.monotonic() - begun
stream, told["aborted"] = litellm.completion("openai/odd", messages, stream=True, **at), 0
for _part in stream:
    told["aborted"] += 1
    if told["aborted"] == 3:
        break
stream.completion_stream.close()
print(json.dumps(told))
