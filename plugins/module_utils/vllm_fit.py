"""What a host has, compared with what its vLLM instances need: from the facts of M(gpufleet.llm.host_facts), and from the findings of
M(gpufleet.llm.vllm_look).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import vllm_keys
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import checked_options, option_problems
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container import engine_problems
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_judge import refusals, unjudged_warnings
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_weights import need, share_problems, weights_problems

GB = 1000**3
# vLLM's wheels are built for CUDA 13, which needs R580, and for compute capability 7.5 and newer.
# Source: docs.vllm.ai/en/latest/getting_started/installation/gpu, and NVIDIA's table of CUDA 13 and its drivers.
MINIMUM_DRIVER = 580
MINIMUM_CAPABILITY = 7.5
# What vLLM on a CPU needs beside weights and KV cache: three Python processes with PyTorch. Measured with 0.32.0.
CPU_OVERHEAD_GB = 2.0


def problems(
    generations: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    device: str,
    driver_due: bool = False,
    fit: str = "refuse",
) -> list[str]:
    """Everything on the host that stands in the way of its instances, one sentence each.

    `driver_due`: the driver is about to change, so nothing can be said of the GPUs yet. `fit`: what estimates do; what is a warning, judge() tells.
    """
    found = port_problems(generations, facts["ports"])
    if device == "cuda":
        found += [] if driver_due else gpu_problems(generations, facts)
        served = [instance for instance in generations if "container" not in instance]
        estimates = share_problems(generations) + floor_problems(served, [] if driver_due else facts["gpus"])
    else:
        estimates = memory_problems(generations, facts["memory_bytes"])
    return found + (overrulable(estimates) if fit == "refuse" else [])


def overrulable(estimates: Sequence[str]) -> list[str]:
    """Estimates with the name of the switch for who knows better."""
    return [f"{text} (an estimate: `vllm_fit: warn` goes on nevertheless)" for text in estimates]


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
    """GPUs that are missing, or that an instance cannot have."""
    gpus = facts["gpus"]
    if facts["gpu_error"]:
        return [f"nvidia-smi fails: {facts['gpu_error']}; the driver does not work"]
    if not gpus:
        return [
            "vllm_device is cuda, but nvidia-smi is not there: install the NVIDIA driver first, or set vllm_device: cpu"
        ]
    found = []
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


def floor_problems(generations: Sequence[Mapping[str, Any]], gpus: Sequence[Mapping[str, Any]]) -> list[str]:
    """GPUs of instances that are too old, or driven by too old a driver, for wheels of CUDA 13."""
    used = {gpu for instance in generations for gpu in instance.get("gpus") or []}
    mine = [gpu for gpu in gpus if gpu["index"] in used]
    found = [
        f"the NVIDIA driver is {driver}, but vLLM needs {MINIMUM_DRIVER} or newer (its wheels are CUDA 13); upgrade the driver"
        for driver in dict.fromkeys(gpu["driver"] for gpu in mine)
        if int(driver.split(".")[0]) < MINIMUM_DRIVER
    ]
    return found + [
        f"GPU {gpu['index']} ({gpu['name']}) has compute capability {gpu['compute_capability']}, but vLLM needs "
        f"{MINIMUM_CAPABILITY} or higher"
        for gpu in mine
        if gpu["compute_capability"] < MINIMUM_CAPABILITY
    ]


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


def judge(
    findings: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], check_mode: bool
) -> dict[str, Any]:
    """What stands in the way of the wanted instances, and what has to change, by the findings of M(gpufleet.llm.vllm_look) and its settings."""
    contained = [instance for instance in wanted if "container" in instance]
    release, there = findings["release"], {entry["name"]: entry for entry in findings["instances"]}
    differing = [there[instance["name"]] for instance in wanted if there[instance["name"]]["differs"]]
    strangers = [entry for entry in findings["instances"] if not entry["wanted"]]
    held = {instance["name"]: there[instance["name"]] for instance in wanted if there[instance["name"]]["held"]}
    fit, estimates = settings.get("fit", "refuse"), overrulable(host_estimates(findings, wanted, settings))
    judgement, refused = settings.get("judgement"), refusals(findings["judgements"])
    warnings = [held_warning(entry, findings["node"]) for entry in differing if entry["held"]]
    warnings += estimates if fit == "warn" else []
    warnings += container_warnings(contained, settings) if fit != "off" else []
    warnings += refused if judgement == "warn" else []
    # before anything changes, what it takes to ask may be about to come
    warnings += unjudged_warnings(findings["judgements"]) if settings["require_models"] else []
    return {
        "problems": look_problems(findings, wanted, settings, check_mode)
        + (estimates if fit == "refuse" else [])
        + (refused if judgement == "refuse" else []),
        "warnings": warnings,
        "release_complete": release["complete"] or len(contained) == len(wanted),
        "missing_images": [
            image
            for image in dict.fromkeys(instance["container"]["image"] for instance in contained)
            if image not in findings["images"]
        ],
        "missing_files": missing_files(findings, wanted),
        "pending": [entry["name"] for entry in differing if not entry["held"]],
        "obsolete": [entry["name"] for entry in strangers if not entry["held"]],
        "internal_keys": internal_keys(findings, settings),
        # what is held may have another port or name than the inventory says
        "gates": [held.get(instance["name"], {}).get("gate") or instance["gate"] for instance in wanted],
    }


def internal_keys(findings: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which internal keys are to be taken: now, and once no gateway shows a former one any more."""
    text, wanted, clock = findings["accepted_keys"], str(settings["internal_key"]), int(findings["clock"])
    return {
        "accepted": vllm_keys.accepted(text, wanted, clock),
        "ending": vllm_keys.ending(text, wanted, clock + int(settings["former_key_seconds"])),
        "former": vllm_keys.former(text, wanted),
        "notes": vllm_keys.notes(text, wanted, clock),
    }


