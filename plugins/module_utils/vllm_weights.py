# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the weights of a model take once they are loaded, from what lies on the disk and from the options of an instance.

Always the least that they can take: who is refused by it would have been refused by the GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GIB = 1024**3
# What Mistral's own format calls its files, and the indexes of both formats.
CONSOLIDATED = "consolidated"
INDEX, CONSOLIDATED_INDEX = "model.safetensors.index.json", "consolidated.safetensors.index.json"
# Bytes of a number. A tensor of another type is packed or quantized, and is loaded as it is.
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Ways to load a model in fewer bits than its files have -> bits of a number. For others the least that vLLM knows.
ONLINE_BITS = re.compile(r"fp8|int8|mxfp8|w8a8|experts_int8")
LEAST_BITS = 4


def counted(names: Iterable[str], indexes: Mapping[str, Iterable[str]], load_format: str = "auto") -> list[str]:
    """The files of a directory that vLLM loads: one layout of the weights, of which the index names the files.

    `indexes` has for each index that is there the files that it names. As vllm/model_executor/model_loader/default_loader.py of 0.33.
    """
    there = sorted(names)
    tensors = [name for name in there if name.endswith(".safetensors")]
    consolidated = [name for name in tensors if name.startswith(CONSOLIDATED)]
    if consolidated and load_format in ("auto", "mistral"):
        chosen, index = consolidated, CONSOLIDATED_INDEX
    else:
        chosen, index = tensors, INDEX
        if INDEX not in indexes and len(consolidated) < len(tensors):
            chosen = [name for name in tensors if name not in consolidated]
    if named := set(indexes.get(index, ())):
        chosen = [name for name in chosen if name in named]
    for ending in (".bin", ".gguf"):
        chosen = chosen or [name for name in there if name.endswith(ending)]
    return chosen


def element(dtype: str) -> int:
    """Bytes of a number as it is loaded. With `auto`, and for models in float32 too, that is two, unless float32 is asked for."""
    return 4 if dtype in ("float32", "float") else 2


def loaded(found: Mapping[str, Any], dtype: str, quantization: str) -> float:
    """Bytes that a model takes in memory; `found` is what vllm_weights_host tells of its directory."""
    size = float(found["bytes"])
    if found["quantized"] or found["stored"] not in BYTES:
        return size
    size *= element(dtype) / BYTES[found["stored"]]
    if quantization:
        size *= (8 if ONLINE_BITS.search(quantization) else LEAST_BITS) / (8 * element(dtype))
    return size


def size_of(config: Mapping[str, Any], key: str) -> int:
    """A parallel size or the like; 1 when there is none."""
    value = config.get(key, 1)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1


def number_of(config: Mapping[str, Any], key: str) -> float:
    """An option that is a number; 0 when there is none."""
    try:
        return max(0.0, float(config.get(key) or 0))
    except (TypeError, ValueError):
        return 0.0


def need(models: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> float:
    """Bytes that the weights of an instance take on the GPUs of one host: its model and the draft model of speculative decoding."""
    dtype = str(config.get("dtype", "auto"))
    speculative = config.get("speculative-config")
    drafted = str(speculative.get("quantization") or "") if isinstance(speculative, Mapping) else ""
    given = str(config.get("quantization") or ("any" if config.get("quantization-config") else ""))
    total = sum(loaded(model, dtype, given if not number else drafted) for number, model in enumerate(models))
    group = number_of(config, "offload-group-size")
    if group and config.get("offload-backend", "auto") != "uva":
        total *= 1 - min(1.0, size_of(config, "offload-num-in-group") / group)
    else:
        total -= number_of(config, "cpu-offload-gb") * GIB * used(config)
    return max(0.0, total) / size_of(config, "nnodes")


def used(config: Mapping[str, Any]) -> int:
    """How many GPUs the weights are spread over. Each of several replicas has all of them, but for experts that are spread."""
    spread = size_of(config, "tensor-parallel-size") * size_of(config, "pipeline-parallel-size")
    return spread * (size_of(config, "data-parallel-size") if config.get("enable-expert-parallel") is True else 1)


def share(config: Mapping[str, Any]) -> float:
    """The part of a GPU's memory that an instance takes; all of it where only the KV cache is limited."""
    if "kv-cache-memory-bytes" in config:
        return 1.0
    for key in ("gpu-memory-utilization", "device-memory-utilization"):
        if found := number_of(config, key):
            return found
    return 0.92  # the default of vLLM 0.33


def weights_problems(
    wanted: Sequence[Mapping[str, Any]],
    gpus: Sequence[Mapping[str, Any]],
    models: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
    """Instances whose weights do not fit into the GPUs that they are spread over."""
    found = []
    memory = {gpu["index"]: gpu["memory_mib"] * 1024**2 for gpu in gpus}
    for instance in wanted:
        config = instance["config"]
        mine = [memory[index] for index in instance.get("gpus") or [] if index in memory]
        have = float(sum(mine[: math.ceil(used(config) / size_of(config, "nnodes"))]))
        weights, part = need(models[instance["name"]], config), share(config)
        if have and weights > have * part:
            found.append(
                f"vllm_instances ({instance['name']}): the weights take {weights / 1e9:.1f} GB or more, but the GPUs that they are spread over have "
                f"{have / 1e9:.1f} GB, of which gpu-memory-utilization gives {have * part / 1e9:.1f} GB; name more GPUs with tensor-parallel-size, "
                "choose a smaller or quantized model, or set cpu-offload-gb"
            )
    return found


def share_problems(wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """GPUs of which several instances together want more than there is."""
    parts: dict[int, list[tuple[str, float]]] = {}
    for instance in wanted:
        for gpu in instance.get("gpus") or []:
            if "kv-cache-memory-bytes" not in instance["config"]:
                parts.setdefault(gpu, []).append((instance["name"], share(instance["config"])))
    return [
        f"vllm_instances: GPU {gpu} is shared by "
        + ", ".join(f"{name} ({part:g})" for name, part in several)
        + ", whose gpu-memory-utilization is more than 1 together; each needs its share"
        for gpu, several in sorted(parts.items())
        if len(several) > 1 and sum(part for _name, part in several) > 1.0001
    ]
