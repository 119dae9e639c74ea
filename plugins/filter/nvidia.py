# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters for the roles nvidia_driver and cuda_toolkit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import nvidia_apt


def nvidia_preferences(source: str, shut_out: Sequence[str] | None = None, version: str = "") -> str:
    """apt's preferences that keep the driver's packages of all sources but one away, or of those that are named."""
    return nvidia_apt.preferences(source, nvidia_apt.APT_ORIGINS if shut_out is None else shut_out, version)


def nvidia_fitting(shown: str, names: Sequence[str], version: str, required: Sequence[str] = ()) -> list[str]:
    """Those of the packages that a source has for a version of the driver."""
    return nvidia_apt.fitting(shown, names, version, required)


def nvidia_repository(facts: Mapping[str, Any], mirror: str = "") -> dict[str, str]:
    """NVIDIA's repository for the release and the CPU of a host, as NVIDIA spells both, or a mirror of it."""
    release = f"{facts['distribution'].lower()}{facts['release'].replace('.', '')}"
    cpu = {"aarch64": "sbsa"}.get(facts["architecture"], "x86_64")
    url = (mirror or f"https://developer.download.nvidia.com/compute/cuda/repos/{release}/{cpu}").rstrip("/")
    return {
        "place": f"{release}/{cpu}",
        "url": url,
        # The file that the package with the key brings. It is ours then, so that there is one source only, also with a mirror.
        "path": f"/etc/apt/sources.list.d/cuda-{release}-{cpu}.list",
        "content": f"deb [signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] {url}/ /\n",
    }


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        functions = (nvidia_preferences, nvidia_fitting, nvidia_repository)
        return {function.__name__: function for function in functions}
