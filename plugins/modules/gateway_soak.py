#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the gateway on this host has counted of each backend."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gateway_soak
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Tells what a gateway has counted of each of its backends
description:
  - Reads the metrics of the gateway on this host and returns, of each backend, how its requests ended and when its answers began.
  - Two looks with some time in between say what happened meanwhile. The filter P(gpufleet.llm.turn_soak#filter) compares them.
  - A gateway that does not answer is no error. It says so, and has counted nothing.
options:
  socket:
    description: Where the gateway answers who is on its host.
    type: path
    default: /run/vllm-gateway/admin.sock
attributes:
  check_mode:
    description: Does the same, it only reads.
    support: full
"""

EXAMPLES = r"""
- name: What the gateway has counted so far is known
  gpufleet.llm.gateway_soak:
  delegate_to: gateway-1
  register: before
"""

RETURN = r"""
backends:
  description:
    - Name of a backend to its C(outcomes), how many requests ended V(ok), with an V(error) or V(cut), and its C(first_token), the buckets of a histogram.
  returned: always
  type: dict
problem:
  description: Why the gateway says nothing; empty when it does.
  returned: always
  type: str
"""

import http.client
import os
import socket
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import soak

ARGUMENTS: dict[str, Any] = {"socket": {"type": "path", "default": "/run/vllm-gateway/admin.sock"}}
SECONDS = 10.0


def scrape(path: str) -> str:
    """The metrics of the gateway. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection("admin", timeout=SECONDS)
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(SECONDS)
        link.connect(path)
        connection.sock = link
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    if response.status != http.client.OK:
        raise OSError(f"it answers HTTP {response.status}")
    return text


def main() -> None:
    """Tell what it has counted."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    try:
        backends = soak.read(scrape(module.params["socket"]))
    except (OSError, http.client.HTTPException) as error:
        problem = getattr(error, "strerror", "") or str(error) or type(error).__name__
        module.exit_json(
            changed=False, backends={}, problem=f"no gateway answers at {module.params['socket']}: {problem}"
        )
    module.exit_json(changed=False, backends=backends, problem="")


if __name__ == "__main__":
    main()
