#!/usr/bin/python
"""What a host has for its vLLM instances, and what stands in their way."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_preflight
version_added: 0.1.0
author: The vLLM Fleet authors
short_description: Looks at a host and says what stands in the way of its vLLM instances
description:
  - Looks at models, ports, memory, disk and GPUs in one call and changes nothing.
  - Returns every problem at once and does not fail by itself.
options:
  instances:
    description: Instances as the filter P(gpufleet.llm.vllm_generations#filter) gives them, with C(gpus) of the inventory.
    type: list
    elements: dict
    required: true
  device:
    description: Where the instances compute.
    type: str
    choices: [cuda, cpu]
    required: true
  release:
    description: Directory of the wanted release.
    type: path
    required: true
  release_gb:
    description: Disk space in GB that a release takes while it is built.
    type: int
    required: true
  minimum_driver:
    description: Oldest major version of the NVIDIA driver that the wheels work with.
    type: int
    default: 580
  minimum_compute_capability:
    description: Lowest compute capability that the wheels work with.
    type: float
    default: 7.5
attributes:
  check_mode:
    description: Changes nothing.
    support: full
"""

EXAMPLES = r"""
- name: Look at the host
  gpufleet.llm.vllm_preflight:
    instances: "{{ generations }}"
    device: cuda
    release: /opt/vllm/releases/0.33.0-0123456789ab
    release_gb: 14
  register: found
"""

RETURN = r"""
problems:
  description: One sentence for each thing that stands in the way.
  returned: always
  type: list
  elements: str
release_complete:
  description: Whether the release was built to its end.
  returned: always
  type: bool
gpus:
  description: GPUs of the host, each with C(index), C(name), C(memory_mib), C(compute_capability) and C(driver).
  returned: always
  type: list
  elements: dict
"""

import os
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu import NVIDIA_SMI_QUERY, parse_nvidia_smi
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import option_problems

GB = 1000**3
# What vLLM on a CPU needs beside weights and KV cache: three Python processes with PyTorch.
CPU_OVERHEAD_GB = 2.0


def weights_bytes(model: Path) -> int:
    """Size of the weights of a model directory."""
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        if size := sum(file.stat().st_size for file in model.glob(pattern)):
            return size
    return 0


