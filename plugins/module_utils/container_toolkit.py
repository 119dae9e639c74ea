# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""How containers get at the GPUs of a host: the specification that says what a GPU is made of (CDI), and whether it is right.

NVIDIA's own units write it when the driver is installed and when the host boots. What they do not see is a driver that was taken away and
another division of the GPUs (MIG), and where the driver is no module of the kernel's own directory they do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.dpkg import compare, is_version, newest, older

LEGACY_PACKAGES = ("nvidia-docker", "nvidia-docker2", "nvidia-container-runtime")
# The oldest engines that read the specification as it is written from 1.19 on (version 0.7.0).
ENGINES = {"docker-ce": "5:26.1", "docker.io": "26.1"}


def plan(
    asked: Mapping[str, Any], installed: Mapping[str, str], available: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is to be installed, what stands in the way, and what is worth a word. `asked` has host, packages, version and minimum."""
    packages = asked["packages"]
    planned: dict[str, Any] = {"problems": [], "install": [], "notes": [], "pending": False, "version": ""}
    wanted = asked["version"] if "-" in asked["version"] else f"{asked['version']}-1"
    there = {name: installed[name] for name in packages if name in installed}
    top = newest(there.values())
    target = top if top and older(wanted, top) else wanted
    planned["version"] = target
    if target != wanted:
        planned["notes"].append(
            f"NVIDIA's container toolkit on {asked['host']} is {top}, newer than nvidia_container_toolkit_version ({asked['version']}); it is kept"
        )
    if all(there.get(name) and compare(there[name], target) == 0 for name in packages):
        return planned
    planned["install"] = [f"{name}={target}" for name in packages]
    lacking = [name for name in packages if name in available and target not in available[name]["versions"]]
    if lacking:
        has = ", ".join(available[lacking[0]]["versions"]) or "none"
        planned["problems"].append(
            f"nvidia_container_toolkit_version is {asked['version']}, but the repository has no {lacking[0]} {target}, only {has}. The four packages "
            "have to be of one version"
        )
        planned["install"] = []
    planned["pending"] = any(name not in available for name in packages)
    return planned


def host_problems(asked: Mapping[str, Any], look: Mapping[str, Any], installed: Mapping[str, str]) -> list[str]:
    """What stands in the way on the host."""
    host, found = asked["host"], []
    if asked["without_gpu"] == "refuse" and not look["gpus"] and not look["pci_gpus"]:
        found.append(
            f"{host} has no GPU of NVIDIA's ({look['driver_problem']}, and none on the PCI bus), so the container toolkit is of no use there. Take the "
            "host out of the play, or set nvidia_container_toolkit_without_gpu to skip (nothing is done there) or install"
        )
    if legacy := [name for name in LEGACY_PACKAGES if name in installed]:
        found.append(
            f"{host} has {', '.join(legacy)}: old packages that give containers their GPUs by a hook, and such containers lose them at the next "
            f"`systemctl daemon-reload`. Drain the host and run `apt-get remove {' '.join(legacy)}` on it"
        )
    found += [
        f"{path} of {host} is the hook by which containers got GPUs before CDI, and they lose them again at the next `systemctl daemon-reload`; remove it"
        for path in look["legacy_hooks"]
    ]
    found += [
        f"{path} of {host} is another specification of the same GPUs, which nobody refreshes; remove it (nvidia-cdi-refresh writes "
        "/run/cdi/nvidia.yaml at every boot)"
        for path in look["other_specs"]
    ]
    found += [
        f"{host} has {name} {installed[name]}, which does not read the specification of GPUs as the toolkit writes it since 1.19 (version 0.7.0); "
        f"{floor} or newer does: the role docker brings one"
        for name, floor in ENGINES.items()
        if name in installed and older(installed[name], floor)
    ]
    found += [
        f"{path} of {host} names the repository that this role writes a file for; take its entry out, other entries may stay"
        for path in look.get("apt", {}).get("mixed", [])
    ]
    return found


def problems(asked: Mapping[str, Any], daemon_options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the variables."""
    found = []
    for name in ("version", "minimum"):
        if not is_version(asked[name]):
            found.append(
                f"nvidia_container_toolkit_{'minimum_' if name == 'minimum' else ''}version is {asked[name]!r}; it is a version such as 1.20.0"
            )
    if not found and older(asked["version"], asked["minimum"]):
        found.append(
            f"nvidia_container_toolkit_version is {asked['version']}, and {asked['minimum']} is the oldest without a known way out of a container; take "
            "that or a newer one. nvidia_container_toolkit_minimum_version overrides this"
        )
    runtimes = [name for name in daemon_options.get("runtimes", {}) if name == "nvidia"]
    if runtimes or daemon_options.get("default-runtime") == "nvidia":
        found.append(
            "docker_daemon_options has the runtime nvidia; containers get their GPUs by CDI (`docker run --device nvidia.com/gpu=all`), which needs no "
            "runtime. Leave it out"
        )
    return found
