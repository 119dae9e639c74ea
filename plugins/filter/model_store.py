# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters of the model_store role: they look at a list of models and at directories on the controller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        }
