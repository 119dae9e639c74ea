# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The clock of a host: whether something keeps it right, and whom it was set by before chrony."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read

# What a distribution asks of itself. chrony does so as well.
DISTRIBUTIONS = re.compile(r".*\.pool\.ntp\.org|ntp\.ubuntu\.com|(.*\.)?(debian|ubuntu)\.(org|com)")
SERVER = re.compile(r"[A-Za-z0-9.:-]+")
# struct timex of Linux is 208 bytes long where a word has eight; its first word asks for no change.
TIMEX_BYTES = 208
NOT_SYNCHRONISED = 5  # TIME_ERROR


def synchronised() -> bool:
    """Whether the kernel believes that somebody keeps its clock right. What cannot be asked is believed."""
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))) != NOT_SYNCHRONISED
    except (OSError, AttributeError):
        return True


def time_servers(root: Path = Path("/")) -> list[str]:
    """Time servers that somebody chose for this host, in the order of those who ask them: timesyncd, ntpd, and the network (DHCP)."""
    words: list[str] = []
    drop_ins = [
        path
        for place in ("usr/lib", "run", "etc")
        for path in (root / place / "systemd/timesyncd.conf.d").glob("*.conf")
    ]
    for path in [root / "etc/systemd/timesyncd.conf", *sorted(drop_ins, key=lambda path: path.name)]:
        for line in read(path).splitlines():
            name, equals, value = line.strip().partition("=")
            if equals and name.strip() == "NTP":  # an empty one takes back what was said before
                words = [*words, *value.split()] if value.strip() else []
    for name in ("etc/ntp.conf", "etc/ntpsec/ntp.conf"):
        lines = [line.split() for line in read(root / name).splitlines()]
        words += [line[1] for line in lines if len(line) > 1 and line[0] in ("server", "pool", "peer")]
    for path in sorted((root / "run/systemd/netif/links").glob("*")):
        found = re.search(r"^NTP=(.+)$", read(path), re.MULTILINE)
        words += found[1].split() if found else []
    return [word for word in dict.fromkeys(words) if SERVER.fullmatch(word) and not DISTRIBUTIONS.fullmatch(word)]
