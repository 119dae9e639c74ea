#!/usr/bin/python
"""What a host has for its vLLM instances, and what stands in their way."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_preflight
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Looks at a host and says what stands in the way of its vLLM instances
description:
  - Looks at what the facts of the host do not tell, in one call, and changes nothing; at models, their weights and adapters, the release, its options,
    disk space, and the instances that run; for instances in containers at the engine, their images, and ports that other containers publish.
  - Returns every problem at once and does not fail by itself.
options:
  wanted:
    description: Instances as the filter P(gpufleet.llm.vllm_wanted#filter) gives them, with C(gpus) of the inventory.
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
  gpus:
    description: The GPUs of the host, as M(gpufleet.llm.host_facts) tells them.
    type: list
    elements: dict
    default: []
  memory_bytes:
    description: The memory of the host.
    type: int
    required: true
  config_path:
    description: Directory of the instances, as M(gpufleet.llm.vllm_generation) takes it.
    type: path
    default: /etc/vllm
  inputs:
    description: Files that an instance reads beside its generation, as M(gpufleet.llm.vllm_generation) takes them.
    type: dict
    default: {}
  container_unit:
    description: The unit of instances in containers, as M(gpufleet.llm.vllm_generation) takes it.
    type: path
  require_models:
    description:
      - Whether a model or an engine that is not there is a problem.
      - In check mode a model never is, because the run would bring it, and an engine is not before the first instance runs.
    type: bool
    default: true
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
    memory_bytes: "{{ ansible_facts['gpufleet'].memory_bytes }}"
  register: found
"""

RETURN = r"""
problems:
  description: One sentence for each thing that stands in the way.
  returned: always
  type: list
  elements: str
release_complete:
  description: Whether the release was built to its end, or no instance needs it.
  returned: always
  type: bool
missing_images:
  description: Images that are not there.
  returned: always
  type: list
  elements: str
container_files:
  description: Whether the host has what instances in containers need beside their generations. It keeps it, because one may come back to a container.
  returned: always
  type: bool
pending:
  description: Instances that do not run a confirmed generation with the wanted content and that nobody holds.
  returned: always
  type: list
  elements: str
obsolete:
  description: Instances on the host that are not among the wanted ones and that nobody holds.
  returned: always
  type: list
  elements: str
"""

import os
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import generations_host, vllm_container_host, vllm_fit
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import option_problems
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_fit import GB


def weights_bytes(model: Path) -> int:
    """Size of the weights of a model directory."""
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        if size := sum(file.stat().st_size for file in model.glob(pattern)):
            return size
    return 0


def missing_adapters(instances: list[dict[str, Any]]) -> list[str]:
    """LoRA adapters that are not where they are looked for."""
    return [
        f"vllm_instances ({instance['name']}): the adapter {entry['name']!r} is not there (no {entry['path']}/adapter_config.json); "
        "name it in model_store_models and run the role model_store first"
        for instance in instances
        for entry in instance["config"].get("lora-modules", [])
        if not (Path(entry["path"]) / "adapter_config.json").is_file()
    ]


def published_problems(instances: list[dict[str, Any]], engine: vllm_container_host.Engine) -> list[str]:
    """Ports of instances that containers of others publish."""
    taken = engine.published()
    return [
        f"vllm_instances ({instance['name']}): port {instance['config']['port']} is published by the container {taken[instance['config']['port']]}; "
        "choose another or stop it"
        for instance in instances
        if instance["config"]["port"] in taken
    ]


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


ARGUMENTS: dict[str, Any] = {
    "wanted": {"type": "list", "elements": "dict", "required": True, "no_log": False},
    "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
    "release": {"type": "path", "required": True},
    "release_gb": {"type": "int", "required": True},
    "gpus": {"type": "list", "elements": "dict", "default": []},
    "memory_bytes": {"type": "int", "required": True},
    "config_path": {"type": "path", "default": "/etc/vllm"},
    "inputs": {"type": "dict", "default": {}},
    "container_unit": {"type": "path"},
    "require_models": {"type": "bool", "default": True},
}


def main() -> None:
    """Look, and tell."""
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        supports_check_mode=True,
    )
    instances: list[dict[str, Any]] = module.params["wanted"]
    contained = [instance for instance in instances if "container" in instance]
    served = [instance for instance in instances if "container" not in instance]
    release = Path(module.params["release"])
    complete = (release / ".complete").is_file()
    problems: list[str] = []
    # In check mode on a bare host there is no engine yet, and on any host a model that is new in the inventory is still to come.
    bare = not Path(module.params["config_path"]).is_dir() if contained else not complete
    required = module.params["require_models"] and not (module.check_mode and bare)
    engine = vllm_container_host.Engine(commands(module))
    if contained and required:
        problems += engine.problems(with_gpus=any(instance["gpus"] for instance in contained))
    problems += published_problems(instances, engine)
    for instance in instances:
        model = Path(instance["config"]["model"])
        if required and not module.check_mode and not (model / "config.json").is_file():
            problems.append(
                f"vllm_instances ({instance['name']}): the model {model.name!r} is not in {model.parent} (no {model}/config.json); "
                "name it in model_store_models and run the role model_store first"
            )
    problems += missing_adapters(instances) if required else []
    weights = {entry["name"]: weights_bytes(Path(entry["config"]["model"]).resolve()) / GB for entry in instances}
    if module.params["device"] == "cpu":
        problems += vllm_fit.memory_problems(instances, module.params["memory_bytes"], weights)
    else:
        problems += vllm_fit.weights_problems(instances, module.params["gpus"], weights)
    if complete:
        problems += installed_option_problems(release, served, module)
    elif served:
        parent = next(path for path in release.parents if path.is_dir())
        free_gb = shutil.disk_usage(parent).free / GB
        if free_gb < module.params["release_gb"]:
            problems.append(
                f"{parent} has {free_gb:.1f} GB free, but building a release takes {module.params['release_gb']} GB; "
                "make room or set vllm_releases_path"
            )
    inputs = generations_host.fingerprints(module.params["inputs"])
    pending = []
    for entry in instances:
        deployed = generations_host.Deployed(module, entry["name"])
        if not generations_host.differs(deployed, generations_host.wanted_content(entry, inputs, str(release))):
            continue
        if held := deployed.held():
            module.warn(
                f"vLLM instance {deployed.name} on {os.uname().nodename} differs from the inventory and stays as it is, because it is held: {held}. "
                f"Without {deployed.path / generations_host.HELD} the next run changes it."
            )
        else:
            pending.append(deployed.name)
    obsolete = generations_host.obsolete(module.params["config_path"], {entry["name"] for entry in instances})
    images = dict.fromkeys(instance["container"]["image"] for instance in contained)
    module.exit_json(
        changed=False,
        problems=problems,
        release_complete=complete or not served,
        missing_images=[image for image in images if not engine.has(image)],
        container_files=Path(module.params["container_unit"] or "/nonexistent").exists(),
        pending=pending,
        obsolete=obsolete,
    )


if __name__ == "__main__":
    main()
