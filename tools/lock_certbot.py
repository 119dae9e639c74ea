"""Locks certbot and the plugins for DNS that come with the role tls_certificate: make lock-certbot

Each plugin has a lock of what it needs beyond certbot's own lock, at the same versions, so that the two together are one environment.
With names of packages behind it, it prints the lock of a plugin that does not come with the role, for tls_certificate_acme_dns_requirements:

    tools/lock_certbot.py certbot-dns-example
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parents[1] / "roles/tls_certificate/files/locks"
CERTBOT = LOCKS / "certbot.txt"
# ARI came with 4.1, certificates for addresses with 5.3.
OLDEST = "certbot>=5.3"
PLUGINS = ("cloudflare", "digitalocean", "google", "ovh", "rfc2136", "route53")
# A requirement with its hashes and the comments below it
ENTRY = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(?:.*\n)(?:[ \t].*\n)*", re.MULTILINE)


def resolve(wanted: list[str], *options: str) -> str:
    """What uv resolves for all systems, with hashes."""
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run(
        [uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-annotate", "--no-header", "--python-version", "3.11", *options, "-"],
        input="\n".join(wanted), text=True, capture_output=True, check=False, env={**os.environ, "UV_SYSTEM_CERTS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return "".join(match[0] for match in ENTRY.finditer(done.stdout))


def beyond(base: str, wanted: list[str]) -> str:
    """The lock of packages, without what the base has already."""
    there = {match[1] for match in ENTRY.finditer(base)}
    found = resolve([OLDEST, *wanted], "--constraints", str(CERTBOT))
    return "".join(match[0] for match in ENTRY.finditer(found) if match[1] not in there)


def main() -> None:
    """Print the lock of the packages that are named, or write all of the role's."""
    if len(sys.argv) > 1:
        print(beyond(CERTBOT.read_text(), sys.argv[1:]), end="")
        return
    head = "# {}, made by tools/lock_certbot.py (make lock-certbot). Do not edit.\n"
    LOCKS.mkdir(exist_ok=True)
    base = resolve([OLDEST])
    CERTBOT.write_text(head.format("certbot") + base)
    for plugin in PLUGINS:
        package = f"certbot-dns-{plugin}"
        (LOCKS / f"{package}.txt").write_text(head.format(f"{package} beyond certbot.txt") + beyond(base, [package]))


if __name__ == "__main__":
    main()