def listeners(root: Path = Path("/proc")) -> dict[int, set[str]]:
    """Inodes of the sockets that listen, by port."""
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (root / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A":  # TCP_LISTEN, include/net/tcp_states.h
                found.setdefault(int(fields[1].rsplit(":", 1)[1], 16), set()).add(fields[9])
    return found


def holder(inodes: set[str], root: Path = Path("/proc")) -> tuple[str, str]:
    """Name and control group of a process that holds one of the sockets."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in root.iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(str(file.readlink()) in wanted for file in (process / "fd").iterdir()):
                return (process / "comm").read_text().strip(), (process / "cgroup").read_text()
        except OSError:
            continue
    return "another program", ""


def port_problems(instances: list[dict[str, Any]]) -> list[str]:
    """Ports that something else listens on."""
    problems = []
    busy = listeners()
    for instance in instances:
        port = instance["config"]["port"]
        if port not in busy:
            continue
        program, group = holder(busy[port])
        # Our own unit, whichever instance: two instances may swap their ports.
        if "/vllm@" not in group and "system-vllm" not in group:
            problems.append(
                f"vllm_instances ({instance['name']}): port {port} is taken by {program}; choose another or stop it"
            )
    return problems


def memory_problems(module: AnsibleModule, instances: list[dict[str, Any]], gpus: list[dict[str, Any]]) -> list[str]:
    """Instances whose weights cannot fit where they are to run."""
    problems = []
    total_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    need_gb = 0.0
    for instance in instances:
        weights_gb = weights_bytes(Path(instance["config"]["model"]).resolve()) / GB
        if module.params["device"] == "cpu":
            need_gb += (
                weights_gb
                + float(instance["environment"].get("VLLM_CPU_KVCACHE_SPACE", 4)) * 1.024**3
                + CPU_OVERHEAD_GB
            )
            continue
        memory = {gpu["index"]: gpu["memory_mib"] * 1024**2 / GB for gpu in gpus}
        have_gb = sum(memory.get(index, 0.0) for index in instance.get("gpus") or [])
        share = float(instance["config"].get("gpu-memory-utilization", 0.92))
        if have_gb and weights_gb > have_gb * share:
            problems.append(
                f"vllm_instances ({instance['name']}): the weights take {weights_gb:.1f} GB, but its GPUs have {have_gb:.1f} GB, of which "
                f"gpu-memory-utilization gives {have_gb * share:.1f} GB; name more GPUs or choose a smaller or quantized model"
            )
    if need_gb > total_gb:
        problems.append(
            f"vllm_instances need about {need_gb:.1f} GB of memory, but the host has {total_gb:.1f} GB; "
            "run fewer instances or lower VLLM_CPU_KVCACHE_SPACE"
        )
    return problems


def find_gpus(module: AnsibleModule) -> tuple[list[dict[str, Any]], list[str]]:
    """The host's GPUs, and what is wrong with them."""
    if not shutil.which("nvidia-smi"):
        return [], [
            "vllm_device is cuda, but nvidia-smi is not there: install the NVIDIA driver first, or set vllm_device: cpu"
        ]
    status, output, error = module.run_command(NVIDIA_SMI_QUERY)
    if status:
        return [], [f"nvidia-smi fails: {(error or output).strip()}; the driver does not work"]
    gpus = parse_nvidia_smi(output)
    if not gpus:
        return [], ["vllm_device is cuda, but nvidia-smi shows no GPU"]
    problems = []
    minimum = module.params["minimum_driver"]
    driver = gpus[0]["driver"]
    if int(driver.split(".")[0]) < minimum:
        problems.append(
            f"the NVIDIA driver is {driver}, but this version of vLLM needs {minimum} or newer (its wheels are CUDA 13)"
        )
    for gpu in gpus:
        capability = gpu["compute_capability"]
        if capability < module.params["minimum_compute_capability"]:
            problems.append(
                f"GPU {gpu['index']} ({gpu['name']}) has compute capability {capability}, but vLLM needs "
                f"{module.params['minimum_compute_capability']} or higher"
            )
    return gpus, problems


def installed_option_problems(release: Path, instances: list[dict[str, Any]], module: AnsibleModule) -> list[str]:
    """Options that the release which is installed does not know (the role's own ones left out)."""
    table = module.from_json((release / "options.json").read_text())
    problems = []
    for instance in instances:
        options = {
            key: value
            for key, value in instance["config"].items()
            if key not in ("model", "host", "port", "shutdown-timeout")
        }
        problems += [f"vllm_instances ({instance['name']}): {problem}" for problem in option_problems(options, table)]
    return problems


def main() -> None:
    """Look, and tell."""
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "dict", "required": True, "no_log": False},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "release": {"type": "path", "required": True},
            "release_gb": {"type": "int", "required": True},
            "minimum_driver": {"type": "int", "default": 580},
            "minimum_compute_capability": {"type": "float", "default": 7.5},
        },
        supports_check_mode=True,
    )
    instances: list[dict[str, Any]] = module.params["instances"]
    release = Path(module.params["release"])
    complete = (release / ".complete").is_file()
    problems: list[str] = []
    gpus: list[dict[str, Any]] = []

    if module.params["device"] == "cuda":
        gpus, problems = find_gpus(module)
        known = {gpu["index"] for gpu in gpus}
        for instance in instances:
            if gpus and (unknown := sorted(set(instance.get("gpus") or []) - known)):
                problems.append(
                    f"vllm_instances ({instance['name']}): gpus names {', '.join(map(str, unknown))}, but the host has "
                    f"{', '.join(map(str, sorted(known)))}"
                )
    # In check mode on a bare host the model store is not there yet: that is no problem of the inventory's.
    for instance in instances:
        model = Path(instance["config"]["model"])
        if not (model / "config.json").is_file() and not (module.check_mode and not complete):
            problems.append(
                f"vllm_instances ({instance['name']}): the model {model.name!r} is not in {model.parent} (no {model}/config.json); "
                "name it in model_store_models and run the role model_store first"
            )
    problems += port_problems(instances)
    problems += memory_problems(module, instances, gpus)
    if complete:
        problems += installed_option_problems(release, instances, module)
    else:
        parent = next(path for path in release.parents if path.is_dir())
        free_gb = shutil.disk_usage(parent).free / GB
        if free_gb < module.params["release_gb"]:
            problems.append(
                f"{parent} has {free_gb:.1f} GB free, but building a release takes {module.params['release_gb']} GB; "
                "make room or set vllm_releases_path"
            )
    module.exit_json(changed=False, problems=problems, release_complete=complete, gpus=gpus)


if __name__ == "__main__":
    main()
