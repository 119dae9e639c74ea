#!/usr/bin/python
"""Generations of vLLM instances: what an instance runs, and what it ran before, with one link that decides."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_generation
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Writes, switches, confirms and reverts generations of vLLM instances
description:
  - A generation is a directory I(config_path)/NAME/NUMBER with C(config.yaml), C(environment), C(inputs) and a link to its release, or
    C(compose.json) when it runs in a container. It is written once and never changed. The link I(config_path)/NAME/current says which one the instance runs.
  - A generation that answered (see M(gpufleet.llm.completion_gate)) is confirmed. The last confirmed generation and its release are
    never removed.
  - Whether an instance has to be restarted is read from what runs, not from what this run changed, so that a run that died half way
    is finished by the next one.
options:
  state:
    description:
      - V(prepared) writes the wanted generation of each instance where it differs from the current one, has systemd read its units again, and restarts
        nothing.
      - V(activated) moves the link to the newest generation, or to that of O(generations), and restarts the instance. The container of one that runs in a
        container is made before anything stops; one that changes its runtime is stopped by the unit that started it. Of several that share a GPU all
        have stopped before the first one starts.
      - V(dropped) removes generations that were written and are not to be activated.
      - V(stopped) stops the instances, after their running requests have ended; nothing else of them changes.
      - V(confirmed) marks the current generation as good and removes old generations, with their containers, and releases and images that no
        generation needs.
      - V(reverted) goes back to the last confirmed generation and restarts the instance, or stops it when there is none. An instance
        whose current generation is confirmed keeps it. When it was stopped for what was to follow, it is started again; else what is wrong is not
        its configuration, and systemd goes on trying.
      - V(outdated) takes the mark of a good one from generations that are newer than the current one, so that nothing goes back to them.
      - V(held) keeps the instances as they are, and V(released) lets them be changed again.
      - V(absent) stops the instances and removes their generations.
      - V(exported) tells what would be in the generation of an instance in a container, for another machine, and changes nothing.
    type: str
    choices: [prepared, dropped, stopped, activated, confirmed, reverted, outdated, held, released, absent, exported]
    required: true
  config_path:
    description: Directory of the instances.
    type: path
    default: /etc/vllm
  wanted:
    description: For V(prepared) and V(exported). All instances of the host, as the filter P(gpufleet.llm.vllm_wanted#filter) gives them.
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
      - For V(prepared). Files that a running instance has read beside its generation, a list for each runtime (C(systemd), C(docker)). When
        one changes, the instances of that runtime get a new generation, so that they are restarted and gated. Only a hash of them is kept.
    type: dict
    default: {}
  container_unit:
    description: For V(activated) and V(reverted). The unit of instances in containers, a file on the host.
    type: path
  generations:
    description: For V(activated). The number of the generation for instances by their names; the newest for those that it does not name.
    type: dict
    default: {}
  idle:
    description: For V(activated). Instances that are switched and not started, because a person stopped them.
    type: list
    elements: str
    default: []
  seconds:
    description: For V(confirmed). What instances took to answer, by their names; kept in the mark of the generation.
    type: dict
  holder:
    description: For V(held). Who wants them to stay as they are.
    type: str
    default: somebody
  reason:
    description: For V(held). Why.
    type: str
    default: ""
  releases_path:
    description: For V(confirmed). Directory of the releases; those that no generation needs are removed, and such images, too. Without it both stay.
    type: path
  files_path:
    description: For V(confirmed). Directory of the files of the inventory; those that no generation names are removed. Without it they stay.
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
    inputs:
      systemd: [/etc/systemd/system/vllm@.service]
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
  description: Name of the instance to V(reverted), V(restarted), V(kept) or V(stopped).
  returned: when state is reverted
  type: dict
exports:
  description: For each instance C(name), C(user), C(cache), C(models) (paths that the container sees), C(compose) (the compose file), C(config) and
    C(environment) (files beside it), and C(files), those of the inventory, each with its C(path) on the host and its place C(beside) the compose file.
  returned: when state is exported
  type: list
  elements: dict
gates:
  description: How to ask the generations that were started, for M(gpufleet.llm.completion_gate).
  returned: when state is activated or reverted
  type: list
  elements: dict
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import generations_host, vllm_container, vllm_shared_gpus
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.generations_host import CONFIRMED, HELD, Deployed
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import render_environment
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container import COMPOSE
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container_host import FETCHED, ContainerError, Engine
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_spelling import render_config


def prepared(module: AnsibleModule) -> dict[str, Any]:
    """Write what differs, and say which instances have to be switched."""
    pending, diffs, changed = [], [], False
    inputs = generations_host.fingerprints(module.params["inputs"])
    for wanted in module.params["wanted"]:
        instance = Deployed(module, wanted["name"])
        content = generations_host.wanted_content(wanted, inputs, module.params["release"])
        if not generations_host.pending(instance, content):
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
                "before": shown(before),
                "after": shown(content),
            }
        )
        # A run that died after writing left the very generation that is wanted.
        if not module.check_mode and instance.content(max(instance.numbers(), default=None)) != content:
            instance.write(content)
    if not module.check_mode:
        # what stands beside the units of instances changes without a restart of any
        module.run_command(["systemctl", "daemon-reload"], check_rc=True)
    names = {wanted["name"] for wanted in module.params["wanted"]}
    gone = generations_host.obsolete(module.params["config_path"], names)
    return {"changed": changed, "pending": pending, "obsolete": gone, "diff": diffs}


def exported(instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What another machine needs for the same containers; the key is nobody's to export."""
    found = []
    for wanted in instances:
        container, config = wanted["container"], wanted["config"]
        user = generations_host.owner_of(container["user"])
        file = vllm_container.compose(wanted, config, user, {"serve": "./serve", "library": "./lib", "keys": "./keys"})
        files = [entry["path"] for entry in wanted.get("files") or []]
        shipped = {*files, *(str(Path(path).parent) for path in files)}
        found.append(
            {
                "name": wanted["name"],
                "user": user,
                "cache": container["cache"],
                "models": [
                    path
                    for path in vllm_container.seen(wanted, config, container["models_path"])
                    if path not in shipped
                ],
                "files": [{"path": path, "beside": vllm_container.beside(path)} for path in files],
                "compose": vllm_container.exported(file, f"vllm-{wanted['name']}", files),
                "config": render_config(config),
                "environment": render_environment(wanted["environment"]),
            }
        )
    return found


