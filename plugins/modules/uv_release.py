#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Installs uv by pip, in a virtual environment of its own."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: uv_release
short_description: Install uv by pip, checked by hash, in a virtual environment of its own
description:
  - Makes a virtual environment with the system's Python, has pip install uv in it as a wheel that is checked by its hash, and calls
    the new uv. Only then do the links C(uv) and C(uvx) lead to it, and older environments are removed. Whatever fails or is killed on
    the way leaves the uv that was there in use.
  - A second run reads one small file and compares sizes and times. It asks no index.
  - Without a source of its own, pip goes by what it is configured with on the host.
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
options:
  requirements:
    description: A requirements file that pins uv, with its hashes.
    type: str
    required: true
  index_url:
    description:
      - The package index, by C(https), C(http) or C(file). Pip's own configuration does not count then.
      - It may carry credentials, which are never shown.
    type: str
    default: ''
  extra_index_urls:
    description: Further indexes.
    type: list
    elements: str
    default: []
  find_links:
    description: Directories, or addresses of pages, with wheels.
    type: list
    elements: str
    default: []
  offline:
    description: Ask no index, unless it is in a directory.
    type: bool
    default: false
  environment:
    description: Environment of the download, such as C(HTTPS_PROXY).
    type: dict
    default: {}
  directory:
    description: Where the environments are.
    type: path
    default: /opt/uv/releases
  link_directory:
    description: Where the links go.
    type: path
    default: /usr/local/bin
  python:
    description: The Python that makes the environment.
    type: path
    default: /usr/bin/python3
"""

EXAMPLES = r"""
- name: Install | uv is there
  gpufleet.llm.uv_release:
    requirements: uv==0.13.8 --hash=sha256:e18a57b8b352eb7c8feb317b9f6f533c8f0ad9673fd6cf34bbe3cf1a9f6a8984
    index_url: https://mirror.example.com/simple
