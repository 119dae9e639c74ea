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


def judge_template(template: str | None) -> None:
    """Read a chat template as vLLM does: what has none of these characters is the name of a file (vllm/renderers/chat_utils/chat_template.py)."""
    if not template or any(character in template for character in "{}\n"):
        return
    if not Path(template).exists():
        raise ConfigurationError(
            f"The supplied chat template string ({template}) appears path-like, but doesn't exist! Tried: {template}"
        )
    try:
        Path(template).read_text()
    except OSError as error:
        raise ConfigurationError(f"The supplied chat template ({template}) cannot be opened: {error}") from error


def kind_of(config: dict[str, Any], options: dict[str, Any]) -> str:
    """What a model is for, as vLLM makes it out: by its architecture, unless options say otherwise."""
    architecture = (config.get("architectures") or ["LlamaForCausalLM"])[0]
    convert = options.get("convert")
    if "Whisper" in architecture:
        return "transcribe"
    if "ForTokenClassification" in architecture:
        return "pool"
    if "ForSequenceClassification" in architecture or convert == "classify":
        return "rerank" if len(config.get("id2label") or {0: "", 1: ""}) == 1 else "classify"
    if "ForCausalLM" not in architecture or options.get("runner") == "pooling" or convert == "embed":
        return "embed"
    return "generate"


@dataclass(frozen=True)
class Served:
    """What a server is, once its configuration was read."""

    names: list[str]
    root: str
    max_model_len: int
    host: str
    port: int
    shutdown_timeout: float
    kind: str
    labels: int
    request_ids: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, options: dict[str, Any]) -> Served:
        """Judge the options as the engine does: with the model at hand."""
        model = options.get("model") or options.get("model-tag")
        if not model:
            raise ConfigurationError("no model is named")
        judge_template(options.get("chat-template"))
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
            kind=kind_of(config, options),
            labels=len(config.get("id2label") or {0: "", 1: ""}),
            request_ids=bool(options.get("enable-request-id-headers")),
            options=options,
        )
