#!/usr/bin/python
"""The proof that what an instance is about to run starts, before the instance is stopped for it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_start_proof
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Starts a tiny model as an instance would be started
description:
  - Runs a Llama of a few megabytes with random weights under the very unit of an instance, with its release or image, environment, caches and
    parallel sizes, on its GPUs. M(gpufleet.llm.completion_gate) asks it; what it proves is that vLLM starts here, not that the model does.
  - A proof holds for a release or image, an environment, parallel sizes, the files of the unit, and the GPUs with their driver. One that passed
    is recorded on the host, and is not made again.
  - Only instances that run are proved for; where nothing runs, the start itself is the proof, and nobody is hurt by it.
options:
  state:
    description:
      - V(started) starts the proofs that are due, one for all instances that it holds for.
      - V(ended) takes all of them away and records those that passed.
    type: str
    choices: [started, ended]
    required: true
  wanted:
    description: Instances that are about to be restarted, as the filter P(gpufleet.llm.vllm_wanted#filter) gives them.
    type: list
    elements: dict
    default: []
  beside:
    description:
      - Whether they run still. Then a proof whose GPUs have no memory left for it is not started, and the instance is named in RV(deferred).
      - Where not, they have been stopped for it.
    type: bool
    default: true
  passed:
    description: For V(ended). Proofs that answered, with C(name) and C(seconds), as M(gpufleet.llm.completion_gate) tells them.
    type: list
    elements: dict
    default: []
  proofs:
    description: For V(ended). What V(started) returned.
    type: dict
    default: {}
  release:
    description: Directory of the release that the instances run.
    type: path
  sandbox:
    description: The files that make the unit of an instance, a list for each runtime (C(systemd), C(docker)).
    type: dict
    default: {}
  gpus:
    description: The GPUs of the host, as M(gpufleet.llm.host_facts) tells them.
    type: list
    elements: dict
    default: []
  config_path:
    description: Directory of the instances, as M(gpufleet.llm.vllm_generation) takes it.
    type: path
    default: /etc/vllm
  proofs_path:
    description: Directory of the records and of the tiny models.
    type: path
    default: /opt/vllm/proofs
  container_unit:
    description: The unit of instances in containers, a file on the host.
    type: path
attributes:
  check_mode:
    description: Starts nothing.
    support: full
"""

EXAMPLES = r"""
- name: What is due is started
  gpufleet.llm.vllm_start_proof:
    state: started
    instances: "{{ generations }}"
    release: /opt/vllm/releases/0.33.0-0123456789ab
  register: proof

- name: It answers
  gpufleet.llm.completion_gate:
    instances: "{{ proof.gates }}"
    api_key: "{{ vllm_internal_key }}"
    timeout: 120
  register: gate

- name: It is gone
  gpufleet.llm.vllm_start_proof:
    state: ended
    passed: "{{ gate.passed }}"
    proofs: "{{ proof.proofs }}"
"""

