"""Libraries that people use, each in the version of its lock in clients/, and a program that measures, against a gateway with stand-ins behind it.

By hand (two minutes, most of them for packages; needs Nginx with its Lua module, and Node for one of them):

    .venv/bin/pytest tests/drills/test_clients.py -s

openai for Python is in the suite: tests/gateway/test_clients.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.drills.conftest import CACHE, CLIENTS
from tests.gateway.backends import Asked, Backend, Handler, failing, tokens
from tests.gateway.harness import CHAT, KEY, Gateway
from tests.gateway.stand_ins import served

TOLD = {"chat": "Paris is the", "stream": " Paris is the", "tool": "weather", "refused": [404, "model_not_found"]}
ODD = Backend("odd@gpu-2")


def chat(handler: Handler, asked: Asked) -> None:
    """vLLM's answers to OpenAI's API that the stand-in does not have: the call of a tool, a full queue."""
    if asked.json.get("user") == "full once" and sum(one.json.get("user") == "full once" for one in ODD.asked) == 1:
        failing(503)(handler, asked)
    elif asked.json.get("stream"):
        handler.stream(tokens(200, 0.02))
    else:
        call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        message = {"role": "assistant", "content": "Hello", "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        handler.reply(
            200,
            {"id": "1", "object": "chat.completion", "created": 0, "model": "odd", "choices": [choice], "usage": usage},
        )


def messages(handler: Handler, asked: Asked) -> None:
    """vLLM's answers to Anthropic's API."""
    user = asked.json.get("metadata", {}).get("user_id")
    usage = {"input_tokens": 1, "output_tokens": 3}
    frame = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "odd",
        "stop_sequence": None,
        "usage": usage,
    }
    if asked.path.endswith("count_tokens"):
        handler.reply(200, {"input_tokens": 7})
    elif user == "full once" and sum(one.json.get("metadata") == {"user_id": user} for one in ODD.asked) == 1:
        failing(503)(handler, asked)
    elif asked.json.get("stream"):
        handler.stream(anthropic_events(frame, 200 if user == "long" else 1))
    elif asked.json.get("tools"):
        handler.reply(
            200,
            frame
            | {"content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {}}], "stop_reason": "tool_use"},
        )
    else:
        handler.reply(200, frame | {"content": [{"type": "text", "text": "Paris is the"}], "stop_reason": "end_turn"})


def anthropic_events(frame: dict[str, Any], count: int) -> Iterator[bytes]:
    def event(kind: str, **more: Any) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode()

    yield event("message_start", message=frame | {"content": [], "stop_reason": None})
    yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    for part in tokens(count, 0.02):
        if b"DONE" not in part:
            yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": " Paris is the"})
    yield event("content_block_stop", index=0)
    yield event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 3})
    yield event("message_stop")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with served(tmp_path_factory.mktemp("clients"), ODD) as gateway:
        yield gateway


def environment(name: str, lock: str) -> Path:
    """The programs of an environment with what a lock names."""
    made = CACHE / name
    uv = str(Path(sys.prefix, "bin", "uv"))
    # torch, which guidellm needs, is no package of PyPI in its build for CPUs
    find_links = os.environ.get("PIP_FIND_LINKS", "")
    source = ["--find-links", find_links] if find_links else ["--torch-backend", "cpu"]
    if not (made / "bin" / "python").exists():
        subprocess.run([uv, "venv", "--quiet", "--python", "3.11", str(made)], check=True)
    subprocess.run(
        [uv, "pip", "sync", "--quiet", "--require-hashes", *source, "--python", str(made / "bin" / "python"), str(CLIENTS / lock)],
        check=True,
    )  # fmt: skip
    return made / "bin"


@pytest.fixture(scope="module")
def python() -> str:
    """Python with the libraries."""
    return str(environment("python", "requirements.txt") / "python")


def told(gateway: Gateway, *command: str, **more: str) -> dict[str, Any]:
    """What a library got. Its last request is a stream that it gives up, and the backend has to hear of that."""
    ODD.reset()
    ODD.answer = lambda handler, asked: (messages if "messages" in asked.path else chat)(handler, asked)
    environment = {
        "BASE_URL": gateway.base_url, "API_KEY": KEY, "SSL_CERT_FILE": str(gateway.ca_file), "NODE_EXTRA_CA_CERTS": str(gateway.ca_file),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", **more,
    }  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ODD.cut.wait(2), "the backend goes on with what nobody waits for"
    gateway.until(lambda: set(gateway.admin("/in_flight")["in_flight"].values()) == {0}, 2)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("aborted") >= 3
    # the gateway says when to come again
    assert 2 <= said.pop("retried_after") < 6
    print(json.dumps(said))
    return said


def test_openai_for_node(gateway: Gateway, node: str) -> None:
    said = told(gateway, "node", f"{node}/ask_node.mjs")
    assert said == {**TOLD, "models": ["generate", "embed", "odd"], "model": "embed", "embedding": 16}


def test_langchain(gateway: Gateway, python: str) -> None:
    assert told(gateway, python, str(CLIENTS / "ask_langchain.py")) == {**TOLD, "embedding": 16}


def test_litellm(gateway: Gateway, python: str) -> None:
    said = told(gateway, python, str(CLIENTS / "ask_litellm.py"))
    assert {"generate", "embed", "odd"} <= {name.removeprefix("openai/") for name in said.pop("models")}
    assert said == {**TOLD, "embedding": 16}


def test_anthropic(gateway: Gateway, python: str) -> None:
    said = told(gateway, python, str(CLIENTS / "ask_anthropic.py"))
    assert said == {**TOLD, "models": ["generate", "embed", "odd"], "model": "embed", "tokens": 7}


def test_guidellm(gateway: Gateway, tmp_path: Path) -> None:
    """Its requests all succeed, over HTTP/2, and what it counts is what the gateway counts."""
    guidellm = environment("guidellm", "requirements-guidellm.txt") / "guidellm"
    sizes = [(5 + number % 7, 3 + number % 5) for number in range(60)]
    rows = [f"{' '.join(['word'] * prompt)},{answer}" for prompt, answer in sizes]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt,output_tokens_count", *rows]) + "\n")
    backend = {"kind": "openai_http", "target": gateway.base_url, "model": "gpt-4o", "api_key": KEY, "verify": True}
    spec = {
        "backend": backend, "profile": {"kind": "concurrent", "streams": 6}, "constraints": [{"kind": "max_requests", "count": len(sizes)}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(gateway.directory.parent / "generate/generate")},
        "data": [{"kind": "csv_file", "path": str(tmp_path / "prompts.csv")}], "outputs": [{"kind": "json", "path": str(tmp_path / "told.json")}],
    }  # fmt: skip
    (tmp_path / "scenario.json").write_text(json.dumps({"spec": spec, "benchmarks": [None]}))
    before, lines = gateway.metrics(), len(gateway.log(0))
    done = subprocess.run(
        [str(guidellm), "run", "--disable-console-interactive", "-c", str(tmp_path / "scenario.json")], cwd=tmp_path,
        env={**os.environ, "SSL_CERT_FILE": str(gateway.ca_file), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    (benchmark,) = json.loads((tmp_path / "told.json").read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {
        "successful": len(sizes), "errored": 0, "incomplete": 0, "total": len(sizes),
    }  # fmt: skip
    counted = [
        sum(one[f"{kind}_tokens"] for one in benchmark["requests"]["successful"]) for kind in ("prompt", "output")
    ]
    assert counted == [sum(column) for column in zip(*sizes, strict=True)]
    labels = '{client="team-a",model="generate",instance="generate"}'
    after = gateway.metrics()
    names = [f"vllm_gateway_{kind}_tokens_total{labels}" for kind in ("prompt", "completion")]
    assert [after[name] - before.get(name, 0) for name in names] == counted
    logged = [line for line in gateway.log(lines + len(sizes))[lines:] if line["uri"] == CHAT]
    assert [sum(int(line[f"{kind}_tokens"]) for line in logged) for kind in ("prompt", "completion")] == counted
    assert {(line["status"], line["estimated"], line["protocol"]) for line in logged} == {("200", "", "HTTP/2.0")}
    print(
        json.dumps(
            {
                name: round(benchmark["metrics"][name]["successful"]["median"], 1)
                for name in ("time_to_first_token_ms", "inter_token_latency_ms")
            }
        )
    )
