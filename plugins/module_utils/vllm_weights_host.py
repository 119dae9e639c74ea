# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The weights of models as they lie on a host: their size, how numbers are stored, and whether they are quantized already."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import vllm_weights

# A header of safetensors that is larger is none.
LARGEST_HEADER = 100 * 1024**2


def read_json(path: Path) -> Any:
    """A JSON file; nothing when there is none, or another thing."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def indexes(model: Path) -> dict[str, set[str]]:
    """The files that each index of a model names."""
    found = {}
    for name in (vllm_weights.INDEX, vllm_weights.CONSOLIDATED_INDEX):
        told = read_json(model / name)
        if isinstance(told, dict) and isinstance(told.get("weight_map"), dict):
            found[name] = {str(file) for file in told["weight_map"].values()}
    return found


def stored(file: Path) -> str:
    """The type in which most numbers of a safetensors file are stored, such as BF16; nothing when it cannot be told."""
    counts: Counter[str] = Counter()
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length <= LARGEST_HEADER else {}
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                counts[str(tensor["dtype"])] += end - begin
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return counts.most_common(1)[0][0] if counts else ""


def is_quantized(model: Path) -> bool:
    """Whether the model says that its weights are quantized already."""
    config, params = read_json(model / "config.json"), read_json(model / "params.json")
    places = [config, params, *(part for part in config.values() if isinstance(part, dict))] if config else [params]
    said = any(place.get("quantization_config") or place.get("quantization") for place in places)
    return said or (model / "hf_quant_config.json").is_file()


def weights(model: Path, load_format: str) -> dict[str, Any]:
    """C(bytes) of the files that vLLM loads, how they are C(stored), and whether they are C(quantized)."""
    sizes = {file.name: file.stat().st_size for file in model.glob("*") if file.is_file()} if model.is_dir() else {}
    files = vllm_weights.counted(sizes, indexes(model), load_format)
    tensors = [name for name in files if name.endswith(".safetensors")]
    return {
        "bytes": sum(sizes[name] for name in files),
        "stored": stored(model / tensors[0]) if tensors else "",
        "quantized": is_quantized(model),
    }


def of_instance(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model of an instance, and the draft model where it has one."""
    load_format = str(config.get("load-format", "auto"))
    speculative = config.get("speculative-config")
    draft = config.get("spec-model") or (speculative.get("model") if isinstance(speculative, Mapping) else "")
    paths = [str(config["model"]), *([draft] if isinstance(draft, str) and draft.startswith("/") else [])]
    return [weights(Path(path), load_format) for path in paths]
