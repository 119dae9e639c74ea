# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The file for `vllm serve --config`: how options are spelt in it so that vLLM understands what an operator wrote.

vLLM turns the file into words of a command line (load_config_file in its utils/argparse_utils.py): `true` becomes the bare name, `false` is dropped,
each entry of a list becomes a word, in Python's spelling, and a mapping becomes JSON, in which YAML has made texts of numbers such as 1e-05.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# How the parser takes options, by their kinds in roles/vllm/files/options: switches that are off by themselves and have no opposite ...
FLAGS = frozenset(
    {"aggregate-engine-logging", "data-parallel-multi-port-external-lb", "disable-log-stats", "grpc", "headless"}
)
# ... options that take several words; a list for any other is one word of JSON ...
LISTS = frozenset(
    {
        "allowed-media-domains", "api-key", "collect-detailed-traces", "cpu-offload-params", "cudagraph-capture-sizes", "ignore-patterns",
        "kv-cache-dtype-skip-layers", "logits-processors", "lora-modules", "lora-target-modules", "numa-bind-cpus", "numa-bind-nodes",
        "offload-params", "served-model-name", "sleep-preserve-parameter-names",
    }
)  # fmt: skip
# ... and those that are named once for each value.
APPENDED = frozenset({"middleware"})


def spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they stand in the file."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if value is False and name not in FLAGS:
            found[f"no-{name}"] = True
        elif isinstance(value, list) and name in APPENDED:
            # A key stands once in YAML; as a part of it the value makes it another one, and the same words.
            found |= {f"{name}={entry}": True for entry in value} if len(value) > 1 else {name: "".join(value)}
        elif isinstance(value, list) and name in LISTS:
            found[name] = [json.dumps(entry) if isinstance(entry, dict | list | bool) else entry for entry in value]
        elif isinstance(value, dict | list):
            found[name] = json.dumps(value)
        else:
            found[name] = value
    return found


def scalar(value: Any) -> str:
    """A value in YAML. JSON is YAML; a text that is JSON itself is easier to read in the other quotes."""
    if isinstance(value, str) and value.startswith(("{", "[")) and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    return json.dumps(value)


def render_config(config: Mapping[str, Any]) -> str:
    """The file, with a line for each option."""
    return "".join(f"{name}: {scalar(value)}\n" for name, value in spelled(config).items())
