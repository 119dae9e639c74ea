"""Which kinds of model there are, how each is asked, and how an instance that does not answer is judged."""

from __future__ import annotations

import io
import json
import socket
import time
import wave
from collections.abc import Callable, Iterator
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds
from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds_host import Asked, Instance
from ansible_collections.gpufleet.llm.plugins.modules import completion_gate

from tests.unit.test_vllm_modules import FakeModule
from tests.upstream import Upstream, listening

ROOT = Path(__file__).resolve().parents[2]
NO_PATH = (404, '{"detail":"Not Found"}')
# Right answers, as vLLM 0.32 gave them to the questions of the table.
USAGE = {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}
ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"choices": [{"text": " Paris"}], "usage": USAGE},
    "/v1/chat/completions": {"choices": [{"message": {"content": "Paris"}}], "usage": USAGE},
    "/v1/audio/transcriptions": {"text": "", "usage": {"type": "duration", "seconds": 1}},
    "/v1/audio/translations": {"text": "Hi"},
    "/v1/embeddings": {"data": [{"embedding": [0.1, 0.2]}], "usage": USAGE},
    "/v1/rerank": {"results": [{"index": 0, "relevance_score": 0.5}], "usage": USAGE},
    "/v1/score": {"data": [{"index": 0, "score": 0.5}], "usage": USAGE},
    "/classify": {"data": [{"label": "good", "probs": [0.2, 0.8]}], "usage": USAGE},
    "/pooling": {"data": [{"data": [[0.1], [0.2]]}], "usage": USAGE},
}
ANSWERS |= {"/v2/rerank": ANSWERS["/v1/rerank"], "/rerank": ANSWERS["/v1/rerank"], "/score": ANSWERS["/v1/score"]}


class Instances(Upstream):
    """An instance that answers as the test wants."""

    answer: Callable[[str, Message, bytes], tuple[int, str]]
    metrics: Callable[[], str] = staticmethod(lambda: "")

    def get(self) -> tuple[int, str]:
        return 200, self.metrics() if self.path == "/metrics" else '{"paths": {"/health": {}, "/v1/realtime": {}}}'

    def post(self, body: bytes) -> tuple[int, str]:
        return type(self).answer(self.path, self.headers, body)


@pytest.fixture
def upstream() -> Iterator[Any]:
    with listening(Instances) as handler:
        yield handler


def serves(upstream: Any, *paths: str) -> list[tuple[str, str, bytes]]:
    """Let the instance have these paths. Returns what it is asked."""
    seen: list[tuple[str, str, bytes]] = []

    def answer(path: str, headers: Message, body: bytes) -> tuple[int, str]:
        seen.append((path, headers["Authorization"], body))
        return (200, json.dumps(ANSWERS[path])) if path in paths else NO_PATH

    upstream.answer = staticmethod(answer)
    return seen


def ask(upstream: Any, timeout: float = 5) -> Asked:
    return Instance(upstream.url, "qwen", "secret").ask(timeout)


@pytest.mark.parametrize(
    ("paths", "kind"),
    [
        # what instances of vLLM 0.32 have, by their models
        (["/v1/completions", "/v1/chat/completions"], "generate"),
        (["/v1/completions", "/v1/audio/transcriptions"], "generate"),
        (["/v1/audio/transcriptions", "/v1/audio/translations"], "transcribe"),
        (["/v1/embeddings", "/v2/embed", "/v1/rerank", "/v1/score", "/pooling"], "embed"),
        (["/v1/rerank", "/v1/score", "/classify", "/pooling"], "rerank"),
        (["/classify", "/pooling"], "classify"),
        (["/pooling"], "pool"),
    ],
)
def test_an_instance_says_itself_of_which_kind_it_is(upstream: Any, paths: list[str], kind: str) -> None:
    seen = serves(upstream, *paths)
    assert ask(upstream) == Asked(kind)
    path, key, body = seen[-1]
    assert model_kinds.kind_of(path).name == kind
    assert key == "Bearer secret"
    assert b"qwen" in body


