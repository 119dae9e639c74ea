#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a certificate and its key are those that are wanted."""

from __future__ import annotations

DOCUMENTATION = r"""
module: certificate_pair
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Tells whether a certificate and its key are those that are wanted
description:
  - Looks at a certificate and a key of a directory in one call, by C(openssl) on the host, and changes nothing.
options:
  directory:
    description: Where the pair is, and C(ca.pem) of the authority.
    type: path
    required: true
  certificate_file:
    description: Name of the certificate in O(directory).
    type: str
    default: fullchain.pem
  key_file:
    description: Name of its key in O(directory).
    type: str
    default: privkey.pem
  certificate:
    description: The certificate has to be this one, PEM. The other conditions are not looked at then.
    type: str
    default: ""
  names:
    description: DNS names and IP addresses that the certificate has to be for, and no others.
    type: list
    elements: str
    default: []
  common_name:
    description: Common name that the certificate has to have, when one is given.
    type: str
    default: ""
  authority_name:
    description: Common name of the authority that has to have signed it. Not looked at when O(authority_files) has one that is there.
    type: str
    default: ""
  authority_files:
    description:
      - Certificates of authorities on the host. The first one that is there has to have signed the certificate, and to be C(ca.pem) of
        O(directory). Of a file with several certificates it is the first one that has to have signed.
    type: list
    elements: path
    default: []
  former:
    description:
      - What C(ca.pem) of O(directory) has to have behind the authority that is first of O(authority_files), PEM. Not looked at where that is
        C(ca.pem) itself.
    type: str
    default: ""
  days:
    description: Days that it has to be valid for from now on. No certificate outlives its authority, so as long as that is valid is enough.
    type: float
    default: 0
  life:
    description: Share of its whole life that has to be left.
    type: float
    default: 0
  pair:
    description: What the name of the directory that C(current) leads to has to begin with.
    type: str
    default: ""
attributes:
  check_mode:
    description: Changes nothing.
    support: full
"""

EXAMPLES = r"""
- name: The pair is looked at
  gpufleet.llm.certificate_pair:
    directory: /etc/ssl/vllm-fleet
    names: [llm.example.com, 192.0.2.10]
    authority_name: vLLM Fleet CA gw1
    days: 30
  register: __tls_certificate_pair
"""

RETURN = r"""
good:
  description: Whether the pair is as wanted.
  returned: always
  type: bool
reason:
  description: What is not as wanted, empty when all is.
  returned: always
  type: str
  sample: the certificate is for old.example.com
authority:
  description: C(ca.pem) of O(directory), PEM, empty when there is none.
  returned: always
  type: str
authority_file:
  description: The one of O(authority_files) that counts, empty when none is there.
  returned: always
  type: str
authority_wanted:
  description: What is in RV(authority_file), PEM, empty when none is there.
  returned: always
  type: str
authority_ends_soon:
  description:
    - Whether RV(authority_file), or else RV(authority), is there and valid for less than 1216 days. That is a third of the ten years that
      authorities are made for, and more than the 825 days that a certificate of theirs lives at most.
  returned: always
  type: bool
"""

import ipaddress
import os
import re
import shutil
import ssl
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

# An authority with fewer days left is renewed. See RETURN.
AUTHORITY_DAYS = 1216
DAY = 86400
PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
FIELDS = {
    "from": re.compile(r"^notBefore=(.+)$", re.MULTILINE),
    "until": re.compile(r"^notAfter=(.+)$", re.MULTILINE),
    "issuer": re.compile(r"^issuer=(?:\n .*)*?\n\s*commonName\s*= (.*)$", re.MULTILINE),
    "subject": re.compile(r"^subject=(?:\n .*)*?\n\s*commonName\s*= (.*)$", re.MULTILINE),
    "names": re.compile(r"Subject Alternative Name:.*\n\s*(.+)$", re.MULTILINE),
    "key": re.compile(r"(-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----)", re.DOTALL),
}


def plain(name: str) -> str:
    """A name or an address in one way of writing."""
    name = re.sub(r"^(DNS|IP Address):", "", name.strip()).lower()
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def described(text: str) -> dict[str, str]:
    """What openssl printed of a certificate."""
    return {field: match[1].strip() if (match := pattern.search(text)) else "" for field, pattern in FIELDS.items()}


def problem(
    found: dict[str, str],
    names: Sequence[str],
    authority: str | None,
    days: float,
    now: float,
    subject: str = "",
    life: float = 0,
) -> str:
    """What is wrong with a certificate, or nothing. Without an authority it does not matter who signed it."""
    wanted, there = {plain(name) for name in names}, {plain(name) for name in found["names"].split(",") if name}
    if wanted != there:
        return f"the certificate is for {', '.join(sorted(there)) or 'no name'}"
    if subject and found["subject"] != subject:
        return f"the certificate is that of {found['subject'] or 'nobody'}"
    if authority is not None and found["issuer"] != authority:
        return f"the certificate was signed by {found['issuer'] or 'nobody known'}"
    left = (ssl.cert_time_to_seconds(found["until"]) - now) / DAY
    if left <= days:
        return f"the certificate is valid for {left:.0f} days"
    whole = left + (now - ssl.cert_time_to_seconds(found["from"])) / DAY
    return "" if left > whole * life else f"the certificate is valid for {left:.1f} of its {whole:.0f} days"


