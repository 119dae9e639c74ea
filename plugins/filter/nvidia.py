# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters for the roles nvidia_driver and cuda_toolkit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import nvidia_plan


def nvidia_preferences(source: str, shut_out: Sequence[str] | None = None, version: str = "") -> str:
    """apt's preferences that keep the driver's packages of all sources but one away, or of those that are named."""
    return nvidia_plan.preferences(source, nvidia_plan.APT_ORIGINS if shut_out is None else shut_out, version)


def nvidia_fitting(shown: str, names: Sequence[str], version: str, required: Sequence[str] = ()) -> list[str]:
    """Those of the packages that a source has for a version of the driver."""
    return nvidia_plan.fitting(shown, names, version, required)


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"nvidia_preferences": nvidia_preferences, "nvidia_fitting": nvidia_fitting}
