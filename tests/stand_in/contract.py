"""What vLLM does, as far as roles, gateway and monitoring rely on it: one list of assertions for the stand-in and for the real CPU build.

Each takes a Server, which is asked over HTTP, and knows nothing of who answers. CONTRACT is the list for a server that runs and generates,
it_is_of_its_kind is for those that do something else; it_drains and it_ends_with_its_engine are for one that is about to end.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_spelling import render_config

RECORDED = Path(__file__).with_name("vllm-0.32.0-cpu.prom")
FRAME = {"id", "object", "created", "model", "choices"}
WHOLE = FRAME | {"service_tier", "system_fingerprint", "usage", "kv_transfer_params", "ec_transfer_params", "metrics"}
PROMPT = {"prompt_logprobs", "prompt_token_ids"}
CHOICE = {"index", "logprobs", "finish_reason", "stop_reason", "token_ids", "routed_experts"}
USAGE = {"prompt_tokens", "total_tokens", "completion_tokens"}
DETAILS = {"prompt_tokens_details", "completion_tokens_details"}
FINGERPRINT = re.compile(r"vllm-\d+\.\d+\.\d+\S*")


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    def events(self) -> list[Any]:
        """The events of a stream, without the [DONE] that has to be its end."""
        found = [line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: ")]
        assert found and found[-1] == "[DONE]", self.text[-300:]
        return [json.loads(text) for text in found[:-1]]


class Server(Protocol):
    """A server that generates, with its model and its limit of 1024 tokens or more."""

    @property
    def model(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    def ask(self, path: str, body: object = None, *, key: str | None = "", raw: str | None = None) -> Answer:
        """GET without a body, POST with one. `key` is the right one when it is empty, and left out when it is None; `raw` is a body as it is."""

    def log(self) -> str:
        """What it has printed since it was started."""


def completion(server: Server, **more: Any) -> dict[str, Any]:
    """The body of a completion of three tokens."""
    return {
        "model": server.model,
        "prompt": "The capital of France is",
        "max_tokens": 3,
        "ignore_eos": True,
        "temperature": 0,
        **more,
    }


def chat(server: Server, **more: Any) -> dict[str, Any]:
    """The body of a chat of three tokens."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return {"model": server.model, "messages": messages, "max_tokens": 3, "ignore_eos": True, "temperature": 0, **more}


def error_of(answer: Answer) -> dict[str, Any]:
    """The error that vLLM tells."""
    told = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}, told
    assert told["code"] == answer.status
    return dict(told)


