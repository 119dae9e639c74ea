"""From the configuration file to what is served: as far as vLLM judges it before it answers."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigurationError(ValueError):
    """What vLLM's engine refuses when it starts."""


# Some of those that the real one knows.
QUANTIZATIONS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "experts_int8",
    "fp8",
    "gptq",
    "gptq_marlin",
    "modelopt",
    "mxfp4",
    "torchao",
)


def told(args: argparse.Namespace) -> dict[str, Any]:
    """What a command line says, by the names of the options."""
    return {name.replace("_", "-"): value for name, value in vars(args).items() if value not in (None, False)}


def judge(options: dict[str, Any]) -> None:
    """Refuse what vLLM's configuration objects refuse without looking at the model."""
    if (method := options.get("quantization")) and method not in QUANTIZATIONS:
        raise ConfigurationError(f"Unknown quantization method: {method}. Must be one of {list(QUANTIZATIONS)}.")
    share = options.get("gpu-memory-utilization")
    if share is not None and not 0 < share <= 1:
        limit = "greater than 0" if share <= 0 else "less than or equal to 1"
        raise ConfigurationError(f"gpu_memory_utilization: Input should be {limit}")


@dataclass(frozen=True)
class Served:
    """What a server is, once its configuration was read."""

    names: list[str]
    root: str
    max_model_len: int
    host: str
    port: int
    shutdown_timeout: float
    pooling: bool
    request_ids: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, options: dict[str, Any]) -> Served:
        """Judge the options as the engine does: with the model at hand."""
        model = options.get("model") or options.get("model-tag")
        if not model:
            raise ConfigurationError("no model is named")
        judge(options)
        file = Path(model) / "config.json"
        if not file.is_file():
            raise ConfigurationError(f"Invalid repository ID or local directory specified: '{model}'.")
        config = json.loads(file.read_text())
        longest = int(config.get("max_position_embeddings", 2048))
        wanted = options.get("max-model-len")
        length = longest if wanted in (None, -1) else int(wanted)
        if length > longest:
            raise ConfigurationError(
                f"User-specified max_model_len ({length}) is greater than the derived max_model_len "
                f"(max_position_embeddings={longest}.0 or model_max_length=None in model's config.json)."
            )
        return cls(
            names=list(options.get("served-model-name") or [model]),
            root=model,
            max_model_len=length,
            host=options.get("host") or "0.0.0.0",
            port=int(options.get("port") or 8000),
            shutdown_timeout=float(options.get("shutdown-timeout") or 0),
            pooling=options.get("runner") == "pooling",
            request_ids=bool(options.get("enable-request-id-headers")),
            options=options,
        )
