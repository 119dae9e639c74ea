# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the module of the same name quickly."""

from __future__ import annotations

from ansible_collections.gpufleet.llm.plugins.plugin_utils.quick import QuickAction


class ActionModule(QuickAction):
    """See the module's documentation."""
