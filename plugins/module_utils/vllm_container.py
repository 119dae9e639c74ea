# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM instances in containers: the names of images, the compose file that a container is made from, and the engine that is asked to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import vllm_named_files
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_tls import CERTIFICATES, OPTION

# What makes a generation one that runs in a container.
COMPOSE = "compose.json"
SERVICE = "vllm"
LABEL = "gpufleet.instance"
IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")
# A name with the hash of what is meant. Source: github.com/distribution/reference, regexp.go.
BY_DIGEST = re.compile(r"[a-zA-Z0-9][\w.:/-]*@sha256:[0-9a-f]{64}")
BY_TAG = re.compile(r"[a-zA-Z0-9][\w.:/-]*")
PERCENT = re.compile(r"([1-9][0-9]?|100)%")
SIZE = re.compile(r"[1-9][0-9]*[mg]")
GIB = 1024**3
# As for the unit of the other runtime.
PIDS = 16384
CDI_KIND = "nvidia.com/gpu"
# What an image has to have is in docs/containers.md: sh and vllm on its PATH.
SERVE = "/run/vllm/serve"
# Where it finds what stands in front of vLLM, and the hashes of the keys that are taken: directories, since files in them are replaced.
LIBRARY = "/run/vllm/lib"
KEYS = "/run/vllm/keys"
# Where generations from before that read the key itself.
KEY = "/run/secrets/internal_key"


def image_problem(image: str, allow_tags: bool) -> str:
    """What is wrong with the name of an image, or nothing."""
    if not image:
        return "has no image; name one in vllm_image, by its digest (name@sha256:...)"
    if IMAGE_ID.fullmatch(image) or BY_DIGEST.fullmatch(image):
        return ""
    if not BY_TAG.fullmatch(image):
        return f"has the image {image!r}, which is no name of an image; write name@sha256:... or sha256:..."
    if allow_tags:
        return ""
    return (
        f"has the image {image}, whose tag may mean another image tomorrow; write {image}@sha256:... with the digest that "
        f"`docker buildx imagetools inspect {image}` tells, or set vllm_image_allow_tags"
    )


def size_problem(name: str, value: str) -> str:
    """What is wrong with an amount of memory, or nothing."""
    if SIZE.fullmatch(value) or (name == "vllm_container_memory" and PERCENT.fullmatch(value)):
        return ""
    share = ", or 90% of what the host has" if name == "vllm_container_memory" else ""
    return f"{name} is {value!r}; it must be a size such as 512m or 16g{share}"


def problems(generations: Sequence[Mapping[str, Any]], allow_tags: bool) -> list[str]:
    """Everything that is wrong with what the inventory says of containers, one sentence each."""
    found = []
    for instance in generations:
        container = instance.get("container")
        if not container:
            continue
        where = f"vllm_instances ({instance['name']})"
        if problem := image_problem(str(container["image"]), allow_tags):
            found.append(f"{where}: it {problem}")
        if container["publish"].startswith("["):
            found.append(
                f"{where}: its port cannot be published at {container['publish'].rsplit(':', 2)[0]}: networks of containers have IPv4 only; "
                "set vllm_bind_address to an IPv4 address of the host, or vllm_runtime: systemd"
            )
        found += [
            problem
            for name, key in (("vllm_container_memory", "memory"), ("vllm_container_shm_size", "shm_size"))
            if (problem := size_problem(name, str(container[key])))
        ]
    return list(dict.fromkeys(found))


def engine_problems(engine: Mapping[str, Any], with_gpus: bool) -> list[str]:
    """What the engine of a host lacks, from what findings() of Engine found."""
    if not engine["version"]:
        return [
            f"vllm_runtime is docker, but no Docker engine answers ({engine['complaint']}); run the role docker, or set fleet_docker: true"
        ]
    found = []
    if not engine["compose"]:
        found.append(
            "docker compose is not there; install its plugin (docker-compose-plugin, docker-compose-v2 or docker-compose)"
        )
    if with_gpus and not engine["cdi_directories"]:
        found.append(
            f"the Docker engine {engine['version']} does not read specifications of devices (CDI): it takes 26.1 or newer with features.cdi, as the "
            "role docker sets it up"
        )
    elif with_gpus and not engine["cdi"]:
        found.append(
            f"no specification in {' or '.join(engine['cdi_directories'])} says what {CDI_KIND} is; run the role nvidia_container_toolkit, "
            "or systemctl restart nvidia-cdi-refresh"
        )
    return found