def shown(content: dict[str, str]) -> str:
    """A generation in a diff: its configuration and what runs it, never its environment."""
    what = content.get(COMPOSE) or f"# release {content.get('release')}\n"
    return content["config.yaml"] + what if content else ""


def container_unit(module: AnsibleModule) -> str:
    """The unit of instances in containers; empty where there are none."""
    return read(module.params["container_unit"] or "/nonexistent")


def activated(instance: Deployed, number: int | None = None) -> None:
    """Switch an instance to a generation, the newest unless another one is meant."""
    instance.switch(number or instance.numbers()[-1], container_unit(instance.module))
    if instance.name not in instance.module.params["idle"]:
        instance.restart()


def make_room(module: AnsibleModule, instances: list[Deployed]) -> None:
    """Stop those that share a GPU and are about to be restarted: none of them starts while another one gives memory back."""
    gpus = {
        instance.name: [
            gpu
            for number in {instance.current(), *instance.confirmed()[-1:], *instance.numbers()[-1:]}
            for gpu in vllm_shared_gpus.gpus_of(instance.content(number))
        ]
        for instance in instances
    }
    names = vllm_shared_gpus.sharing(gpus)
    together = [instance for instance in instances if instance.name in names]
    for instance in together:
        if instance.in_container(newest := instance.numbers()[-1]):
            instance.containers.create(newest)  # what fails has to fail before anything stops
    if together:
        module.run_command(["systemctl", "stop", *(instance.unit for instance in together)])
    for instance in together:
        instance.stop()


def gates(instances: list[Deployed]) -> list[dict[str, Any]]:
    """How to ask the current generations."""
    return [generations_host.gate_of((instance.link / "gate.json").read_text()) for instance in instances]


def reverted(instance: Deployed) -> str:
    """Go back to what answered last, and say what that was."""
    failed = instance.current()
    good = instance.confirmed()
    if failed in good:
        instance.drop_after(failed)
        if instance.stopped():  # for what was to follow, which did not come to that
            instance.switch(good[-1], container_unit(instance.module))
            instance.restart()
            return "restarted"
        return "kept"
    if good:
        instance.switch(good[-1], container_unit(instance.module))
        instance.restart()
    else:
        instance.systemctl("disable", "--quiet")
        instance.systemctl("stop")
        instance.link.unlink(missing_ok=True)
    if failed is not None:
        instance.remove(failed)
    return "reverted" if good else "stopped"


def unneeded_images(module: AnsibleModule) -> list[str]:
    """Remove images that were fetched for instances and that no generation needs. Returns those that are gone."""
    file = Path(module.params["config_path"]) / FETCHED
    fetched, needed, engine = read(file).split(), generations_host.images(module), Engine(commands(module))
    gone = [image for image in fetched if image not in needed and engine.remove(image)]
    if gone:
        write(file, "".join(f"{image}\n" for image in fetched if image not in gone))
    return gone


def unneeded_files(module: AnsibleModule) -> list[str]:
    """Remove files of the inventory that no generation names. Returns the directories that are gone."""
    directory = Path(module.params["files_path"] or "/nonexistent")
    root = Path(module.params["config_path"])
    texts = [read(root / name) for pattern in ("config.yaml", "environment") for name in root.glob(f"*/*/{pattern}")]
    entries = list(directory.iterdir()) if directory.is_dir() else []
    gone = [str(entry) for entry in entries if not any(str(entry) in text for text in texts)]
    for path in gone:
        shutil.rmtree(path)
    return gone