RETURN = r"""
gates:
  description: How to ask the proofs that were started, for M(gpufleet.llm.completion_gate).
  returned: when state is started
  type: list
  elements: dict
proofs:
  description: Name of a proof to the name of its record, which tells what it holds for.
  returned: when state is started
  type: dict
deferred:
  description: Instances whose GPUs have no memory left for a proof beside what runs.
  returned: when state is started
  type: list
  elements: str
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import generations_host, start_proof, start_proof_host
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.start_proof_host import ProofInstance
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import CACHE_PATH
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container_host import ContainerError

# Records are small, and what is older than so many others is about releases that are long gone.
RECORDS = 50


def proof_key(module: AnsibleModule, wanted: dict[str, Any]) -> str:
    """What a proof for this instance holds for."""
    runtime = wanted.get("runtime", "systemd")
    runs = wanted["container"]["image"] if runtime == "docker" else module.params["release"]
    gpus = [(gpu["name"], gpu["driver"]) for gpu in module.params["gpus"] if gpu["index"] in wanted["gpus"]]
    return start_proof.key(
        wanted, str(runs), generations_host.fingerprint(module.params["sandbox"].get(runtime) or []), gpus
    )


def due(module: AnsibleModule) -> dict[str, list[dict[str, Any]]]:
    """What has to be proved, by its key, and the instances that it would hold for."""
    found: dict[str, list[dict[str, Any]]] = {}
    for wanted in module.params["wanted"]:
        if not start_proof.provable(wanted):
            continue
        if module.params["beside"] and generations_host.Deployed(module, wanted["name"]).running() is None:
            continue
        found.setdefault(proof_key(module, wanted), []).append(wanted)
    return {key: instances for key, instances in found.items() if not record(module, key).exists()}


def record(module: AnsibleModule, key: str) -> Path:
    """The file that says what passed."""
    return Path(module.params["proofs_path"]) / f"{key}.json"


def start(module: AnsibleModule, wanted: dict[str, Any], memory: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """Start one proof, and say how to ask it."""
    heads, layers = start_proof.shape(wanted["config"])
    model = start_proof_host.put_model(
        Path(module.params["proofs_path"]) / f"model-{heads}-{layers}", start_proof.model_files(heads, layers)
    )
    whole = [memory[gpu][1] for gpu in wanted["gpus"] if gpu in memory]
    share = round(start_proof.NEEDED_MIB / min(whole), 4) if whole else None
    proof = start_proof.instance(wanted, str(model), start_proof_host.free_port(), share)
    sandbox = generations_host.fingerprints(module.params["sandbox"])
    content = generations_host.wanted_content(proof, sandbox, module.params["release"])
    one = ProofInstance(module, proof["name"])
    unit = read(module.params["container_unit"] or "/nonexistent") if "container" in proof else ""
    one.prepare(content, start_proof.drop_in(f"{CACHE_PATH}/{wanted['name']}"), unit)
    status, complaint = one.start()
    if status:
        module.fail_json(msg=f"{one.instance.unit} cannot be started: {complaint}")
    return dict(proof["gate"])


def started(module: AnsibleModule) -> dict[str, Any]:
    """Start what is due and finds room."""
    start_proof_host.remove_left(module)
    candidates = due(module)
    with_gpus = any(entry["gpus"] for instances in candidates.values() for entry in instances)
    memory = start_proof_host.gpu_memory(module) if with_gpus else {}
    chosen: dict[str, Any] = {key: instances[0] for key, instances in candidates.items()}
    deferred: list[str] = []
    if module.params["beside"]:
        chosen, deferred = start_proof.choose(candidates, {gpu: free for gpu, (free, _whole) in memory.items()})
    gates = [start(module, entry, memory) for entry in chosen.values()]
    return {
        "changed": bool(gates),
        "gates": gates,
        "proofs": {start_proof.proof_name(entry["name"]): key for key, entry in chosen.items()},
        "deferred": deferred,
    }


def ended(module: AnsibleModule) -> dict[str, Any]:
    """Take the proofs away and write down which of them passed."""
    start_proof_host.remove_left(module)
    for passed in module.params["passed"]:
        if key := module.params["proofs"].get(passed["name"]):
            text = {"seconds": passed["seconds"], "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            write(record(module, key), json.dumps(text) + "\n", 0o644)
    records = sorted(Path(module.params["proofs_path"]).glob("*.json"), key=lambda path: path.stat().st_mtime)
    for old in records[:-RECORDS]:
        old.unlink()
    return {"changed": True}


STATES = {"started": started, "ended": ended}
ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": list(STATES), "required": True},
    "wanted": {"type": "list", "elements": "dict", "default": []},
    "beside": {"type": "bool", "default": True},
    "passed": {"type": "list", "elements": "dict", "default": [], "no_log": False},
    "proofs": {"type": "dict", "default": {}},
    "release": {"type": "path"},
    "sandbox": {"type": "dict", "default": {}},
    "gpus": {"type": "list", "elements": "dict", "default": []},
    "config_path": {"type": "path", "default": "/etc/vllm"},
    "proofs_path": {"type": "path", "default": "/opt/vllm/proofs"},
    "container_unit": {"type": "path"},
}
RULES: dict[str, Any] = {"required_if": [("state", "started", ["release"])]}


def main() -> None:
    """Do what the state asks for."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, **RULES, supports_check_mode=True)
    if module.check_mode:
        module.exit_json(changed=False, gates=[], proofs={}, deferred=[])
    try:
        module.exit_json(**STATES[module.params["state"]](module))
    except ContainerError as error:
        start_proof_host.remove_left(module)
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
