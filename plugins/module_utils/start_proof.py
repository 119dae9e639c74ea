# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The proof that a release or image starts: a tiny model with random weights, run as an instance would be. What it is, and when it is due."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.instance_tls import HTTP
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import CACHES
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_kernels import ATTENTION_WITHOUT_COMPILER

# No instance of the inventory can have such a name; units, directories and containers can.
PREFIX = "proof_"
MODEL = "proof"
# Options of an instance that decide which parts of vLLM start, whatever the model is.
KEPT_OPTIONS = (
    "tensor-parallel-size", "pipeline-parallel-size", "distributed-executor-backend", "disable-custom-all-reduce",
    "enforce-eager", "dtype",
)  # fmt: skip
# What decides where an instance runs and not whether it starts.
PLACES = {*CACHES, "CUDA_VISIBLE_DEVICES", "VLLM_CPU_OMP_THREADS_BIND"}
# What vLLM is told that it may take of each GPU, in MiB, and does not start without: the CUDA context, NCCL's buffers, workspaces, graphs and a
# small KV cache. With 0.33.0 on an H200 context and NCCL took about 900, graphs 40, the KV cache 64; one and two GPUs started with it.
NEEDED_MIB = 3072
# What has to stay free beside it for the engines that run there.
SPARE_MIB = 1024
# No proof runs longer than that, whatever becomes of the run that waits for it (vllm_start_proof_timeout is less).
LONGEST_SECONDS = 1000
KV_CACHE_BYTES = 64 * 1024**2
HEAD_SIZE = 64
VOCABULARY = 1024


def proof_name(instance: str) -> str:
    """The name of the instance that proves for an instance."""
    return PREFIX + instance


def parallel(config: Mapping[str, Any], key: str) -> int:
    """A parallel size of an instance's configuration; 1 when it has none."""
    size = config.get(key, 1)
    return size if isinstance(size, int) else 1


def provable(wanted: Mapping[str, Any]) -> bool:
    """Whether one host alone can show it: an instance over several nodes starts only with all of them."""
    return "nnodes" not in wanted["config"]


def config(wanted: Mapping[str, Any], model: str, port: int, memory_share: float | None) -> dict[str, Any]:
    """The configuration of the proof for a wanted instance; `memory_share` is its share of the memory of each GPU, None on a CPU."""
    container = wanted.get("runtime") == "docker"
    found: dict[str, Any] = {
        "model": model,
        "served-model-name": [MODEL],
        "host": "0.0.0.0" if container else "127.0.0.1",  # noqa: S104 - a container's own network; its port is published on loopback
        "port": port,
        "shutdown-timeout": 0,
        "load-format": "dummy",
        "max-model-len": 128,
        "max-num-seqs": 2,
        "max-num-batched-tokens": 256,
        **{name: wanted["config"][name] for name in KEPT_OPTIONS if name in wanted["config"]},
    }
    # An instance's own choice may be for models of another kind.
    if wanted["config"].get("attention-config") == ATTENTION_WITHOUT_COMPILER:
        found["attention-config"] = ATTENTION_WITHOUT_COMPILER
    if memory_share is None:
        # In bfloat16 the attention of 0.32 takes AMX where a processor has it, and leaves it to the products of a real model to ask the kernel
        # for that: with a tiny one alone the engine dies of an illegal instruction.
        found["dtype"] = "float32"
    else:
        found["gpu-memory-utilization"] = memory_share
        found["kv-cache-memory-bytes"] = KV_CACHE_BYTES
    return found


def record_key(facts: Any) -> str:
    """The name under which a host keeps the record of what passed with these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def key(wanted: Mapping[str, Any], runs: str, sandbox: str, gpus: Iterable[Sequence[str]]) -> str:
    """What a proof holds for: release or image (`runs`), environment, options, the files of the unit (`sandbox`), and the GPUs with their driver."""
    facts = {
        "runs": runs,
        "sandbox": sandbox,
        "environment": {name: value for name, value in wanted["environment"].items() if name not in PLACES},
        "options": {name: wanted["config"].get(name) for name in KEPT_OPTIONS},
        "gpus": sorted(list(gpu) for gpu in gpus),
    }
    return record_key(facts)


def shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Attention heads and layers of the tiny model, which the parallel sizes of an instance divide."""
    return max(4, 2 * parallel(config, "tensor-parallel-size")), max(2, parallel(config, "pipeline-parallel-size"))


def model_files(heads: int, layers: int) -> dict[str, str]:
    """The tiny model: a Llama that has a tokenizer of single words, and no weights."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "Hi": 3}
    words.update({f"word{number}": number for number in range(len(words), VOCABULARY)})
    return {
        "config.json": json.dumps(
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": VOCABULARY,
                "hidden_size": heads * HEAD_SIZE, "intermediate_size": heads * HEAD_SIZE * 2, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 256, "rms_norm_eps": 1e-05,
                "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
            }
        ),
        "tokenizer.json": json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
            }
        ),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        ),
    }  # fmt: skip


def gate(wanted: Mapping[str, Any], port: int) -> dict[str, Any]:
    """How the proof is asked, for M(gpufleet.llm.completion_gate)."""
    name = proof_name(wanted["name"])
    return {
        "name": name,
        "unit": f"vllm@{name}.service",
        "url": f"{HTTP}://127.0.0.1:{port}",
        "model": MODEL,
    }


def instance(wanted: Mapping[str, Any], model: str, port: int, memory_share: float | None) -> dict[str, Any]:
    """The wanted instance that proves for a wanted instance: its environment, GPUs, release or image, and caches are the other's."""
    found = {
        **wanted,
        "name": proof_name(wanted["name"]),
        "config": config(wanted, model, port, memory_share),
        "gate": gate(wanted, port),
    }
    if "container" in wanted:
        found["container"] = {**wanted["container"], "publish": f"127.0.0.1:{port}:{port}"}
    return found


def drop_in(cache: str) -> str:
    """What differs in the unit of a proof: it may use the caches of its instance, is not tried again, and ends when the run that started it died."""
    return f"[Service]\nRestart=no\nTimeoutStopSec=20\nRuntimeMaxSec={LONGEST_SECONDS}\nReadWritePaths=-{cache}\n"


def choose(
    candidates: Mapping[str, Sequence[Mapping[str, Any]]], free_mib: Mapping[int, int]
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """For each proof that is due, by its key, the instance in whose place it is made: the first one whose GPUs have memory left beside what runs.

    All of them are started together. Returns them, and the names of the instances that have to stop first, because none has room.
    """
    left = dict(free_mib)
    chosen: dict[str, Mapping[str, Any]] = {}
    deferred: list[str] = []
    for key, instances in candidates.items():
        for instance in instances:
            if all(left.get(gpu, 0) >= NEEDED_MIB + SPARE_MIB for gpu in instance["gpus"]):
                chosen[key] = instance
                for gpu in instance["gpus"]:
                    left[gpu] -= NEEDED_MIB
                break
        else:
            deferred.append(instances[0]["name"])
    return chosen, deferred
