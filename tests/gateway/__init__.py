"""The gateway as a process of its own on loopback.

Templates find this collection's filters only when Ansible's own finder is the first to import anything of a collection.
"""

from pathlib import Path

from ansible.plugins.loader import init_plugin_loader

init_plugin_loader([str(Path(__file__).resolve().parents[2] / ".collections")])
