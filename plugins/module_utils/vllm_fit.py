"""What a host has, compared with what its vLLM instances need: from the facts of M(gpufleet.llm.host_facts), and from the findings of
M(gpufleet.llm.vllm_look).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import checked_options, option_problems
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container import engine_problems
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_judge import refusals, unjudged_warnings

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
        # vllm_look does.
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


def judge(
    findings: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], check_mode: bool
) -> dict[str, Any]:
    """What stands in the way of the wanted instances, and what has to change, by the findings of M(gpufleet.llm.vllm_look) and its settings."""
    contained = [instance for instance in wanted if "container" in instance]
    release, there = findings["release"], {entry["name"]: entry for entry in findings["instances"]}
    differing = [there[instance["name"]] for instance in wanted if there[instance["name"]]["differs"]]
    strangers = [entry for entry in findings["instances"] if not entry["wanted"]]
    held = {instance["name"]: there[instance["name"]] for instance in wanted if there[instance["name"]]["held"]}
    refused, unjudged = refusals(findings["judgements"]), unjudged_warnings(findings["judgements"])
    return {
        "problems": look_problems(findings, wanted, settings, check_mode)
        + (refused if settings.get("judgement") == "refuse" else []),
        "warnings": [held_warning(entry, findings["node"]) for entry in differing if entry["held"]]
        + (refused if settings.get("judgement") == "warn" else [])
        # before anything changes, what it takes to ask may be about to come
        + (unjudged if settings["require_models"] else []),
        "release_complete": release["complete"] or len(contained) == len(wanted),
        "missing_images": [
            image
            for image in dict.fromkeys(instance["container"]["image"] for instance in contained)
            if image not in findings["images"]
        ],
        "pending": [entry["name"] for entry in differing if not entry["held"]],
        "obsolete": [entry["name"] for entry in strangers if not entry["held"]],
        # what is held may have another port or name than the inventory says
        "gates": [held.get(instance["name"], {}).get("gate") or instance["gate"] for instance in wanted],
    }


def held_warning(instance: Mapping[str, Any], node: str) -> str:
    """What is said of an instance that stays as it is."""
    return (
        f"vLLM instance {instance['name']} on {node} differs from the inventory and stays as it is, because it is held: {instance['held']}. "
        f"Without {instance['path']}/held the next run changes it."
    )


def look_problems(
    findings: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], check_mode: bool
) -> list[str]:
    """Everything that stands in the way of the wanted instances, one sentence each."""
    contained = [instance for instance in wanted if "container" in instance]
    served = [instance for instance in wanted if "container" not in instance]
    release, models = findings["release"], findings["models"]
    # In check mode on a bare host there is no engine yet, and on any host a model that is new in the inventory is still to come.
    bare = not findings["deployed"] if contained else not release["complete"]
    required = settings["require_models"] and not (check_mode and bare)
    weights = {name: model["weights_bytes"] / GB for name, model in models.items()}
    found: list[str] = []
    if contained and required:
        found += engine_problems(findings["engine"], with_gpus=any(instance["gpus"] for instance in contained))
    found += published_problems(wanted, findings["published"])
    found += missing_models(wanted, models) if required and not check_mode else []
    found += missing_adapters(wanted, models) if required else []
    if settings["device"] == "cpu":
        found += memory_problems(wanted, settings["memory_bytes"], weights)
    else:
        found += weights_problems(wanted, settings["gpus"], weights)
    if release["complete"]:
        found += installed_option_problems(served, release["options"])
    elif served:
        found += space_problems(release, settings["release_gb"])
    return found


def published_problems(wanted: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ports of instances that containers of others publish."""
    taken = {entry["port"]: entry["container"] for entry in published}
    return [
        f"vllm_instances ({instance['name']}): port {instance['config']['port']} is published by the container {taken[instance['config']['port']]}; "
        "choose another or stop it"
        for instance in wanted
        if instance["config"]["port"] in taken
    ]


def missing_models(wanted: Sequence[Mapping[str, Any]], models: Mapping[str, Any]) -> list[str]:
    """Models that are not in the model store."""
    found = []
    for instance in wanted:
        model = PurePosixPath(instance["config"]["model"])
        if not models[instance["name"]]["present"]:
            found.append(
                f"vllm_instances ({instance['name']}): the model {model.name!r} is not in {model.parent} (no {model}/config.json); "
                "name it in model_store_models and run the role model_store first"
            )
    return found


def missing_adapters(wanted: Sequence[Mapping[str, Any]], models: Mapping[str, Any]) -> list[str]:
    """LoRA adapters that are not where they are looked for."""
    return [
        f"vllm_instances ({instance['name']}): the adapter {entry['name']!r} is not there (no {entry['path']}/adapter_config.json); "
        "name it in model_store_models and run the role model_store first"
        for instance in wanted
        for entry in instance["config"].get("lora-modules", [])
        if entry["path"] not in models[instance["name"]]["adapters"]
    ]


def installed_option_problems(served: Sequence[Mapping[str, Any]], table: Mapping[str, Any]) -> list[str]:
    """Options that the release which is installed does not know."""
    return [
        f"vllm_instances ({instance['name']}): {problem}"
        for instance in served
        for problem in option_problems(checked_options(instance["config"]), table)
    ]


def space_problems(release: Mapping[str, Any], release_gb: float) -> list[str]:
    """Whether there is room to build a release."""
    free_gb = release["free_bytes"] / GB
    if free_gb >= release_gb:
        return []
    return [
        f"{release['parent']} has {free_gb:.1f} GB free, but building a release takes {release_gb} GB; "
        "make room or set vllm_releases_path"
    ]
