#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Installs a Python of its own beside the system's."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: managed_python
short_description: Install a standalone Python and link it into a directory on the PATH
description:
  - Installs one exact version of a standalone CPython (python-build-standalone) beside the system's Python, either by
    C(uv python install), which checks the archive against the hash that it carries, or from an archive pinned by hash.
  - Links it as C(pythonX.Y). The name C(python3) stays the system's.
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
options:
  version:
    description: Exact version, such as C(3.12.16).
    type: str
    required: true
  directory:
    description: Where the installations live.
    type: path
    default: /opt/uv/python
  link_directory:
    description: Where the link goes.
    type: path
    default: /usr/local/bin
  uv:
    description: The uv that installs it when no archive is named.
    type: path
    default: /usr/local/bin/uv
  mirror:
    description: Where uv looks instead of its own source (C(UV_PYTHON_INSTALL_MIRROR)).
    type: str
    default: ''
  archive_url:
    description: A C(.tar.gz) of a standalone Python, by C(https), C(http) or C(file). Empty means that uv fetches it.
    type: str
    default: ''
  archive_sha256:
    description: SHA-256 of the archive.
    type: str
    default: ''
  environment:
    description: Environment of the download, such as C(HTTPS_PROXY).
    type: dict
    default: {}
  timeout:
    description: Seconds without an answer after which a server counts as unreachable.
    type: int
    default: 60
"""

EXAMPLES = r"""
- name: Install | Python 3.12 is there
  gpufleet.llm.managed_python:
    version: 3.12.16
    mirror: https://mirror.example.com/python-build-standalone
"""

RETURN = r"""
path:
  description: The link on the PATH.
  type: str
  returned: success
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.gpufleet.llm.plugins.module_utils.credentials import (
    hide_passwords,
    only_passwords,
    without_credentials,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.uv_host import UvError, adopt, call_environment


class PythonError(Exception):
    """A reason why there is no Python, in words for the operator."""


def says_version(program: Path) -> str:
    """The version that a Python says it is; empty when it does not run."""
    try:
        done = subprocess.run([str(program), "-V"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().removeprefix("Python ") if done.returncode == 0 else ""


def minor(version: str) -> str:
    """The name under which a version is linked."""
    return "python" + ".".join(version.split(".")[:2])


def installation(directory: Path, version: str) -> Path | None:
    """The program of an installation, when it is there."""
    found = sorted(directory.glob(f"cpython-{version}-*/bin/{minor(version)}"))
    return found[0] if found else None


def current(parameters: dict[str, Any]) -> bool:
    """Whether the link leads to the wanted version, from the wanted archive."""
    link = Path(parameters["link_directory"]) / minor(parameters["version"])
    program = installation(Path(parameters["directory"]), parameters["version"])
    if program is None or not link.is_symlink() or link.resolve() != program.resolve():
        return False
    if parameters["archive_url"]:
        try:
            known = json.loads((program.parent.parent / ".archive.json").read_text())
        except (OSError, ValueError):
            return False
        if known != {"sha256": parameters["archive_sha256"]}:
            return False
    return says_version(link) == str(parameters["version"])


def by_uv(parameters: dict[str, Any]) -> None:
    """Let uv fetch it: uv knows the hash of every archive of its release."""
    command = [
        parameters["uv"],
        "python",
        "install",
        "--no-bin",
        "--install-dir",
        parameters["directory"],
        parameters["version"],
    ]
    environment = os.environ | call_environment()
    if parameters["mirror"]:
        environment["UV_PYTHON_INSTALL_MIRROR"] = parameters["mirror"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        source = without_credentials(parameters["mirror"]) if parameters["mirror"] else "uv's own source"
        raise PythonError(f"uv could not install Python {parameters['version']} from {source}: {done.stderr.strip()}")


def by_archive(parameters: dict[str, Any]) -> None:
    """Fetch the archive, check it, unpack it aside, prove that it runs, and rename it into place."""
    directory, version = Path(parameters["directory"]), parameters["version"]
    directory.mkdir(parents=True, exist_ok=True)
    shown = without_credentials(parameters["archive_url"])
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as scratch:
        archive = Path(scratch) / "archive"
        digest = hashlib.sha256()
        try:
            with (
                open_url(parameters["archive_url"], timeout=parameters["timeout"], force_basic_auth=True) as answer,
                archive.open("wb") as file,
            ):
                while block := answer.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        except Exception as error:  # open_url raises whatever its layers raise; all of it means the same here
            raise PythonError(f"cannot download {shown}: {error}") from error
        if digest.hexdigest() != parameters["archive_sha256"]:
            raise PythonError(
                f"{shown}: the hash differs: expected sha256 {parameters['archive_sha256']}, got {digest.hexdigest()}"
            )
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(Path(scratch) / "tree")  # noqa: S202 (the archive is the one that the operator pinned)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise PythonError(f"{shown} cannot be unpacked: {error}") from error
        found = list((Path(scratch) / "tree").glob(f"*/bin/{minor(version)}"))
        if not found:
            raise PythonError(f"{shown} is not a standalone Python {version}: it has no */bin/{minor(version)}")
        said = says_version(found[0])
        if said != version:
            raise PythonError(f"{shown} is not Python {version}: {minor(version)} in it says {said or 'nothing'}")
        tree = found[0].parent.parent
        tree.chmod(0o755)
        (tree / ".archive.json").write_text(json.dumps({"sha256": parameters["archive_sha256"]}) + "\n")
        final = directory / f"cpython-{version}-linux-{platform.machine()}-gnu"
        if final.exists():
            final.rename(Path(scratch) / "former")
        tree.rename(final)


def ensure(parameters: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Do what the module is for and say what was done."""
    link = Path(parameters["link_directory"]) / minor(parameters["version"])
    if current(parameters):
        return {"changed": False, "path": str(link)}
    if link.exists() and not link.is_symlink():
        raise PythonError(f"{link} is a file that this module did not put there; move it away")
    if not check_mode:
        if parameters["archive_url"]:
            by_archive(parameters)
        else:
            by_uv(parameters)
        program = installation(Path(parameters["directory"]), parameters["version"])
        if program is None:
            raise PythonError(f"uv installed no Python {parameters['version']} below {parameters['directory']}")
        aside = link.with_name(f".{link.name}.new")
        aside.unlink(missing_ok=True)
        aside.symlink_to(program)
        aside.replace(link)
    return {"changed": True, "path": str(link)}


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "directory": {"type": "path", "default": "/opt/uv/python"},
            "link_directory": {"type": "path", "default": "/usr/local/bin"},
            "uv": {"type": "path", "default": "/usr/local/bin/uv"},
            "mirror": {"type": "str", "default": ""},
            "archive_url": {"type": "str", "default": ""},
            "archive_sha256": {"type": "str", "default": ""},
            "environment": {"type": "dict", "default": {}, "no_log": True},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    only_passwords(module, *adopt(module.params["environment"]))
    hide_passwords(module, module.params["mirror"], module.params["archive_url"])
    try:
        result = ensure(module.params, module.check_mode)
    except (PythonError, UvError, OSError, shutil.Error) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
