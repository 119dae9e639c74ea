#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Hands a model of this host out to others, for as long as they copy it."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: model_share
short_description: Hand a model of a host out to others while they copy it
description:
  - Starts a small read-only HTTP server in a transient systemd unit, as a user of its own who sees nothing of the store but this model.
  - Only who shows the token gets a file. The files are not encrypted on the way.
  - The server ends when it is closed, when nobody has asked for O(idle_seconds), or after O(limit_seconds), whatever comes first.
  - What keeps it from starting is a warning and no failure, since a model can always come from where it came from first.
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
options:
  action:
    description: Whether it starts or ends.
    type: str
    choices: [open, close]
    default: open
  path:
    description: The store.
    type: path
    default: /srv/models
  model:
    description: The model, as the filter P(gpufleet.llm.model_store_plan#filter) planned it.
    type: dict
    default: {}
  address:
    description: The IP address that it listens on.
    type: str
    default: ''
  port:
    description: The port that it listens on.
    type: int
    default: 8990
  token:
    description: What a receiver has to show.
    type: str
    default: ''
  idle_seconds:
    description: It ends when nobody has asked for this many seconds.
    type: int
    default: 300
  limit_seconds:
    description: It ends after this many seconds in any case.
    type: int
    default: 86400
"""

EXAMPLES = r"""
- name: Share | The host that has the model hands it out
  gpufleet.llm.model_share:
    model: "{{ model_store_models | gpufleet.llm.model_store_plan | first }}"
    address: 10.0.0.11
    token: "{{ token }}"
"""

RETURN = r"""
opened:
  description: Whether the server runs.
  type: bool
  returned: success
url:
  description: Where it answers.
  type: str
  returned: when it runs
files:
  description: Size and SHA-256 of each file, from the manifest of the model.
  type: dict
  returned: when it runs
commit:
  description: The commit that the hub had for the revision.
  type: str
  returned: when it runs
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import host, model_server, model_unit
from ansible_collections.gpufleet.llm.plugins.module_utils.fleet import with_port
from ansible_collections.gpufleet.llm.plugins.module_utils.model_store import Model, asks_for
from ansible_collections.gpufleet.llm.plugins.module_utils.model_store_host import manifest_of

UNIT = "model-share"


def unit_for(parameters: dict[str, Any], directory: Path, files: list[str]) -> model_unit.Unit:
    """A user of its own, an empty store with one model in it, and no way to write anything."""
    job = {
        **{key: parameters[key] for key in ("address", "port", "token")},
        "directory": str(directory),
        "files": files,
        "idle": parameters["idle_seconds"],
    }
    properties = [
        "Type=notify",
        "DynamicUser=yes",
        f"TemporaryFileSystem={parameters['path']}:ro",
        f"BindReadOnlyPaths={directory}",
        f"RuntimeMaxSec={parameters['limit_seconds']}",
        "TimeoutStartSec=30",
        "TimeoutStopSec=10",
        "MemoryDenyWriteExecute=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "RestrictNamespaces=yes",
        "SystemCallFilter=@system-service",
        "UMask=0077",
        *model_unit.homes(parameters["path"]),
    ]
    # The program travels as a credential too, so that nothing of it stays on the host.
    credentials = {"job": json.dumps(job), "program": inspect.getsource(model_server)}
    program = f"/run/credentials/{UNIT}.service/program"
    description = f"The model {parameters['model']['name']} for other hosts of the fleet"
    return model_unit.Unit(UNIT, description, properties, credentials, [host.python()["python_path"], "-BI", program])


def held(parameters: dict[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """Where the model is, and its manifest when it is whole and just what is asked for."""
    model: Model = parameters["model"]
    directory = Path(parameters["path"]) / ".revisions" / model["directory"]
    manifest = manifest_of(directory)
    if manifest and all(manifest.get(key) == value for key, value in asks_for(model).items()):
        return directory, manifest
    return directory, None


def opened(module: Any) -> dict[str, Any]:
    """Start the server."""
    parameters = module.params
    what = f"{parameters['model']['name']} cannot be copied from here"
    directory, manifest = held(parameters)
    if not manifest:
        module.warn(f"{what}: {directory} is not whole, or has other files than model_store_models asks for")
        return {"changed": False, "opened": False}
    model_unit.stop(module, UNIT)  # of a run that was killed
    if problem := model_unit.start(module, unit_for(parameters, directory, list(manifest["files"]))):
        log = model_unit.last_lines(module, UNIT).splitlines()
        module.warn(f"{what}: {UNIT} does not start: {log[-1] if log else problem}")
        return {"changed": False, "opened": False}
    url = f"http://{with_port(parameters['address'], parameters['port'])}"
    known = {"files": manifest["files"], "commit": manifest.get("commit", "")}
    return {"changed": True, "opened": True, "url": url, **known}


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["open", "close"], "default": "open"},
            "path": {"type": "path", "default": "/srv/models"},
            "model": {"type": "dict", "default": {}},
            "address": {"type": "str", "default": ""},
            "port": {"type": "int", "default": 8990},
            "token": {"type": "str", "default": "", "no_log": True},
            "idle_seconds": {"type": "int", "default": 300},
            "limit_seconds": {"type": "int", "default": 86400},
        },
        required_if=[("action", "open", ["model", "address", "token"])],
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=True, opened=False)
    if module.params["action"] == "close":
        model_unit.stop(module, UNIT)
        module.exit_json(changed=True, opened=False)
    module.exit_json(**opened(module))


if __name__ == "__main__":
    main()
