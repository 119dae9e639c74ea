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

import gc
import importlib
import multiprocessing
from pathlib import Path

PLUGINS = Path(__file__).parents[1]


def preload() -> None:
    """Import all filters, and the modules that are run quickly, unless this is a worker."""
    if multiprocessing.parent_process() is None:
        # A module is run quickly when there is an action of its name; others are read by nobody here.
        for directory, kind in (("filter", "filter"), ("action", "modules")):
            for file in sorted((PLUGINS / directory).glob("*.py")):
                importlib.import_module(f"ansible_collections.gpufleet.llm.plugins.{kind}.{file.stem}")
        # What is there now, playbooks and roles too, stays until the end. A worker whose garbage collector looked at all of it would make a
        # copy of the memory that it shares with ansible-playbook.
        gc.freeze()
