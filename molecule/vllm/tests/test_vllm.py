"""The real vLLM (its CPU build) with a real small model, under the unit that runs in production.

What cannot be shown here: GPUs, and on a machine with cgroup v1 the device rules of the unit (they have no effect there).
Tests that change the host come last and build on each other's end state.
"""

from __future__ import annotations

import json
import math
import operator
import re
import threading
import time
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from tests.roles import ROOT, applied, apply_role, refused
from tests.sandbox import ATTEMPTS, PROBE, probe

KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
MODEL = "smollm2-135m-instruct"
INSTANCES: list[dict[str, Any]] = yaml.safe_load((ROOT / "molecule/shared/inventory/group_vars/vllm.yml").read_text())[
    "vllm_instances"
]
# See there: what each of them has. The adapter and the int8 model come from make_models.py.
CHAT, OTHER, EMBED = INSTANCES
# What the tests further down make of OTHER.
PLAIN = {**OTHER, "model": MODEL, "options": {**OTHER["options"], "max-model-len": 512}}
UNITS = ("chat", "other", "embed")
METRIC = "vllm:prefix_cache_hits_total{"


def cosine(one: list[float], other: list[float]) -> float:
    """How near two vectors are: 1 in the same direction."""
    product: float = sum(map(operator.mul, one, other))
    return product / math.hypot(*one) / math.hypot(*other)


def send(host: Host, port: int, path: str, body: object = None, key: str = KEY) -> tuple[int, Any]:
    """Ask an instance from its own host; returns the status and the answer."""
    data = ["-d", json.dumps(body)] if body is not None else []
    done = host.run(
        f"curl -sS -m 100 -w '\\n%%{{http_code}}' -H %s -H 'Content-Type: application/json' {'%s ' * len(data)}%s",
        f"Authorization: Bearer {key}",
        *data,
        f"http://127.0.0.1:{port}{path}",
    )
    answer, status = done.stdout.rsplit("\n", 1)
    return int(status), json.loads(answer) if answer.startswith("{") else answer


def ask(
    host: Host, port: int = 8000, model: str = MODEL, tokens: int = 4, key: str = KEY, **more: object
) -> tuple[int, Any]:
    """Ask for exactly so many tokens; returns the status and the answer."""
    request = {
        "model": model,
        "prompt": "The capital of France is",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        **more,
    }
    return send(host, port, "/v1/completions", request, key)


def text(host: Host, *arguments: Any, **more: Any) -> str:
    """The text of a completion."""
    status, answer = ask(host, *arguments, **more)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def models(host: Host, port: int = 8000) -> dict[str, dict[str, Any]]:
    """What an instance says that it serves, by name."""
    return {entry["id"]: entry for entry in send(host, port, "/v1/models")[1]["data"]}


def main_pid(host: Host, name: str) -> int:
    return int(host.check_output("systemctl show --property=MainPID --value vllm@%s", name))


def generation(host: Host, name: str) -> str:
    """Number of the generation that runs."""
    return str(host.check_output("cat /run/vllm/%s/generation", name))


@pytest.mark.parametrize(("port", "model"), [(8000, MODEL), (8000, "also-chat"), (8001, "other-name")])
def test_an_instance_answers_by_each_of_its_names(host: Host, port: int, model: str) -> None:
    assert model in models(host, port)
    assert "Paris" in text(host, port, model)


def test_an_adapter_answers_by_its_own_name_and_leaves_the_model_as_it_is(host: Host) -> None:
    """LoRA. Its weights are random: this shows that it is loaded and that a name leads to it, nothing about quality."""
    listed = models(host)
    assert list(listed) == [MODEL, "also-chat", "adapted"]
    assert listed["adapted"]["parent"] == MODEL
    assert listed["adapted"]["root"].startswith(f"/srv/models/.revisions/{MODEL}-adapter-")
    before, adapted, after = (text(host, 8000, name, tokens=8) for name in (MODEL, "adapted", MODEL))
    assert before == after
    assert adapted != before


def test_a_prompt_may_be_longer_than_the_length_that_yarn_starts_from(host: Host) -> None:
    """512 stands in for the length that a model was made for. That YaRN is at work is shown further down, without a start more."""
    assert models(host)[MODEL]["max_model_len"] == 1024
    status, answer = ask(host, prompt="red green blue " * 200, tokens=1)
    assert status == 200, answer
    assert 512 < answer["usage"]["prompt_tokens"] < 1024
    status, answer = ask(host, prompt="red green blue " * 400, tokens=1)
    assert status == 400, answer
    assert "maximum context length is 1024" in answer["error"]["message"]


