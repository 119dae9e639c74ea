# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the controller's ssh knows of a host, from what `ssh -G` and `ssh-keygen -F` print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ansible_collections.gpufleet.llm.plugins.module_utils.ssh import parse_key

# What another attempt would not change. Attempts that fail count against the controller's address (PerSourcePenalties).
FINAL = re.compile(
    r"Permission denied|Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|Unable to negotiate|no matching|Too many auth"
    r"|Could not resolve|Bad configuration option|invalid format|Invalid key length"
)


@dataclass(frozen=True)
class Settings:
    """The part of ssh's configuration for a host that says whom it trusts."""

    host: str = ""
    port: int = 22
    strict: str = "ask"
    known_hosts: list[str] = field(default_factory=list)
    other_sources: bool = False  # a program or the DNS says which keys are right

    @property
    def names(self) -> list[str]:
        """How the host is called in known_hosts. ssh takes an entry without a port for other ports, too."""
        return [self.host] if self.port == 22 else [f"[{self.host}]:{self.port}", self.host]


def parse_settings(text: str) -> Settings:
    """The output of `ssh -G`."""
    values = dict(line.partition(" ")[::2] for line in text.splitlines())
    files = [*shlex.split(values.get("userknownhostsfile", "")), *shlex.split(values.get("globalknownhostsfile", ""))]
    return Settings(
        host=values.get("hostkeyalias") or values.get("hostname", ""),
        port=int(values.get("port", "22")),
        strict=values.get("stricthostkeychecking", "ask"),
        known_hosts=[file for file in files if file not in ("none", "/dev/null")],
        other_sources=values.get("knownhostscommand", "none") != "none"
        or values.get("verifyhostkeydns", "false") not in ("no", "false"),
    )


def parse_known(text: str) -> list[str]:
    """The keys that `ssh-keygen -F` found, as type and base64; `@cert-authority` in front of one that only signs."""
    found = []
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        marker = line.split()[0] if line.startswith("@") else ""
        words = line.split()[2:] if marker else line.split()[1:]
        if (key := parse_key(" ".join(words))) and marker != "@revoked":
            found.append(f"{marker} {key.plain}".strip())
    return found


def problem(settings: Settings, offered: Sequence[str], known: Mapping[str, str]) -> str:
    """Why the controller would refuse the host when it shows these keys, or nothing."""
    if settings.strict in ("no", "false", "off", "accept-new") or settings.other_sources or not known:
        return ""
    if set(offered) & set(known) or any(key.startswith("@") for key in known):
        return ""
    kinds = ", ".join(sorted({key.split()[0] for key in known}))
    name, file = settings.names[0], next(iter(known.values()))
    line = next((key for key in offered if key.startswith("ssh-ed25519 ")), next(iter(offered), ""))
    return (
        f"The controller knows {settings.host} by a key of the type {kinds} only, which the host would not show any more, so Ansible would be "
        f"refused as if the host had been exchanged. Add this line to {file}, after comparing the key with the host's: `{name} {line}`; or set "
        "ssh_hardening_host_keys: compatible"
    )


def is_final(said: str) -> bool:
    """Whether trying again cannot help."""
    return FINAL.search(said) is not None


def explained(said: str, port: int) -> str:
    """What ssh said, and what it may mean."""
    hints = {
        r"timed out": f"does a firewall between here and the host close port {port}?",
        r"Permission denied": "the host does not accept the key that Ansible uses; is it among the authorised keys of this user, and long enough?",
        r"Unable to negotiate|no matching": "the controller's ssh is too old for these algorithms; ssh_hardening_key_exchange: compatible may help",
        r"Host key verification|IDENTIFICATION": "the controller does not know the key that the host shows now",
        r"refused": f"nobody listens there, or a firewall refuses port {port}",
    }
    hint = next((text for pattern, text in hints.items() if re.search(pattern, said)), "")
    return f"{said}; {hint}" if hint else said
