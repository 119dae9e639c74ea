#!/usr/bin/python
"""Generations of vLLM instances: what an instance runs, and what it ran before, with one link that decides."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_generation
version_added: 0.1.0
author: The vLLM Fleet authors
short_description: Writes, switches, confirms and reverts generations of vLLM instances
description:
  - A generation is a directory I(config_path)/NAME/NUMBER with C(config.yaml), C(environment), C(inputs) and a link to its release.
    It is written once and never changed. The link I(config_path)/NAME/current says which one the instance runs.
  - A generation that answered (see M(gpufleet.llm.completion_gate)) is confirmed. The last confirmed generation and its release are
    never removed.
  - Whether an instance has to be restarted is read from what runs, not from what this run changed, so that a run that died half way
    is finished by the next one.
options:
  state:
    description:
      - V(prepared) writes the wanted generation of each instance where it differs from the current one, and restarts nothing.
      - V(activated) moves the link to the newest generation and restarts the instance.
      - V(confirmed) marks the current generation as good and removes old generations and releases.
      - V(reverted) goes back to the last confirmed generation and restarts the instance, or stops it when there is none. An instance
        whose current generation is confirmed keeps it; what is wrong is not its configuration, and systemd goes on trying.
      - V(absent) stops the instances and removes their generations.
    type: str
    choices: [prepared, activated, confirmed, reverted, absent]
    required: true
  config_path:
    description: Directory of the instances.
    type: path
    default: /etc/vllm
  instances:
    description: For V(prepared). All instances of the host, as the filter P(gpufleet.llm.vllm_generations#filter) gives them.
    type: list
    elements: dict
    default: []
  names:
    description: For every other state. The instances that are meant.
    type: list
    elements: str
    default: []
  release:
    description: For V(prepared). Directory of the release that the instances run.
    type: path
  inputs:
    description:
      - For V(prepared). Files that a running instance has read beside its generation. When one changes, the instance gets a new
        generation, so that it is restarted and gated. Only a hash of them is kept.
    type: list
    elements: path
    default: []
  releases_path:
    description: For V(confirmed). Directory of the releases; those that no generation needs are removed.
    type: path
  keep:
    description: For V(confirmed). How many generations of an instance are kept.
    type: int
    default: 3
attributes:
  check_mode:
    description: Says what would change, and shows the configuration in a diff. The environment is never shown.
    support: full
"""

EXAMPLES = r"""
- name: The wanted generations are written
  gpufleet.llm.vllm_generation:
    state: prepared
    instances: "{{ generations }}"
    release: /opt/vllm/releases/0.33.0-0123456789ab
    inputs: [/etc/systemd/system/vllm@.service]
  register: written

- name: The instances run them
  gpufleet.llm.vllm_generation:
    state: activated
    names: "{{ written.pending }}"
"""

