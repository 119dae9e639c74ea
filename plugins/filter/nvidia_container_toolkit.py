# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters of the role nvidia_container_toolkit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import container_toolkit


def container_toolkit_plan(
    asked: Mapping[str, Any], installed: Mapping[str, str], available: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is to be installed, what stands in the way, and what is worth a word."""
    return container_toolkit.plan(asked, installed, available)


def container_toolkit_problems(asked: Mapping[str, Any], daemon_options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the variables of the role."""
    return container_toolkit.problems(asked, daemon_options)


def container_toolkit_host_problems(
    asked: Mapping[str, Any], look: Mapping[str, Any], installed: Mapping[str, str]
) -> list[str]:
    """What stands in the way on the host."""
    return container_toolkit.host_problems(asked, look, installed)


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        functions = (container_toolkit_plan, container_toolkit_problems, container_toolkit_host_problems)
        return {function.__name__: function for function in functions}
