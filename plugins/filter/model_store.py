# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters of the model_store role: they look at a list of models and at directories on the controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.gpufleet.llm.plugins.module_utils.model_store import (
    contents,
    header_problems,
    plan,
    problems,
    queries,
)


def model_store_contents(path: str) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a model on the controller."""
    found: dict[str, dict[str, Any]] = contents(Path(path))
    return found


def model_store_holders(
    hostvars: Mapping[str, Any], hosts: Sequence[str], directory: str, later: Mapping[str, Any] | None = None
) -> list[str]:
    """The hosts that have a revision: those that this run has looked at, then those of `later`, the result of a loop over hosts."""
    looked = [host for host in hosts if directory in _state(hostvars, host).get("present", [])]
    return looked + [
        result["item"] for result in (later or {}).get("results", []) if directory in (result.get("present") or [])
    ]


def model_store_lackers(hostvars: Mapping[str, Any], hosts: Sequence[str], directory: str) -> list[str]:
    """The hosts that want a revision and do not have it."""
    return [host for host in hosts if directory in _state(hostvars, host).get("absent", [])]


def model_store_unseen(hostvars: Mapping[str, Any], hosts: Sequence[str]) -> list[str]:
    """The hosts that share and that this run has not looked at yet: with `serial`, their turn comes later."""
    return [
        host
        for host in hosts
        if boolean(hostvars[host].get("model_store_share", False), strict=False) and not _state(hostvars, host)
    ]


def _state(hostvars: Mapping[str, Any], host: str) -> Mapping[str, Any]:
    """What the module model_store said about a host in this run."""
    found: Mapping[str, Any] = hostvars[host].get("__model_store_state") or {}
    return found


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            "model_store_problems": problems,
            "model_store_header_problems": header_problems,
            "model_store_plan": plan,
            "model_store_queries": queries,
            "model_store_contents": model_store_contents,
            "model_store_holders": model_store_holders,
            "model_store_lackers": model_store_lackers,
            "model_store_unseen": model_store_unseen,
        }
