# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The module of this name is run quickly."""

from __future__ import annotations

from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickAction as ActionModule

__all__ = ["ActionModule"]
