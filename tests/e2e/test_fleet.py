"""From bare hosts to a service that survives what happens to services.

What stands in for what: the hosts are systemd containers on one network of this machine, reached over real SSH by an
unprivileged user with sudo. vLLM is its CPU build with a real small model, and a stand-in where things are broken that are
not vLLM (fixture stand_in); Nginx, TLS and the OpenAI client are what production has. A reboot is `docker restart`, which
is closer to a power cut: nothing is told to stop. The kernel, GPUs, and a network that loses packets are not here.

The tests run in this order. The first wants bare hosts; from the limits on the stand-in serves; from `A configuration that
vLLM refuses` on they break things, and each leaves a fleet that serves.
"""

from __future__ import annotations

import getpass
import http.client
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.e2e.conftest import (
    DIRECTORY,
    ENVIRONMENT,
    FIGURES,
    GATEWAY,
    KILL_MODULES,
    LEASE,
    LEFTOVERS,
    NAME,
    ROOT,
    RUNTIME,
    STRANGERS_LEASE,
    UNIT,
    WORKERS,
    Done,
    Fleet,
    command,
    demo,
    on,
    playbook,
    playbook_command,
    program,
    secret,
    until,
)
from tests.hosts import hosts
from tests.network import scan

CHAT, COMPLETIONS, RESPONSES, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"
EMBEDDING = "tiny-embedding"
OPEN = {("POST", CHAT), ("POST", COMPLETIONS), ("POST", RESPONSES), ("GET", MODELS)}
# The instance of the demo that the tests change, and what else is on the hosts.
INSTANCE, *OTHERS = yaml.safe_load((ROOT / "inventories/demo/group_vars/vllm/vllm.yml").read_text())["vllm_instances"]
BUSY_KEY, NARROW_KEY, WRONG_KEY = (secrets.token_hex(32) for _ in range(3))
# What differs on a host that was left alone: logs, caches, and what Ansible and sudo need to look at it.
SNAPSHOT = (
    "dpkg-query -W; cat /etc/passwd /etc/group; systemctl list-unit-files --no-legend;"
    " find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /var/tmp -o -path /var/log"
    " -o -path '/var/cache/apt/*.bin' -o -path /var/cache/uv -o -path '/home/*/.ansible' -o -path /var/lib/systemd -o -path /srv/wheels"
    " -o -path /root/.ansible \\) -prune -o -type f -printf '%p %s %T@ %m %U\\n' 2>/dev/null | sort"
)


def code(error: openai.APIStatusError) -> object:
    """What the gateway calls an error."""
    body = error.response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    return body["error"]["code"]


