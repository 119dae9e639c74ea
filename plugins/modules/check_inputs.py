#!/usr/bin/python
"""The documentation of an action plugin, which does all the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: check_inputs
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Refuses variables of a role that cannot work, all of them at once
description:
  - To be used by a task of a role. Runs on the controller and changes nothing.
  - Compares the role's variables with the role's C(meta/argument_specs.yml), entries of lists and their keys included; names variables that
    look like a misspelt one of the role, and those that have a new name; then evaluates the given checks.
  - A check that needs a variable which has been told already, also through other variables, is not asked. Numbers and truths that came as text are
    compared as what the argument spec says that they are.
  - While the variable C(check_inputs_collect) is true, nothing fails and what is wrong is only returned. Outside of a role only the given
    checks are made. So a playbook finds the mistakes of many roles in one go, and fails once, with all of them.
  - Every sentence names the variable, what is wrong with it and what would be right. The values of options with C(no_log) are never told.
options:
  checks:
    description: What the argument spec cannot say. Each is evaluated by itself; a message is templated only when its check fails.
    type: list
    elements: dict
    default: []
    suboptions:
      that:
        description: Expressions that must be true, as for M(ansible.builtin.assert).
        type: list
        elements: str
      fail_msg:
        description: What to say when one of them is not.
        type: str
      problems:
        description: Instead of O(checks[].that), sentences of what is wrong; none when all is well.
        type: list
        elements: str
      when:
        description: Expressions that must be true for the check to be made.
        type: list
        elements: str
      warning:
        description: Whether what the check finds is shown as a warning and is no problem.
        type: bool
        default: false
attributes:
  check_mode:
    description: Does the same.
    support: full
"""

EXAMPLES = r"""
- name: preflight | The variables make sense
  gpufleet.llm.check_inputs:
    checks:
      - that: vllm_bind_address not in ['0.0.0.0', '::']
        fail_msg: vllm_bind_address is {{ vllm_bind_address }}; it must be one address of this host.
      - problems: "{{ gateway_clients | gpufleet.llm.gateway_client_problems }}"
        when: gateway_clients | length > 0
  register: __vllm_checked

# In a playbook, after the checks of several roles with check_inputs_collect, each registered as __ROLE_checked.
- name: Nothing is wrong with what the inventory asks
  gpufleet.llm.check_inputs:
    checks:
      - problems: "{{ query('vars', *query('varnames', '^__[a-z_]+_checked$')) | map(attribute='problems') | flatten }}"
"""

RETURN = r"""
problems:
  description: What is wrong, one sentence each. A task that does not collect fails when there is anything, so it returns none.
  returned: success
  type: list
  elements: str
"""
