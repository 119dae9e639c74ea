# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters for the role ssh_hardening."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.ssh import parse_key

# Blanks, quotes and # would end a word of sshd_config.
PATTERN = re.compile(r"!?[\w.*?@:/\[\]$%+\\-]+")
# Those of a directory are also called jdoe@corp.example and CORP\\jdoe.
USER = re.compile(r"[a-z0-9_][a-z0-9_.@\\-]*\$?", re.IGNORECASE)


def ssh_pattern_problems(patterns: Sequence[Any], variable: str) -> list[str]:
    """What is wrong with a list of users or groups as sshd_config takes them; `variable` is where it stands."""
    return [
        f"{variable} has {pattern!r}; it takes one name or pattern for each entry, without blanks, for example fleet or admin-*"
        for pattern in patterns
        if not isinstance(pattern, str) or not PATTERN.fullmatch(pattern)
    ]


def ssh_key_problems(entries: Sequence[Any]) -> list[str]:
    """What is wrong with `ssh_hardening_authorized_keys`. Never shows what may be a private key."""
    problems = []
    users = [entry.get("user") for entry in entries if isinstance(entry, Mapping)]
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("keys"), list):
            continue  # the argument spec tells
        user, where = entry.get("user"), f"ssh_hardening_authorized_keys[{number}] ({entry.get('user')})"
        if not isinstance(user, str) or not USER.fullmatch(user):
            problems.append(f"{where}: user must be the name of a user on the host")
        if not entry["keys"]:
            problems.append(f"{where}: keys is empty; list at least one public key, as in the file id_ed25519.pub")
        for place, key in enumerate(entry["keys"]):
            if "PRIVATE KEY" in str(key):
                problems.append(
                    f"{where}: keys[{place}] is a private key; it belongs to nobody but its owner. Give the one in the .pub file"
                )
            elif not isinstance(key, str) or "\n" in key.strip() or not parse_key(key):
                problems.append(
                    f"{where}: keys[{place}] is no public key; it is one line such as `ssh-ed25519 AAAA... alice@laptop`"
                )
    problems += [
        f"ssh_hardening_authorized_keys names {user} twice; put all keys of a user in one entry"
        for user in sorted({str(user) for user in users if users.count(user) > 1})
    ]
    return problems


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"ssh_pattern_problems": ssh_pattern_problems, "ssh_key_problems": ssh_key_problems}
