#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Starts the download of a model on the host, or says how it goes."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: model_download
short_description: Download a model into the store, with progress
description:
  - Runs the download as an unprivileged user in a transient systemd unit, so that a lost connection or a killed
    playbook does not stop it. A second run attaches to the one that runs.
  - The action plugin of the same name starts it, shows how it goes, and returns when it ended.
  - The model arrives in the staging directory. M(gpufleet.llm.model_store) puts it under its name.
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
options:
  action:
    description: Set by the action plugin.
    type: str
    choices: [start, status]
    default: start
  path:
    description: The store.
    type: path
    required: true
  model:
    description: The model, as the filter P(gpufleet.llm.model_store_plan#filter) planned it.
    type: dict
    required: true
  user:
    description: The user who downloads.
    type: str
    default: model-store
  python:
    description: A Python that has the client library of the source.
    type: path
    required: true
  program:
    description: The downloader.
    type: path
    required: true
  endpoint:
    description: The hub that the repository of O(model) is on.
    type: str
    default: ''
  token:
    description: Token for the hub.
    type: str
    default: ''
  headers:
    description: For addresses, the headers of those that begin with a key.
    type: dict
    default: {}
  queries:
    description: For addresses, what follows the question mark, by the name of the file.
    type: dict
    default: {}
  peer:
    description:
      - What M(gpufleet.llm.model_share) returned on a host that hands the model out at O(endpoint), to whoever has O(token).
      - Then it comes from there, and what cannot be had from there is a warning and no failure.
    type: dict
    default: {}
  parallel:
    description: Files at the same time.
    type: int
    default: 8
  reserve_bytes:
    description: Room that must be left on the disk.
    type: int
    default: 0
  environment:
    description: Environment of the download.
    type: dict
    default: {}
  pause:
    description: Seconds before the second attempt after the network failed.
    type: int
    default: 5
  interval:
    description: Seconds between two lines of progress.
    type: int
    default: 10
"""

EXAMPLES = r"""
- name: Download | The model is on the host
  gpufleet.llm.model_download:
    path: /srv/models
    model:
      name: qwen2.5-7b
      directory: qwen2.5-7b-a09a35458c70
      source: huggingface
      repository: Qwen/Qwen2.5-7B-Instruct
      revision: a09a35458c702b33eeacc393d103063234e8bc28
    python: /opt/model-store/huggingface-hub-2.4.0/bin/python
    program: /opt/model-store/fetch/fetch_model.py
    endpoint: https://huggingface.co
    token: "{{ vault_hf_token }}"
"""

RETURN = r"""
state:
  description: How it ended, or goes. One of checking, waiting, downloading, verifying, done, failed.
  type: str
  returned: success
done:
  description: Bytes that are on the disk.
  type: int
  returned: success
total:
  description: Bytes of the model.
  type: int
  returned: success
selection:
  description: How many files are fetched, and which are left out and why. Empty when all are.
  type: str
  returned: success
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import model_unit
from ansible_collections.gpufleet.llm.plugins.module_utils.credentials import only_passwords
from ansible_collections.gpufleet.llm.plugins.module_utils.model_store_host import status_directory


def unit_of(name: str) -> str:
    """The unit of a model's download."""
    return f"model-download-{name}"


def status_file(parameters: dict[str, Any]) -> Path:
    """Where the download says how it goes: not on the disk of the store, which may be full."""
    return status_directory(parameters["model"]["name"]) / "status.json"


def said(parameters: dict[str, Any]) -> dict[str, Any]:
    """What it said last."""
    try:
        known: dict[str, Any] = json.loads(status_file(parameters).read_text())
        return known
    except (OSError, ValueError):
        return {"state": "checking", "done": 0, "total": 0, "message": "", "selection": ""}


def job_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """What the downloader is told."""
    model, peer = parameters["model"], parameters["peer"]
    files = model.get("files") or []
    if peer:
        files = [
            {"path": name, "url": f"{parameters['endpoint']}/{quote(name)}", **file}
            for name, file in peer["files"].items()
        ]
    return {
        "name": model["name"],
        "source": model["source"],
        "peer": bool(peer),
        "commit": peer.get("commit", ""),
        "repository": model.get("repository") or "",
        "revision": model["revision"],
        "include": model.get("include") or [],
        "exclude": model.get("exclude"),
        "code": model.get("code"),
        "files": files,
        "staging": str(Path(parameters["path"]) / ".partial" / model["directory"]),
        "status": str(status_file(parameters)),
        "endpoint": parameters["endpoint"].rstrip("/"),
        "parallel": parameters["parallel"],
        "reserve": parameters["reserve_bytes"],
        "environment": {key: str(value) for key, value in parameters["environment"].items()},
        "pause": parameters["pause"],
    }


def secrets_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """What the downloader is told and nobody else. A peer is shown its token as any address is shown its headers."""
    if parameters["peer"]:
        shown = {parameters["endpoint"]: {"Authorization": f"Bearer {parameters['token']}"}}
        return {"token": "", "headers": shown, "queries": {}}
    return {name: parameters[name] for name in ("token", "headers", "queries")}


def unit_for(parameters: dict[str, Any]) -> model_unit.Unit:
    """The transient unit: no root, one writable directory, and its secrets as credentials."""
    properties = ["Type=exec", f"User={parameters['user']}", f"ReadWritePaths={parameters['path']}", "UMask=0022"]
    # What it said last is read after it ended.
    properties += [
        f"RuntimeDirectory={status_directory(parameters['model']['name']).name}",
        "RuntimeDirectoryPreserve=yes",
    ]
    return model_unit.Unit(
        unit_of(parameters["model"]["name"]),
        f"Download of the model {parameters['model']['name']}",
        [*properties, *model_unit.homes(parameters["path"])],
        {"job": json.dumps(job_of(parameters)), "secrets": json.dumps(secrets_of(parameters))},
        [parameters["python"], "-B", parameters["program"]],
    )


class Download:
    """The download of one model on this host."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.parameters: dict[str, Any] = module.params
        self.unit = unit_of(self.parameters["model"]["name"])

    def start(self) -> dict[str, Any]:
        """Start it, or attach to the one that runs."""
        if model_unit.active(self.module, self.unit):
            if said(self.parameters).get("directory") not in (None, self.parameters["model"]["directory"]):
                self.module.fail_json(
                    msg=f"{self.unit} fetches another revision; wait for it or stop it: systemctl stop {self.unit}"
                )
            if not (self.parameters["peer"] or said(self.parameters).get("peer")):
                return {"changed": True, "attached": True, **self.status()}
            # A peer has a new secret in each run, which one from before does not know. What it brought stays.
            model_unit.stop(self.module, self.unit)
        status_file(self.parameters).unlink(missing_ok=True)
        if problem := model_unit.start(self.module, unit_for(self.parameters)):
            self.module.fail_json(msg=f"systemd could not start {self.unit}: {problem}")
        return {"changed": True, "attached": False, **said(self.parameters)}

    def status(self) -> dict[str, Any]:
        """How it goes. What stopped without a last word has failed."""
        running = model_unit.active(self.module, self.unit)
        state = said(self.parameters)  # after the question: a last word was said before the end
        if not running and state["state"] not in ("done", "failed"):
            log = model_unit.last_lines(self.module, self.unit)
            state = {
                **state,
                "state": "failed",
                "message": f"{self.unit} stopped by itself. Its last lines:\n{log}",
            }
        return state


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["start", "status"], "default": "start"},
            "path": {"type": "path", "required": True},
            "model": {"type": "dict", "required": True},
            "user": {"type": "str", "default": "model-store"},
            "python": {"type": "path", "required": True},
            "program": {"type": "path", "required": True},
            "endpoint": {"type": "str", "default": ""},
            "token": {"type": "str", "default": "", "no_log": True},
            "headers": {"type": "dict", "default": {}, "no_log": True},
            "queries": {"type": "dict", "default": {}, "no_log": True},
            "peer": {"type": "dict", "default": {}},
            "parallel": {"type": "int", "default": 8},
            "reserve_bytes": {"type": "int", "default": 0},
            "environment": {"type": "dict", "default": {}, "no_log": True},
            "pause": {"type": "int", "default": 5},
            "interval": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    only_passwords(module, *map(str, module.params["environment"].values()))
    if module.check_mode:
        module.exit_json(changed=True, state="checking", done=0, total=0, selection="")
    download = Download(module)
    if module.params["action"] == "start":
        module.exit_json(**download.start())
    module.exit_json(changed=False, **download.status())


if __name__ == "__main__":
    main()
