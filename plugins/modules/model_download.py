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
  description: How it ended, or goes. One of checking, downloading, verifying, done, failed.
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
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

RUN = Path("/run/model-download")


def unit_of(name: str) -> str:
    """The unit of a model's download."""
    return f"model-download-{name}"


def status_file(parameters: dict[str, Any]) -> Path:
    """Where the download says how it goes."""
    return Path(parameters["path"]) / ".partial" / f"{parameters['model']['directory']}.status.json"


def said(parameters: dict[str, Any]) -> dict[str, Any]:
    """What it said last."""
    try:
        known: dict[str, Any] = json.loads(status_file(parameters).read_text())
        return known
    except (OSError, ValueError):
        return {"state": "checking", "done": 0, "total": 0, "message": ""}


def job_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """What the downloader is told."""
    model = parameters["model"]
    return {
        "name": model["name"],
        "source": model["source"],
        "repository": model.get("repository") or "",
        "revision": model["revision"],
        "include": model.get("include") or [],
        "exclude": model.get("exclude") or [],
        "files": model.get("files") or [],
        "staging": str(Path(parameters["path"]) / ".partial" / model["directory"]),
        "status": str(status_file(parameters)),
        "endpoint": parameters["endpoint"].rstrip("/"),
        "parallel": parameters["parallel"],
        "reserve": parameters["reserve_bytes"],
        "environment": {key: str(value) for key, value in parameters["environment"].items()},
        "pause": parameters["pause"],
    }


def command(parameters: dict[str, Any], secrets: Path) -> list[str]:
    """The transient unit: no root, one writable directory, and its secrets as credentials."""
    properties = [
        "Type=exec",
        f"User={parameters['user']}",
        f"LoadCredential=job:{secrets}/job",
        f"LoadCredential=secrets:{secrets}/secrets",
        "ProtectSystem=strict",
        f"ReadWritePaths={parameters['path']}",
        "PrivateTmp=yes",
        "PrivateDevices=yes",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "RestrictSUIDSGID=yes",
        "ProtectKernelTunables=yes",
        "ProtectControlGroups=yes",
        "UMask=0022",
        "Nice=5",
    ]
    if not parameters["path"].startswith(("/home/", "/root/")):
        properties.append("ProtectHome=yes")
    return [
        "systemd-run",
        "--quiet",
        "--collect",
        f"--unit={unit_of(parameters['model']['name'])}",
        f"--description=Download of the model {parameters['model']['name']}",
        *(f"--property={entry}" for entry in properties),
        parameters["python"],
        "-B",
        parameters["program"],
    ]


class Download:
    """The download of one model on this host."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.parameters: dict[str, Any] = module.params
        self.unit = unit_of(self.parameters["model"]["name"])

    def running(self) -> bool:
        """Whether it runs."""
        _rc, state, _error = self.module.run_command(["systemctl", "is-active", self.unit])
        return str(state).strip() in ("active", "activating", "deactivating")

    def start(self) -> dict[str, Any]:
        """Start it, or attach to the one that runs."""
        if self.running():
            if said(self.parameters).get("directory") not in (None, self.parameters["model"]["directory"]):
                self.module.fail_json(
                    msg=f"{self.unit} fetches another revision; wait for it or stop it: systemctl stop {self.unit}"
                )
            return {"changed": True, "attached": True, **self.status()}
        status_file(self.parameters).unlink(missing_ok=True)
        secrets = RUN / self.parameters["model"]["name"]
        RUN.mkdir(mode=0o700, exist_ok=True)
        secrets.mkdir(mode=0o700, exist_ok=True)
        try:
            contents = {
                "job": job_of(self.parameters),
                "secrets": {name: self.parameters[name] for name in ("token", "headers", "queries")},
            }
            for name, content in contents.items():
                with os.fdopen(os.open(secrets / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    json.dump(content, file)
            # Type=exec: it returns when the program runs, and then the credentials were read.
            rc, _out, error = self.module.run_command(command(self.parameters, secrets))
        finally:
            shutil.rmtree(secrets, ignore_errors=True)
        if rc:
            self.module.fail_json(msg=f"systemd could not start {self.unit}: {error.strip()}")
        return {"changed": True, "attached": False, **said(self.parameters)}

    def status(self) -> dict[str, Any]:
        """How it goes. What stopped without a last word has failed."""
        running = self.running()
        state = said(self.parameters)  # after the question: a last word was said before the end
        if not running and state["state"] not in ("done", "failed"):
            _rc, log, _error = self.module.run_command(
                ["journalctl", f"--unit={self.unit}", "--lines=15", "--no-pager", "--output=cat"]
            )
            state = {
                **state,
                "state": "failed",
                "message": f"{self.unit} stopped by itself. Its last lines:\n{log.strip()}",
            }
        return state


def main() -> None:
    """Run as an Ansible module."""
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
            "parallel": {"type": "int", "default": 8},
            "reserve_bytes": {"type": "int", "default": 0},
            "environment": {"type": "dict", "default": {}},
            "pause": {"type": "int", "default": 5},
            "interval": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=True, state="checking", done=0, total=0)
    download = Download(module)
    if module.params["action"] == "start":
        module.exit_json(**download.start())
    module.exit_json(changed=False, **download.status())


if __name__ == "__main__":
    main()