"""

RETURN = r"""
source:
  description: Where pip had it from, and later calls of uv have packages from, in words without credentials.
  type: str
  returned: when it was installed
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.credentials import (
    hidden,
    passwords,
    without_credentials,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.uv_host import (
    LINKS,
    PROGRAMS,
    RECORD,
    RELEASES,
    UvError,
    configurations,
    installed,
    names_index,
    pip_settings,
    release_state,
)

SYSTEM_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def run(command: list[str], environment: Mapping[str, str], doing: str, secrets: Iterable[str] = ()) -> str:
    """What a program prints; when it fails, its own words, without the passwords of its environment and of `secrets`."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise UvError(f"{doing}: {hidden(done.stderr.strip() or done.stdout.strip(), *environment.values(), *secrets)}")
    return done.stdout.strip()


def pip_environment(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Where pip is to look, as variables: an argument could be read by every user of the host."""
    found = dict(os.environ)
    if parameters["index_url"]:
        found = {name: value for name, value in found.items() if not name.startswith("PIP_")}
        found.update(PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL=parameters["index_url"])
    found.update({name: str(value) for name, value in parameters["environment"].items()})
    for name, values in (("PIP_EXTRA_INDEX_URL", "extra_index_urls"), ("PIP_FIND_LINKS", "find_links")):
        if parameters[values]:
            found[name] = " ".join(parameters[values])
    if parameters["offline"] and not parameters["index_url"].startswith("file:"):
        found["PIP_NO_INDEX"] = "1"
    return found | {"PIP_NO_CACHE_DIR": "1", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0"}


def source(parameters: Mapping[str, Any], settings: Mapping[str, str]) -> str:
    """Which source of packages counts, for the operator."""
    if parameters["offline"]:
        return "no network, as the inventory says (uv_offline)"
    if parameters["index_url"]:
        return f"{without_credentials(parameters['index_url'])}, as the inventory says (uv_index_url)"
    # The file may be the role's own, of the run before: then it names an index that is not wanted any more, and goes.
    by_pip = ", ".join(map(without_credentials, settings.get("index-url", "").split()))
    if names_index(configurations()):
        return f"what uv is configured with on the host; uv itself came from {by_pip or 'the default of pip'}"
    return (
        f"{by_pip}, as pip is configured on the host"
        if by_pip
        else "the default of pip and uv: the host names no other"
    )


def build(parameters: Mapping[str, Any], release: Path) -> str:
    """Install uv in a new environment and prove that it runs. Returns where it came from."""
    environment = pip_environment(parameters)
    run(
        [parameters["python"], "-m", "venv", str(release)],
        environment,
        "The virtual environment for uv could not be made",
    )
    release.chmod(0o755)
    pip = [str(release / "bin/python"), "-I", "-m", "pip"]
    settings = pip_settings(pip, environment)
    if not settings.get("cert") and SYSTEM_CERTIFICATES.is_file():
        # As uv does it: a company's own authority counts as soon as the host trusts it.
        environment["PIP_CERT"] = environment.get("SSL_CERT_FILE") or str(SYSTEM_CERTIFICATES)
    requirements = release / "requirements.txt"
    requirements.write_text(parameters["requirements"].strip() + "\n")
    run(
        [*pip, "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirement", str(requirements)],
        environment, "pip could not install uv", settings.values(),
    )  # fmt: skip
    for name in PROGRAMS:
        said = run([str(release / "bin" / name), "--version"], environment, f"The new {name} does not run")
        wanted = re.search(r"==\s*([^\s;]+)", parameters["requirements"])
        if wanted and wanted[1] not in said.split():
            raise UvError(f"The new {name} says that it is {said}, and {wanted[1]} was asked for")
    record = {"requirements": parameters["requirements"], "state": release_state(release)}
    (release / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return source(parameters, settings)


def link(release: Path, links: Path) -> None:
    """Let the links lead to the new environment, each by rename."""
    links.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        aside = links / f".{name}.new"
        aside.unlink(missing_ok=True)
        aside.symlink_to(release / "bin" / name)
        aside.replace(links / name)


def ensure(parameters: Mapping[str, Any]) -> str:
    """Build, switch, tidy up. Returns where uv came from."""
    directory = Path(parameters["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    # A new name each time: what runs is never changed, and what a killed run left is never mistaken for a whole one.
    release = Path(tempfile.mkdtemp(prefix="uv-", dir=directory))
    try:
        came_from = build(parameters, release)
        link(release, Path(parameters["link_directory"]))
    except BaseException:
        shutil.rmtree(release, ignore_errors=True)
        raise
    for other in directory.iterdir():
        if other != release:
            shutil.rmtree(other, ignore_errors=True)
    return came_from


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec={
            "requirements": {"type": "str", "required": True},
            "index_url": {"type": "str", "default": "", "no_log": True},
            "extra_index_urls": {"type": "list", "elements": "str", "default": [], "no_log": True},
            "find_links": {"type": "list", "elements": "str", "default": [], "no_log": True},
            "offline": {"type": "bool", "default": False},
            "environment": {"type": "dict", "default": {}, "no_log": True},
            "directory": {"type": "path", "default": str(RELEASES)},
            "link_directory": {"type": "path", "default": str(LINKS)},
            "python": {"type": "path", "default": "/usr/bin/python3"},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    sources = [parameters["index_url"], *parameters["extra_index_urls"], *parameters["find_links"]]
    # The journal has none of it. In messages an operator needs the addresses; only the passwords in them are secret.
    module.no_log_values = passwords(*sources, *map(str, parameters["environment"].values()))
    before = installed(Path(parameters["link_directory"]))
    if before == parameters["requirements"]:
        module.exit_json(changed=False)
    result = {"changed": True, "diff": {"before": f"{before}\n", "after": f"{parameters['requirements']}\n"}}
    try:
        if not module.check_mode:
            result["source"] = ensure(parameters)
    except (UvError, OSError) as error:
        module.fail_json(msg=f"{error}\nThe uv that was there before is unchanged.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