def test_the_same_prompt_is_not_read_twice(host: Host) -> None:
    """Prefix caching, in blocks of 128 tokens on a CPU."""

    def hits() -> float:
        told = send(host, 8000, "/metrics")[1]
        return sum(float(line.split()[-1]) for line in told.splitlines() if line.startswith(METRIC))

    before = [hits()]
    for _ in range(2):
        ask(host, prompt="one two three four " * 40, tokens=1)
        before.append(hits())
    assert before[1] == before[0], "nobody asked this before"
    assert before[2] == before[1] + 128


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_a_tool_is_called_with_the_arguments_of_its_schema(host: Host) -> None:
    """Without tool-strict-level this model gives a bare string; without enable-auto-tool-choice `auto` is refused."""
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "temperature": 0,
    }
    named = {"type": "function", "function": {"name": "get_weather"}}
    status, answer = send(host, 8000, "/v1/chat/completions", {**request, "tool_choice": named, "max_tokens": 120})
    assert status == 200, answer
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    status, answer = send(host, 8000, "/v1/chat/completions", {**request, "tool_choice": "auto", "max_tokens": 1})
    assert status == 200, answer


def test_a_quantized_model_is_served_as_such(host: Host) -> None:
    """W8A8 in the format of compressed-tensors; that it answers is shown above."""
    whole, small = (host.file(f"/srv/models/{name}/model.safetensors").size for name in (MODEL, f"{MODEL}-int8"))
    assert small < 0.65 * whole, "int8 but for the embeddings"
    told = host.check_output(
        "journalctl --unit vllm@other --output cat --no-pager --quiet --grep %s", "Initializing a V1"
    )
    assert "quantization=compressed-tensors" in told


def test_an_embedding_model_stands_beside_the_chat_model(host: Host) -> None:
    """The small model as one that embeds: what is nearer is a matter of the model, that near and far differ is vLLM's."""
    texts = ["The cat sits on the mat.", "A cat is sitting on a mat.", "Interest rates rose by two percent.", ""]
    texts[3] = texts[0]
    status, answer = send(host, 8002, "/v1/embeddings", {"model": "embedder", "input": texts})
    assert status == 200, answer
    vectors = [entry["embedding"] for entry in answer["data"]]
    width = json.loads(host.file(f"/srv/models/{MODEL}/config.json").content_string)["hidden_size"]
    assert [len(vector) for vector in vectors] == [width] * 4
    near, far, same = (cosine(vectors[0], vector) for vector in vectors[1:])
    assert same > 0.999
    assert near > far + 0.05
    assert ask(host, 8002, "embedder")[0] == 404, "it completes nothing, so the gate has asked it for an embedding"
    assert host.file("/etc/vllm/embed/current/confirmed").exists


def test_nothing_is_answered_without_the_key(host: Host) -> None:
    assert ask(host, key="wrong")[0] == 401


def test_vllm_listens_on_loopback_only(host: Host) -> None:
    sockets = host.check_output("ss -Hltn 'sport >= :8000 and sport <= :8002'")
    assert sockets
    assert all(line.split()[3].startswith("127.0.0.1:") for line in sockets.splitlines()), sockets


def test_nothing_of_vllm_listens_on_the_network(host: Host) -> None:
    """PyTorch and ZMQ open ports of their own; none may be reachable from another host."""
    pids = host.check_output("pgrep -u vllm").split()
    assert len(pids) >= 4
    for line in host.check_output("ss -Hltnp").splitlines():
        if any(f"pid={pid}," in line for pid in pids):
            assert line.split()[3].startswith(("127.0.0.1:", "[::1]:")), line


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_is_hardened(host: Host, name: str) -> None:
    told = host.check_output("systemd-analyze security --no-pager vllm@%s | tail -1", name)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", told)
    assert found, told
    assert float(found[1]) <= 2.0


def test_the_sandbox_refuses_what_it_should(host: Host) -> None:
    good, told = probe(host.check_output, PROBE)
    assert good, told
    assert "ALLOWED" not in told, told
    assert told.count(" refused ") == ATTEMPTS, told
    assert "processes []" in told
    assert "home 0o700" in told
    assert 0 < int(told.split("\nuid ")[1].split()[0]) < 1000