def held_warning(instance: Mapping[str, Any], node: str) -> str:
    """What is said of an instance that stays as it is."""
    return (
        f"vLLM instance {instance['name']} on {node} differs from the inventory and stays as it is, because it is held: {instance['held']}. "
        f"Without {instance['path']}/held the next run changes it."
    )


def tls_problems(findings: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why instances cannot speak TLS yet that do not now: a gateway would have no backend any more."""
    present = {entry["name"]: str((entry.get("gate") or {}).get("url") or "") for entry in findings["instances"]}
    new = [one["name"] for one in wanted if one["gate"].get("url", "").startswith("https:") and present.get(one["name"], "").startswith("http:")]  # fmt: skip
    cannot = findings.get("gateways_without_tls") or []
    if not new or not cannot:
        return []
    return [
        f"{', '.join(new)} would speak TLS (fleet_backend_tls), which {', '.join(cannot)} cannot ask by yet: run site.yml once without it, so that every "
        "gateway and host has this version of the collection"
    ]


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
    found = tls_problems(findings, wanted)
    if contained and required:
        found += engine_problems(findings["engine"], with_gpus=any(instance["gpus"] for instance in contained))
    found += published_problems(wanted, findings["published"])
    found += missing_models(wanted, models) if required and not check_mode else []
    found += named_problems(findings["named"], wanted, settings, required, host=not (check_mode and bare))
    if release["complete"]:
        found += installed_option_problems(served, release["options"])
    return found


def host_estimates(
    findings: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[str]:
    """By what is estimated rather than known, what of the wanted instances does not fit the host."""
    models = {name: model["weights"] for name, model in findings["models"].items()}
    served = [instance for instance in wanted if "container" not in instance]
    release = findings["release"]
    if settings["device"] == "cpu":
        weights = {entry["name"]: need(models[entry["name"]], entry["config"]) / GB for entry in wanted}
        found = memory_problems(wanted, settings["memory_bytes"], weights)
    else:
        gpus = [] if settings.get("driver_due") else settings["gpus"]
        found = floor_problems(served, gpus) + share_problems(wanted) + weights_problems(wanted, gpus, models)
    if served and not release["complete"]:
        found += space_problems(release, settings["release_gb"])
    return found


def container_warnings(contained: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    """What an image has to bring so that it runs on this host's driver and GPUs: only the image says whether it does."""
    if settings["device"] == "cpu" or settings.get("driver_due"):
        return []
    return [
        f"{text}. In a container that is for the image to say: one of an earlier CUDA, or with the libraries for compatibility, runs all the same"
        for text in floor_problems(contained, settings["gpus"])
    ]


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
                f"vllm_instances ({instance['name']}): the model {model.name!r} is not in {model.parent} (no {model}/config.json, nor params.json); "
                "name it in model_store_models and run the role model_store first"
            )
    return found


def missing_files(findings: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Files of the inventory that a run has to bring: whoever is held needs no others than it has."""
    held = {entry["name"] for entry in findings["instances"] if entry["held"]}
    paths = [
        file["path"] for instance in wanted if instance["name"] not in held for file in instance.get("files") or []
    ]
    return [path for path in dict.fromkeys(paths) if path not in findings["files"]]


def named_problems(
    named: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], store: bool, host: bool
) -> list[str]:
    """What options name and is not there, or cannot be read: in the model store when `store`, elsewhere on the host when `host`."""
    models_path = str(settings.get("models_path") or "").rstrip("/") + "/"
    found = []
    for instance in wanted:
        for entry in named[instance["name"]]:
            in_store = entry["path"].startswith(models_path)
            # a model that is missing is told by missing_models()
            if not (store if in_store else host) or (entry["label"] == "the model" and entry["what"] == "missing"):
                continue
            if entry["what"] == "no module":
                said = f"the release has no module {entry['path']}; ship it with vllm_files as {entry['path']}.py"
            elif entry["what"] == "missing":
                said = f"there is no {entry['path']}; " + (
                    "name it in model_store_models and run the role model_store first"
                    if in_store
                    else "put it there, or let vllm_files ship it"
                )
            else:
                said = (
                    f"vLLM's user cannot read {entry['path']}; `namei -l {entry['path']}` shows what shuts it out"
                    + ("" if in_store else ", and vllm_files can ship a small file")
                )
            found.append(f"vllm_instances ({instance['name']}): {entry['label']}: {said}")
    return found


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