class Watch:
    """Another client, who goes on asking while something happens."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.outcomes: list[tuple[float, str]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        while not self.over.is_set():
            try:
                outcome = str(self.fleet.complete().status)
            except (OSError, http.client.HTTPException) as error:
                outcome = type(error).__name__
            self.outcomes.append((time.monotonic(), outcome))
            self.over.wait(0.2)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def told(self) -> str:
        """How it went, for a person."""
        counted = dict(Counter(outcome for _, outcome in self.outcomes))
        return f"{counted}, longest time without an answer {self.longest_gap():.1f} s"

    def longest_gap(self) -> float:
        """The longest time between two good answers, in seconds."""
        good = [moment for moment, outcome in self.outcomes if outcome == "200"]
        return max((after - before for before, after in pairwise(good)), default=float("inf"))

    def failures(self) -> list[str]:
        return [outcome for _, outcome in self.outcomes if outcome != "200"]


# --- from nothing ---


def test_check_mode_on_bare_hosts_succeeds_and_changes_nothing(bare_hosts: Sequence[str]) -> None:
    before = {host: on(host, SNAPSHOT) for host in bare_hosts}
    done = playbook("site.yml", "--check", "--diff")
    FIGURES["site.yml --check --diff on bare hosts"] = f"{done.seconds:.0f} s"
    recap = done.recap()
    assert set(recap) == set(bare_hosts)
    assert all(counters["changed"] and not counters["failed"] for counters in recap.values()), recap
    for name in ("api_key", "internal_key"):
        assert secret(name) not in done.output
    for host in bare_hosts:
        differing = set(before[host].splitlines()) ^ set(on(host, SNAPSHOT).splitlines())
        assert not differing, f"{host}: {sorted(differing)[:20]}"


def test_demo_tells_how_to_ask(fleet: Fleet) -> None:
    """What it prints is copied and run as it is."""
    printed = fleet.first_run.output
    curl = printed[printed.index("curl --cacert") : printed.index("or with Python")]
    python = printed[printed.index("import openai") : printed.index("Next:")]
    # at the model's own temperature: any answer will do
    answer = program("sh", "-c", curl.replace("curl", "curl --silent --show-error --fail", 1)).output
    assert json.loads(answer)["choices"][0]["message"]["content"]
    assert program(sys.executable, "-c", python).output.strip().endswith("numbers by tiny-embedding")
    assert re.search(r"answer: .*Paris", printed), "the demo's own question is asked at temperature 0"
    assert set(fleet.access) == {"base_url", "ca_file", "api_key", "model", "models", "hosts"}
    assert set(fleet.access["hosts"]) == {GATEWAY, *WORKERS}
    assert (DIRECTORY / "access.json").stat().st_mode & 0o077 == 0


def test_what_the_page_for_clients_says_works(fleet: Fleet) -> None:
    page = (ROOT / "docs/clients.md").read_text().replace("qwen2.5-7b", fleet.model).replace("bge-m3", EMBEDDING)
    python = page.partition("### openai for Python")[2].partition("```python\n")[2].partition("```")[0]
    curl = page.partition("### curl\n")[2].partition('`"stream"')[0]
    told = {
        "FLEET": fleet.access["base_url"].removesuffix("/v1"), "FLEET_KEY": fleet.key, "SSL_CERT_FILE": fleet.access["ca_file"],
    }  # fmt: skip
    assert program(sys.executable, "-c", python, environment=told).output.endswith("numbers: 128\n")
    directory = Path(fleet.access["ca_file"]).parent
    done = program("sh", "-c", f"cd {directory} && {curl.strip()}", environment=told)
    assert json.loads(done.output[done.output.index("{") :])["choices"][0]["message"]["content"]


def test_a_second_run_changes_nothing_and_asks_each_host_little(fleet: Fleet, tmp_path: Path) -> None:
    counted = tmp_path / "calls.json"
    done = demo("up", ANSIBLE_CALLBACKS_ENABLED="gpufleet.llm.remote_calls", REMOTE_CALLS_FILE=str(counted))
    FIGURES["demo up, again"] = f"{done.seconds:.0f} s"
    recap = done.recap()
    assert set(recap) == {GATEWAY, *WORKERS}
    for host, counters in recap.items():
        assert counters["changed"] == counters["failed"] == counters["unreachable"] == 0, (host, counters)
        # Each is a process on the controller, one that is skipped too: 30 to 100 ms of its processor time.
        assert counters["ok"] + counters["skipped"] <= 53, (host, counters)
    calls = json.loads(counted.read_text())
    assert set(calls) == set(recap)
    for host, made in calls.items():
        assert made["total"] <= 3 + len(set(made["roles"]) - {"no role"}), (host, made)
        hardening = ("host_support", "base", "firewall", "ssh_hardening")
        assert sum(made["roles"].get(f"gpufleet.llm.{role}", 0) for role in hardening) <= 4, (host, made)
    FIGURES["remote calls of a run that changes nothing"] = ", ".join(
        f"{host} {made['total']}" for host, made in calls.items()
    )
    FIGURES["tasks of a run that changes nothing"] = ", ".join(f"{host} {ran['ok']}" for host, ran in recap.items())


def test_vllm_runs_in_a_container_or_not(fleet: Fleet) -> None:
    for worker in WORKERS:
        processes = on(worker, "readlink /proc/1/ns/pid; readlink /proc/$(pgrep -ox VLLM::EngineCor)/ns/pid").split()
        assert len(set(processes)) == (2 if RUNTIME == "docker" else 1), processes


# --- a client ---


def test_models_are_listed(fleet: Fleet) -> None:
    client = fleet.client()
    assert [model.id for model in client.models.list()] == fleet.access["models"] == [fleet.model, EMBEDDING]
    assert client.models.retrieve(EMBEDDING).id == EMBEDDING
    for name in ("nobody-has-this", "../../etc"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve(name)
        assert fleet.model not in refused.value.response.text


def test_the_model_of_a_request_chooses_the_instance(fleet: Fleet) -> None:
    client = fleet.client()
    before = fleet.log_lines()
    assert len(client.embeddings.create(model=EMBEDDING, input="Hi").data[0].embedding) == 128
    aliased = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
    assert aliased.model == fleet.model, "answers have the model's own name"
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="nobody-has-this", prompt="Hi")
    assert code(refused.value) == "model_not_found"
    asked = [line["upstream_addr"].rpartition(":")[2] for line in fleet.log(before)]
    assert asked == ["8001", "8000", ""], "the ports of embed and chat, and nobody"


def test_chat(fleet: Fleet) -> None:
    answer = fleet.client().chat.completions.create(
        model=fleet.model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=16,
    )
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.usage is not None and answer.usage.completion_tokens > 0


def test_completion(fleet: Fleet) -> None:
    answer = fleet.client().completions.create(
        model=fleet.model, prompt="The capital of France is", temperature=0, max_tokens=4
    )
    assert "Paris" in answer.choices[0].text


def test_a_chat_streams_piece_by_piece(fleet: Fleet) -> None:
    began = time.monotonic()
    moments: list[float] = []
    text = ""
    with fleet.client().chat.completions.create(
        model=fleet.model,
        messages=[{"role": "user", "content": "Count to thirty."}],
        max_tokens=48,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as pieces:
        for piece in pieces:
            if piece.choices and piece.choices[0].delta.content:
                moments.append(time.monotonic() - began)
                text += piece.choices[0].delta.content
    assert len(moments) >= 40, moments
    assert text.strip()
    spread = moments[-1] - moments[0]
    gaps = [after - before for before, after in pairwise(moments)]
    FIGURES["a streamed chat"] = f"{len(moments)} pieces, first after {moments[0]:.2f} s, last {spread:.2f} s later"
    # Made on a CPU, 48 tokens take a second or more. Held back anywhere, they come in one lump, or in few.
    assert spread > 0.3, moments
    assert max(gaps) < spread / 2, moments


def test_an_error_of_vllm_reaches_the_client_as_it_is(fleet: Fleet) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        fleet.client().completions.create(model=fleet.model, prompt="Hi", max_tokens=-1)
    assert "max_tokens" in str(refused.value)


def test_a_wrong_key_is_refused(fleet: Fleet) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        fleet.client(WRONG_KEY).models.list()
    assert code(refused.value) == "invalid_api_key"
    # vLLM's own key opens nothing from outside
    with pytest.raises(openai.AuthenticationError):
        fleet.client(fleet.internal_key).models.list()


def test_vllm_answers_nobody_without_its_own_key(fleet: Fleet) -> None:
    """The client's key does not work past the gateway, so the gateway must have put another in its place."""
    for key in (None, fleet.key):
        assert fleet.inside(WORKERS[0], "GET", MODELS, key=key) == 401
    assert fleet.inside(WORKERS[0], "GET", MODELS, key=fleet.internal_key) == 200


