"""LangChain's client for OpenAI's API. Prints what it got as one JSON object."""

import json
import os
import time

import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

at = {"base_url": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"], "max_retries": 0}
chat, odd = ChatOpenAI(model="generate", max_tokens=3, **at), ChatOpenAI(model="odd", **at)
told = {"chat": chat.invoke("Hello").content, "stream": "".join(str(part.content) for part in chat.stream("Hello"))}
told["tool"] = (
    odd.bind_tools([{"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}])
    .invoke("Hello")
    .tool_calls[0]["name"]
)
embeddings = OpenAIEmbeddings(
    model="embed", check_embedding_ctx_length=False, model_kwargs={"encoding_format": "float"}, **at
)
told["embedding"] = len(embeddings.embed_query("Hello"))
try:
    ChatOpenAI(model="none", **at).invoke("Hello")
except openai.NotFoundError as error:
    told["refused"] = [error.status_code, error.code]
begun = time.monotonic()
ChatOpenAI(model="odd", model_kwargs={"user": "full once"}, **(at | {"max_retries": 1})).invoke("Hello")
told["retried_after"] = time.monotonic() - begun
stream, told["aborted"] = odd.stream("Hello"), 0
for _part in stream:
    told["aborted"] += 1
    if told["aborted"] == 3:
        stream.close()
        break
print(json.dumps(told))