def test_the_key_is_seen_by_nobody(host: Host) -> None:
    places = (
        "systemctl show vllm@chat vllm@other; systemctl cat vllm@chat; cat /etc/vllm/chat/*/* /opt/vllm/bin/*;"
        " journalctl --no-pager; cat /proc/[0-9]*/cmdline | tr '\\0' ' '; grep -r . /var/log /var/cache/vllm/*/vllm 2>/dev/null"
    )
    told = host.run(places).stdout
    assert "smollm2" in told
    assert KEY not in told
    assert host.file("/etc/vllm/internal_key").mode == 0o600


def test_the_environment_arrives_as_it_was_written(host: Host) -> None:
    pid = main_pid(host, "other")
    environment = host.check_output("tr '\\0' '\\n' </proc/%s/environ", str(pid)).splitlines()
    assert 'QUOTED=a "b" $c \\d' in environment
    assert "VLLM_CPU_OMP_THREADS_BIND=1" in environment
    assert "HF_HUB_OFFLINE=1" in environment


def test_no_start_compiles_modules_of_vllm(host: Host) -> None:
    """Its user may write no release, so what is not compiled when a release is built is compiled at every start."""
    files = host.check_output(
        "cd /opt/vllm/releases/*/lib/python3.*/site-packages/vllm && find . -name '*.py*'"
    ).split()
    sources = {file.removesuffix(".py") for file in files if file.endswith(".py")}
    compiled = {
        re.sub(r"/__pycache__/([^/]+)\.cpython-\d+\.pyc$", r"/\1", file) for file in files if file.endswith(".pyc")
    }
    assert len(sources) > 1000
    assert sources - compiled == set()


def test_caches_are_private_to_each_instance(host: Host) -> None:
    for name in UNITS:
        cache = host.file(f"/var/cache/vllm/{name}")
        assert (cache.mode, cache.user) == (0o700, "vllm")
        assert host.file(f"/var/cache/vllm/{name}/vllm").is_directory


def test_check_mode_shows_the_change_and_makes_none(host: Host) -> None:
    changed = {**OTHER, "options": {**OTHER["options"], "max-model-len": 512}}
    told = applied(host, "vllm", "--check", "--diff", vllm_instances=[CHAT, changed, EMBED])
    assert "-max-model-len: 1024" in told
    assert "+max-model-len: 512" in told
    assert "QUOTED" not in told
    assert generation(host, "other") == "1"
    assert host.run("test -e /etc/vllm/other/2").rc != 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"options": {"max-model-length": 5}}, "did you mean 'max-model-len'?"),
        (
            {"options": {"enable-lora": True, "lora-modules": ["x=adapter"]}},
            "adapter 'adapter' is not in model_store_models",
        ),
        ({"model": "not-there"}, "model 'not-there' is not in model_store_models"),
        ({"prot": 1}, "prot"),
        ({"environment": {"VLLM_SERVER_DEV_MODE": 1}}, "VLLM_SERVER_DEV_MODE is refused"),
        ({"environment": {"VLLM_CPU_KVCACHE_SPACE": 4000}}, "GB of memory, but the host has"),
    ],
)
def test_a_mistake_is_refused_before_anything_changes(host: Host, change: dict[str, Any], expected: str) -> None:
    before = [main_pid(host, name) for name in UNITS]
    assert expected in refused(host, "vllm", vllm_instances=[CHAT, {**OTHER, **change}, EMBED])
    assert [main_pid(host, name) for name in UNITS] == before
    assert host.run("test -e /etc/vllm/other/2").rc != 0


def test_a_port_that_something_else_holds_is_refused(host: Host) -> None:
    host.check_output("systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 8009")
    host.check_output("for i in $(seq 50); do ss -Hltn 'sport = :8009' | grep -q . && break; sleep 0.1; done")
    told = refused(host, "vllm", vllm_instances=[CHAT, {**OTHER, "port": 8009}, EMBED])
    host.check_output("systemctl stop squatter")
    assert "port 8009 is taken by python3" in told


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"vllm_version": "0.26.0"}, "CVE-2026-114053"),
        ({"vllm_device": "cuda", "vllm_instances": [{**CHAT, "gpus": [0], "cpus": []}]}, "nvidia-smi is not there"),
        ({"vllm_internal_key": "short"}, "openssl rand -hex 32"),
    ],
)
def test_what_cannot_work_here_is_refused(host: Host, variables: dict[str, Any], expected: str) -> None:
    assert expected in refused(host, "vllm", **variables)


