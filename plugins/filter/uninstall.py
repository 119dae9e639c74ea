# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What playbooks/uninstall.yml takes away, what it refuses, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import uninstall


def uninstall_problems(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], roles: Iterable[str], asked: Mapping[str, Any]
) -> list[str]:
    """What is wrong with what was asked for."""
    return uninstall.problems(hostvars, hosts, roles, asked)


def uninstall_plan(table: Mapping[str, Any], asked: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """What goes from a host, what stays, and what the inventory would bring back."""
    return uninstall.plan(table, asked, hosts)


def uninstall_host_problems(planned: Mapping[str, Any], host: str) -> list[str]:
    """Roles that stay on a host and cannot do without one that would go."""
    return uninstall.host_problems(host, planned)


def uninstall_report(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], asked: Mapping[str, Any]
) -> list[str]:
    """What went, what is left and why, and what comes next."""
    return uninstall.report(hostvars, hosts, asked)


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        functions = (uninstall_problems, uninstall_plan, uninstall_host_problems, uninstall_report)
        return {function.__name__: function for function in functions}
