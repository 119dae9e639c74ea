"""Ports for servers that a test starts."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port that nobody listens on, and that no connection of a client gets by itself meanwhile: those begin at 32768 (ip_local_port_range)."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
