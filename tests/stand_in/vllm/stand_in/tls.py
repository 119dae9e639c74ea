"""TLS as the options of vLLM ask for it, and certificates that are taken up while it runs.

With --enable-ssl-refresh the real one watches the files themselves: what is written into them is taken up each time; of files that are put in their
place it sees the first one only.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

# The real one needs up to two seconds, too.
LOOK_SECONDS = 0.5


def context(options: Mapping[str, Any]) -> ssl.SSLContext | None:
    """As uvicorn makes it; nothing where no certificate is named."""
    if not (options.get("ssl-certfile") and options.get("ssl-keyfile")):
        return None
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(options["ssl-certfile"], options["ssl-keyfile"])
    made.verify_mode = ssl.VerifyMode(int(options.get("ssl-cert-reqs") or 0))
    if options.get("ssl-ca-certs"):
        made.load_verify_locations(options["ssl-ca-certs"])
    return made


async def refresh(made: ssl.SSLContext, options: Mapping[str, Any]) -> None:
    """Take up what changes, for ever."""
    chain = options["ssl-certfile"], options["ssl-keyfile"]
    watched = [os.open(path, os.O_RDONLY) for path in (*chain, options["ssl-ca-certs"])]

    def stamps() -> list[object]:
        return [(found.st_mtime_ns, found.st_nlink) for found in map(os.fstat, watched)]

    seen = stamps()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if (now := stamps()) != seen:
            seen = now
            print("INFO [ssl.py] Reloading SSL certificate chain", file=sys.stderr, flush=True)
            with suppress(OSError):
                made.load_cert_chain(*chain)
                made.load_verify_locations(options["ssl-ca-certs"])
