"""The proof that a release starts, without a host: what it is made of, when it is due, where it finds room, and that nothing of it stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import generations_host, start_proof, start_proof_host
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import INSTANCE_NAME
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_kernels import ATTENTION_WITHOUT_COMPILER
from ansible_collections.gpufleet.llm.plugins.modules import vllm_compiler, vllm_start_proof

GPUS = [{"index": index, "name": "NVIDIA H200", "driver": "580.159.04"} for index in range(4)]
SMI = "0, 9000, 143771\n1, 9000, 143771\n2, 3000, 143771\n3, 143000, 143771\n"


def wanted(name: str = "chat", gpus: tuple[int, ...] = (0,), options: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "gpus": list(gpus),
        "runtime": "systemd",
        "config": {"model": "/srv/models/qwen", "port": 8000, "max-model-len": 8192, **(options or {})},
        "environment": {"A": "1", "HOME": f"/var/cache/vllm/{name}", "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))},
        "gate": {"name": name},
    }


def test_the_proof_is_the_instance_with_a_tiny_model() -> None:
    chat = wanted(
        options={"tensor-parallel-size": 2, "enforce-eager": True, "quantization": "fp8", "served-model-name": ["x"]}
    )
    made = start_proof.instance(chat, "/opt/vllm/proofs/model", 4711, 0.02)
    assert made["environment"] == chat["environment"]
    assert made["gpus"] == chat["gpus"]
    config = made["config"]
    assert (config["tensor-parallel-size"], config["enforce-eager"]) == (2, True)
    assert "quantization" not in config, "that is the model's"
    assert (config["host"], config["port"], config["load-format"]) == ("127.0.0.1", 4711, "dummy")
    assert config["gpu-memory-utilization"] == 0.02
    assert not INSTANCE_NAME.fullmatch(made["name"]), "an instance of the inventory could have the same name"
    assert made["gate"]["unit"] == "vllm@proof_chat.service"
    assert "attention-config" not in config
    closed = start_proof.instance(wanted(options={"attention-config": ATTENTION_WITHOUT_COMPILER}), "/m", 1, None)[
        "config"
    ]
    assert closed["attention-config"] == ATTENTION_WITHOUT_COMPILER
    assert "gpu-memory-utilization" not in closed, "a CPU has none"


def test_the_proof_on_a_cpu_is_in_float32() -> None:
    """In bfloat16 a tiny model alone dies on processors with AMX."""
    asked = wanted(options={"dtype": "bfloat16"})
    assert start_proof.instance(asked, "/m", 1, None)["config"]["dtype"] == "float32"
    assert start_proof.instance(asked, "/m", 1, 0.02)["config"]["dtype"] == "bfloat16"


def test_a_proof_in_a_container_is_published_on_loopback() -> None:
    chat = {
        **wanted(),
        "runtime": "docker",
        "container": {"image": "i", "publish": "10.0.0.5:8000:8000", "cache": "/c"},
    }
    made = start_proof.instance(chat, "/m", 4711, None)
    assert made["config"]["host"] == "0.0.0.0"
    assert made["container"] == {"image": "i", "publish": "127.0.0.1:4711:4711", "cache": "/c"}


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (3, 1), (4, 3), (8, 1), (16, 5)])
def test_the_parallel_sizes_of_an_instance_divide_the_tiny_model(tensor: int, pipeline: int) -> None:
    heads, layers = start_proof.shape({"tensor-parallel-size": tensor, "pipeline-parallel-size": pipeline})
    config = json.loads(start_proof.model_files(heads, layers)["config.json"])
    assert config["num_attention_heads"] % tensor == 0
    assert config["num_hidden_layers"] >= pipeline
    assert config["hidden_size"] == config["num_attention_heads"] * start_proof.HEAD_SIZE


def test_a_proof_holds_for_what_decides_whether_vllm_starts_and_for_nothing_else() -> None:
    def key(entry: dict[str, Any], runs: str = "/r", sandbox: str = "s", gpus: Any = (("H200", "580"),)) -> str:
        return start_proof.key(entry, runs, sandbox, gpus)

    same = key(wanted())
    assert key(wanted("other", (3,), {"max-model-len": 1})) == same, "another name, GPU and length"
    different = [
        key(wanted(), runs="/r2"),
        key(wanted(), sandbox="t"),
        key(wanted(), gpus=(("H200", "590"),)),
        key(wanted(), gpus=(("H100", "580"),)),
        key(wanted(options={"tensor-parallel-size": 2})),
        key(wanted(options={"enforce-eager": True})),
        key({**wanted(), "environment": {"A": "2"}}),
    ]
    assert len({same, *different}) == 1 + len(different)


def test_a_proof_is_made_where_there_is_room_and_the_others_wait_for_their_turn() -> None:
    free = {0: 9000, 1: 3000, 2: 8500}
    chosen, deferred = start_proof.choose(
        {
            "a": [wanted("one", (1,)), wanted("two", (0,))],
            "b": [wanted("three", (0, 1))],
            "c": [wanted("four", (0,))],
            "d": [wanted("five", (0,))],
        },
        free,
    )
    assert {key: entry["name"] for key, entry in chosen.items()} == {"a": "two", "c": "four"}
    assert deferred == ["three", "five"], "GPU 0 has room for two of them, and not for a third"
    assert free[0] == 9000, "what was asked of the host is left as it is"
    on_a_cpu, waiting = start_proof.choose({"a": [wanted(gpus=())]}, {})
    assert (len(on_a_cpu), waiting) == (1, [])


def test_an_instance_over_several_nodes_is_not_proved_by_one() -> None:
    assert start_proof.provable(wanted())
    assert not start_proof.provable(wanted(options={"nnodes": 2}))


class FailedError(Exception):
    """What a module fails with."""


class FakeModule:
    """A module on a host whose commands are answered by the test."""

    check_mode = False

    def __init__(
        self, root: Path, answers: Callable[[list[str]], tuple[int, str]] = lambda _words: (0, ""), **given: Any
    ) -> None:
        self.params = {
            "config_path": str(root / "etc"), "proofs_path": str(root / "proofs"), "container_unit": None, "release": str(root / "r1"),
            "sandbox": {"systemd": []}, "gpus": GPUS, "wanted": [], "beside": True, "passed": [], "proofs": {}, **given,
        }  # fmt: skip
        self.answers = answers
        self.commands: list[str] = []

    def run_command(self, command: list[str], **_options: object) -> tuple[int, str, str]:
        self.commands.append(" ".join(command))
        return (*self.answers(command), "")

    def fail_json(self, msg: str) -> None:
        raise FailedError(msg)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose instance `chat` runs generation 1."""
    monkeypatch.setattr(generations_host, "RUNTIME", tmp_path / "run")
    monkeypatch.setattr(generations_host, "UNITS", tmp_path / "units")
    monkeypatch.setattr(start_proof_host, "RUNTIME_UNITS", tmp_path / "run-units")
    monkeypatch.setattr(start_proof_host, "CACHE_PATH", str(tmp_path / "cache"))
    for name in ("chat", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "generation").write_text("1\n")
    (tmp_path / "etc").mkdir()
    return tmp_path