def confirmed(module: AnsibleModule, instances: list[Deployed]) -> bool:
    """Mark what runs as good and remove what nothing needs."""
    changed = False
    for instance in instances:
        current = instance.current()
        if current is not None:
            changed |= instance.confirm(current, (module.params["seconds"] or {}).get(instance.name))
        instance.prune(module.params["keep"])
    changed |= bool(unneeded_files(module))
    if module.params["releases_path"]:
        changed |= bool(unneeded_images(module))
        root = Path(module.params["config_path"])
        needed = {os.path.realpath(link) for link in root.glob("*/*/release")}
        releases = Path(module.params["releases_path"])
        for release in releases.iterdir() if releases.is_dir() else []:
            if release.is_dir() and os.path.realpath(release) not in needed:
                shutil.rmtree(release)
                changed = True
    return changed


def absent(instance: Deployed) -> None:
    """Stop an instance and remove its generations."""
    instance.systemctl("disable", "--quiet")
    instance.stop()
    instance.module.run_command(["systemctl", "reset-failed", instance.unit])
    instance.erase()


def activate(module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Switch instances to their newest generations, or to the one that is meant."""
    # the unit may be new, in this run or in one that died
    module.run_command(["systemctl", "daemon-reload"], check_rc=True)
    make_room(module, instances)
    numbers = module.params["generations"]
    for instance in instances:
        activated(instance, int(numbers[instance.name]) if instance.name in numbers else None)
    idle = module.params["idle"]
    return {"gates": gates([instance for instance in instances if instance.name not in idle])}


def revert(module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Go back with instances, and say how to ask those that did."""
    make_room(module, [instance for instance in instances if instance.current() not in instance.confirmed()])
    outcomes = {instance.name: reverted(instance) for instance in instances}
    back = [instance for instance in instances if outcomes[instance.name] in ("reverted", "restarted")]
    changed = any(outcome != "kept" for outcome in outcomes.values())
    return {"changed": changed, "outcomes": outcomes, "gates": gates(back)}


def drop(_module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Remove what was written after the current generations."""
    for instance in instances:
        instance.drop_after(instance.current())
    return {}


def stop(_module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Stop instances."""
    for instance in instances:
        instance.stop()
    return {}


def confirm(module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Mark what instances run as good."""
    return {"changed": confirmed(module, instances)}


def outdate(_module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Take the mark from what is newer than the current generations."""
    newer = [
        instance.path / str(number)
        for instance in instances
        for number in instance.confirmed()
        if number > (instance.current() or number)
    ]
    for generation in newer:
        (generation / CONFIRMED).unlink()
    return {"changed": newer != []}


def hold(module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Keep instances as they are."""
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    said = f"{module.params['holder']}, since {since}" + (
        f", {module.params['reason']}" if module.params["reason"] else ""
    )
    for instance in instances:
        write(instance.path / HELD, f"{said}\n", 0o644)
    return {}


def release(_module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Let instances be changed again."""
    held = [instance for instance in instances if instance.held()]
    for instance in held:
        (instance.path / HELD).unlink()
    return {"changed": held != []}


def remove(_module: AnsibleModule, instances: list[Deployed]) -> dict[str, Any]:
    """Remove instances."""
    for instance in instances:
        absent(instance)
    return {}


STATES = {
    "dropped": drop,
    "stopped": stop,
    "activated": activate,
    "confirmed": confirm,
    "reverted": revert,
    "outdated": outdate,
    "held": hold,
    "released": release,
    "absent": remove,
}

ARGUMENTS: dict[str, Any] = {
    "state": {
        "type": "str",
        "choices": ["prepared", "exported", *STATES],
        "required": True,
    },
    "config_path": {"type": "path", "default": "/etc/vllm"},
    "wanted": {"type": "list", "elements": "dict", "default": []},
    "names": {"type": "list", "elements": "str", "default": []},
    "release": {"type": "path"},
    "inputs": {"type": "dict", "default": {}},
    "container_unit": {"type": "path"},
    "generations": {"type": "dict", "default": {}},
    "idle": {"type": "list", "elements": "str", "default": []},
    "seconds": {"type": "dict"},
    "holder": {"type": "str", "default": "somebody"},
    "reason": {"type": "str", "default": ""},
    "releases_path": {"type": "path"},
    "files_path": {"type": "path"},
    "keep": {"type": "int", "default": 3},
}
RULES: dict[str, Any] = {"required_if": [("state", "prepared", ["release"])]}


def main() -> None:
    """Do what the state asks for."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        **RULES,
        supports_check_mode=True,
    )
    state = module.params["state"]
    instances = [Deployed(module, name) for name in module.params["names"]]
    try:
        if state == "prepared":
            module.exit_json(**prepared(module))
        if state == "exported":
            module.exit_json(changed=False, exports=exported(module.params["wanted"]))
        if module.check_mode or not (instances or state == "confirmed"):  # which also removes what nothing needs
            module.exit_json(changed=bool(instances))
        module.exit_json(**{"changed": True, **STATES[state](module, instances)})
    except ContainerError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
