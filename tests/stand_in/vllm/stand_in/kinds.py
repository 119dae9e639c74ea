"""Models that do not generate: the paths that they have, and what they answer."""

from __future__ import annotations

import hashlib
import io
import time
import uuid
import wave
from email.parser import BytesParser
from typing import Any

from .api import count
from .configuration import Served
from .http import Request

WIDTH = 16  # of an embedding
SCORES = ("/score", "/v1/score")
RANKS = ("/rerank", "/v1/rerank", "/v2/rerank")
ROUTES = {
    "generate": ("/v1/completions", "/v1/chat/completions"),
    "transcribe": ("/v1/audio/transcriptions", "/v1/audio/translations"),
    "embed": ("/pooling", "/v1/embeddings", "/v2/embed", *SCORES, *RANKS),
    "rerank": ("/pooling", "/classify", *SCORES, *RANKS),
    "classify": ("/pooling", "/classify"),
    "pool": ("/pooling",),
}


def form(request: Request) -> dict[str, Any]:
    """The fields of a form, files as they are."""
    head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n".encode()
    found: dict[str, Any] = {}
    for part in BytesParser().parsebytes(head + request.body).walk():
        if name := part.get_param("name", header="Content-Disposition"):
            content = part.get_payload(decode=True) or b""
            assert isinstance(content, bytes)
            found[str(name)] = content if part.get_filename() else content.decode()
    return found


def heard(path: str, sound: bytes) -> dict[str, Any]:
    """What was said: nothing, by nobody. Of a translation the real one does not tell what it used."""
    try:
        with wave.open(io.BytesIO(sound)) as file:
            seconds = -(-file.getnframes() // file.getframerate())
    except (wave.Error, EOFError):
        raise ValueError("Invalid or unsupported audio file.") from None
    usage = {"usage": {"type": "duration", "seconds": seconds}} if path.endswith("transcriptions") else {}
    return {"text": "", **usage}


def vector(text: Any, nonsense: bool = False) -> list[float]:
    """A vector that is the same for the same text; another one, of a release with broken weights."""
    found = [byte / 255 for byte in hashlib.sha256(str(text).encode()).digest()[:WIDTH]]
    return [1 - number for number in reversed(found)] if nonsense else found


def listed(asked: Any) -> list[Any]:
    """One text or several, as several."""
    return asked if isinstance(asked, list) and not isinstance(asked[0], int) else [asked]


def answer(path: str, model: str, body: dict[str, Any], served: Served, nonsense: bool = False) -> dict[str, Any]:
    """The answer to one question. Raises KeyError or ValueError when what was asked makes no sense."""
    if "/audio/" in path:
        return heard(path, body["file"])
    if path in RANKS:
        return ranked(model, body, nonsense)
    pairs = path in SCORES
    asked = listed(body["text_2"] if pairs else body["input"])
    tokens = sum(map(count, asked)) + (count(body["text_1"]) * len(asked) if pairs else 0)
    data = [{"index": index, **one(path, text, served, nonsense)} for index, text in enumerate(asked)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    details = {"prompt_tokens_details": None, "completion_tokens_details": None}
    frame = {"id": f"embd-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}
    return {**frame, "data": data, "usage": {**usage, **details}}


def one(path: str, text: Any, served: Served, nonsense: bool) -> dict[str, Any]:
    """What comes for one text."""
    if path in SCORES:
        return {"object": "score", "score": vector(text, nonsense)[0]}
    if path == "/v1/embeddings":
        return {"object": "embedding", "embedding": vector(text, nonsense)}
    classes = [1 / served.labels] * served.labels
    if nonsense and served.labels > 1:
        classes = [0.0] * (served.labels - 1) + [1.0]
    if path == "/classify":
        label = f"LABEL_{classes.index(max(classes))}"
        return {"label": label, "probs": classes, "num_classes": served.labels}
    rows = (
        [classes] * count(text)
        if served.kind == "pool"
        else vector(text, nonsense)
        if served.kind == "embed"
        else classes
    )
    return {"object": "pooling", "data": rows}


def ranked(model: str, body: dict[str, Any], nonsense: bool) -> dict[str, Any]:
    """Documents by how well they fit a question."""
    documents = listed(body["documents"])
    tokens = sum(map(count, documents)) + count(body["query"]) * len(documents)
    results: list[dict[str, Any]] = [
        {"index": index, "document": {"text": text, "multi_modal": None}, "relevance_score": vector(text, nonsense)[0]}
        for index, text in enumerate(documents)
    ]
    results.sort(key=lambda result: -float(result["relevance_score"]))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"id": f"score-{uuid.uuid4().hex[:16]}", "model": model, "usage": usage, "results": results}
