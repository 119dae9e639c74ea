# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What all modules take that ask an endpoint; module_utils/endpoint.py has it as arguments."""

from __future__ import annotations


class ModuleDocFragment:
    """Options that endpoint_ask, endpoint_keys and endpoint_verify have in common."""

    DOCUMENTATION = r"""
options:
  url:
    description:
      - Scheme, host name and port of the endpoint, such as V(https://llm.example.com:8443).
      - The name has to be in the certificate.
    type: str
    required: true
  connect_address:
    description: Address to connect to instead of the one that the name in O(url) resolves to, like C(curl --resolve).
    type: str
  ca_file:
    description: File with the certificate authorities to trust. Without this and O(ca_pem), those of the system.
    type: path
  ca_pem:
    description: The certificate authorities to trust, in PEM form.
    type: str
  certificate_file:
    description: File with a certificate of a client and its key, both PEM, for a gateway that asks for one.
    type: path
"""
