#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The Docker engine of a host: this is the part that runs there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: docker_engine
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Has a Docker engine take over its daemon.json without ending containers
description:
  - Knows what a running engine was told when it was started, and compares that with what its file has to say. So a restart that could not be done
    yet is still due in the next run.
  - Reloads where a reload is enough, restarts where nothing runs or where it is allowed, and says what is due otherwise.
  - Before a restart under running containers it has the engine take over C(live-restore), so that they outlive it.
  - An engine that does not start with a new file gets the one back that it was seen to run with.
  - Asks the engine through its socket, and only when the unit is active; otherwise the question would start it.
options:
  state:
    description:
      - V(looked) says what is there and what is due, and changes nothing but its own memory in C(/run/vllm-fleet).
      - V(applied) does what is due, if it may be done now.
    type: str
    choices: [looked, applied]
    default: looked
  options:
    description: What C(/etc/docker/daemon.json) holds, or will hold.
    type: dict
    default: {}
  restart:
    description: Whether the engine may be restarted while containers run.
    type: bool
    default: false
  replaced:
    description: Whether the file has just been replaced. Then it is read again even when it says what the engine was told before, because somebody
      may have had the engine read another one meanwhile.
    type: bool
    default: false
  apt:
    description: Options of M(gpufleet.llm.apt_source), which looks in the same call, as C(apt) of the result.
    type: dict
    default: {}
  host:
    description: Name of the host, for messages.
    type: str
    default: this host
attributes:
  check_mode:
    description: Says what would be done.
    support: full
"""

EXAMPLES = r"""
- name: The engine takes over its file
  gpufleet.llm.docker_engine:
    state: applied
    options: {live-restore: true, log-driver: local}
"""

RETURN = r"""
installed:
  description: Whether there is an engine.
  returned: always
  type: bool
active:
  description: Whether it runs.
  returned: always
  type: bool
enabled:
  description: Whether it starts with the host.
  returned: always
  type: bool
version:
  description: The version that runs, empty when none does.
  returned: always
  type: str
containers:
  description: Names of the containers that run.
  returned: always
  type: list
  elements: str
live_restore:
  description: Whether containers outlive the engine.
  returned: always
  type: bool
log_driver:
  description: What containers that are made now log with.
  returned: always
  type: str
swarm:
  description: Whether the host is in a swarm.
  returned: always
  type: bool
foreign_keys:
  description: Keys of a daemon.json that the role did not write, and that it would lose.
  returned: always
  type: list
  elements: str
flags:
  description: Options of the command line that C(daemon.json) would have as well, or that name another file. The engine does not start with both.
  returned: always
  type: list
  elements: str
flags_from:
  description: The files that have them.
  returned: always
  type: list
  elements: str
routes:
  description: Networks of IPv4 that the host has a route to, but for those of the engine.
  returned: always
  type: list
  elements: str
due:
  description: What is due, V(install), V(start), V(enable), V(reload) or V(restart), empty when nothing is.
  returned: always
  type: str
due_keys:
  description: The keys of the file that differ from what the engine runs with.
  returned: always
  type: list
  elements: str
due_reason:
  description: Why it is due.
  returned: always
  type: str
action:
  description: What was done, V(started), V(enabled), V(reloaded), V(restarted) or V(deferred), empty when nothing was due.
  returned: when state is applied
  type: str
reason:
  description: Why it was done.
  returned: when state is applied
  type: str
lost:
  description: Containers that ran before and do not run afterwards.
  returned: when state is applied
  type: list
  elements: str
apt:
  description: What M(gpufleet.llm.apt_source) returns.
  returned: when O(apt) is given
  type: dict
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.apt_host import Apt
from ansible_collections.gpufleet.llm.plugins.module_utils.docker_host import Engine, EngineError, decided
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands

ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["looked", "applied"], "default": "looked"},
    "options": {"type": "dict", "default": {}},
    "restart": {"type": "bool", "default": False},
    "replaced": {"type": "bool", "default": False},
    "apt": {"type": "dict", "default": {}},
    "host": {"type": "str", "default": "this host"},
}


def main() -> None:
    """Do what is asked for."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    given = module.params
    command = commands(module)
    engine = Engine(command)
    found: dict[str, Any] = {}
    try:
        if given["apt"]:
            found["apt"] = Apt(command).look(given["apt"])
        if given["state"] == "looked":
            found.update(engine.look(given["options"], remember=not module.check_mode))
        elif module.check_mode:
            look = engine.look(given["options"], remember=False)
            found.update(look, action=decided(look, given["restart"]), reason=look["due_reason"], lost=[])
        else:
            found.update(engine.apply(given["options"], given["restart"], given["replaced"]))
    except (EngineError, OSError) as error:
        module.fail_json(msg=f"Docker on {given['host']}: {error}")
    module.exit_json(changed=found.get("action", "") not in ("", "deferred"), **found)


if __name__ == "__main__":
    main()
