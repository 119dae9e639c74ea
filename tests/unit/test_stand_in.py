"""The stand-in for vLLM is held to what vLLM does: the contract that molecule/vllm holds the real one to, and its faults."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import sound_form
from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds_host import Asked, Instance

from tests import tiny_models
from tests.stand_in import contract, wheel
from tests.stand_in.local import KEY, Running, start, unpack, up

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    return unpack(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "stand_in.json").write_text('{"start_seconds": 0}')
    return tmp_path


@pytest.fixture
def server(site: Path, home: Path) -> Iterator[Running]:
    """One for a test that commands a fault or ends it."""
    running = up(site, home)
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def healthy(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for all tests that only ask."""
    running = up(site, tmp_path_factory.mktemp("healthy"))
    yield running
    running.process.kill()
    running.process.wait()


@pytest.mark.parametrize("assertion", contract.CONTRACT, ids=lambda assertion: assertion.__name__)
def test_it_does_what_vllm_does(healthy: Running, assertion: Callable[[contract.Server], None]) -> None:
    assertion(healthy)


@pytest.mark.parametrize("kind", contract.HAS)
def test_it_serves_every_kind_of_model_as_vllm_does(site: Path, home: Path, kind: str) -> None:
    """The very gate asks it; tests/drills/test_kinds.py holds the real one to the same."""
    model = tiny_models.write(home, kind)
    server = up(site, home, **{"model": str(model), "max-model-len": "auto"})
    instance = Instance(f"http://127.0.0.1:{server.port}", server.model, KEY)

    def ask(path: str, body: tuple[bytes, str] | None) -> contract.Answer:
        status, text = instance.request(path, 20, *(body or ()))
        return contract.Answer(status, text.decode())

    contract.it_is_of_its_kind(kind, ask, server.model)
    assert instance.ask(20) == Asked("rerank" if kind == "reward" else kind)
    server.process.kill()
    server.process.wait()


def test_it_hears_no_sound_where_there_is_none(site: Path, home: Path) -> None:
    server = up(site, home, **{"model": str(tiny_models.write(home, "transcribe")), "max-model-len": "auto"})
    refused = Instance(f"http://127.0.0.1:{server.port}", server.model, KEY).request(
        "/v1/audio/transcriptions", 20, *sound_form.form({"model": server.model}, b"no sound")
    )
    assert refused[0] == 400
    assert b"Invalid or unsupported audio file." in refused[1]
    server.process.kill()
    server.process.wait()


def in_background(server: Running, tokens: int, **more: Any) -> tuple[threading.Thread, list[contract.Answer]]:
    """Ask for tokens in a thread of its own."""
    answers: list[contract.Answer] = []
    body = contract.completion(server, **{"max_tokens": tokens, **more})
    thread = threading.Thread(target=lambda: answers.append(server.ask("/v1/completions", body)))
    thread.start()
    return thread, answers


def test_it_drains_as_vllm_does(server: Running) -> None:
    server.command(seconds_per_token=0.05)
    thread, answers = in_background(server, 20)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    contract.it_drains(server)
    thread.join()
    assert answers[0].status == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 20
    assert server.process.wait(timeout=5) == 0


def test_who_takes_longer_than_the_shutdown_timeout_gets_no_answer(site: Path, home: Path) -> None:
    """As with the real one: the port closes, the client waits, and the process stays until it is killed (TimeoutStopSec).

    A connection that somebody keeps for later ends, as uvicorn has it: what a proxy keeps would find a server that refuses.
    """
    server = up(site, home, **{"shutdown-timeout": 0})
    kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=1.5)
    kept.request("GET", "/health")
    assert kept.getresponse().read() == b""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=1.5)
    body = json.dumps(contract.completion(server, max_tokens=50))
    connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {KEY}"})
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    try:
        with pytest.raises(TimeoutError):
            connection.getresponse()
        assert kept.sock and kept.sock.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            server.ask("/health")
        assert server.process.poll() is None
    finally:
        kept.close()
        connection.close()
        server.process.kill()
        server.process.wait()


