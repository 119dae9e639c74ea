"""Makes what stands in for a quantized model and for a LoRA adapter out of the small model: argument 1 is the model's directory.

    python make_models.py .cache/models/smollm2-135m-instruct

writes `<model>-int8` and `<model>-adapter` beside it, once. Standard library only: a test host has its release, and with it
PyTorch, only after the role ran, and the instances of this scenario have these models from the start.

The quantized model is a real one: W8A8 as compressed-tensors writes it, all linear layers in int8 with one scale per tensor
(coarser than what tools make, which take one per channel). The adapter has random weights: it shows that an adapter is loaded
and that requests reach it, nothing about quality.
"""

from __future__ import annotations

import array
import json
import random
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RANK = 8
ADAPTED = ("q_proj", "v_proj")

Tensor = tuple[str, list[int], bytes]  # type, shape, data


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], bytes(body[slice(*entry["data_offsets"])]))
        for name, entry in header.items()
    }


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _kind, _shape, data in tensors.values():
            out.write(data)


def number(bits: int) -> float:
    """The number that the 16 bits of a bfloat16 stand for."""
    value: float = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return value


def int8(data: bytes) -> tuple[bytes, float]:
    """Numbers in bfloat16 as int8, and the scale that they were divided by."""
    values = array.array("H", data)
    numbers = {bits: number(bits) for bits in set(values)}  # a few thousand different ones: each is worked out once
    scale = max(map(abs, numbers.values())) / 127
    rounded = {bits: round(value / scale) & 0xFF for bits, value in numbers.items()}
    return bytes(map(rounded.__getitem__, values)), scale


def quantized(model: Path, target: Path) -> None:
    """Write the model with its linear layers in int8."""
    tensors: dict[str, Tensor] = {}
    for name, (kind, shape, data) in read(model / "model.safetensors").items():
        if kind == "BF16" and name.endswith("_proj.weight"):
            data, scale = int8(data)
            tensors[f"{name}_scale"] = ("F32", [1], struct.pack("<f", scale))
            kind = "I8"
        tensors[name] = (kind, shape, data)
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    write(target / "model.safetensors", tensors)
    whole = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**whole, "strategy": "tensor", "dynamic": False},
                "input_activations": {**whole, "strategy": "token", "dynamic": True},
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))


def adapter(model: Path, target: Path) -> None:
    """Write a LoRA adapter of random weights, strong enough that it says something else than the model."""
    config = json.loads((model / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "v_proj": config["num_key_value_heads"]}
    chance = random.Random(0)  # noqa: S311 weights, and the same in every run
    tensors: dict[str, Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for module in ADAPTED:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            shapes = {
                "lora_A": [RANK, config["hidden_size"]],
                "lora_B": [heads[module] * config["head_dim"], RANK],
            }
            for part, shape in shapes.items():
                data = array.array("f", (chance.gauss(0, 0.1) for _ in range(shape[0] * shape[1])))
                tensors[f"{name}.{part}.weight"] = ("F32", shape, data.tobytes())
    write(target / "adapter_model.safetensors", tensors)
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(ADAPTED),
    }
    (target / "adapter_config.json").write_text(json.dumps(told, indent=2))


def made(directory: Path, build: Callable[[Path], None]) -> None:
    """Have a directory built beside its name and renamed when it is whole."""
    if directory.is_dir():
        return
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    build(partial)
    partial.rename(directory)


def main() -> None:
    """Make both."""
    model = Path(sys.argv[1])
    made(model.with_name(f"{model.name}-int8"), lambda target: quantized(model, target))
    made(model.with_name(f"{model.name}-adapter"), lambda target: adapter(model, target))


if __name__ == "__main__":
    main()