def test_one_token_is_asked_for(upstream: Any) -> None:
    seen = serves(upstream, "/v1/completions")
    ask(upstream)
    [(_path, _key, body)] = seen
    assert json.loads(body) == {"model": "qwen", "prompt": "Hi", "max_tokens": 1, "temperature": 0}


def test_a_sound_is_half_a_second_of_wav_in_a_form() -> None:
    [path] = [path for path in model_kinds.paths() if path.path == "/v1/audio/transcriptions"]
    body, content_type = path.body("whisper")
    message = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    parts = {
        part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True)
        for part in message.walk()
        if not part.is_multipart()
    }
    assert parts["model"] == b"whisper"
    sound = parts["file"]
    assert isinstance(sound, bytes)
    with wave.open(io.BytesIO(sound)) as file:
        assert file.getnframes() / file.getframerate() == 0.5
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        assert any(file.readframes(100))


@pytest.mark.parametrize("path", [path for path in model_kinds.paths() if path.question], ids=lambda path: path.path)
def test_every_question_has_a_right_answer_and_a_wrong_one(path: model_kinds.Path) -> None:
    assert path.content(ANSWERS[path.path])
    assert len(path.used(ANSWERS[path.path])) == len(path.usage)
    wrongs: list[Any] = [{}, [], None, {"choices": []}, {"data": []}, {"data": [{}]}, {"results": []}, {"text": None}]
    for wrong in wrongs:
        with pytest.raises(model_kinds.AnswerError):
            path.content(wrong)
    if path.usage:
        with pytest.raises(model_kinds.AnswerError, match="does not tell its usage"):
            path.used({"usage": None})


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (500, "boom", "asked to generate (/v1/completions), it answered HTTP 500: boom"),
        (401, '{"error": "Unauthorized"}', "HTTP 401"),
        (200, '{"choices": []}', "it answered without content"),
        (200, "<html>", "it answered no JSON: <html>"),
        (500, "Please install vllm[audio] for it", "(vllm_extras: [audio] brings what that needs)"),
        (404, '{"error":{"message":"The model `qwen` does not exist.","code":404}}', "does not exist"),
    ],
)
def test_an_answer_that_is_none_tells_the_kind_and_what_was_answered(
    upstream: Any, status: int, text: str, expected: str
) -> None:
    asked: list[str] = []

    def answer(path: str, _headers: Message, _body: bytes) -> tuple[int, str]:
        asked.append(path)
        return status, text

    upstream.answer = staticmethod(answer)
    told = ask(upstream)
    assert (told.kind, told.hopeless, told.waiting) == ("generate", status in (401, 404), False), (
        "what is refused once is refused again"
    )
    assert expected in told.reason
    assert asked == ["/v1/completions"], "not by other paths"


def test_an_instance_that_cannot_read_sound_is_told_what_it_lacks(upstream: Any) -> None:
    """What vLLM 0.32 says of every sound when the packages of its extra are not there: not a word of them."""
    refusal = (
        400,
        '{"error":{"message":"Invalid or unsupported audio file.","type":"BadRequestError","param":null,"code":400}}',
    )
    upstream.answer = staticmethod(lambda path, _headers, _body: refusal if "audio" in path else NO_PATH)
    told = ask(upstream)
    assert told.hopeless
    assert told.reason.startswith("asked to transcribe (/v1/audio/transcriptions), it answered HTTP 400: ")
    assert told.reason.endswith(" (vllm_extras: [audio] brings what that needs)")


def test_a_path_that_is_there_for_other_models_is_passed_over(upstream: Any) -> None:
    """Older ones have all paths, and answer 501 on those that are not for the model."""
    told = {"/v1/rerank": (200, json.dumps(ANSWERS["/v1/rerank"]))}
    refusal = (501, '{"error":{"message":"The model does not support Completions API"}}')
    upstream.answer = staticmethod(lambda path, _headers, _body: told.get(path, refusal))
    assert ask(upstream) == Asked("rerank")


