"""What the weights of a model take: which files count, and what options make of them. And that whoever knows better is let through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import vllm_fit, vllm_weights, vllm_weights_host

GB = 10**9
GPU = {"index": 0, "name": "L4", "memory_mib": 22888, "driver": "580.1", "compute_capability": 8.9, "mig": False}
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
LISTED = {vllm_weights.INDEX: SHARDS}


@pytest.mark.parametrize(
    ("names", "indexes", "load_format", "expected"),
    [
        (["consolidated.safetensors", *SHARDS], LISTED, "auto", ["consolidated.safetensors"]),
        (["consolidated.safetensors", *SHARDS], LISTED, "safetensors", SHARDS),
        (["consolidated.safetensors", *SHARDS], {}, "hf", SHARDS),
        (["consolidated.safetensors"], {}, "auto", ["consolidated.safetensors"]),
        ([*SHARDS, "model.safetensors", "pytorch_model.bin"], LISTED, "auto", SHARDS),
        (["model.safetensors", "extra.safetensors"], {}, "auto", ["extra.safetensors", "model.safetensors"]),
        (["pytorch_model.bin", "model.gguf"], {}, "auto", ["pytorch_model.bin"]),
        (["model.gguf", "config.json"], {}, "auto", ["model.gguf"]),
    ],
)
def test_one_layout_of_the_weights_counts(
    names: list[str], indexes: dict[str, list[str]], load_format: str, expected: list[str]
) -> None:
    assert vllm_weights.counted(names, indexes, load_format) == expected


def model(**more: Any) -> dict[str, Any]:
    return {"bytes": 30 * GB, "stored": "BF16", "quantized": False, **more}


@pytest.mark.parametrize(
    ("found", "config", "expected"),
    [
        (model(), {}, 30),
        (model(), {"dtype": "float32"}, 60),
        (model(stored="F32"), {}, 15),
        (model(stored="F32"), {"dtype": "float32"}, 30),
        (model(), {"quantization": "fp8"}, 15),
        (model(), {"quantization": "fp8_per_block"}, 15),
        (model(), {"quantization": "bitsandbytes"}, 7.5),
        (model(), {"quantization-config": {"linear": "nvfp4"}}, 7.5),
        (model(quantized=True), {"quantization": "fp8"}, 30),
        (model(stored="I32", quantized=True), {"dtype": "float32"}, 30),
        (model(), {"cpu-offload-gb": 10, "tensor-parallel-size": 2}, 30 - 20 * 1.073741824),
        (model(), {"cpu-offload-gb": 100}, 0),
        (model(), {"offload-group-size": 4, "offload-num-in-group": 1}, 22.5),
        (model(), {"nnodes": 2, "tensor-parallel-size": 2}, 15),
        (model(), {"cpu-offload-gb": "much"}, 30),
    ],
)
def test_the_weights_are_counted_as_they_are_loaded(
    found: dict[str, Any], config: dict[str, Any], expected: float
) -> None:
    assert vllm_weights.need([found], config) / GB == pytest.approx(expected)


def test_a_draft_model_counts_too() -> None:
    config = {"quantization": "fp8", "speculative-config": {"model": "/m/draft"}}
    assert vllm_weights.need([model(), model(bytes=2 * GB)], config) == 17 * GB


def problems(config: dict[str, Any], *gpus: int, found: dict[str, Any] | None = None) -> list[str]:
    wanted = [{"name": "chat", "config": config, "gpus": list(gpus)}]
    there = [{**GPU, "index": index} for index in range(4)]
    return vllm_weights.weights_problems(wanted, there, {"chat": [found or model()]})


def test_the_memory_of_gpus_that_the_weights_are_not_spread_over_does_not_count() -> None:
    assert "24.0 GB, of which gpu-memory-utilization gives 22.1 GB" in problems({}, 0)[0]
    assert problems({"tensor-parallel-size": 2}, 0, 1) == []
    assert len(problems({}, 0, 1, 2, 3)) == 1, "without parallelism the first one has all of them"
    assert len(problems({"data-parallel-size": 4}, 0, 1, 2, 3)) == 1, "each replica has all of them"
    assert problems({"data-parallel-size": 4, "enable-expert-parallel": True}, 0, 1, 2, 3) == []
    assert problems({"quantization": "fp8"}, 0) == []
    assert problems({}, 0, found=model(bytes=14 * GB)) == []
    assert problems({"gpu-memory-utilization": 0.5}, 0, found=model(bytes=14 * GB)) != []
    assert problems({"gpu-memory-utilization": 0.5, "kv-cache-memory-bytes": "2g"}, 0, found=model(bytes=14 * GB)) == []


def test_gpus_that_are_shared_by_too_much_are_named() -> None:
    def shares(*parts: float | None) -> list[str]:
        return vllm_weights.share_problems(
            [
                {"name": f"i{number}", "gpus": [0], "config": {} if part is None else {"gpu-memory-utilization": part}}
                for number, part in enumerate(parts)
            ]
        )

    assert shares(0.5, 0.4) == shares(None) == []
    assert (
        "GPU 0 is shared by i0 (0.92), i1 (0.92), whose gpu-memory-utilization is more than 1 together"
        in shares(None, None)[0]
    )


def tensors(file: Path, dtype: str, size: int) -> None:
    """A safetensors file with one tensor."""
    header = json.dumps(
        {"__metadata__": {}, "w": {"dtype": dtype, "shape": [size], "data_offsets": [0, size]}}
    ).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def test_the_weights_of_a_directory_are_read(tmp_path: Path) -> None:
    """Mistral's layout: the same weights twice, and only one of them counts."""
    assert vllm_weights_host.weights(tmp_path / "nothing", "auto") == {"bytes": 0, "stored": "", "quantized": False}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"], "text_config": {"dtype": "bfloat16"}}))
    for name in ("consolidated.safetensors", "model-1.safetensors", "model-2.safetensors"):
        tensors(tmp_path / name, "BF16", 1000)
    size = (tmp_path / "consolidated.safetensors").stat().st_size
    assert vllm_weights_host.weights(tmp_path, "auto") == {"bytes": size, "stored": "BF16", "quantized": False}
    (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / vllm_weights.INDEX).write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    tensors(tmp_path / "model-1.safetensors", "F32", 1000)
    found = vllm_weights_host.weights(tmp_path, "auto")
    assert (found["bytes"], found["stored"]) == ((tmp_path / "model-1.safetensors").stat().st_size, "F32")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": {"quant_method": "fp8"}}}))
    assert vllm_weights_host.weights(tmp_path, "auto")["quantized"]
    (tmp_path / "model-1.safetensors").write_bytes(b"version https://git-lfs")
    assert vllm_weights_host.weights(tmp_path, "auto")["stored"] == ""
    draft = {"model": str(tmp_path), "speculative-config": {"model": str(tmp_path)}}
    assert len(vllm_weights_host.of_instance(draft)) == 2
    assert len(vllm_weights_host.of_instance({"model": str(tmp_path), "speculative-config": {"model": "ngram"}})) == 1