def authority_of(module: AnsibleModule) -> Path | None:
    """The first of the authorities that is there."""
    there = [path for path in map(Path, module.params["authority_files"]) if path.exists()]
    return there[0] if there else None


def unsigned(module: AnsibleModule, authority: Path, certificate: Path) -> str:
    """Why a certificate is not one of an authority, or nothing."""
    beside = certificate.with_name("ca.pem")
    if not beside.exists():
        return "there is no ca.pem"
    known = authority.read_text()
    former = module.params["former"]
    if beside != authority and beside.read_text().split() != [*known.split(), *former.split()]:
        return f"ca.pem is not {authority}{' and the former authority' if former else ''}"
    with tempfile.NamedTemporaryFile("w") as signer:
        # the others are those of before, or those that stand above it
        signer.write(match[0] if (match := PEM.search(known)) else known)
        signer.flush()
        status, output, error = module.run_command(
            [
                "openssl",
                "verify",
                "-partial_chain",
                "-CAfile",
                signer.name,
                "-no-CApath",
                "-no-CAstore",
                str(certificate),
            ]
        )
    said = (error or output).strip().splitlines()
    return f"{authority} has not signed it ({said[-1] if said else status})" if status else ""


def days_left(module: AnsibleModule, certificate: Path | None) -> float | None:
    """For how many days a certificate is valid yet, nothing where that cannot be said."""
    if not certificate or not certificate.exists() or not shutil.which("openssl"):
        return None
    status, output, _error = module.run_command(["openssl", "x509", "-in", str(certificate), "-noout", "-enddate"])
    return None if status else (ssl.cert_time_to_seconds(described(output)["until"]) - time.time()) / DAY


def look(module: AnsibleModule) -> str:
    """What is wrong with the pair, or nothing."""
    given = module.params
    directory = Path(given["directory"])
    certificate, key = directory / given["certificate_file"], directory / given["key_file"]
    missing = [path.name for path in (certificate, key) if not path.exists()]
    if missing:
        return f"there is no {missing[0]}"
    if not shutil.which("openssl"):
        return "openssl is not installed"
    shown = [
        "openssl", "x509", "-in", str(certificate), "-noout", "-pubkey", "-startdate", "-enddate", "-issuer", "-subject",
        "-nameopt", "multiline,utf8,-esc_msb", "-ext", "subjectAltName",
    ]  # fmt: skip
    status, output, error = module.run_command(shown)
    if status:
        return f"{certificate.name} cannot be read: {error.strip()}"
    found = described(output)
    status, public, error = module.run_command(["openssl", "pkey", "-in", str(key), "-pubout"])
    if status:
        return f"{key.name} cannot be read: {error.strip()}"
    if found["key"] != public.strip():
        return "the key does not belong to the certificate"
    if given["certificate"]:
        same = certificate.read_text().strip() == given["certificate"].strip()
        return "" if same else "the certificate is another one"
    pair = (directory / "current").resolve().name
    if not pair.startswith(given["pair"]):
        return "the certificate was not ordered as it is wanted now"
    authority = authority_of(module)
    anybody = authority or not (given["authority_files"] or given["authority_name"])
    name = None if anybody else given["authority_name"]
    # one that was signed until the very end of its authority cannot become better
    days = min(given["days"], left - 1) if (left := days_left(module, authority)) is not None else given["days"]
    return problem(found, given["names"], name, days, time.time(), given["common_name"], given["life"]) or (
        unsigned(module, authority, certificate) if authority else ""
    )


ARGUMENTS: dict[str, Any] = {
    "directory": {"type": "path", "required": True},
    "certificate_file": {"type": "str", "default": "fullchain.pem"},
    "key_file": {"type": "str", "default": "privkey.pem"},
    "certificate": {"type": "str", "default": ""},
    "names": {"type": "list", "elements": "str", "default": []},
    "common_name": {"type": "str", "default": ""},
    "authority_name": {"type": "str", "default": ""},
    "authority_files": {"type": "list", "elements": "path", "default": []},
    "former": {"type": "str", "default": ""},
    "days": {"type": "float", "default": 0.0},
    "life": {"type": "float", "default": 0.0},
    "pair": {"type": "str", "default": ""},
}


def main() -> None:
    """Look, and tell."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    reason = look(module)
    authority, wanted = Path(module.params["directory"]) / "ca.pem", authority_of(module)
    left = days_left(module, wanted or authority)
    module.exit_json(
        changed=False,
        good=not reason,
        reason=reason,
        authority=authority.read_text() if authority.exists() else "",
        authority_file=str(wanted or ""),
        authority_wanted=wanted.read_text() if wanted else "",
        authority_ends_soon=left is not None and left < AUTHORITY_DAYS,
    )


if __name__ == "__main__":
    main()
