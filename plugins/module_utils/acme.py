# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a certificate authority by ACME."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

VARIABLE = "tls_certificate_acme_"
LETS_ENCRYPT = "letsencrypt.org"
# What Let's Encrypt calls those of its certificates that may be for addresses
SHORT = "shortlived"
PLUGIN = re.compile(r"[a-z0-9][a-z0-9-]*")
MAIL = re.compile(r"[^\s@]+@[^\s@]+")


def addresses(names: Sequence[str]) -> list[str]:
    """The IP addresses among names."""
    found = []
    for name in names:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            continue
        found.append(name)
    return found


def name_problems(names: Sequence[str], settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the names that the certificate is to be for."""
    numbers = addresses(names)
    if numbers and settings["dns_plugin"]:
        yield (
            f"tls_certificate_names has the address {numbers[0]}, which cannot be proved by DNS; leave the address out, or clear {VARIABLE}dns_plugin"
        )
    if LETS_ENCRYPT not in settings["directory"]:
        return
    for name in names:
        if name not in numbers and "." not in name:
            yield f"tls_certificate_names has {name}, and Let's Encrypt gives certificates for public names only, such as llm.example.com"
        if name in numbers and not ipaddress.ip_address(name).is_global:
            yield f"tls_certificate_names has {name}, and Let's Encrypt gives certificates for public addresses only"
    if numbers and settings["profile"] != SHORT:
        yield (
            f"tls_certificate_names has the address {numbers[0]}, for which Let's Encrypt gives certificates of six days only: "
            f"set {VARIABLE}profile to {SHORT}"
        )


def dns_problems(settings: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    """What is wrong with how names are to be proved by DNS."""
    plugin, requirements = settings["dns_plugin"], settings["dns_requirements"]
    if not plugin:
        if settings["dns_credentials"] or requirements:
            yield f"{VARIABLE}dns_credentials and {VARIABLE}dns_requirements are for DNS, but {VARIABLE}dns_plugin says of no plugin, such as rfc2136"
        return
    if not PLUGIN.fullmatch(plugin) or plugin.startswith("dns-"):
        yield f"{VARIABLE}dns_plugin is {plugin!r}; it is the name of a plugin without dns-, such as rfc2136 for certbot-dns-rfc2136"
    elif plugin not in known and not requirements:
        yield (
            f"{VARIABLE}dns_plugin is {plugin}, whose packages do not come with the role ({', '.join(known)} do); name them, with their hashes, in "
            f"{VARIABLE}dns_requirements: `tools/lock_certbot.py certbot-dns-{plugin}` prints them"
        )
    if plugin in known and not settings["dns_credentials"]:
        yield f"{VARIABLE}dns_credentials is empty; it is the text of the file of credentials that certbot-dns-{plugin} describes"
    for entry in requirements:
        if "==" not in entry or "--hash=sha256:" not in entry:
            yield f"{VARIABLE}dns_requirements has {entry!r}; an entry is package==version --hash=sha256:..."


def problems(settings: Mapping[str, Any], names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Everything that is wrong, one sentence each. `known` are the plugins that come with the role."""
    found = []
    for name in ("directory", "staging_directory"):
        if not re.match(r"https://[^/\s]+", settings[name]) and (settings[name] or name == "directory"):
            found.append(f"{VARIABLE}{name} is {settings[name]!r}; it is the address of an ACME directory, https://...")
    if settings["agree_to_terms"] is not True:
        found.append(
            f"{VARIABLE}agree_to_terms is not true: read the terms of service of {settings['directory']} and agree to them by setting it to true"
        )
    if settings["email"] and not MAIL.fullmatch(settings["email"]):
        found.append(f"{VARIABLE}email is {settings['email']!r}, which is no e-mail address")
    if bool(settings["eab_key_id"]) != bool(settings["eab_key"]):
        found.append(
            f"of {VARIABLE}eab_key_id and {VARIABLE}eab_key one is set; the certificate authority gave you both"
        )
    if settings["authority"] and "-----BEGIN CERTIFICATE-----" not in settings["authority"]:
        found.append(f"{VARIABLE}authority_file names a file that has no certificate in PEM in it")
    return [*found, *name_problems(names, settings), *dns_problems(settings, known)]
