#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""A virtual environment with exactly the packages of a lock, made by uv."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: python_environment
short_description: A virtual environment with exactly the packages of a lock
description:
  - Makes a virtual environment with uv, and installs in it what a lock names, checked by hash, and nothing else.
  - Packages come from where uv has them from on the host. Where no index is named to uv, that is pip's index, with its certificate.
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
options:
  path:
    description: Directory of the environment.
    type: path
    required: true
  lock:
    description: The lock, a requirements file with hashes on the host.
    type: path
    required: true
  python:
    description: Version specifier of the Python to use, as C(uv venv --python) takes it.
    type: str
    default: '>=3.11'
  uv:
    description: The uv program.
    type: path
    default: /usr/local/bin/uv
  environment:
    description: Environment of the download, such as C(HTTPS_PROXY).
    type: dict
    default: {}
attributes:
  check_mode:
    description: Says whether the environment would be made.
    support: partial
    details: The packages of one that is there are not compared.
"""

EXAMPLES = r"""
- name: The client of the hub is there
  gpufleet.llm.python_environment:
    path: /opt/model-store/huggingface
    lock: /opt/model-store/huggingface.txt
"""

RETURN = r""" # """

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.credentials import hidden
from ansible_collections.gpufleet.llm.plugins.module_utils.uv_host import UvError, adopt, call_environment

ARGUMENTS: dict[str, Any] = {
    "path": {"type": "path", "required": True},
    "lock": {"type": "path", "required": True},
    "python": {"type": "str", "default": ">=3.11"},
    "uv": {"type": "path", "default": "/usr/local/bin/uv"},
    "environment": {"type": "dict", "default": {}, "no_log": True},
}
SEARCH_PATH = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def main() -> None:
    """Make the environment unless it is there, and have uv compare its packages."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    path, uv = module.params["path"], module.params["uv"]
    missing = not Path(path, "pyvenv.cfg").is_file()
    if module.check_mode:
        module.exit_json(changed=missing)
    given = adopt(module.params["environment"])
    try:
        environment = SEARCH_PATH | call_environment()
    except UvError as problem:
        module.fail_json(msg=str(problem))
        raise
    commands = [[uv, "venv", "--no-project", "--clear", "--python", module.params["python"], path]] if missing else []
    commands += [
        [
            uv,
            "pip",
            "sync",
            "--require-hashes",
            "--link-mode=copy",
            f"--python={path}/bin/python",
            module.params["lock"],
        ]
    ]
    said = ""
    for command in commands:
        status, output, error = module.run_command(command, environ_update=environment, cwd="/")
        said = hidden(error.strip() or output.strip(), *environment.values(), *given)
        if status:
            module.fail_json(msg=f"{' '.join(command[:3])} ... ended with {status}: {said}")
    module.exit_json(changed=missing or "Installed" in said or "Uninstalled" in said)


if __name__ == "__main__":
    main()