def test_a_running_request_ends_before_its_instance_stops(host: Host) -> None:
    """`other` is restarted under a request that takes some seconds: the request is answered to its end."""
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(ask(host, 8001, "other-name", tokens=60)))
    client.start()
    time.sleep(1.5)
    host.check_output("systemctl stop vllm@other")
    client.join()
    status, answer = answers[0]
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 60
    assert host.check_output("systemctl show --property=Result --value vllm@other") == "success"
    leftover = host.run("pgrep -u vllm -f VLLM::EngineCore -c").stdout.strip()
    assert leftover == "2", "only the engines of `chat` and `embed` may be left"


def test_a_change_restarts_only_its_instance_and_starts_a_stopped_one(host: Host) -> None:
    """`other` is stopped here (by the test before): it is started with its new generation. `embed` is not needed any more."""
    before = main_pid(host, "chat")
    applied(host, "vllm", vllm_instances=[CHAT, PLAIN])
    assert main_pid(host, "chat") == before
    assert generation(host, "other") == "2"
    assert ask(host, 8001, "other-name")[0] == 200
    assert host.file("/etc/vllm/other/current").linked_to == "/etc/vllm/other/2"
    assert host.file("/etc/vllm/other/2/confirmed").exists


def test_yarn_is_at_work(host: Host) -> None:
    """`chat` has it, `other` by now is the same model without it. Measured: -0.49 and -0.24, and -0.24 for `chat` without YaRN.

    The host has no compiler: without TORCHDYNAMO_DISABLE the first of these requests ends the engine.
    """
    found = []
    for port, model in ((8000, MODEL), (8001, "other-name")):
        status, answer = ask(host, port, model, tokens=1, logprobs=1)
        assert status == 200, answer
        found.append(answer["choices"][0]["logprobs"]["token_logprobs"][0])
    assert abs(found[0] - found[1]) > 0.1, found


def test_a_configuration_that_vllm_refuses_goes_back(host: Host) -> None:
    """The option is known and of the right type; only the engine, when it starts, says no."""
    before = main_pid(host, "chat")
    broken = {**PLAIN, "options": {**PLAIN["options"], "quantization": "awq"}}
    told = refused(host, "vllm", vllm_instances=[CHAT, broken])
    assert "vLLM instance other" in told
    assert "did not come up" in told
    assert "awq" in told, "the lines of the journal that say why"
    assert "The previous generation is back and answers" in told
    assert generation(host, "other") == "2"
    assert ask(host, 8001, "other-name")[0] == 200
    assert host.run("test -e /etc/vllm/other/3").rc != 0
    assert main_pid(host, "chat") == before


def test_an_instance_that_nobody_wants_is_gone(host: Host) -> None:
    before = main_pid(host, "chat")
    applied(host, "vllm", vllm_instances=[CHAT])
    assert main_pid(host, "chat") == before
    assert host.run("systemctl is-active vllm@other").stdout.strip() == "inactive"
    assert host.run("systemctl is-enabled vllm@other").stdout.strip() != "enabled"
    assert not host.file("/etc/vllm/other").exists
    assert host.run("pgrep -u vllm -f VLLM::EngineCore -c").stdout.strip() == "1"


def test_a_run_that_died_half_way_is_finished_by_the_next(host: Host) -> None:
    """What a run leaves that dies between writing a generation and proving it, and a release that was half built."""
    host.check_output(
        "rm /etc/vllm/chat/current/confirmed && mkdir /etc/vllm/chat/.9.partial /opt/vllm/releases/0.1.0-half"
    )
    done = apply_role(host, "vllm", vllm_instances=[CHAT])
    assert done.returncode == 0, done.stdout
    assert host.file("/etc/vllm/chat/current/confirmed").exists
    assert not host.file("/etc/vllm/chat/.9.partial").exists
    assert not host.file("/opt/vllm/releases/0.1.0-half").exists
    again = applied(host, "vllm", vllm_instances=[CHAT])
    assert "changed=0" in again


def test_a_crash_is_followed_by_a_start(host: Host) -> None:
    host.check_output("pkill -9 -u vllm -f VLLM::EngineCore")
    deadline = time.monotonic() + 400  # a start takes 40 s; more on a machine that does other things
    while time.monotonic() < deadline:
        time.sleep(2)
        if ask(host)[0] == 200:
            return
    pytest.fail(host.run("systemctl status --no-pager --lines=40 vllm@chat").stdout)