def test_from_outside_two_ports_of_the_gateway_are_open_and_nothing_else(fleet: Fleet) -> None:
    """Every port of every host, as a stranger in the same network sees it, and as the others of the fleet do."""
    stranger = f"{NAME}-stranger"
    hosts.up(NAME, {stranger: "debian12"})
    pairs = [(stranger, GATEWAY), (stranger, WORKERS[0]), (GATEWAY, WORKERS[0]), (WORKERS[0], WORKERS[1])]
    with ThreadPoolExecutor(len(pairs)) as pool:
        found = pool.map(lambda pair: scan(pair[0], fleet.access["hosts"][pair[1]], range(1, 65536)), pairs)
        seen = dict(zip(pairs, found, strict=True))
    hosts.docker("rm", "--force", "--volumes", stranger)
    assert {pair: found["open"] for pair, found in seen.items()} == {
        (stranger, GATEWAY): [80, 443],
        (stranger, WORKERS[0]): [],
        (GATEWAY, WORKERS[0]): [8000, 8001, 9440],
        (WORKERS[0], WORKERS[1]): [],
    }
    # dropped, not refused: nobody learns what is there
    assert not any(found["refused"] for found in seen.values()), seen


def test_both_hosts_are_asked(fleet: Fleet) -> None:
    before = fleet.log_lines()
    with ThreadPoolExecutor(4) as pool:
        assert {reply.status for reply in pool.map(lambda _: fleet.complete(), range(24))} == {200}
    asked = Counter(line["upstream_addr"] for line in fleet.log(before))
    FIGURES["24 requests went to"] = ", ".join(f"{backend} {times}" for backend, times in sorted(asked.items()))
    assert set(asked) == {fleet.backend(worker) for worker in WORKERS}
    assert min(asked.values()) >= 3, asked


# --- what is open, and what is not ---


def routes(journal: Sequence[str]) -> set[tuple[str, str]]:
    """What vLLM said at its start that it serves: (method, path)."""
    found = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", "\n".join(journal))
    return {(method.strip(), path) for path, methods in found for method in methods.split(",")}


