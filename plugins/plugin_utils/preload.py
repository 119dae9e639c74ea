# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""
Imports in ansible-playbook itself what its workers would import.

Each task of each host is a process of its own, which has what ansible-playbook had when it was forked. Ansible's loader of collections keeps
nothing that it compiled (core 2.19 to 2.21: _AnsibleCollectionPkgLoaderBase.get_code), and one filter makes it load all files of filters, so
without this every task that uses a filter spends 0.1 to 0.2 s on loading the same texts. A strategy loads the action plugin of a task before
it forks (action_loader.get(..., class_only=True)), which is when preload() is called.
"""

from __future__ import annotations

import importlib
import multiprocessing
from pathlib import Path

PLUGINS = Path(__file__).parents[1]


def preload() -> None:
    """Import all filters and modules, unless this is a worker."""
    if multiprocessing.parent_process() is None:
        for kind in ("filter", "modules"):
            for file in sorted((PLUGINS / kind).glob("*.py")):
                importlib.import_module(f"ansible_collections.gpufleet.llm.plugins.{kind}.{file.stem}")
