"""What is asked, and what is wrong with what comes. Nothing here touches the network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# vLLM's own words for an end that is one.
ENDS = ("length", "stop")


class WrongError(Exception):
    """What is wrong with an answer, in words for whoever reads the report."""


@dataclass(frozen=True)
class Question:
    """One request."""

    model: str
    tokens: int
    path: str = COMPLETIONS
    stream: bool = True
    # The right answer, where it is known: a new version may be up and answer nonsense.
    text: str = ""

    def body(self) -> bytes:
        """As the client writes it."""
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        words = "The capital of France is"
        asked |= {"messages": [{"role": "user", "content": words}]} if self.path == CHAT else {"prompt": words}
        if self.stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(asked).encode()

    def check(self, text: str, tokens: object) -> None:
        """What a whole answer and a stream have in common."""
        if not text.strip():
            raise WrongError("it has no text")
        if tokens != self.tokens:
            raise WrongError(f"{self.tokens} tokens were asked for, its account says {tokens}")
        if self.text and text.strip() != self.text.strip():
            raise WrongError("its text is not what this model says")

    def told(self) -> str:
        """For the report."""
        return f"{'a stream' if self.stream else 'an answer'} of {self.tokens} tokens of {self.model} by {self.path}"


def loaded(text: bytes | str) -> dict[str, Any]:
    """JSON that has to be an object without an error in it."""
    try:
        found = json.loads(text)
    except ValueError:
        raise WrongError("it is no JSON") from None
    if not isinstance(found, dict):
        raise WrongError("it is no JSON object")
    if "error" in found:
        raise WrongError("it is an error")
    return found


def choice_of(found: dict[str, Any]) -> dict[str, Any]:
    """The one choice of an answer or an event."""
    choices = found.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise WrongError("it has no choice")
    return choices[0]


def text_of(choice: dict[str, Any], member: str) -> str:
    """The text of a choice: a completion's, or a chat's in this member."""
    inner = choice.get(member)
    text = inner.get("content") if isinstance(inner, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def check_status(status: int) -> None:
    """Only one is good."""
    if status != 200:
        raise WrongError(f"the status is {status}")


def check_whole(question: Question, content: bytes) -> None:
    """An answer that came in one piece."""
    found = loaded(content)
    choice = choice_of(found)
    if choice.get("finish_reason") not in ENDS:
        raise WrongError(f"its finish reason is {choice.get('finish_reason')!r}")
    usage = found.get("usage")
    question.check(text_of(choice, "message"), usage.get("completion_tokens") if isinstance(usage, dict) else None)


@dataclass
class Reading:
    """A stream while it comes."""

    question: Question
    pieces: list[str] = field(default_factory=list)
    reason: object = None
    tokens: object = None
    done: bool = False
    rest: bytes = b""

    def feed(self, data: bytes) -> int:
        """Read on. Returns how many events this was the end of."""
        *events, self.rest = (self.rest + data).split(b"\n\n")
        for event in events:
            self.event(event)
        return len(events)

    def event(self, event: bytes) -> None:
        """One event."""
        if self.done:
            raise WrongError("something came after [DONE]")
        if not event.startswith(b"data: ") or b"\n" in event:
            raise WrongError("it has an event that is none")
        content = event.removeprefix(b"data: ")
        if content == b"[DONE]":
            self.done = True
            return
        found = loaded(content)
        if isinstance(usage := found.get("usage"), dict):
            self.tokens = usage.get("completion_tokens")
        if found.get("choices") == []:
            return
        choice = choice_of(found)
        self.reason = choice.get("finish_reason") or self.reason
        if text := text_of(choice, "delta"):
            self.pieces.append(text)

    def end(self) -> None:
        """The body ended as HTTP says it does."""
        if self.rest:
            raise WrongError("its last event is cut")
        if self.reason not in ENDS:
            raise WrongError(f"no event has a finish reason but {self.reason!r}, after {len(self.pieces)} pieces")
        if not self.done:
            raise WrongError("it has no [DONE]")
        self.question.check("".join(self.pieces), self.tokens)