def test_every_route_of_vllm_is_open_or_not_there(fleet: Fleet) -> None:
    """Each one probed with its methods, with and without a key; what is not open never reaches vLLM."""
    listed = routes(fleet.journal(WORKERS[0]))
    assert len(listed) > 20, listed
    assert listed >= OPEN, OPEN - listed
    paths = sorted({path for _, path in listed})
    bodies: dict[str, dict[str, object]] = {
        CHAT: {"model": fleet.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
        COMPLETIONS: fleet.prompt(),
        RESPONSES: {"model": fleet.model, "input": "Hi", "max_output_tokens": 16},
    }
    lengths = {worker: len(fleet.journal(worker)) for worker in WORKERS}
    before = fleet.log_lines()
    wrong = []
    probes = 0
    for path in paths:
        probed = re.sub(r"\{\w+\}", "x", path)
        for method in sorted({m for m, p in listed if p == path} | {"GET", "POST"}):
            body = bodies.get(path, {}) if method == "POST" else None
            for key in (fleet.key, None):
                got = fleet.ask(method, probed, key=key, body=body).status
                if path == "/health":
                    expected = 200  # the gateway's own
                elif path not in {p for _, p in OPEN}:
                    expected = 404
                elif key is None:
                    expected = 401
                else:
                    expected = 200 if (method, path) in OPEN else 405
                probes += 1
                if got != expected:
                    wrong.append(f"{method} {path} {'with' if key else 'without'} key: {got} instead of {expected}")
    assert not wrong, wrong
    FIGURES["routes of vLLM"] = f"{len(paths)} paths, {probes} probes, {len(OPEN)} open"

    through = {(line["method"], line["uri"]) for line in fleet.log(before) if line["upstream_addr"]}
    assert through == OPEN - {("GET", MODELS)}, "the gateway answers for the models itself"
    reached = set()
    for worker in WORKERS:
        lines = "\n".join(fleet.journal(worker)[lengths[worker] :])
        reached |= set(re.findall(r'"([A-Z]+) (\S+) HTTP/1\.1" \d+', lines))
    # the health checks of the gateway ask for the metrics of who does not answer
    assert reached - {("GET", "/metrics")} == OPEN - {("GET", MODELS)}


@pytest.mark.parametrize(
    "path",
    [
        "//metrics",
        "/metrics/",
        "/%6detrics",
        "/v1/models/x",
        "/V1/models",
        "/v1/models/..%2f..%2fmetrics",
        "/v1/chat/completions/../../../metrics",
        "/v1/models;/metrics",
        "/server_info",
        "/sleep",
        "/collective_rpc",
        "/v1/load_lora_adapter",
    ],
)
def test_no_spelling_leads_past_the_gateway(fleet: Fleet, path: str) -> None:
    before = fleet.log_lines()
    for method in ("GET", "POST"):
        assert fleet.ask(method, path, key=fleet.key).status in (404, 405 if path.startswith("/v1/models/") else 404)
    assert not any(line["upstream_addr"] for line in fleet.log(before))


# --- limits ---


@pytest.fixture(scope="module")
def limited(fleet: Fleet, stand_in: None) -> Done:
    """Two more clients, added by one run while an answer streams: `busy` may ask seldom, `narrow` one thing at a time."""
    clients = [
        {"name": "demo", "key": fleet.key, "requests_per_minute": 600, "concurrent_requests": 32},
        {"name": "busy", "key": BUSY_KEY, "requests_per_minute": 6, "burst": 2, "concurrent_requests": 4},
        {"name": "narrow", "key": NARROW_KEY, "requests_per_minute": 600, "concurrent_requests": 1},
    ]
    nginx = on(GATEWAY, "cat /run/nginx.pid")
    reloaded = threading.Event()

    def follow() -> int:
        """Read on until twenty pieces have come after the reload."""
        late = 0
        for _ in fleet.stream(1900):
            late += reloaded.is_set()
            if late == 20:
                break
        return late

    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(follow)
        try:
            done = playbook("site.yml", "--tags", "gateway", variables={"gateway_clients": clients})
        finally:
            reloaded.set()
        assert stream.result() == 20, "the reload cut a stream"
    FIGURES["site.yml --tags gateway, two clients more"] = f"{done.seconds:.0f} s"
    assert done.recap()[GATEWAY]["changed"] > 0
    assert BUSY_KEY not in done.output
    assert on(GATEWAY, "cat /run/nginx.pid") == nginx, "Nginx was restarted and not reloaded"
    return done


@pytest.mark.usefixtures("limited")
def test_too_many_requests_of_one_client_do_not_touch_another(fleet: Fleet) -> None:
    client = fleet.client(BUSY_KEY)
    for _ in range(3):  # one, and a burst of two
        client.models.list()
    with pytest.raises(openai.RateLimitError) as refused:
        client.models.list()
    assert code(refused.value) == "rate_limit_exceeded"
    assert refused.value.response.headers["Retry-After"] == "10"
    for _ in range(5):
        assert fleet.complete().status == 200
        with pytest.raises(openai.RateLimitError):
            client.models.list()
    time.sleep(10)
    client.models.list()


@pytest.mark.usefixtures("limited")
def test_too_many_streams_of_one_client_do_not_touch_another(fleet: Fleet) -> None:
    stream = fleet.stream(300, NARROW_KEY)
    next(stream)
    second = fleet.complete(NARROW_KEY)
    assert second.status == 429
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(second.headers["retry-after"]) >= 1
    assert fleet.complete().status == 200
    assert list(stream)[-1] == 300
    assert fleet.complete(NARROW_KEY).status == 200


@pytest.mark.usefixtures("limited")
def test_a_client_that_was_removed_is_a_stranger(fleet: Fleet) -> None:
    assert fleet.complete(NARROW_KEY).status == 200
    playbook("site.yml", "--tags", "gateway")
    for key in (BUSY_KEY, NARROW_KEY):
        assert fleet.complete(key).status == 401
    assert fleet.complete().status == 200


# --- proof from the outside ---


@pytest.mark.usefixtures("stand_in")
def test_verify_alone_passes_and_names_what_is_wrong(fleet: Fleet) -> None:
    done = playbook("playbooks/verify.yml")
    FIGURES["verify.yml"] = f"{done.seconds:.0f} s"
    rows = (f"completion {fleet.model}", "alias gpt-4o", f"embedding {EMBEDDING}", "unknown model", "closed /metrics")
    for row in ("certificate", "key needed", "models", *rows):
        assert re.search(rf"\bok +{re.escape(row)} ", done.output), done.output
    stranger = [{"name": "demo", "key": WRONG_KEY}]
    failed = playbook("playbooks/verify.yml", variables={"gateway_clients": stranger}, check=False)
    assert failed.status != 0
    assert re.search(r"FAILED +models +401", failed.output), failed.output
    assert re.search(r"ok +certificate", failed.output)


# --- what happens to services ---


@pytest.mark.usefixtures("stand_in")
def test_a_configuration_that_vllm_refuses_stops_nothing(fleet: Fleet) -> None:
    """The preflight asks vLLM itself, on the host: a client behind the gateway sees nothing of it."""
    worker = WORKERS[0]
    good, pid = on(worker, "readlink /etc/vllm/chat/current"), on(worker, "systemctl show -p MainPID vllm@chat")
    instance = {
        "name": "chat",
        "model": fleet.model,
        "port": 8000,
        "cpus": [0],
        "options": {"max-model-len": 10_000_000},
        "environment": {"VLLM_CPU_KVCACHE_SPACE": 1},
    }
    with Watch(fleet) as watch:
        arguments = ("--limit", worker, "--tags", "vllm")
        done = playbook("site.yml", *arguments, variables={"vllm_instances": [instance, *OTHERS]}, check=False)
    FIGURES["a configuration that vLLM refuses, asked before: run"] = f"{done.seconds:.0f} s"
    assert done.status != 0
    assert "vLLM itself refuses this: User-specified max_model_len (10000000) is greater" in " ".join(
        done.output.split()
    )
    assert watch.failures() == [] and watch.longest_gap() < 5, watch.told()
    assert on(worker, "readlink /etc/vllm/chat/current") == good
    assert on(worker, "systemctl show -p MainPID vllm@chat") == pid


@pytest.mark.usefixtures("stand_in")
def test_a_planned_stop_loses_no_request(fleet: Fleet) -> None:
    """Whoever stops an instance: it leaves the gateway first, and takes part again when it answers."""
    worker = WORKERS[0]

    def used() -> bool:
        state = json.loads(on(GATEWAY, "cat /run/vllm-gateway/state.json"))
        return bool(state["backends"][f"chat@{worker}"]["use"])

    with Watch(fleet) as one, Watch(fleet) as other:
        on(worker, "systemctl stop vllm@chat && systemctl start vllm@chat")
        until("the gateway uses the instance again", used, 60)
        on(worker, "systemctl restart vllm@chat")
        until("the gateway uses the instance once more", used, 60)
    FIGURES["clients while an instance is stopped, started and restarted"] = f"{one.told()}; {other.told()}"
    assert one.failures() == other.failures() == [], (one.told(), other.told())
    assert "every gateway has let it go" in on(worker, "journalctl --unit vllm@chat --no-pager --output cat")


@pytest.mark.usefixtures("stand_in")
def test_a_configuration_that_vllm_refuses_is_taken_back(fleet: Fleet) -> None:
    """Nobody asks vLLM before, and it fails in the engine. The other host goes on answering.

    Nothing takes the host out of the gateway before it stops yet (drain is to come), and vLLM answers 500 while it drains:
    so some requests may fail in these seconds, but the service is never away.
    """
    worker = WORKERS[0]
    good = on(worker, "readlink /etc/vllm/chat/current")
    instance = {
        "name": "chat",
        "model": fleet.model,
        "port": 8000,
        "cpus": [0],
        "options": {"max-model-len": 10_000_000, "dtype": "bfloat16", "enforce-eager": True},
        "environment": {"VLLM_CPU_KVCACHE_SPACE": 1},
    }
    with Watch(fleet) as watch:
        arguments = ("--limit", worker, "--tags", "vllm")
        variables = {"vllm_instances": [instance, *OTHERS], "vllm_judgement": "off"}
        done = playbook("site.yml", *arguments, variables=variables, check=False)
    FIGURES["a configuration that vLLM refuses, unasked: run, way back included"] = f"{done.seconds:.0f} s"
    FIGURES["a client meanwhile"] = watch.told()
    assert done.status != 0
    assert done.recap()[worker]["failed"] == 1
    assert "did not come up" in done.output
    assert re.search(r"max.model.len", done.output.split("did not come up", 1)[1]), done.output
    assert "The previous generation is back and answers." in done.output
    assert fleet.internal_key not in done.output
    assert on(worker, "readlink /etc/vllm/chat/current") == good
    assert on(worker, "cat /run/vllm/chat/generation") == good
    assert fleet.direct(worker) == 200
    assert set(watch.failures()) <= {"500", "502"}, watch.told()
    assert watch.longest_gap() < 30, watch.told()


@pytest.mark.usefixtures("stand_in")
def test_a_killed_engine_ends_its_stream_and_comes_back(fleet: Fleet) -> None:
    """One stream on each host; the engine of one host is killed. Nobody does anything about it."""
    worker = WORKERS[0]

    def both_serve() -> bool:
        """Nginx leaves a backend alone for ten seconds after it failed: the test before may have ended just now."""
        since = fleet.log_lines()
        for _ in range(4):
            fleet.complete()
        # one that is asked in vain stands in the log beside the one that answered
        return {line["upstream_addr"] for line in fleet.log(since)} == {fleet.backend(worker) for worker in WORKERS}

    until("the gateway asks both hosts", both_serve, 60)
    before = fleet.log_lines()
    ends: list[float] = []

    def follow(stream: Iterator[int]) -> tuple[int, str]:
        tokens = 0
        try:
            for so_far in stream:
                tokens = so_far
        except Exception as error:  # whatever it is, it has to be an error and not silence
            ends.append(time.monotonic())
            return tokens, f"{type(error).__name__}: {error}"
        return tokens, ""

    streams = [fleet.stream(400), fleet.stream(400)]
    for stream in streams:
        next(stream)  # the second begins when the first runs, so each host has one
    restarts = int(on(worker, f"systemctl show --property NRestarts --value {UNIT}"))
    with ThreadPoolExecutor(2) as pool, Watch(fleet) as watch:
        followed = [pool.submit(follow, stream) for stream in streams]
        time.sleep(1)
        on(worker, "kill -9 $(pgrep -x VLLM::EngineCor)")
        killed = time.monotonic()
        outcomes = [end.result(timeout=120) for end in followed]
        back = until(f"{worker} serves again", lambda: fleet.direct(worker) == 200)
    FIGURES["kill -9 of an engine: it served again after"] = f"{time.monotonic() - killed:.0f} s"
    FIGURES["kill -9 of an engine: other clients meanwhile"] = watch.told()
    broken = [outcome for outcome in outcomes if outcome[1]]
    whole = [outcome for outcome in outcomes if not outcome[1]]
    assert len(broken) == 1 and len(whole) == 1, outcomes
    FIGURES["kill -9 of an engine: its stream"] = f"{broken[0][1]} (after {ends[0] - killed:.1f} s)"
    assert ends[0] - killed < 60
    assert broken[0][0] < 400 == whole[0][0], outcomes
    assert int(on(worker, f"systemctl show --property NRestarts --value {UNIT}")) == restarts + 1
    assert back < 420
    good = Counter(line["upstream_addr"] for line in fleet.log(before) if line["status"] == "200")
    assert good[fleet.backend(WORKERS[1])] >= 10, good
    # The dying server may break what it was asked in its last second; then the gateway asks the other one.
    assert len(watch.failures()) <= 10, watch.told()


@pytest.mark.usefixtures("stand_in")
def test_verify_fails_and_clients_are_told_when_nothing_serves(fleet: Fleet) -> None:
    for worker in WORKERS:
        on(worker, f"systemctl stop {UNIT}")
    reply = fleet.complete()
    assert reply.status in (502, 503)
    assert reply.json()["error"]["code"] in ("bad_gateway", "unavailable")
    failed = playbook("playbooks/verify.yml", check=False)
    assert failed.status != 0
    for row in (f"completion {fleet.model}", f"streaming {fleet.model}"):
        assert re.search(rf"FAILED +{re.escape(row)} +(/v1/completions: )?50[23]", failed.output), failed.output
    assert re.search(r"ok +key needed", failed.output)
    on(WORKERS[1], f"systemctl start --no-block {UNIT}")
    took = until("the gateway serves again", lambda: fleet.complete().status == 200)
    FIGURES["systemctl start until the gateway serves"] = f"{took:.0f} s"


@pytest.mark.usefixtures("stand_in")
def test_hosts_come_back_from_a_reboot_by_themselves(fleet: Fleet) -> None:
    """An inference host whose service was stopped but never disabled, then the gateway. Ansible is not asked."""
    worker = WORKERS[0]
    assert fleet.complete().status == 200  # by the other one
    for host in (worker, GATEWAY):
        hosts.docker("restart", "--time", "1", host)
        if hosts.address(host) != fleet.access["hosts"][host]:
            pytest.skip(f"Docker gave {host} another address: what is bound to the old one cannot come back")
        if host == worker:
            with Watch(fleet) as watch:
                took = until(f"{worker} serves again", lambda: fleet.direct(worker) == 200)
            FIGURES["reboot of an inference host: it served again after"] = f"{took:.0f} s"
            FIGURES["reboot of an inference host: clients meanwhile"] = watch.told()
            assert not watch.failures(), watch.told()

    def answers() -> bool:
        try:
            return fleet.complete().status == 200
        except (OSError, http.client.HTTPException):
            return False

    took = until("the gateway serves again", answers, seconds=30, pause=0.2)
    FIGURES["reboot of the gateway: it served again after"] = f"{took:.1f} s"


# --- runs that meet, and runs that die ---


def test_two_operators_never_change_a_host_at_the_same_time(fleet: Fleet) -> None:
    """The second is told who is first, and holds nothing afterwards. Then a run on another controller that nobody can ask."""
    command = playbook_command("site.yml", "--tags", "base")
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as first:
        until("the first run holds the fleet", lambda: not on(GATEWAY, f"test -e {LEASE} || echo no"), 60, 0.05)
        # Stopped, it holds the hosts for as long as the second run takes.
        first.send_signal(signal.SIGSTOP)
        try:
            second = playbook("site.yml", "--tags", "base", check=False)
        finally:
            first.send_signal(signal.SIGCONT)
        told = first.communicate()[0].decode()
    assert first.returncode == 0, told
    who = rf"{GATEWAY} is being changed by {getpass.getuser()} on {socket.gethostname()} \(process {first.pid}\), since 20"
    assert re.search(who, " ".join(second.output.split())), second.output
    assert second.status != 0
    assert {counters["changed"] for counters in second.recap().values()} == {0}

    worker = WORKERS[0]
    on(worker, f"cat >{LEASE}", stdin=json.dumps(STRANGERS_LEASE))
    refused = playbook("site.yml", "--tags", "base", check=False)
    assert refused.status != 0
    assert "alice on ctl9 (process 7), since 2026-01-02 03:04:05 UTC" in " ".join(refused.output.split())
    assert on(GATEWAY, f"ls {LEASE} 2>/dev/null || true") == "", "who cannot have all hosts keeps none"
    broken = playbook("site.yml", "--tags", "base", "-e", "fleet_break_lease=true")
    assert {counters["changed"] for counters in broken.recap().values()} == {0}
    for host in (GATEWAY, *WORKERS):
        assert on(host, f"ls {LEASE} 2>/dev/null || true") == ""


@pytest.mark.usefixtures("stand_in")
def test_hosts_that_serve_are_changed_one_after_the_other(fleet: Fleet) -> None:
    """The second stops when the first has answered with its new options; a host that somebody holds stays as it is. Nothing drains yet, so
    that a request may meet the 500 of a server that stops; the service is never away.
    """
    first, second = WORKERS
    other = {"vllm_instances": [{**INSTANCE, "options": {**INSTANCE["options"], "max-model-len": 768}}, *OTHERS]}

    def when(worker: str, moment: str) -> int:
        return int(on(worker, f"systemctl show --property={moment}TimestampMonotonic --value vllm@chat"))

    with Watch(fleet) as watch:
        done = playbook("site.yml", "--tags", "vllm", variables=other)
    assert done.output.count("PLAY [Change vLLM in batches where it serves]") == 2, done.output
    assert when(second, "InactiveEnter") > when(first, "ExecMainStart") > when(first, "InactiveEnter")
    assert set(watch.failures()) <= {"500", "502"}, watch.told()
    assert watch.longest_gap() < 10, watch.told()
    FIGURES["a client while both hosts get new options"] = watch.told()

    on(first, "echo ann, since noon, compares two versions >/etc/vllm/chat/held")
    held = playbook("site.yml", "--tags", "vllm")
    assert "is held: ann, since noon, compares two versions." in " ".join(held.output.split())
    assert {worker: held.recap()[worker]["changed"] > 0 for worker in WORKERS} == {first: False, second: True}
    assert "max-model-len: 768" in on(first, "cat /etc/vllm/chat/current/config.yaml")
    on(first, "rm /etc/vllm/chat/held")
    assert playbook("site.yml", "--tags", "vllm").recap()[first]["changed"]


@pytest.mark.usefixtures("stand_in")
def test_one_command_puts_an_instance_back_on_every_host(fleet: Fleet) -> None:
    """To the generations of the test before, one host after the other; the next site.yml leaves them."""

    def lengths() -> list[str]:
        return [on(worker, "grep max-model-len /etc/vllm/chat/current/config.yaml").strip() for worker in WORKERS]

    wrong = playbook("playbooks/rollback.yml", "-e", "fleet_instance=chatt", check=False)
    assert "fleet_instance is 'chatt', which is no instance of these hosts" in " ".join(wrong.output.split())
    before = lengths()
    done = playbook("playbooks/rollback.yml", "-e", "fleet_instance=chat")
    assert done.output.count("PLAY [Put the instance back]") == len(WORKERS), done.output
    assert lengths() == ["max-model-len: 768"] * len(WORKERS)
    for host in (GATEWAY, *WORKERS):
        assert on(host, f"ls {LEASE} 2>/dev/null || true") == ""
    assert {counters["changed"] for counters in playbook("site.yml", "--tags", "vllm").recap().values()} == {0}
    shown = playbook("playbooks/status.yml", "-e", "status_compare=true", check=False).output
    for worker in WORKERS:
        [row] = [line for line in shown.splitlines() if re.match(rf"{worker} +chat ", line)]
        assert "held" in row and row.endswith("differs"), shown
    for worker in WORKERS:  # in one line where both are held in the same words
        assert re.search(rf"chat@{worker}\b[^\n]*: is held: ", shown), "in the list of what somebody wants"
    assert ": differs from the inventory" not in shown, "and not in that of problems"
    for worker in WORKERS:
        on(worker, "rm /etc/vllm/chat/held")
    playbook("site.yml", "--tags", "vllm")
    assert lengths() == before


DEATHS = {
    "the controller": "kill -9 of ansible-playbook",
    "both sides": "that, and of the modules that run on the host",
    "the connection": "kill -9 of the host's end of SSH",
    "the host": "a restart of the container, without a word to what runs in it",
}


@pytest.mark.usefixtures("stand_in")
def test_runs_that_die_while_vllm_changes_converge_on_the_next(fleet: Fleet) -> None:
    """Each run changes the options of an instance there or back, and dies of one of DEATHS at a random moment.

    KILLS=20 makes more of them. With more than eight, every third wants a configuration that vLLM refuses, so that the way back is
    interrupted as well.
    """
    rounds = int(os.environ.get("KILLS", "4"))
    worker = WORKERS[1]

    def wanted(number: int) -> dict[str, Any]:
        lengths = [1024, 2048, 10_000_000] if rounds > 8 else [1024, 2048]
        return {
            "vllm_judgement": "off",
            "vllm_instances": [
                {**INSTANCE, "options": {**INSTANCE["options"], "max-model-len": lengths[number % len(lengths)]}},
                *OTHERS,
            ],
        }

    arguments = ("site.yml", "--limit", worker, "--tags", "vllm")
    if RUNTIME != "docker":
        command(worker, start_seconds=3)
    length = playbook(*arguments, variables=wanted(0)).seconds
    chance = random.Random(20261121)
    for number in range(1, rounds + 1):
        death = list(DEATHS)[number % len(DEATHS)]
        with subprocess.Popen(
            playbook_command(*arguments, variables=wanted(number)),
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as run:
            time.sleep(chance.uniform(0.2, 1.2) * length)
            if death in ("the controller", "both sides"):
                os.killpg(run.pid, signal.SIGKILL)
                if death == "both sides":
                    on(worker, KILL_MODULES)
            elif death == "the connection":
                on(worker, "pkill -9 -f '^sshd: fleet'", check=False)
            else:
                hosts.docker("restart", "--time", "1", worker)
                if hosts.address(worker) != fleet.access["hosts"][worker]:
                    pytest.skip(f"Docker gave {worker} another address: what is bound to the old one cannot come back")
            run.wait(timeout=600)
    done = playbook("site.yml", "--limit", f"{worker},{GATEWAY}")
    FIGURES[f"the run after {rounds} that died"] = f"{done.seconds:.0f} s"
    again = playbook("site.yml", "--limit", f"{worker},{GATEWAY}")
    assert {counters["changed"] for counters in again.recap().values()} == {0}, again.output
    assert fleet.direct(worker) == 200
    current = on(worker, "readlink /etc/vllm/chat/current")
    assert on(worker, "cat /run/vllm/chat/generation") == current, "what runs is what is wanted"
    assert "max-model-len: 2048" in on(worker, "cat /etc/vllm/chat/current/config.yaml")
    generations = on(worker, "ls -A /etc/vllm/chat").split()
    assert [name for name in generations if name != "current" and not name.isdigit()] == []
    numbers = sorted(int(name) for name in generations if name != "current")
    good = sorted(int(line.split("/")[4]) for line in on(worker, "ls /etc/vllm/chat/[0-9]*/confirmed").split())
    assert set(numbers) <= {*numbers[-3:], *good[-2:]}, "the newest (vllm_keep_generations) and the last two good ones"
    assert on(worker, LEFTOVERS) == ""
    assert on(worker, f"ls {LEASE} 2>/dev/null || true") == ""


# --- after all of that ---


@pytest.mark.usefixtures("stand_in")
def test_keys_are_nowhere_but_in_their_files(fleet: Fleet) -> None:
    """Looked for after everything that could have put one into a log: errors, refusals, crashes, diffs."""
    fleet.ask("GET", f"{MODELS}?api_key={fleet.key}", key=fleet.key)  # a client that does it wrong
    keys = {"client": fleet.key, "internal": fleet.internal_key, "former client": NARROW_KEY}
    expected = {
        GATEWAY: {"internal": ["/etc/vllm-gateway"]},  # which knows keys of clients by their SHA-256
        **{worker: {"internal": ["/etc/vllm"]} for worker in WORKERS},
    }
    commands = (
        "journalctl --no-pager --output export; ps -eo args; systemctl show '*' --all --no-pager;"
        " ! command -v docker >/dev/null || docker container inspect $(docker container ls --all --quiet)"
    )
    told = {host: on(host, commands) for host in expected}
    assert all("vllm serve" in told[worker] and "--config" in told[worker] for worker in WORKERS)
    for host, places in expected.items():
        for name, key in keys.items():
            found = on(
                host,
                'IFS= read -r key; grep -rlaF --devices=skip -e "$key" /etc /var /home /root /tmp /opt/vllm/bin'
                " /opt/vllm/locks --exclude-dir=uv 2>/dev/null | xargs -rn1 dirname | sort -u",
                stdin=key + "\n",
                check=False,
            ).split()
            assert found == places.get(name, []), f"the {name} key on {host}"
            assert key not in told[host], f"the {name} key is told on {host}"
    for name, key in keys.items():
        assert key not in (DIRECTORY / "site.log").read_text(), f"the {name} key is in the controller's log"


@pytest.mark.usefixtures("stand_in")
def test_demo_down_removes_the_fleet_and_nothing_else(fleet: Fleet) -> None:
    bystander = f"{NAME}-bystander"
    hosts.up(bystander, {bystander: "debian12"})
    try:
        demo("down")
        assert hosts.docker("ps", "--all", "--quiet", "--filter", f"label={hosts.LABEL}={NAME}") == ""
        assert hosts.docker("network", "ls", "--quiet", "--filter", f"label={hosts.LABEL}={NAME}") == ""
        assert not DIRECTORY.exists()
        assert hosts.docker("inspect", "--format", "{{.State.Running}}", bystander) == "true"
        with pytest.raises(OSError):
            fleet.complete()
    finally:
        hosts.down(bystander)
    assert subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