RETURN = r"""
pending:
  description: Instances that do not run a confirmed generation with the wanted content.
  returned: when state is prepared
  type: list
  elements: str
obsolete:
  description: Instances on the host that are not among the wanted ones.
  returned: when state is prepared
  type: list
  elements: str
outcomes:
  description: Name of the instance to V(reverted), V(kept) or V(stopped).
  returned: when state is reverted
  type: dict
gates:
  description: How to ask the generations that came back, for M(gpufleet.llm.completion_gate).
  returned: when state is reverted
  type: list
  elements: dict
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import generations
from ansible_collections.gpufleet.llm.plugins.module_utils.generations import CONFIRMED, Instance


def prepared(module: AnsibleModule) -> dict[str, Any]:
    """Write what differs, and say which instances have to be switched."""
    pending, diffs, changed = [], [], False
    inputs = generations.fingerprint(module.params["inputs"])
    for wanted in module.params["instances"]:
        instance = Instance(module, wanted["name"])
        content = generations.wanted_content(wanted, inputs, module.params["release"])
        if not generations.pending(instance, content):
            continue
        changed = True
        pending.append(instance.name)
        current = instance.current()
        before = instance.content(current)
        if before == content:
            if not module.check_mode:
                instance.drop_after(current)
            continue
        diffs.append(
            {
                "before_header": f"{instance.link}/config.yaml",
                "after_header": f"{instance.link}/config.yaml",
                "before": before.get("config.yaml", "") + (f"# release {before['release']}\n" if before else ""),
                "after": content["config.yaml"] + f"# release {content['release']}\n",
            }
        )
        # A run that died after writing left the very generation that is wanted.
        if not module.check_mode and instance.content(max(instance.numbers(), default=None)) != content:
            instance.write(content)
    names = {wanted["name"] for wanted in module.params["instances"]}
    gone = generations.obsolete(module.params["config_path"], names)
    return {"changed": changed, "pending": pending, "obsolete": gone, "diff": diffs}


def activated(instance: Instance) -> None:
    """Switch an instance to its newest generation."""
    newest = instance.numbers()[-1]
    if newest != instance.current():
        instance.point_to(newest)
    instance.restart()


def reverted(instance: Instance) -> str:
    """Go back to what answered last, and say what that was."""
    failed = instance.current()
    good = instance.confirmed()
    if failed in good:
        return "kept"
    if good:
        instance.point_to(good[-1])
        instance.restart()
    else:
        instance.systemctl("disable", "--quiet")
        instance.systemctl("stop")
        instance.link.unlink(missing_ok=True)
    if failed is not None:
        shutil.rmtree(instance.path / str(failed))
    return "reverted" if good else "stopped"


def confirmed(module: AnsibleModule, instances: list[Instance]) -> bool:
    """Mark what runs as good and remove what nothing needs."""
    changed = False
    for instance in instances:
        mark = instance.link / CONFIRMED
        if instance.current() is not None and not mark.exists():
            mark.touch(mode=0o644)
            changed = True
        instance.prune(module.params["keep"])
    if module.params["releases_path"]:
        root = Path(module.params["config_path"])
        needed = {os.path.realpath(link) for link in root.glob("*/*/release")}
        releases = Path(module.params["releases_path"])
        for release in releases.iterdir() if releases.is_dir() else []:
            if release.is_dir() and os.path.realpath(release) not in needed:
                shutil.rmtree(release)
                changed = True
    return changed


def absent(instance: Instance) -> None:
    """Stop an instance and remove its generations."""
    instance.systemctl("disable", "--quiet")
    instance.systemctl("stop")
    instance.module.run_command(["systemctl", "reset-failed", instance.unit])
    shutil.rmtree(instance.path, ignore_errors=True)


def main() -> None:
    """Do what the state asks for."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["prepared", "activated", "confirmed", "reverted", "absent"],
                "required": True,
            },
            "config_path": {"type": "path", "default": "/etc/vllm"},
            "instances": {"type": "list", "elements": "dict", "default": []},
            "names": {"type": "list", "elements": "str", "default": []},
            "release": {"type": "path"},
            "inputs": {"type": "list", "elements": "path", "default": []},
            "releases_path": {"type": "path"},
            "keep": {"type": "int", "default": 3},
        },
        required_if=[("state", "prepared", ["release"])],
        supports_check_mode=True,
    )
    state = module.params["state"]
    if state == "prepared":
        module.exit_json(**prepared(module))
    instances = [Instance(module, name) for name in module.params["names"]]
    result: dict[str, Any] = {"changed": bool(instances)}
    if module.check_mode or not instances:
        module.exit_json(**result)
    if state == "activated":
        module.run_command(
            ["systemctl", "daemon-reload"], check_rc=True
        )  # the unit may be new, in this run or in one that died
        for instance in instances:
            activated(instance)
    elif state == "confirmed":
        result["changed"] = confirmed(module, instances)
    elif state == "reverted":
        result["outcomes"] = {instance.name: reverted(instance) for instance in instances}
        back = [instance for instance in instances if result["outcomes"][instance.name] == "reverted"]
        result["changed"] = any(outcome != "kept" for outcome in result["outcomes"].values())
        result["gates"] = [json.loads((instance.link / "gate.json").read_text()) for instance in back]
    else:
        for instance in instances:
            absent(instance)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