def smi(words: list[str]) -> tuple[int, str]:
    return (0, SMI) if "nvidia-smi" in words else (0, "")


def test_one_proof_for_all_that_it_holds_for_and_none_for_what_does_not_run(host: Path) -> None:
    (host / "run/off").mkdir()  # it has no generation that runs
    module = FakeModule(host, smi, wanted=[wanted(), wanted("other", (1,)), wanted("off", (3,), {"dtype": "half"})])
    found = vllm_start_proof.started(module)
    assert [gate["name"] for gate in found["gates"]] == ["proof_chat"]
    assert list(found["proofs"]) == ["proof_chat"]
    assert found["deferred"] == []
    assert "systemctl start --no-block vllm@proof_chat.service" in module.commands
    assert not any("enable" in command for command in module.commands), "after a boot nobody waits for it"
    drop_in = (host / "run-units/vllm@proof_chat.service.d/proof.conf").read_text()
    assert "Restart=no" in drop_in and "ReadWritePaths=-/var/cache/vllm/chat" in drop_in
    assert (host / "etc/proof_chat/current/release").readlink() == host / "r1"
    share = json.loads(
        (host / "etc/proof_chat/1/config.yaml").read_text().split("gpu-memory-utilization: ")[1].split("\n")[0]
    )
    assert 3072 <= share * 143771 < 3100


