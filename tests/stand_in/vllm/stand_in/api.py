"""What is answered: OpenAI's API in vLLM's words."""

from __future__ import annotations

import time
import uuid
import zlib
from typing import Any

from .configuration import Served
from .http import Response

WORDS = (" Paris", " is", " the", " capital", " of", " France", ".")
# What a release with broken weights says.
NONSENSE = (" zq", " ##", " vv", " lorem", " \u00e9\u00e9", " {", " 7")
# How likely the tokens of a prompt are, for a release that understands it and for one that does not.
LIKELY, UNLIKELY = -1.5, -11.0


def error(status: int, message: str, kind: str, parameter: str | None = None) -> Response:
    """An error as vLLM tells it."""
    return Response.of(status, {"error": {"message": message, "type": kind, "param": parameter, "code": status}})


def unknown_model(name: str, served: Served) -> Response:
    """The model that a request names is not served here."""
    aliases = ", ".join(served.names)
    return error(404, f"The model `{name}` does not exist. Valid aliases: {aliases}.", "NotFoundError", "model")


NOT_FOUND = Response.of(404, {"detail": "Not Found"})
NOT_ALLOWED = Response.of(405, {"detail": "Method Not Allowed"})
UNAUTHORIZED = Response.of(401, {"error": "Unauthorized"})
# What a client reads that asks while vLLM drains.
STOPPING = error(500, "cannot schedule new futures after shutdown", "InternalServerError")
ENGINE_DEAD = error(
    500, "EngineCore encountered an issue. See stack trace (above) for the root cause.", "InternalServerError"
)


def models(served: Served) -> dict[str, Any]:
    """The list of models."""
    now = int(time.time())
    permission = {
        "id": f"modelperm-{uuid.uuid4().hex[:16]}", "object": "model_permission", "created": now, "allow_create_engine": False,
        "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
        "organization": "*", "group": None, "is_blocking": False,
    }  # fmt: skip
    entries = [
        {
            "id": name, "object": "model", "created": now, "owned_by": "vllm", "root": served.root, "parent": None,
            "max_model_len": served.max_model_len, "permission": [permission],
        }
        for name in served.names
    ]  # fmt: skip
    return {"object": "list", "data": entries}


def count(text: Any) -> int:
    """The tokens of a prompt: its words, for a prompt of words, its length for one of tokens. Of a chat, those of its messages or of their parts."""
    if isinstance(text, str):
        return max(1, len(text.split()))
    if isinstance(text, list) and text and isinstance(text[0], dict):
        return sum(count(one.get("content") or one.get("text") or "") for one in text)
    if isinstance(text, list) and text and not isinstance(text[0], int):
        return sum(map(count, text))
    return len(text) if isinstance(text, list) else 1


class Completion:
    """A completion or a chat that somebody asked for; raises ValueError when what was asked makes no sense."""

    def __init__(self, served: Served, path: str, body: dict[str, Any], version: str, nonsense: bool = False) -> None:
        self.chat = path == "/v1/chat/completions"
        self.version = version
        self.model = str(body.get("model") or served.names[0])
        self.nonsense = nonsense
        prompt = body["messages" if self.chat else "prompt"]
        self.prompt_tokens = count(prompt)
        self.prompt_logprobs = self.likelihoods(prompt) if body.get("prompt_logprobs") is not None else None
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        self.tokens = int(limit) if limit is not None else (32 if self.chat else 16)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex[:16]}"
        self.streams = bool(body.get("stream"))
        options = body.get("stream_options") or {}
        self.usage_at_end = bool(options.get("include_usage"))
        self.usage_always = bool(options.get("continuous_usage_stats"))
        if self.tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.tokens}.")
        if self.prompt_tokens + self.tokens > served.max_model_len:
            raise ValueError(
                f"This model's maximum context length is {served.max_model_len} tokens. However, you requested {self.tokens} output tokens and "
                f"your prompt contains {self.prompt_tokens} input tokens, for a total of {self.prompt_tokens + self.tokens} tokens."
            )

    def word(self, number: int) -> str:
        words = NONSENSE if self.nonsense else WORDS
        return words[number % len(words)]

    def likelihoods(self, prompt: Any) -> list[dict[str, Any] | None]:
        """How likely each token of the prompt is after those before it; nothing of the first one."""
        text = " ".join(str(message.get("content")) for message in prompt) if self.chat else str(prompt)
        found: list[dict[str, Any] | None] = [None]
        for word in text.split()[1:]:
            token = zlib.crc32(word.encode()) % 50000
            likely = (UNLIKELY if self.nonsense else LIKELY) - (token % 100) / 100
            found.append({str(token): {"logprob": likely, "rank": 1, "decoded_token": f" {word}"}})
        return found

    def usage(self, tokens: int, whole: bool = False) -> dict[str, Any]:
        """The account of a request."""
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "completion_tokens": tokens,
        }
        return found | ({"prompt_tokens_details": None, "completion_tokens_details": None} if whole else {})

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What is around the choices."""
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model, "choices": choices}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        text = "".join(self.word(number) for number in range(self.tokens))
        nothing = {"token_ids": None, "routed_experts": None}
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            **nothing,
        }
        prompt = {"prompt_logprobs": self.prompt_logprobs, "prompt_token_ids": None}
        more: dict[str, Any] = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
        if self.chat:
            empty = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
            choice["message"] = {"role": "assistant", "content": text.lstrip(), **empty}
            more |= {**prompt, "prompt_text": None}
        else:
            choice |= {"text": text, **prompt}
        return {
            **self.frame("chat.completion" if self.chat else "text_completion", [choice]),
            "service_tier": None,
            "system_fingerprint": self.version,
            "usage": self.usage(self.tokens, whole=True),
            **more,
        }

    def chunk(self, choices: list[dict[str, Any]], tokens: int | None, last: bool = False) -> dict[str, Any]:
        """An event of a stream; with so many tokens in its account, or without one."""
        found = self.frame("chat.completion.chunk" if self.chat else "text_completion", choices)
        found |= {"system_fingerprint": self.version} if last else {}
        return found | ({"usage": self.usage(tokens)} if tokens is not None else {})

    def piece(self, number: int) -> dict[str, Any]:
        """The event for one token."""
        last = number == self.tokens - 1
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": None,
            "finish_reason": "length" if last else None,
            "token_ids": None,
        }
        if self.chat:
            choice["delta"] = {"content": self.word(number)}
        else:
            choice |= {"text": self.word(number), "stop_reason": None, "prompt_token_ids": None}
        return self.chunk([choice], number + 1 if self.usage_always else None, last and not self.usage_at_end)

    def role(self) -> dict[str, Any]:
        """The first event of a chat."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self.chunk([choice], 0 if self.usage_always else None) | {"prompt_token_ids": None, "prompt_text": None}

    def account(self) -> dict[str, Any]:
        """The last event of a stream whose client asked for its usage."""
        return self.chunk([], self.tokens, last=True)
