# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Instances on one GPU. Their engines measure its free memory while they start: roles/vllm/files/gpu_turn.py lets one start after the other, and before
the first of them starts, all that are about to change have to be gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ansible_collections.gpufleet.llm.plugins.module_utils import vllm_container


def gpus_of(content: Mapping[str, str]) -> list[int]:
    """The GPUs of a generation, from its files."""
    if compose := content.get(vllm_container.COMPOSE):
        return vllm_container.gpus_of(compose)
    lines = content.get("environment", "").splitlines()
    named = [line.partition("=")[2] for line in lines if line.startswith("CUDA_VISIBLE_DEVICES=")]
    return [int(gpu) for gpu in "".join(named).strip('"').split(",") if gpu.isdigit()]


def sharing(instances: Mapping[str, Iterable[int]]) -> list[str]:
    """Names of those that share a GPU with another one of them."""
    users: dict[int, set[str]] = {}
    for name, gpus in instances.items():
        for gpu in gpus:
            users.setdefault(gpu, set()).add(name)
    several = {name for names in users.values() if len(names) > 1 for name in names}
    return [name for name in instances if name in several]