def test_what_passed_is_not_proved_again_and_nothing_of_it_is_left(host: Path) -> None:
    module = FakeModule(host, smi, wanted=[wanted()])
    found = vllm_start_proof.started(module)
    vllm_start_proof.ended(FakeModule(host, passed=[{"name": "proof_chat", "seconds": 41.2}], proofs=found["proofs"]))
    assert not (host / "etc/proof_chat").exists()
    assert not (host / "run-units/vllm@proof_chat.service.d").exists()
    [record] = (host / "proofs").glob("*.json")
    assert json.loads(record.read_text())["seconds"] == 41.2
    again = vllm_start_proof.started(FakeModule(host, smi, wanted=[wanted()]))
    assert (again["gates"], again["changed"]) == ([], False)
    assert vllm_start_proof.started(FakeModule(host, smi, wanted=[wanted()], release="/r2"))["gates"]


def test_what_failed_is_not_recorded(host: Path) -> None:
    found = vllm_start_proof.started(FakeModule(host, smi, wanted=[wanted()]))
    vllm_start_proof.ended(FakeModule(host, passed=[], proofs=found["proofs"]))
    assert vllm_start_proof.started(FakeModule(host, smi, wanted=[wanted()]))["gates"]


def test_an_instance_without_room_waits_and_is_proved_when_it_has_stopped(host: Path) -> None:
    entry = wanted(gpus=(2,))
    assert vllm_start_proof.started(FakeModule(host, smi, wanted=[entry]))["deferred"] == ["chat"]
    (host / "run/chat/generation").unlink()
    found = vllm_start_proof.started(FakeModule(host, smi, wanted=[entry], beside=False))
    assert [gate["name"] for gate in found["gates"]] == ["proof_chat"]


def test_what_a_run_left_that_died_is_taken_away_by_the_next(host: Path) -> None:
    vllm_start_proof.started(FakeModule(host, smi, wanted=[wanted()]))
    module = FakeModule(host, smi, wanted=[])
    vllm_start_proof.started(module)
    assert not (host / "etc/proof_chat").exists()
    assert "systemctl stop vllm@proof_chat.service" in module.commands


def compiler(host: Path, answers: Callable[[list[str]], tuple[int, str]], **given: Any) -> FakeModule:
    return FakeModule(
        host, answers, cuda_home="/usr/local/cuda-13.0", program="/opt/vllm/bin/compile_kernel.py", release_mount="/opt/vllm/release",
        environment={"CUDA_HOME": "/usr/local/cuda-13.0"}, **{"sandbox": [], **given},
    )  # fmt: skip


def test_a_kernel_is_compiled_by_the_unit_itself(host: Path) -> None:
    seen = []

    def answers(words: list[str]) -> tuple[int, str]:
        if words[:2] == ["systemctl", "start"]:
            seen.append((host / "run-units/vllm@proof_compiler.service.d/proof.conf").read_text())
            seen.append((host / "etc/proof_compiler/1/environment").read_text())
        return 0, ""

    assert vllm_compiler.compile_kernel(compiler(host, answers)) == ""
    assert "ExecStart=\nExecStart=/opt/vllm/release/bin/python /opt/vllm/bin/compile_kernel.py\n" in seen[0]
    assert 'CUDA_HOME="/usr/local/cuda-13.0"' in seen[1]
    assert not (host / "etc/proof_compiler").exists()


def test_why_a_kernel_does_not_compile_is_told(host: Path) -> None:
    def answers(words: list[str]) -> tuple[int, str]:
        if words[:2] == ["systemctl", "start"]:
            return 1, "Job failed"
        if words[0] == "journalctl":
            return 0, "/usr/bin/ld: cannot find -lcudart\n"
        return 0, "0123abcd\n"

    module = compiler(host, answers)
    assert vllm_compiler.compile_kernel(module) == "/usr/bin/ld: cannot find -lcudart"
    assert any("_SYSTEMD_INVOCATION_ID=0123abcd" in command for command in module.commands)
    assert not (host / "etc/proof_compiler").exists()


def test_a_compiler_is_tried_again_when_it_or_the_release_is_another(host: Path) -> None:
    one = vllm_compiler.key(compiler(host, smi), "13.0.88")
    others = {
        vllm_compiler.key(compiler(host, smi), "13.1"),
        vllm_compiler.key(compiler(host, smi, release="/r2"), "13.0.88"),
    }
    assert vllm_compiler.key(compiler(host, smi), "13.0.88") == one
    assert one not in others and len(others) == 2
