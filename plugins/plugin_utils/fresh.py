# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""A connection that shares nothing with the one of the task, as the proof that a host can still be reached."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import connection_loader

# Of several values, ssh takes the first: these come before what ansible.cfg or the inventory say.
ALONE = "-o ControlMaster=no -o ControlPath=none"


def fresh(action: ActionBase, timeout: int, arguments: str = "", extra: str = "", **changed: Any) -> Any:
    """The connection of an action's task once more, with the same settings.

    By SSH: not through the control socket, with one attempt of `timeout` seconds, with `arguments` that win over those of the inventory, `extra`
    ones after them, and `changed` options of the connection plugin. Other connection plugins are used as they are.
    """
    own = action._connection
    options = dict(own.get_options())
    if own.transport == "ssh":
        options.update(
            ssh_args=" ".join(filter(None, [ALONE, arguments, options.get("ssh_args")])),
            ssh_extra_args=" ".join(filter(None, [options.get("ssh_extra_args"), extra])),
            timeout=timeout,
            reconnection_retries=0,
            verbosity=0,
            **changed,
        )
    connection = connection_loader.get(own.ansible_name, action._play_context.copy())
    connection.set_options(direct=options)
    return connection


def reason(failure: AnsibleError) -> str:
    """What ssh said, on one line and without what only Ansible adds."""
    return " ".join(str(failure).split()).removeprefix("Failed to connect to the host via ssh: ")
