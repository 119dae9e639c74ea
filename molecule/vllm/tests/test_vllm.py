"""The real vLLM (its CPU build) with a real small model, under the unit that runs in production.

What cannot be shown here: GPUs, and on a machine with cgroup v1 the device rules of the unit (they have no effect there).
Tests that change the host come last and build on each other's end state. What the role does with instances, whatever runs in
them, is in test_instances.py.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from tests.roles import ROOT, applied, refused, until
from tests.sandbox import ATTEMPTS, PROBE, probe
from tests.served import (
    KEY,
    MODEL,
    Asked,
    Client,
    ask,
    ends_before_a_stop,
    generation,
    main_pid,
    nothing_is_left_of_a_proof,
    send,
)
from tests.stand_in import contract

testinfra_hosts = ["docker://vllm-debian12"]

INSTANCES: list[dict[str, Any]] = yaml.safe_load((ROOT / "molecule/shared/inventory/group_vars/vllm.yml").read_text())[
    "vllm_instances"
]
# See there: what each of them has. The adapter and the int8 model come from make_models.py.
CHAT, OTHER, EMBED = INSTANCES
# What the last tests make of OTHER.
PLAIN = {**OTHER, "model": MODEL, "options": {**OTHER["options"], "max-model-len": 512}}
UNITS = ("chat", "other", "embed")
JUDGE = ROOT / "roles/vllm/files/judge.py"
METRIC = "vllm:prefix_cache_hits_total{"


def cosine(one: list[float], other: list[float]) -> float:
    """How near two vectors are: 1 in the same direction."""
    product: float = sum(map(operator.mul, one, other))
    return product / math.hypot(*one) / math.hypot(*other)


def text(host: Host, *arguments: Any, **more: Any) -> str:
    """The text of a completion."""
    status, answer = ask(host, *arguments, **more)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def models(host: Host, port: int = 8000) -> dict[str, dict[str, Any]]:
    """What an instance says that it serves, by name."""
    return {entry["id"]: entry for entry in send(host, port, "/v1/models")[1]["data"]}


@pytest.mark.parametrize("assertion", contract.CONTRACT, ids=lambda assertion: assertion.__name__)
def test_it_does_what_the_stand_in_does(host: Host, assertion: Callable[[contract.Server], None]) -> None:
    """tests/unit/test_stand_in.py runs the same list on the stand-in."""
    assertion(Asked(host))


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
    environments = "".join(f"; tr '\\0' ' ' </proc/{main_pid(host, name)}/environ" for name in UNITS)
    told = host.run(places + environments).stdout
    assert "smollm2" in told
    assert "FLEET_INTERNAL_KEYS=" in told
    assert KEY not in told
    assert host.file("/etc/vllm/internal_key").mode == 0o600
    accepted = host.file("/etc/vllm-keys/accepted")
    assert (accepted.mode, accepted.user, accepted.group) == (0o640, "root", "vllm")
    assert KEY not in accepted.content_string


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


def test_a_release_is_proved_with_a_tiny_model_beside_what_runs(host: Host) -> None:
    """A change of `other`. `embed` is not needed any more."""
    before = main_pid(host, "chat")
    told = applied(host, "vllm", vllm_instances=[CHAT, PLAIN], vllm_start_proof="refuse")
    assert "prove | The proofs answer a completion" in told
    assert len(host.check_output("ls /opt/vllm/proofs/*.json").split()) == 1
    nothing_is_left_of_a_proof(host)
    assert main_pid(host, "chat") == before
    assert generation(host, "other") == "2"
    assert ask(host, 8001, "other-name")[0] == 200


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


def test_what_starts_with_no_model_is_refused_before_anything_stops(host: Host) -> None:
    """An environment that kills every start: found with a tiny model, while what runs answers every request."""
    before = main_pid(host, "other")
    deadly = {**PLAIN, "environment": {**PLAIN["environment"], "VLLM_LOGGING_LEVEL": "nonsense"}}
    with Client(host, 8001, "other-name") as client:
        told = refused(host, "vllm", vllm_instances=[CHAT, deadly], vllm_start_proof="refuse", vllm_judgement="off")
    assert "What vLLM instance other on" in told
    assert "does not start, not even with a tiny model" in told
    assert "Unknown level: 'NONSENSE'" in told
    assert "Nothing was stopped" in told
    assert len(client.answers) > 5 and set(client.answers) == {200}, client.answers
    assert main_pid(host, "other") == before
    assert generation(host, "other") == "2"
    nothing_is_left_of_a_proof(host)
    assert len(host.check_output("ls /opt/vllm/proofs/*.json").split()) == 1, "what failed is not recorded"


def test_it_judges_as_the_stand_in_does(host: Host) -> None:
    """Importing vLLM takes longest, so everything is asked at once."""
    release = host.check_output("readlink -f /etc/vllm/chat/current/release")

    def ask_all(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        host.check_output("mkdir -p /srv/judge")
        for name, text in (("judge.py", JUDGE.read_text()), ("requests", json.dumps(requests))):
            host.check_output(f"printf %%s %s >/srv/judge/{name}", text)
        environment = "HOME=/tmp VLLM_CACHE_ROOT=/tmp/judge HF_HUB_OFFLINE=1"
        command = f"cd /tmp && {environment} {release}/bin/python -c %s /srv/judge </srv/judge/requests 2>/dev/null"
        return list(json.loads(host.check_output(command, contract.JUDGE_ALL)))

    contract.it_judges(f"/srv/models/{MODEL}", ask_all)


def test_a_wrong_option_costs_no_second_of_service(host: Host) -> None:
    before = main_pid(host, "other")
    wrong = {**PLAIN, "options": {**PLAIN["options"], "quantization": "nonsense"}}
    with Client(host, 8001, "other-name") as client:
        told = refused(host, "vllm", vllm_instances=[CHAT, wrong])
    assert "vllm_instances (other): vLLM itself refuses this: Unknown quantization method: nonsense." in told
    assert len(client.answers) > 2 and set(client.answers) == {200}, client.answers
    assert (main_pid(host, "other"), generation(host, "other")) == (before, "2")


def test_a_running_request_ends_before_its_instance_stops(host: Host) -> None:
    """`other` is restarted under a request that takes some seconds: the request is answered to its end."""
    asked = Asked(host, "other", 8001, "other-name")
    ends_before_a_stop(
        host, "other", lambda: ask(host, 8001, "other-name", tokens=60), 60, meanwhile=lambda: contract.it_drains(asked)
    )
    leftover = host.run("pgrep -u vllm -f VLLM::EngineCore -c").stdout.strip()
    assert leftover == "1", "only the engine of `chat` may be left"


def test_it_ends_with_its_engine_and_systemd_starts_it_again(host: Host) -> None:
    """That it then answers again is a start as any other, and shown with the stand-in."""
    before = int(host.check_output("systemctl show --property=NRestarts --value vllm@chat"))
    contract.it_ends_with_its_engine(Asked(host), lambda: host.check_output("pkill -9 -x VLLM::EngineCor"))
    restarts = "systemctl show --property=NRestarts --value vllm@chat"
    until(lambda: int(host.check_output(restarts)) == before + 1, 60, "systemd did not start it again")
