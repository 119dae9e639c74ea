"""What a host has, compared with what its vLLM instances need: from the facts of M(gpufleet.llm.host_facts) alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GB = 1000**3
# vLLM's wheels are built for CUDA 13, which needs R580, and for compute capability 7.5 and newer.
# Source: docs.vllm.ai/en/latest/getting_started/installation/gpu, and NVIDIA's table of CUDA 13 and its drivers.
MINIMUM_DRIVER = 580
MINIMUM_CAPABILITY = 7.5
# What vLLM on a CPU needs beside weights and KV cache: three Python processes with PyTorch. Measured with 0.32.0.
CPU_OVERHEAD_GB = 2.0


def problems(
    generations: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], device: str, driver_due: bool = False
) -> list[str]:
    """Everything on the host that stands in the way of its instances, one sentence each.

    `driver_due`: the driver is about to change, so nothing can be said of the GPUs yet.
    """
    found = port_problems(generations, facts["ports"])
    if device == "cuda":
        return found if driver_due else found + gpu_problems(generations, facts)
    return found + memory_problems(generations, facts["memory_bytes"])


def port_problems(generations: Sequence[Mapping[str, Any]], ports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ports that something else listens on."""
    found = []
    for instance in generations:
        port = instance["config"]["port"]
        # Our own unit, whichever instance: two instances may swap their ports. What Docker holds for containers it has to be asked for:
        # vllm_preflight does.
        others = [
            entry["program"] or "another program"
            for entry in ports
            if entry["port"] == port and not entry["unit"].startswith(("vllm@", "docker."))
        ]
        if others:
            found.append(
                f"vllm_instances ({instance['name']}): port {port} is taken by {others[0]}; choose another or stop it"
            )
    return found


def gpu_problems(generations: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    """GPUs that are missing, too old, or driven by too old a driver."""
    gpus = facts["gpus"]
    if facts["gpu_error"]:
        return [f"nvidia-smi fails: {facts['gpu_error']}; the driver does not work"]
    if not gpus:
        return [
            "vllm_device is cuda, but nvidia-smi is not there: install the NVIDIA driver first, or set vllm_device: cpu"
        ]
    found = []
    driver = gpus[0]["driver"]
    if int(driver.split(".")[0]) < MINIMUM_DRIVER:
        found.append(
            f"the NVIDIA driver is {driver}, but vLLM needs {MINIMUM_DRIVER} or newer (its wheels are CUDA 13); upgrade the driver"
        )
    for gpu in gpus:
        if gpu["compute_capability"] < MINIMUM_CAPABILITY:
            found.append(
                f"GPU {gpu['index']} ({gpu['name']}) has compute capability {gpu['compute_capability']}, but vLLM needs "
                f"{MINIMUM_CAPABILITY} or higher"
            )
    known = {gpu["index"] for gpu in gpus}
    divided = {gpu["index"] for gpu in gpus if gpu["mig"]}
    for instance in generations:
        found += [
            f"vllm_instances ({instance['name']}): GPU {gpu} is in MIG mode, and vLLM would see one part of it only; name another one, or "
            f"turn MIG off (nvidia-smi -i {gpu} -mig 0)"
            for gpu in sorted(divided.intersection(instance.get("gpus") or []))
        ]
        if unknown := sorted(set(instance.get("gpus") or []) - known):
            found.append(
                f"vllm_instances ({instance['name']}): gpus names {', '.join(map(str, unknown))}, but the host has "
                f"{', '.join(map(str, sorted(known)))}"
            )
    return found


def memory_problems(
    generations: Sequence[Mapping[str, Any]], memory_bytes: int, weights_gb: Mapping[str, float] | None = None
) -> list[str]:
    """Whether all instances together fit into the memory of a CPU host; `weights_gb` is known once the models are there."""
    need = sum(
        (weights_gb or {}).get(instance["name"], 0.0)
        + float(instance["environment"].get("VLLM_CPU_KVCACHE_SPACE", 4)) * 1024**3 / GB
        + CPU_OVERHEAD_GB
        for instance in generations
    )
    have = memory_bytes / GB
    if need <= have:
        return []
    return [
        f"vllm_instances need about {need:.1f} GB of memory, but the host has {have:.1f} GB; "
        "run fewer instances or lower VLLM_CPU_KVCACHE_SPACE"
    ]


def weights_problems(
    generations: Sequence[Mapping[str, Any]], gpus: Sequence[Mapping[str, Any]], weights_gb: Mapping[str, float]
) -> list[str]:
    """Instances whose weights do not fit into their GPUs."""
    found = []
    memory = {gpu["index"]: gpu["memory_mib"] * 1024**2 / GB for gpu in gpus}
    for instance in generations:
        have = sum(memory.get(index, 0.0) for index in instance.get("gpus") or [])
        share = float(instance["config"].get("gpu-memory-utilization", 0.92))  # the default of vLLM 0.33
        weights = weights_gb[instance["name"]]
        if have and weights > have * share:
            found.append(
                f"vllm_instances ({instance['name']}): the weights take {weights:.1f} GB, but its GPUs have {have:.1f} GB, of which "
                f"gpu-memory-utilization gives {have * share:.1f} GB; name more GPUs or choose a smaller or quantized model"
            )
    return found