def engine(server: Running) -> int:
    """The process that stands in for the engine."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    [pid] = [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "VLLM::EngineCor\n"]
    return pid


def test_a_long_prompt_moves_the_cache_and_nothing_else_as_vllm_does(server: Running) -> None:
    """Measured on vLLM 0.32 with a prompt of 131,000 tokens. The gate sees that it works."""
    instance = Instance(f"http://127.0.0.1:{server.port}", server.model, KEY)
    thread, answers = in_background(server, 1, stand_in={"prefill_seconds": 3})
    time.sleep(0.3)
    before = instance.work()
    waiting, later = in_background(server, 1)
    assert instance.works(2)
    after = instance.work()
    assert (before.load, after.load) == (1, 2)
    assert after.done == before.done
    assert after.kv > before.kv
    assert later == [], "it waits behind the prompt"
    thread.join()
    waiting.join()
    assert [answer.status for answer in (*answers, *later)] == [200, 200]
    assert instance.work().kv == 0
    assert not instance.works(2)


def test_it_ends_with_its_engine_as_vllm_does(server: Running) -> None:
    contract.it_ends_with_its_engine(server, lambda: os.kill(engine(server), signal.SIGKILL))
    assert server.process.wait(timeout=5) == 0, "as the real one"


@pytest.mark.parametrize("answers", ["wrong", "503", "hang", "drop"])
def test_faults_are_commanded_by_a_file_or_by_the_request(server: Running, answers: str) -> None:
    def told() -> object:
        body = contract.completion(server, **more)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=0.5)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
            response = connection.getresponse()
            return response.status, bool(json.loads(response.read()).get("choices"))
        except (TimeoutError, http.client.RemoteDisconnected) as error:
            return type(error).__name__
        finally:
            connection.close()

    expected = {"wrong": (200, False), "503": (503, False), "hang": "TimeoutError", "drop": "RemoteDisconnected"}[
        answers
    ]
    more: dict[str, Any] = {"stand_in": {"answers": answers}}
    assert told() == expected
    more = {}
    assert told() == (200, True)
    server.command(answers=answers)
    assert told() == expected
    assert server.ask("/health").status == 200, "whatever it does, it calls itself healthy"


def test_it_says_what_came_when_that_is_commanded(server: Running) -> None:
    server.command(answers="echo", version="b1")
    told = server.ask("/any/path?x=1", {"model": "another"}).json()
    assert (told["backend"], told["method"], told["path"], told["size"]) == ("b1", "POST", "/any/path?x=1", 20)
    assert told["headers"]["authorization"] == f"Bearer {KEY}"


def test_it_dies_or_does_not_start_as_commanded(site: Path, home: Path) -> None:
    (home / "stand_in.json").write_text('{"start_seconds": 0, "dies_after": 0.2}')
    server = up(site, home)
    assert server.process.wait(timeout=5) == 0
    (home / "stand_in.json").write_text('{"start_seconds": 0, "start_error": "CUDA out of memory"}')
    process, _port, output = start(site, home)
    assert process.wait(timeout=5) == 1
    assert "RuntimeError: CUDA out of memory" in output.read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max-model-len": 10_000}, "User-specified max_model_len (10000) is greater than the derived max_model_len"),
        ({"model": "/nowhere"}, "Invalid repository ID or local directory specified: '/nowhere'"),
        ({"max-model-length": 5}, "unrecognized arguments: --max-model-length"),
        ({"dtype": "float7"}, "argument --dtype: invalid choice"),
    ],
)
def test_it_refuses_what_vllm_refuses(site: Path, home: Path, options: dict[str, object], expected: str) -> None:
    process, _port, output = start(site, home, **options)
    assert process.wait(timeout=5) in (1, 2)
    assert expected in output.read_text()


def test_its_options_are_those_that_vllm_printed(site: Path) -> None:
    """Asked by the very program that asks a release."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "roles/vllm/files/dump_options.py")],
        env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == json.loads((ROOT / "roles/vllm/files/options/0.32.0-cpu.json").read_text())


def test_it_judges_as_vllm_does(site: Path, home: Path) -> None:
    def ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-c", contract.JUDGE_ALL, str(ROOT / "roles/vllm/files")],
            env={**os.environ, "PYTHONPATH": str(site)}, input=json.dumps(requests), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    (home / "config.json").write_text('{"max_position_embeddings": 8192}')
    contract.it_judges(str(home), ask)


def test_the_same_sources_give_the_same_wheel(tmp_path: Path) -> None:
    one, two = (wheel.write(tmp_path / name) for name in ("one", "two"))
    assert one[0].read_bytes() == two[0].read_bytes()
    assert one[1].read_text() == two[1].read_text()