def gate(
    upstream: Any, monkeypatch: pytest.MonkeyPatch, timeout: float = 30, request_timeout: float = 5
) -> dict[str, Any]:
    monkeypatch.setattr(completion_gate, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(completion_gate, "STEP_SECONDS", 2)
    module = FakeModule(Path("/nowhere"), timeout=timeout, request_timeout=request_timeout, api_key="k")
    return completion_gate.Gate(module).wait({"name": "x", "url": upstream.url, "model": "qwen"})


def test_the_gate_does_not_wait_for_a_kind_that_it_cannot_ask(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    serves(upstream)
    told = gate(upstream, monkeypatch)["reason"]
    assert told == "it serves no kind of model that can be asked (its paths are /health, /v1/realtime)"
    assert time.monotonic() - begun < 5


def hang(_path: str, _headers: Message, _body: bytes) -> tuple[int, str]:
    time.sleep(1.5)  # the gate waits a second at least
    return 200, ""


def metrics(step: float, running: int, reason: str = "length") -> str:
    return (
        f'vllm:num_requests_running{{engine="0"}} {running}\nvllm:num_requests_waiting{{engine="0"}} 0.0\n'
        f'vllm:request_success_total{{engine="0",finished_reason="{reason}"}} {step}\n'
    )


@pytest.mark.parametrize(
    ("answer", "running", "moves", "reason", "passes"),
    [
        (hang, 8, True, "length", True),
        (lambda *_asked: (503, '{"error": {"message": "try a different instance"}}'), 8, True, "length", True),
        (hang, 8, False, "length", False),  # it hangs
        (hang, 8, True, "abort", False),  # its clients give up
        (hang, 0, True, "length", False),  # nobody keeps it busy
        (lambda *_asked: (500, "boom"), 8, True, "length", False),
    ],
)
def test_busy_is_told_apart_from_dead(
    upstream: Any, monkeypatch: pytest.MonkeyPatch, answer: Any, running: int, moves: bool, reason: str, passes: bool
) -> None:
    clock = iter(range(1000))
    upstream.answer = staticmethod(answer)
    upstream.metrics = staticmethod(lambda: metrics(next(clock) if moves else 7, running, reason))
    told = gate(upstream, monkeypatch, timeout=0.5, request_timeout=0.2)
    assert told.get("busy", False) is passes
    assert passes or "no answer after 0.5 s" in told["reason"]


def test_a_closed_port_is_not_busy() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = Instance(f"http://127.0.0.1:{port}", "qwen", "k").ask(1)
    assert "refused" in asked.reason
    assert not asked.waiting


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, ["generate", "transcribe", "embed", "rerank", "classify", "pool"]),
        ({"runner": "pooling"}, ["embed", "rerank", "classify", "pool"]),
        ({"runner": "pooling", "convert": "embed"}, ["embed", "rerank", "pool"]),
        ({"convert": "classify"}, ["rerank", "classify", "pool"]),
        ({"runner": "generate"}, ["generate", "transcribe"]),
    ],
)
def test_options_narrow_the_kinds(options: dict[str, str], kinds: list[str]) -> None:
    assert [kind.name for kind in model_kinds.wanted_kinds(options)] == kinds


def test_the_gateway_takes_its_paths_from_the_table() -> None:
    specs = yaml.safe_load((ROOT / "roles/gateway/meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    paths, routes = specs["options"]["gateway_paths"], specs["options"]["gateway_routes"]["options"]
    assert paths["choices"] == list(model_kinds.methods())
    assert paths["default"] == model_kinds.open_paths()
    assert [*routes["paths"]["choices"], model_kinds.MODELS] == paths["choices"]
