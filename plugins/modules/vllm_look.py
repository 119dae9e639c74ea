#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What a host has for its vLLM instances, and which of them it has: this is the part that runs there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_look
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Looks at the vLLM instances of a host and at what they need
description:
  - Says in one call what the facts of the host do not say, and changes nothing. The instances that are there with their generations and units, and for
    those that are wanted their models and whatever else their options name, the release and its options, disk space, and for containers the engine and
    its images.
  - With O(judgement) it asks vLLM itself whether it takes what is wanted, where release or image and model are there. Its own parser reads the
    configuration, and its configuration objects are built, without weights and without an engine. That takes seconds for each instance that
    differs; what passed is remembered on the host by its content, and not asked again.
  - With O(settings) it also says, on the controller, what stands in the way of the wanted instances and what has to change. It does not fail by itself.
options:
  config_path:
    description: Directory of the instances, as M(gpufleet.llm.vllm_generation) takes it.
    type: path
    default: /etc/vllm
  wanted:
    description: Instances as the filter P(gpufleet.llm.vllm_wanted#filter) gives them, with C(gpus) of the inventory.
    type: list
    elements: dict
    default: []
  release:
    description: Directory of the wanted release.
    type: path
    default: /nonexistent
  inputs:
    description: Files that an instance reads beside its generation, as M(gpufleet.llm.vllm_generation) takes them.
    type: dict
    default: {}
  container_unit:
    description: The unit of instances in containers, as M(gpufleet.llm.vllm_generation) takes it.
    type: path
  accepted_keys:
    description: The file with the hashes of the internal keys that instances take.
    type: path
    default: /nonexistent
  user:
    description: Name of the user that runs vLLM, who has to be able to read what is named.
    type: str
    default: vllm
  judgement:
    description:
      - How vLLM itself is asked. C(program), the text of what it runs; C(user) that it runs as; C(unit), the file of the unit of instances from a
        release; C(records_path), the directory of the records; C(gpus) of the host.
      - Without it vLLM is not asked.
    type: dict
  settings:
    description:
      - What to judge by. C(device), where the instances compute, V(cuda) or V(cpu); C(gpus) and C(memory_bytes) of the host, as
        M(gpufleet.llm.host_facts) gives them; C(release_gb), disk space in GB that a release takes while it is built; C(models_path), the model store;
        C(internal_key), the SHA-256 of the wanted internal key, and C(former_key_seconds), for how long a former one is taken once no gateway shows
        it any more.
      - C(fit) says what an estimate does by which an instance does not fit its host, V(refuse), V(warn) or V(off). C(driver_due) says that the driver is
        about to change. C(judgement) says whether what vLLM itself refuses is a problem (V(refuse)) or a warning (V(warn)).
      - C(require_models) says whether a model or an engine that is not there is a problem. In check mode a model never is, because the run would bring
        it, and an engine is not before the first instance runs.
      - Without it nothing is judged.
    type: dict
attributes:
  check_mode:
    description: Changes nothing.
    support: full
"""

EXAMPLES = r"""
- name: Look at the instances that are there
  gpufleet.llm.vllm_look:
  register: look

- name: The instance chat runs its current generation
  ansible.builtin.assert:
    that: look.findings.instances | selectattr('name', 'equalto', 'chat') | map(attribute='active') | first == 'active'
"""

RETURN = r"""
problems:
  description: One sentence for each thing that stands in the way.
  returned: when O(settings) is given
  type: list
  elements: str
release_complete:
  description: Whether the release was built to its end, or no instance needs it.
  returned: when O(settings) is given
  type: bool
missing_images:
  description: Images that are not there.
  returned: when O(settings) is given
  type: list
  elements: str
missing_files:
  description: Paths of files of the inventory that instances name, that are not there as they are wanted, and that a run may bring.
  returned: when O(settings) is given
  type: list
  elements: str
pending:
  description: Instances that do not run a confirmed generation with the wanted content and that nobody holds.
  returned: when O(settings) is given
  type: list
  elements: str
obsolete:
  description: Instances on the host that are not among the wanted ones and that nobody holds.
  returned: when O(settings) is given
  type: list
  elements: str
internal_keys:
  description:
    - What is to be in O(accepted_keys). C(accepted) is the file in which the wanted key is taken beside what is taken, C(ending) the one in which all
      others end; C(former) says whether another key is taken without an end, and C(notes) the same in words.
  returned: when O(settings) is given
  type: dict
gates:
  description: How to ask the wanted instances, for M(gpufleet.llm.completion_gate); one that is held as it is.
  returned: when O(settings) is given
  type: list
  elements: dict
findings:
  description: What was found.
  returned: always
  type: dict
  contains:
    node:
      description: The host's own name.
      type: str
    deployed:
      description: Whether anything was ever deployed.
      type: bool
    container_files:
      description: Whether the host has what instances in containers need beside their generations. It keeps it, because one may come back to a container.
      type: bool
    container_key:
      description: Whether a generation is there whose container reads the internal key itself, as all did before.
      type: bool
    tls:
      description: Whether a generation is there that speaks TLS. The host keeps what that needs, because an instance may come back to it.
      type: bool
    gateways_without_tls:
      description: Gateways that ask the agent of the host, and could not ask an instance that speaks TLS.
      type: list
      elements: str
    accepted_keys:
      description: The text of O(accepted_keys); where there is no such file yet, the hash of the key that instances were started with.
      type: str
    clock:
      description: The host's time, in seconds of the epoch.
      type: int
    instances:
      description: Instances that are there or wanted.
      type: list
      elements: dict
      contains:
        name:
          description: Its name.
          type: str
        path:
          description: Its directory.
          type: str
        wanted:
          description: Whether it is among O(wanted).
          type: bool
        differs:
          description: Whether it is wanted and does not run a confirmed generation with the wanted content.
          type: bool
        held:
          description: Who wants it to stay as it is, since when and why; empty when nobody does.
          type: str
        generations:
          description: Numbers of the generations that are there.
          type: list
          elements: int
        confirmed:
          description: Numbers of those that answered.
          type: list
          elements: int
        current:
          description: Number of the current one; none before there is one.
          type: int
        previous:
          description: Number of the last one before it that answered, where going back leads.
          type: int
        running:
          description: Number of the one that the unit was started with, when it runs.
          type: int
        runtime:
          description: What runs the current one, V(systemd) or V(docker).
          type: str
        runs:
          description: Its release or image.
          type: str
        port:
          description: Its port.
          type: int
        gpus:
          description: The GPUs that it may use.
          type: list
          elements: int
        gate:
          description: How to ask it.
          type: dict
        active:
          description: State of its unit, such as V(active), V(activating), V(failed) or V(inactive).
          type: str
        enabled:
          description: Whether its unit starts at boot.
          type: bool
        start_seconds:
          description: What the current generation took to answer when it was started; none where nobody knows.
          type: float
        word:
          description: The operator's word on it, with C(operator), C(by), C(since), C(reason) and C(turn), the act of a playbook whose word it is.
          type: dict
    models:
      description: For each wanted instance whether its model is there (C(present)), and C(weights) of it and of its draft model, each with C(bytes) of
        the files that vLLM loads, how most numbers are C(stored), and whether they are C(quantized) already.
      type: dict
    named:
      description: For each wanted instance what is wrong with what its options and environment name, each with C(label), where it is named, C(path), and
        C(what), V(missing), V(unreadable) or V(no module).
      type: dict
    files:
      description: Paths of the wanted files of the inventory that are there as they are wanted.
      type: list
      elements: str
    release:
      description: Whether it is C(complete). If so C(options), what its C(vllm serve) says of the options that are wanted, of all when it does not know one;
        else C(parent), where it would be built, and C(free_bytes) there.
      type: dict
    engine:
      description: The Docker engine with C(version), C(compose), C(cdi_directories) and C(cdi), or C(complaint) where none answers. Empty when no wanted
        instance runs in a container.
      type: dict
    judgements:
      description: For each instance that vLLM was asked about its C(refusal), empty when there is none, or why it is C(unjudged), and the C(seconds).
      type: dict
    published:
      description: Wanted ports that containers of others publish, each with C(port) and C(container).
      type: list
      elements: dict
    images:
      description: Wanted images that are there.
      type: list
      elements: str
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import (
    generations_host,
    host_agent,
    instance_tls,
    systemctl,
    vllm_container,
    vllm_judge_host,
    vllm_keys,
    vllm_named_files_host,
    vllm_weights_host,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_state_host import InstanceHost
from ansible_collections.gpufleet.llm.plugins.module_utils.model_store import MODEL_CONFIGS
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import checked_options
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container_host import Engine


def model_findings(wanted: dict[str, Any]) -> dict[str, Any]:
    """The model of a wanted instance."""
    model = Path(wanted["config"]["model"])
    return {
        "present": any((model / name).is_file() for name in MODEL_CONFIGS),
        "weights": vllm_weights_host.of_instance(wanted["config"]),
    }


def release_findings(release: Path, served: list[dict[str, Any]]) -> dict[str, Any]:
    """The release, and what its options are compared with."""
    if not (release / ".complete").is_file():
        parent = next(path for path in release.parents if path.is_dir())
        return {"complete": False, "parent": str(parent), "free_bytes": shutil.disk_usage(parent).free}
    options: dict[str, Any] = json.loads((release / "options.json").read_text()) if served else {}
    used = {name for instance in served for name in checked_options(instance["config"])}
    known = {name: options[name] for name in used if name in options}
    return {"complete": True, "options": known if len(known) == len(used) else options}


def units(module: AnsibleModule, names: list[str]) -> dict[str, dict[str, str]]:
    """What systemd says of the units of instances, by the names of the units."""
    if not names:
        return {}
    command = [
        "systemctl",
        "show",
        "--property=Id,ActiveState,UnitFileState",
        *(f"vllm@{name}.service" for name in names),
    ]
    return systemctl.by_unit(module.run_command(command)[1])


def instance_findings(module: AnsibleModule) -> list[dict[str, Any]]:
    """The instances that are wanted or there."""
    wanted = {entry["name"]: entry for entry in module.params["wanted"]}
    there = generations_host.there(module.params["config_path"])
    names = [*wanted, *(name for name in there if name not in wanted)]
    states = units(module, names)
    inputs = generations_host.fingerprints(module.params["inputs"])
    found = []
    for name in names:
        deployed = generations_host.Deployed(module, name)
        state = states.get(deployed.unit, {})
        current, confirmed = deployed.current(), deployed.confirmed()
        running = deployed.started() if state.get("ActiveState") == "active" else None
        differs = False
        if name in wanted:
            content = generations_host.wanted_content(wanted[name], inputs, module.params["release"])
            differs = generations_host.differs(deployed, content, running)
        found.append(
            {
                "name": name,
                "path": str(deployed.path),
                "wanted": name in wanted,
                "differs": differs,
                "held": deployed.held(),
                "generations": deployed.numbers(),
                "confirmed": confirmed,
                "current": current,
                "previous": max((number for number in confirmed if number < (current or 0)), default=None),
                "running": running,
                "active": state.get("ActiveState", ""),
                "enabled": state.get("UnitFileState") == "enabled",
                "start_seconds": deployed.start_seconds(current),
                "word": deployed.word(),
                **generations_host.described(deployed.content(current)),
            }
        )
    return found


def accepted_keys(module: AnsibleModule) -> str:
    """Which keys instances take; those that were started before there was such a file took the one key of the host."""
    file = Path(module.params["accepted_keys"])
    key = read(Path(module.params["config_path"]) / "internal_key")
    return vllm_keys.rendered({vllm_keys.digest(key): None}) if key and not file.exists() else read(file)


def judgements(module: AnsibleModule, findings: dict[str, Any]) -> dict[str, Any]:
    """What vLLM says of the wanted instances that are to change, where what it takes to ask it is there."""
    settings, there = module.params["judgement"], {entry["name"]: entry for entry in findings["instances"]}
    if not settings:
        return {}

    def can_be_asked(wanted: dict[str, Any]) -> bool:
        entry, image = there[wanted["name"]], wanted.get("container", {}).get("image")
        runs = image in findings["images"] if image else findings["release"]["complete"]
        return runs and entry["differs"] and not entry["held"] and findings["models"][wanted["name"]]["present"]

    judge = vllm_judge_host.Judge(settings, module.params["release"], remember=not module.check_mode)
    return judge.judge([wanted for wanted in module.params["wanted"] if can_be_asked(wanted)])


def speaks_tls(config_path: Path) -> bool:
    """Whether any generation of any instance speaks TLS."""
    return any(instance_tls.scheme(file) == instance_tls.HTTPS for file in config_path.glob("*/*/config.yaml"))


def look(module: AnsibleModule) -> dict[str, Any]:
    """The findings."""
    wanted: list[dict[str, Any]] = module.params["wanted"]
    contained = [instance for instance in wanted if "container" in instance]
    served = [instance for instance in wanted if "container" not in instance]
    ports = {instance["config"]["port"] for instance in wanted}
    images = dict.fromkeys(instance["container"]["image"] for instance in contained)
    engine = Engine(commands(module))
    published = engine.published() if wanted else {}
    findings = {
        "node": os.uname().nodename,
        "deployed": Path(module.params["config_path"]).is_dir(),
        "container_files": Path(module.params["container_unit"] or "/nonexistent").exists(),
        "container_key": vllm_container.reads_key(
            read(file) for file in Path(module.params["config_path"]).glob(f"*/*/{vllm_container.COMPOSE}")
        ),
        "tls": speaks_tls(Path(module.params["config_path"])),
        "gateways_without_tls": host_agent.without_tls(InstanceHost().heard(), time.monotonic()),
        "accepted_keys": accepted_keys(module),
        "clock": int(time.time()),
        "instances": instance_findings(module),
        "models": {instance["name"]: model_findings(instance) for instance in wanted},
        "named": {
            instance["name"]: vllm_named_files_host.findings(
                instance, module.params["user"], Path(module.params["release"])
            )
            for instance in wanted
        },
        "files": vllm_named_files_host.arrived(file for instance in wanted for file in instance.get("files") or []),
        "release": release_findings(Path(module.params["release"]), served),
        "engine": engine.findings() if contained else {},
        "published": [{"port": port, "container": name} for port, name in published.items() if port in ports],
        "images": [image for image in images if engine.has(image)],
    }
    return {**findings, "judgements": judgements(module, findings)}


ARGUMENTS: dict[str, Any] = {
    "config_path": {"type": "path", "default": "/etc/vllm"},
    "wanted": {"type": "list", "elements": "dict", "default": [], "no_log": False},
    "release": {"type": "path", "default": "/nonexistent"},
    "inputs": {"type": "dict", "default": {}},
    "container_unit": {"type": "path"},
    "accepted_keys": {"type": "path", "default": "/nonexistent", "no_log": False},
    "user": {"type": "str", "default": "vllm"},
    "judgement": {"type": "dict"},
    "settings": {"type": "dict"},  # the action keeps it
}


def main() -> None:
    """Look, and tell."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    module.exit_json(changed=False, findings=look(module))


if __name__ == "__main__":
    main()
