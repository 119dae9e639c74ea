#!/usr/bin/python
"""The proof that a CUDA compiler works for a vLLM release, in the sandbox of vLLM's unit."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_compiler
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Compiles a kernel as vLLM does at run time
description:
  - Whether kernels can be compiled is not asked of vLLM, which says yes where nvcc is there and dies of it when the headers or the libraries do
    not fit. One is compiled, loaded and run, by the release, in the sandbox of the unit.
  - What works is recorded, and tried again when the release, the compiler or the unit is another.
options:
  cuda_home:
    description: Directory of the CUDA toolkit, with C(bin/nvcc).
    type: path
    required: true
  release:
    description: Directory of the release.
    type: path
    required: true
  program:
    description: The program that compiles, a file on the host.
    type: path
    required: true
  release_mount:
    description: Where the unit sees its release.
    type: path
    default: /opt/vllm/release
  environment:
    description: Environment of the program, as the instances have it.
    type: dict
    default: {}
  sandbox:
    description: The files that make the unit of an instance.
    type: list
    elements: path
    default: []
  config_path:
    description: Directory of the instances, as M(gpufleet.llm.vllm_generation) takes it.
    type: path
    default: /etc/vllm
  proofs_path:
    description: Directory of the records.
    type: path
    default: /opt/vllm/proofs
attributes:
  check_mode:
    description: Compiles nothing.
    support: full
"""

EXAMPLES = r"""
- name: Kernels can be compiled
  gpufleet.llm.vllm_compiler:
    cuda_home: /usr/local/cuda-13.0
    release: /opt/vllm/releases/0.33.0-0123456789ab
    program: /opt/vllm/bin/compile_kernel.py
    environment:
      CUDA_HOME: /usr/local/cuda-13.0
      PATH: /opt/vllm/release/bin:/usr/local/cuda-13.0/bin:/usr/bin:/bin
"""

RETURN = r"""
seconds:
  description: How long it took.
  returned: when it was tried
  type: float
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import generations_host, start_proof
from ansible_collections.gpufleet.llm.plugins.module_utils.files import write
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands
from ansible_collections.gpufleet.llm.plugins.module_utils.start_proof_host import ProofInstance
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import CACHE_PATH, CACHES, render_environment

SECONDS = 300
LINES = "25"


def key(module: AnsibleModule, versions: str) -> str:
    """What the proof holds for."""
    parameters = module.params
    facts = [
        parameters["release"],
        parameters["environment"],
        versions,
        generations_host.fingerprint(parameters["sandbox"]),
    ]
    return start_proof.record_key(facts)


def drop_in(module: AnsibleModule) -> str:
    """What differs in the unit: it runs the program once."""
    command = f"{module.params['release_mount']}/bin/python {module.params['program']}"
    return f"[Service]\nType=oneshot\nRestart=no\nTimeoutStartSec={SECONDS}\nExecStart=\nExecStart={command}\n"


def compile_kernel(module: AnsibleModule) -> str:
    """Run the program in the sandbox. Returns nothing when it went well, else what it said."""
    one = ProofInstance(module, f"{start_proof.PREFIX}compiler")
    home = f"{CACHE_PATH}/{one.instance.name}"
    environment = {
        **{name: f"{home}{path}" for name, path in CACHES.items()},
        "PYTHONDONTWRITEBYTECODE": "1",
        **{name: str(value) for name, value in module.params["environment"].items()},
    }
    content = dict.fromkeys(generations_host.FILES, "")
    content.update(environment=render_environment(environment), release=module.params["release"])
    try:
        one.prepare(content, drop_in(module))
        status, complaint = one.start(wait=True)
        if status == 0:
            return ""
        _status, told, _error = module.run_command(
            ["systemctl", "show", "--property=InvocationID", "--value", one.instance.unit]
        )
        match = f"_SYSTEMD_INVOCATION_ID={told.strip()}"
        _status, journal, _error = module.run_command(
            ["journalctl", match, "--output=cat", f"--lines={LINES}", "--no-pager", "--quiet"]
        )
        return str(journal).strip() or complaint
    finally:
        one.remove()


ARGUMENTS: dict[str, Any] = {
    "cuda_home": {"type": "path", "required": True},
    "release": {"type": "path", "required": True},
    "program": {"type": "path", "required": True},
    "release_mount": {"type": "path", "default": "/opt/vllm/release"},
    "environment": {"type": "dict", "default": {}},
    "sandbox": {"type": "list", "elements": "path", "default": []},
    "config_path": {"type": "path", "default": "/etc/vllm"},
    "proofs_path": {"type": "path", "default": "/opt/vllm/proofs"},
}


def main() -> None:
    """Try it unless it is known to work."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        supports_check_mode=True,
    )
    parameters: dict[str, Any] = module.params
    nvcc = f"{parameters['cuda_home']}/bin/nvcc"
    run = commands(module)
    status, nvcc_version, error = run([nvcc, "--version"])
    if status:
        module.fail_json(
            msg=f"There is no CUDA compiler: {nvcc} --version ended with {status} ({error.strip()[-300:]}). cuda_toolkit_enabled: true installs one; "
            "with vllm_cuda_home: '' vLLM does without."
        )
    record = (
        Path(parameters["proofs_path"]) / f"compiler-{key(module, nvcc_version + run(['c++', '--version'])[1])}.json"
    )
    if record.exists() or module.check_mode:
        module.exit_json(changed=False)
    begun = time.monotonic()
    if problem := compile_kernel(module):
        module.fail_json(
            msg=f"Kernels as vLLM compiles them at run time do not work with {nvcc}, so an engine would die of them. Nothing was stopped. Install the "
            f"CUDA release of the wheels (cuda_toolkit_version), or set vllm_cuda_home: '' and vLLM does without. It said:\n{problem}"
        )
    seconds = round(time.monotonic() - begun, 1)
    write(record, json.dumps({"nvcc": nvcc_version.strip().splitlines()[-1], "seconds": seconds}) + "\n", 0o644)
    module.exit_json(changed=True, seconds=seconds)


if __name__ == "__main__":
    main()