def it_says_that_it_is_there(server: Server) -> None:
    """Without a key, as /metrics."""
    assert server.ask("/health", key=None) == Answer(200, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", server.ask("/version").json()["version"])


def it_asks_for_its_key(server: Server) -> None:
    """Middleware is in front of every path, as `--middleware` says. vLLM's own check leaves out what is not below /v1, such as /version."""
    posted = [("/v1/completions", completion(server)), ("/tokenize", completion(server)), ("/health", {}), ("/metrics", {})]  # fmt: skip
    for key in (None, "wrong"):
        for path, body in (("/v1/models", None), ("/version", None), ("/ping", None), ("/nothing", None), *posted):
            refused = server.ask(path, body, key=key)
            assert refused.status == 401, path
            told = refused.json()["error"]
            assert set(told) == {"message", "type", "param", "code"}, told
            assert told["code"] == "invalid_api_key"


def it_lists_its_models(server: Server) -> None:
    listed = server.ask("/v1/models").json()
    assert listed["object"] == "list"
    [entry] = [entry for entry in listed["data"] if entry["id"] == server.model]
    assert entry["object"] == "model" and entry["owned_by"] == "vllm" and entry["parent"] is None
    assert entry["max_model_len"] == server.max_model_len
    assert entry["root"].startswith("/")


def it_completes(server: Server) -> None:
    answer = server.ask("/v1/completions", completion(server))
    assert answer.status == 200, answer
    told = answer.json()
    assert set(told) == WHOLE
    assert FINGERPRINT.fullmatch(told["system_fingerprint"])
    assert told["object"] == "text_completion" and told["model"] == server.model and told["id"].startswith("cmpl-")
    [choice] = told["choices"]
    assert set(choice) == CHOICE | PROMPT | {"text"}
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert choice["text"].strip()
    usage = told["usage"]
    assert set(usage) == USAGE | DETAILS
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3


def it_chats(server: Server) -> None:
    told = server.ask("/v1/chat/completions", chat(server)).json()
    assert set(told) == WHOLE | PROMPT | {"prompt_text"}
    assert told["object"] == "chat.completion" and told["id"].startswith("chatcmpl-")
    [choice] = told["choices"]
    assert set(choice) == CHOICE | {"message"}
    assert {"role", "content", "refusal"} <= set(choice["message"])
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip()
    assert told["usage"]["completion_tokens"] == 3
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    in_parts = server.ask("/v1/chat/completions", chat(server, messages=parts)).json()
    assert in_parts["usage"]["prompt_tokens"] == told["usage"]["prompt_tokens"]


def it_tells_how_likely_a_prompt_is(server: Server) -> None:
    """By 0 the tokens of the prompt alone, the first one without a number: what instance_proof compares releases by."""
    told = server.ask("/v1/completions", completion(server, prompt_logprobs=0)).json()
    in_chat = server.ask("/v1/chat/completions", chat(server, prompt_logprobs=0)).json()
    for positions, usage in (
        (told["choices"][0]["prompt_logprobs"], told["usage"]),
        (in_chat["prompt_logprobs"], in_chat["usage"]),
    ):
        first, *others = positions
        assert first is None
        assert len(positions) == usage["prompt_tokens"]
        for position in others:
            [(token, said)] = position.items()
            assert token.isdigit()
            assert set(said) == {"logprob", "rank", "decoded_token"}
            assert said["logprob"] < 0
    again = server.ask("/v1/completions", completion(server, prompt_logprobs=0)).json()
    assert again["choices"][0]["prompt_logprobs"] == told["choices"][0]["prompt_logprobs"]


def it_streams_a_completion(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.ask("/v1/completions", completion(server, stream=True, stream_options=options)).events()
    *pieces, account = events
    assert {event["object"] for event in events} == {"text_completion"}
    assert "".join(piece["choices"][0]["text"] for piece in pieces).strip()
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == "length"
    assert {piece["choices"][0]["finish_reason"] for piece in pieces[:-1]} <= {None}
    assert pieces[-1]["usage"]["completion_tokens"] == 3
    assert FINGERPRINT.fullmatch(account["system_fingerprint"]), "on the last event, whichever that is"
    assert all(set(event) - {"system_fingerprint"} == FRAME | {"usage"} for event in events)
    assert all(set(event["usage"]) == USAGE for event in events)
    assert account["choices"] == []
    assert account["usage"]["completion_tokens"] == 3


def it_streams_a_chat(server: Server) -> None:
    events = server.ask("/v1/chat/completions", chat(server, stream=True)).events()
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events).strip()
    assert not any(event.get("usage") for event in events), "nobody asked for it"
    assert ["system_fingerprint" in event for event in events] == [False] * (len(events) - 1) + [True]


def it_knows_no_other_model(server: Server) -> None:
    aliases = ", ".join(entry["id"] for entry in server.ask("/v1/models").json()["data"] if entry["parent"] is None)
    for path, body in (("/v1/completions", completion(server)), ("/v1/chat/completions", chat(server))):
        refused = server.ask(path, {**body, "model": "another"})
        assert refused.status == 404
        told = error_of(refused)
        assert (told["message"], told["type"]) == (
            f"The model `another` does not exist. Valid aliases: {aliases}.",
            "NotFoundError",
        )


def it_refuses_what_makes_no_sense(server: Server) -> None:
    assert server.ask("/v1/completions", raw="{").status == 400
    refused = server.ask("/v1/completions", completion(server, prompt="red green blue " * server.max_model_len))
    assert refused.status == 400
    told = error_of(refused)
    assert told["type"] == "BadRequestError"
    assert f"maximum context length is {server.max_model_len} tokens" in told["message"]


def it_has_no_other_paths(server: Server) -> None:
    """The very words are how the gate knows what a model is for."""
    for path in ("/v1/embeddings", "/pooling", "/nothing"):
        refused = server.ask(path, {"model": server.model, "input": "Hi"})
        assert (refused.status, refused.json()) == (404, {"detail": "Not Found"}), path
    refused = server.ask("/v1/completions")
    assert (refused.status, refused.json()) == (405, {"detail": "Method Not Allowed"})


def names(text: str) -> dict[str, set[frozenset[str]]]:
    """Metric -> the sets of labels that it has."""
    found: dict[str, set[frozenset[str]]] = {}
    for name, labels in re.findall(r"^(vllm:\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        found.setdefault(name, set()).add(frozenset(re.findall(r'(\w+)="', labels)))
    return found


def sample(text: str, name: str, label: str = "") -> float:
    """The sum of the values of a metric."""
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")) and label in line]
    assert lines, name
    return sum(float(line.split()[-1]) for line in lines)


def it_measures(server: Server) -> None:
    """Every metric of the recorded scrape is there with its labels, and what it counts is counted. Info metrics differ from host to host."""
    before = server.ask("/metrics", key=None).text
    server.ask("/v1/completions", completion(server))
    after = server.ask("/metrics", key=None).text
    recorded, found = names(RECORDED.read_text()), names(after)
    assert set(recorded) - set(found) == set()
    assert {
        name for name, labels in recorded.items() if not name.endswith("_info") and not found[name] & labels
    } == set()
    assert f'model_name="{server.model}"' in after
    for name, label, more in (
        ("vllm:generation_tokens_total", "", 3),
        ("vllm:request_success_total", 'finished_reason="length"', 1),
    ):
        assert sample(after, name, label) - sample(before, name, label) == more, name
    assert sample(after, "vllm:prompt_tokens_total") > sample(before, "vllm:prompt_tokens_total")
    assert sample(after, "vllm:num_requests_running") == 0


def it_tells_what_it_serves(server: Server) -> None:
    """In its log: docs/runbook.md and the tests of the gateway read it."""
    told = server.log()
    assert "non-default args" in told
    assert "Application startup complete" in told
    routes = dict(re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", told))
    assert {"/health", "/metrics", "/version", "/v1/models", "/v1/completions", "/v1/chat/completions"} <= set(routes)


SCORING = {"/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"}
# The paths that instances have, by what tests/tiny_models.py makes. A reward model is a reranker for vLLM: it has one label.
HAS: dict[str, set[str]] = {
    "transcribe": {"/v1/audio/transcriptions", "/v1/audio/translations"},
    "embed": {"/v1/embeddings", "/v2/embed", "/pooling", *SCORING},
    "rerank": {"/classify", "/pooling", *SCORING},
    "reward": {"/classify", "/pooling", *SCORING},
    "classify": {"/classify", "/pooling"},
    "pool": {"/pooling"},
}

CONTRACT: list[Callable[[Server], None]] = [
    it_says_that_it_is_there,
    it_asks_for_its_key,
    it_lists_its_models,
    it_completes,
    it_chats,
    it_tells_how_likely_a_prompt_is,
    it_streams_a_completion,
    it_streams_a_chat,
    it_knows_no_other_model,
    it_refuses_what_makes_no_sense,
    it_has_no_other_paths,
    it_measures,
    it_tells_what_it_serves,
]


def it_is_of_its_kind(kind: str, ask: Callable[[str, tuple[bytes, str] | None], Answer], model: str) -> None:
    """Of the paths in the table of kinds it has those of its model and no others, and each answers its question with what the table says.

    `ask` takes a path and a body with its content type: the right key goes with it.
    """
    for path in model_kinds.paths():
        told = ask(path.path, path.body(model) if path.question else (b"{}", "application/json"))
        if path.path not in HAS[kind]:
            assert model_kinds.lacks(told.status, told.text.encode()), (path.path, told)
        elif path.question:
            assert told.status == 200, (path.path, told)
            assert path.content(told.json()), path.path
            path.used(told.json())
        else:
            assert told.status == 400 and not model_kinds.lacks(told.status, told.text.encode()), (path.path, told)
    assert ask(model_kinds.MODELS, None).json()["data"][0]["id"] == model


def it_drains(server: Server) -> None:
    """While it drains it says that it is healthy and refuses whatever is new, at once: why a gateway has to know before it stops."""
    assert server.ask("/health", key=None).status == 200
    refused = server.ask("/v1/completions", completion(server))
    assert refused.status == 500, refused
    assert "cannot schedule new futures after shutdown" in error_of(refused)["message"]


def it_ends_with_its_engine(server: Server, kill: Callable[[], object]) -> None:
    """When its engine is killed it says so to who waits, and ends by itself a moment later."""
    answers: list[Answer] = []
    body = completion(server, max_tokens=900, stream=True)
    client = threading.Thread(target=lambda: answers.append(server.ask("/v1/completions", body)))
    client.start()
    time.sleep(1)
    kill()
    client.join()
    assert "EngineCore encountered an issue" in answers[0].text, answers[0].text[-500:]
    end = time.monotonic() + 30
    while _answers(server):
        assert time.monotonic() < end, "it goes on without its engine"
        time.sleep(0.2)


def _answers(server: Server) -> bool:
    try:
        return server.ask("/health", key=None).status == 200
    except (OSError, ValueError):
        return False


# Asks roles/vllm/files/judge.py, in the directory that is its argument, several things at once: importing vLLM takes longest.
JUDGE_ALL = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import judge
output = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
answers = [judge.judge(request) for request in json.load(sys.stdin)]
output.write(json.dumps(answers) + chr(10))
output.close()
os._exit(0)
"""
# What is wished, as it stands in the file where that is not what the role would write, and what vLLM says to it.
JUDGED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "", ""),
    ({"max-model-len": "1k"}, "", ""),
    ({"max-model-len": "auto"}, "", ""),
    ({"enforce-eager": True, "enable-prefix-caching": False, "disable-log-stats": False}, "", ""),
    ({"enable-prefix-caching": False}, "enable-prefix-caching: false", "'enable-prefix-caching' is False, but vLLM reads"),
    ({"enforce-eager": False}, "enforce-eager: false", ""),  # dropped, and what it is by itself
    ({"allowed-origins": ["https://a", "https://b"]}, "", ""),
    ({"allowed-origins": ["https://a"]}, 'allowed-origins: ["https://a"]', "argument --allowed-origins: "),
    ({"middleware": ["a.One", "b.Two"], "allowed-media-domains": ["a.example", "b.example"]}, "", ""),
    ({"hf-overrides": {"rms_norm_eps": 0.00001}}, "", ""),
    (
        {"hf-overrides": {"rms_norm_eps": 0.00001}},
        'hf-overrides: {"rms_norm_eps": 1e-05}',
        "'hf-overrides' is {'rms_norm_eps': 1e-05}, but vLLM reads {'rms_norm_eps': '1e-05'}",
    ),
    ({"compilation-config": "{not json"}, "", "Invalid JSON"),
    ({"quantization": "nonsense"}, "", "Unknown quantization method: nonsense. Must be one of ["),
    ({"gpu-memory-utilization": 1.5}, "", "Input should be less than or equal to 1"),
    ({"max-model-len": 1_000_000}, "", "User-specified max_model_len (1000000) is greater than the derived max_model_len"),
    ({"max-model-length": 5}, "", "option 'max-model-length' is not one of vllm serve's"),
    ({"dtype": "float7"}, "", "argument --dtype: invalid choice: 'float7'"),
    ({"tensor-parallel-size": "two"}, "", "argument --tensor-parallel-size"),
    ({"compilation-config": False}, "", "option 'compilation-config' is False; it takes a value, not true or false"),
    ({"enable-auto-tool-choice": True}, "", "--enable-auto-tool-choice requires --tool-call-parser"),
    ({"enable-auto-tool-choice": True, "tool-call-parser": "nobody"}, "", "invalid tool call parser: nobody"),
]  # fmt: skip


def it_judges(model: str, ask: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """What it would refuse when it starts it says before, and what is not understood as it was meant is found. `model` is a directory."""
    base = {"model": model, "served-model-name": ["served"], "host": "127.0.0.1", "port": 8000}
    requests = [
        {"config": render_config({**base, **({} if text else wish)}) + f"{text}\n", "wish": {**base, **wish}}
        for wish, text, _expected in JUDGED
    ]
    for (wish, _text, expected), answer in zip(JUDGED, ask(requests), strict=True):
        refusal = answer["refusal"]
        assert expected in refusal and "\n" not in refusal if expected else refusal == "", (wish, answer)