def memory_bytes(memory: str) -> int:
    """Bytes of a size, or of a share of the host's memory in whole GiB, so that some pages more or less make no other container."""
    if share := PERCENT.fullmatch(memory):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(1, have * int(share[1]) // 100 // GIB) * GIB
    return int(memory[:-1]) * (GIB if memory.endswith("g") else 1024**2)


def mount(source: str, target: str = "", read_only: bool = True) -> dict[str, Any]:
    """A file or directory of the host in the container. One that may be written is made when it is missing; its unit gives it to vLLM's user."""
    return {
        "type": "bind",
        "source": source,
        "target": target or source,
        "read_only": read_only,
        # in the place of what is to be read, an empty directory would hide that it is missing
        "bind": {"create_host_path": not read_only},
    }


def inside(path: str, directory: str) -> bool:
    """Whether a path is a directory or below it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def seen(wanted: Mapping[str, Any], config: Mapping[str, Any], models_path: str) -> list[str]:
    """What the container has to see: the model store, and whatever else the configuration and the environment name."""
    used = [entry.value for entry in vllm_named_files.paths(config, wanted["environment"])]
    return list(dict.fromkeys([models_path, *(path for path in used if not inside(path, models_path))]))


def compose(
    wanted: Mapping[str, Any], config: Mapping[str, Any], owner: str, shared: Mapping[str, str], readers: str = ""
) -> dict[str, Any]:
    """The compose file of an instance in a container. Relative paths are files of its generation, beside it.

    `wanted` is an instance as generation() of vllm gives it, `config` its configuration with the very revisions of its models, `owner`
    the uid and gid that it runs as, `shared` where those of all instances are: `serve`, which starts vLLM, and the directories `library` and `keys`.
    `readers` is the gid of those who may read the key of the host's certificate, for an instance that speaks TLS.
    """
    container = wanted["container"]
    cache = container["cache"]
    service: dict[str, Any] = {
        "container_name": "${COMPOSE_PROJECT_NAME}",
        "image": container["image"],
        "pull_policy": "never",
        "labels": {LABEL: wanted["name"]},
        "entrypoint": ["/bin/sh", SERVE],
        "command": [],
        "user": owner,
        "working_dir": cache,
        # An engine whose default is NVIDIA's runtime would add all GPUs: those that are meant come by their specification.
        "environment": {"NVIDIA_VISIBLE_DEVICES": "void", "USER": "vllm"},
        "ports": [container["publish"]],
        "volumes": [
            mount("./config.yaml", "/run/vllm/config.yaml"),
            mount("./environment", "/run/vllm/environment"),
            mount(shared["serve"], SERVE),
            mount(shared["library"], LIBRARY),
            mount(shared["keys"], KEYS),
            *(mount(path) for path in seen(wanted, config, container["models_path"])),
            mount(cache, read_only=False),
        ],
        "read_only": True,
        # kernels are compiled and loaded there, too
        "tmpfs": ["/tmp:mode=1777,exec"],  # noqa: S108
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "ipc": "private",
        "shm_size": container["shm_size"],
        "pids_limit": PIDS,
        "mem_limit": memory_bytes(str(container["memory"])),
        "ulimits": {"core": 0},
        "healthcheck": {"disable": True},
        # systemd starts it, and says when it has been tried often enough
        "restart": "no",
        "stop_signal": "SIGTERM",
        "stop_grace_period": f"{container['stop_seconds']}s",
    }
    if OPTION in config:
        # the directory: what is in it may be put there anew
        service["volumes"].append(mount(str(CERTIFICATES)))
        service["group_add"] = [readers]
    if wanted["gpus"]:
        names = [f"{CDI_KIND}={index}" for index in wanted["gpus"]]
        device = {"driver": "cdi", "device_ids": names, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    if container.get("infiniband"):
        service["devices"] = ["/dev/infiniband:/dev/infiniband"]
        service["ulimits"]["memlock"] = -1
    return {"services": {SERVICE: escaped(service)}}


def escaped(node: Any, keep: str = "${COMPOSE_PROJECT_NAME}") -> Any:
    """Values as compose reads them: a dollar sign means a variable unless there are two."""
    if isinstance(node, dict):
        return {key: escaped(value, keep) for key, value in node.items()}
    if isinstance(node, list):
        return [escaped(value, keep) for value in node]
    return node.replace("$", "$$") if isinstance(node, str) and node != keep else node


def beside(path: str) -> str:
    """Where a shipped file is beside the compose file of another machine."""
    return f"files/{PurePosixPath(path).parent.name}/{PurePosixPath(path).name}"


def exported(compose_file: Mapping[str, Any], name: str, files: Sequence[str] = ()) -> dict[str, Any]:
    """The compose file for another machine: the same container under a name of its own, started by the engine alone. `files` are the paths of those
    that are shipped; they come with it.
    """
    service = compose_file["services"][SERVICE]
    moved = {path: f"./{beside(path)}" for path in files}
    moved.update({str(PurePosixPath(path).parent): f"./{PurePosixPath(beside(path)).parent}" for path in files})
    changed = {
        "container_name": name,
        "pull_policy": "missing",
        "restart": "unless-stopped",
        "volumes": [{**entry, "source": moved.get(entry["source"], entry["source"])} for entry in service["volumes"]],
    }
    return {"name": name, "services": {SERVICE: {**service, **changed}}}


def reads_key(compose_texts: Iterable[str]) -> bool:
    """Whether any container of these compose files reads the internal key itself."""
    return any(f'"{KEY}"' in text for text in compose_texts)


def image_of(compose_text: str) -> str:
    """The image that a compose file names."""
    return str(json.loads(compose_text)["services"][SERVICE]["image"])


def gpus_of(compose_text: str) -> list[int]:
    """The GPUs that a compose file gives to its container."""
    resources = json.loads(compose_text)["services"][SERVICE].get("deploy", {}).get("resources", {})
    devices = resources.get("reservations", {}).get("devices", [])
    return [int(name.partition("=")[2]) for device in devices for name in device["device_ids"]]
