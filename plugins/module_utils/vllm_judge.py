# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own judgement of a configuration, before anything stops: how the release or image that is to run it is asked, and what its answer means.

roles/vllm/files/judge.py is what runs there: as vLLM's user, in the sandbox of its unit, without a network, and without a trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.vllm import CACHES
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_spelling import render_config

# What stands in the unit of an instance and is no part of its sandbox, by how it begins.
LIFE = (
    "Type=", "User=", "Group=", "Exec", "Environment", "LoadCredential=", "WorkingDirectory=", "CacheDirectory", "RuntimeDirectory", "Kill",
    "Timeout", "Restart",
)  # fmt: skip
# On a host without a unit yet.
SANDBOX = ["NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes"]
# The program ends itself before that.
LONGEST_SECONDS = 960
# The Python that `vllm` of an image runs on stands in its first line.
IN_IMAGE = 'read -r line <"$(command -v vllm)"; case $line in "#!"*python*) ;; *) line="#!python3" ;; esac; exec ${line#"#!"} "$0"'
PROGRAM = "/run/vllm/judge.py"


def request(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What the program is asked. `config` is what the instance wishes, with the very revisions of its models."""
    environment = wanted["environment"]
    scratch = {name: f"/tmp/vllm{path}" for name, path in CACHES.items()}  # noqa: S108 - a private one, gone afterwards
    return {
        "environment": {**environment, **scratch},
        "cache": environment.get("VLLM_CACHE_ROOT", ""),
        "config": render_config(config),
        "wish": dict(config),
    }


def record_key(asked: Mapping[str, Any], holds_for: Sequence[Any]) -> str:
    """The name under which a host remembers what passed, made of everything that an answer depends on."""
    return hashlib.sha256(json.dumps([asked, holds_for], sort_keys=True).encode()).hexdigest()[:32]


def named_paths(value: Any) -> Iterator[str]:
    """What looks like an absolute path, anywhere in a configuration."""
    if isinstance(value, str) and value.startswith("/"):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from named_paths(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from named_paths(entry)


def sandbox(unit: str) -> list[str]:
    """The properties of a unit that say what it may."""
    lines = (line.strip() for line in unit.partition("[Service]")[2].partition("[Install]")[0].splitlines())
    found = [line for line in lines if "=" in line and not line.startswith(("#", *LIFE)) and "%i" not in line]
    return found or SANDBOX


def from_release(release: str, user: str, unit: str, program: str) -> list[str]:
    """The command for an instance that runs from a release, under the rules of its `unit`, a text."""
    properties = [
        *sandbox(unit),
        f"User={user}",
        "PrivateNetwork=yes",
        "WorkingDirectory=/tmp",
        f"RuntimeMaxSec={LONGEST_SECONDS}",
    ]
    options = [f"--property={line}" for line in properties]
    return ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", *options, f"{release}/bin/python", program]


def from_image(service: Mapping[str, Any], own_files: Sequence[str], program: str) -> list[str]:
    """The command for an instance in a container, of which `service` is the entry of its compose file. `own_files` are mounted for serving only."""
    mounts = [
        f"--mount=type=bind,source={volume['source'].replace('$$', '$')},target={volume['target'].replace('$$', '$')},readonly"
        for volume in service["volumes"]
        if volume["read_only"] and volume["source"].startswith("/") and volume["source"] not in own_files
    ]
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    devices = [f"--device={name}" for device in reserved for name in device["device_ids"]]
    environment = [f"--env={name}={value}" for name, value in service["environment"].items()]
    return [
        "docker", "run", "--rm", "--interactive", "--pull=never", "--network=none", "--read-only", f"--tmpfs={service['tmpfs'][0]}",
        f"--user={service['user']}", "--cap-drop=ALL", *(f"--security-opt={option}" for option in service["security_opt"]),
        f"--pids-limit={service['pids_limit']}", f"--shm-size={service['shm_size']}", "--workdir=/tmp", *environment, *mounts,
        f"--mount=type=bind,source={program},target={PROGRAM},readonly", *devices, "--entrypoint=/bin/sh", service["image"], "-c", IN_IMAGE, PROGRAM,
    ]  # fmt: skip


def understood(status: int, output: str, error: str) -> dict[str, Any]:
    """The answer of the program: its last line. Whatever else came is no judgement."""
    lines = output.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = (error.strip() or output.strip()).splitlines()
        return {"unjudged": f"{said[-1][-300:] if said else 'it said nothing'} (exit status {status})"}
    return dict(answer)


def refusals(judgements: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What vLLM refuses, one sentence for each instance."""
    return [
        f"vllm_instances ({name}): vLLM itself refuses this: {answer['refusal']}"
        for name, answer in judgements.items()
        if answer.get("refusal")
    ]


def unjudged_warnings(judgements: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What vLLM could not be asked about, one sentence for each instance."""
    return [
        f"vllm_instances ({name}): vLLM could not be asked whether it takes this: {answer['unjudged']}"
        for name, answer in judgements.items()
        if answer.get("unjudged")
    ]