def judged(
    fit: str, runtime: str = "systemd", driver: str = "580.1", size: int = 30 * GB
) -> tuple[list[str], list[str]]:
    """Problems and warnings of one instance on a GPU of 24 GB."""
    wanted: dict[str, Any] = {
        "name": "chat",
        "config": {"model": "/m/x", "port": 8000},
        "gpus": [0],
        "environment": {},
        "gate": {},
    }
    if runtime == "docker":
        wanted["container"] = {"image": "x"}
    findings = {
        "node": "n", "deployed": True, "release": {"complete": True, "options": {}}, "images": ["x"], "published": [], "files": [], "named": {"chat": []},
        "judgements": {}, "accepted_keys": "", "clock": 0,
        "instances": [{"name": "chat", "wanted": True, "differs": False, "held": ""}],
        "engine": {"version": "29", "compose": True, "cdi_directories": ["/etc/cdi"], "cdi": True},
        "models": {"chat": {"present": True, "weights": [model(bytes=size)]}},
    }  # fmt: skip
    settings = {
        "device": "cuda", "release_gb": 1, "gpus": [{**GPU, "driver": driver}], "memory_bytes": 10**12, "require_models": True, "fit": fit,
        "internal_key": "0" * 64, "former_key_seconds": 60,
    }  # fmt: skip
    said = vllm_fit.judge(findings, [wanted], settings, check_mode=False)
    return said["problems"], said["warnings"]


def test_an_estimate_can_be_overruled() -> None:
    assert judged("refuse", size=GB) == ([], [])
    problems, warnings = judged("refuse")
    assert "the weights take 30.0 GB or more" in problems[0]
    assert "`vllm_fit: warn` goes on nevertheless" in problems[0]
    assert warnings == []
    assert judged("warn") == ([], problems)
    assert judged("off") == ([], [])


def test_the_drivers_floor_is_a_warning_for_containers() -> None:
    (problem,), _warnings = judged("refuse", driver="570.1", size=GB)
    assert problem.startswith("the NVIDIA driver is 570.1, but vLLM needs 580")
    problems, (warning,) = judged("refuse", "docker", driver="570.1", size=GB)
    assert problems == []
    assert "In a container that is for the image to say" in warning
    assert judged("off", "docker", driver="570.1", size=GB) == ([], [])
