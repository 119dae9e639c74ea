#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Looks after a directory of models."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: model_store
short_description: Put models that arrived under their final names and say which are missing
description:
  - Compares the store with a list of models in one call, from manifests, sizes and links. It asks no network.
  - A model that arrived and is verified is moved under its final name; names are links, replaced by rename.
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
options:
  path:
    description: The store.
    type: path
    required: true
  user:
    description: The user who owns it.
    type: str
    default: model-store
  models:
    description: The models, as the filter P(gpufleet.llm.model_store_plan#filter) planned them.
    type: list
    elements: dict
    required: true
  arrived:
    description: Files of one model that was copied, by relative path, with their C(size) and C(sha256) at the source.
    type: dict
    default: {}
  arrived_name:
    description: The model that O(arrived) is about.
    type: str
    default: ''
  keep_revisions:
    description: How many revisions of a model stay on disk, the one in use among them.
    type: int
    default: 2
  reserve_bytes:
    description: Room that must be left on the disk after a copy.
    type: int
    default: 0
  share:
    description: Tell other hosts, by C(present) and C(absent), what they could copy from this one and it from them.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Install | Models that are here are under their names
  gpufleet.llm.model_store:
    path: /srv/models
    models: "{{ model_store_models | gpufleet.llm.model_store_plan }}"
"""

RETURN = r"""
user_ready:
  description: Whether the user is there and cannot log in. Without the user nothing is done and every model is missing.
  type: bool
  returned: success
missing:
  description: Names of the models that have to be fetched.
  type: list
  elements: str
  returned: success
present:
  description: Directories of the wanted revisions that are here and came from elsewhere. Empty without O(share).
  type: list
  elements: str
  returned: success
absent:
  description: Those that are not here. Empty without O(share).
  type: list
  elements: str
  returned: success
removed:
  description: Directories of old revisions that were removed.
  type: list
  elements: str
  returned: success
"""

import grp
import os
import pwd
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.model_progress import amount
from ansible_collections.gpufleet.llm.plugins.module_utils.model_store import Model, ModelError, is_model, unfit
from ansible_collections.gpufleet.llm.plugins.module_utils.model_store_host import (
    link,
    manifest_of,
    prune,
    publish,
    verify,
    write_manifest,
)


def existing(path: Path) -> Path:
    """The nearest directory that is there: the disk that a store will be on."""
    while not path.exists():
        path = path.parent
    return path


class Store:
    """A directory of models and what is done to it."""

    def __init__(self, parameters: dict[str, Any], check_mode: bool) -> None:
        self.parameters, self.check_mode = parameters, check_mode
        self.path = Path(parameters["path"])
        self.changed = False
        self.missing: list[str] = []
        self.removed: list[str] = []
        self.present: list[str] = []
        self.absent: list[str] = []
        self.uid = self.gid = -1
        self.user_ready = False
        try:
            user = pwd.getpwnam(parameters["user"])
        except KeyError:
            return
        self.uid, self.gid = user.pw_uid, grp.getgrgid(user.pw_gid).gr_gid
        self.user_ready = (user.pw_dir, user.pw_shell) == ("/nonexistent", "/usr/sbin/nologin")

    def look(self) -> None:
        """Do what can be done without a network, and note what is missing."""
        if self.uid < 0 and not self.check_mode:
            self.missing = [model["name"] for model in self.parameters["models"]]
            self.compare()
            return
        self.directories()
        for model in self.parameters["models"]:
            self.place(model)
        self.compare()
        if not self.parameters["arrived_name"]:
            self.room()

    def compare(self) -> None:
        """What other hosts may copy from here, or here from others. A model on the controller is copied from there."""
        if self.parameters["share"]:
            for model in self.parameters["models"]:
                if model["source"] != "path":
                    (self.absent if model["name"] in self.missing else self.present).append(model["directory"])

    def directories(self) -> None:
        """The store and its parts are there and belong to its user."""
        for directory in (self.path, self.path / ".revisions", self.path / ".partial"):
            if directory.is_dir():
                status = directory.stat()
                if (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (self.uid, self.gid, 0o755):
                    continue
            self.changed = True
            if not self.check_mode:
                directory.mkdir(parents=True, exist_ok=True)
                os.chown(directory, self.uid, self.gid)
                directory.chmod(0o755)

    def point(self, name: str, target: str) -> None:
        """The name leads to the target."""
        path = self.path / name
        if path.is_symlink() and str(path.readlink()) == target:
            return
        self.changed = True
        if not self.check_mode:
            link(target, path)
            os.chown(path, self.uid, self.gid, follow_symlinks=False)
            self.removed += prune(self.path, name, self.parameters["keep_revisions"])

    def place(self, model: Model) -> None:
        """Put one model under its name, or note that it is missing."""
        name, directory = model["name"], model["directory"]
        if not directory:
            if not is_model(Path(model["path"])):
                raise ModelError(
                    f"{name}: there is no {model['path']}/config.json on this host; is the disk mounted? "
                    "(Instead of it, a model may have a params.json, a LoRA adapter has an adapter_config.json, a tokenizer its own files.)"
                )
            if problem := unfit(name, Path(model["path"]), model):
                raise ModelError(problem)
            self.point(name, model["path"])
            return
        if manifest_of(self.path / ".revisions" / directory) is None:
            staged = self.path / ".partial" / directory
            if name == self.parameters["arrived_name"] and not self.check_mode:
                try:
                    verify(staged, self.parameters["arrived"])
                except ModelError as error:
                    raise ModelError(f"{name}: {error}; run it again to copy what is wrong") from error
                write_manifest(staged, model, self.parameters["arrived"])
            if manifest_of(staged) is None:
                self.missing.append(name)
                return
            self.changed = True
            if not self.check_mode:
                publish(self.path, model, self.uid, self.gid)
        self.point(name, f".revisions/{directory}")

    def room(self) -> None:
        """There is room for the copies that are missing. What a download needs, only its source can tell."""
        waiting = [model for model in self.parameters["models"] if model["name"] in self.missing and model.get("size")]
        needed = sum(int(model["size"]) for model in waiting)
        free = shutil.disk_usage(existing(self.path)).free
        reserve = self.parameters["reserve_bytes"]
        if waiting and needed + reserve > free:
            raise ModelError(
                f"{', '.join(model['name'] for model in waiting)} take {amount(needed)}, but {self.path} has "
                f"{amount(free)} free and {amount(reserve)} shall stay free (model_store_minimum_free_gb)"
            )


ARGUMENTS: dict[str, Any] = {
    "path": {"type": "path", "required": True},
    "user": {"type": "str", "default": "model-store"},
    "models": {"type": "list", "elements": "dict", "required": True},
    "arrived": {"type": "dict", "default": {}},
    "arrived_name": {"type": "str", "default": ""},
    "keep_revisions": {"type": "int", "default": 2},
    "reserve_bytes": {"type": "int", "default": 0},
    "share": {"type": "bool", "default": False},
}


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        supports_check_mode=True,
    )
    try:
        store = Store(module.params, module.check_mode)
        store.look()
    except (ModelError, OSError) as error:
        module.fail_json(msg=str(error))
    changed = store.changed or (module.check_mode and bool(store.missing))
    told = {key: getattr(store, key) for key in ("missing", "present", "absent", "removed", "user_ready")}
    module.exit_json(changed=changed, **told)


if __name__ == "__main__":
    main()
