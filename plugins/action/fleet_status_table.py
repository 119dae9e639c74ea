# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Shows what all hosts said to fleet_status: on the controller, once."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet_status, fleet_status_table, vllm_status

ARGUMENTS: dict[str, dict[str, Any]] = {
    "hosts": {"type": "list", "elements": "str", "required": True},
    "found": {"type": "str", "default": "status_found"},
    "compared": {"type": "str", "default": "status_compared"},
    "vllm_group": {"type": "str", "default": "vllm"},
    "gateway_group": {"type": "str", "default": "gateway"},
    "format": {"type": "str", "choices": ["table", "json"], "default": "table"},
    "file": {"type": "str", "default": ""},
    "width": {"type": "int", "default": fleet_status_table.WIDTH},
}


def command(playbook: str, arguments: str) -> str:
    """The command line of a playbook of this collection, or only what names the inventory of this run."""
    sources: Sequence[str] = context.CLIARGS.get("inventory") or ()
    inventory = "".join(f" -i {shlex.quote(inventory_of(source))}" for source in sources)
    if not playbook:
        return inventory
    name = "site.yml" if playbook == "site" else f"playbooks/{playbook}.yml"
    called = name if Path(name).is_file() else f"gpufleet.llm.{playbook}"
    return f"ansible-playbook {called}{inventory} {arguments}".rstrip()


def inventory_of(source: str) -> str:
    """An inventory as a person would name it. A list of hosts is told by its comma."""
    return source if "," in source else min(os.path.relpath(source), source, key=len)


def written(path: Path, text: str) -> None:
    """Replace a file by rename: whoever reads it sees the one before or this one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise AnsibleActionFail(f"status_file is {path}, which cannot be written: {error.strerror}") from None


class ActionModule(ActionBase):  # type: ignore[misc]
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Put together, judge, show."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, given = self.validate_argument_spec(ARGUMENTS)
        variables = task_vars or {}
        known: Mapping[str, Any] = variables["hostvars"]
        found, compared, inventory = {}, {}, {}
        groups = variables.get("groups") or {}
        for name in given["hosts"]:
            host = known[name]
            found[name] = host.get(given["found"]) or {}
            compared[name] = {
                one["name"]: vllm_status.inventory_says({**one, "held": ""})
                for one in host.get(given["compared"]) or []
            }
            roles = [role for role in ("vllm", "gateway") if name in groups.get(given[f"{role}_group"], [])]
            inventory[name] = {"roles": roles, "instances": self.wanted(host) if "vllm" in roles else []}
        now = time.time()
        document = fleet_status.judged(fleet_status.document(found, inventory, now, compared), now, command)
        if given["format"] == "json":
            text = json.dumps(document, ensure_ascii=True) + "\n"
            if given["file"]:
                written(Path(given["file"]).expanduser().absolute(), text)
            else:
                self._display.display(text.rstrip("\n"))
        if given["format"] == "table" or given["file"]:
            told = "\n".join(fleet_status_table.lines(document, now, given["width"]))
            self._display.display(f"\n{told}\n")
        return {
            **result,
            "changed": False,
            "well": document["well"],
            "problems": len(document["problems"]),
            "last_line": fleet_status_table.last_line(document),
        }

    @staticmethod
    def wanted(host: Mapping[str, Any]) -> list[str]:
        """Names of the instances that the inventory has for a host. What is wrong with it is the preflight's to say."""
        try:
            return [str(one["name"]) for one in host.get("vllm_instances") or []]
        except (AnsibleError, TypeError, KeyError):
            return []
