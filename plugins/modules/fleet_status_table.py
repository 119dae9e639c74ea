#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Documentation only: the action plugin of the same name does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_status_table
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Shows what the hosts said to fleet_status as one table
description:
  - Puts together what M(gpufleet.llm.fleet_status) found on all hosts, says what is not well with the one command for each, and prints it or writes
    it as JSON. With C(run_once) it runs for the whole fleet, and it never connects to a host.
  - It does not fail when something is not well. RV(well) says so, for a task after it.
options:
  hosts:
    description: Names of the hosts that belong to the fleet, those that did not answer included, in the order of the table.
    type: list
    elements: str
    required: true
  found:
    description: Name of the variable that has the result of M(gpufleet.llm.fleet_status) on each host.
    type: str
    default: status_found
  compared:
    description: Name of the variable that has C(vllm_status) of each host, as the role vllm sets it. A host without it is not compared.
    type: str
    default: status_compared
  vllm_group:
    description: Name of the group of hosts that run vLLM.
    type: str
    default: vllm
  gateway_group:
    description: Name of the group of gateways. One of them that has no configuration of a gateway is not well.
    type: str
    default: gateway
  format:
    description: V(table) is for people. V(json) is one line in the form that docs/status.md describes.
    type: str
    choices: [table, json]
    default: table
  file:
    description: Where to write the JSON on the controller, replaced at once; the table is printed then as well. Empty prints the line.
    type: str
    default: ""
  width:
    description: How many columns the table may have. What is longer is cut, and told in full below it where it matters.
    type: int
    default: 160
attributes:
  check_mode:
    description: It changes no host. It writes O(file) in check mode, too.
    support: full
"""

EXAMPLES = r"""
- name: The fleet is shown
  gpufleet.llm.fleet_status_table:
    hosts: "{{ ansible_play_hosts_all }}"
  run_once: true
  register: status_told
"""

RETURN = r"""
well:
  description: Whether there is no problem.
  returned: always
  type: bool
problems:
  description: How many there are.
  returned: always
  type: int
last_line:
  description: The same in words.
  returned: always
  type: str
  sample: 3 problems
"""
