# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Finds a wheel on a package index: reads a simple page (PEP 503 HTML or PEP 691 JSON) and picks the file that fits."""

from __future__ import annotations

import html.parser
import json
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

# What an index is asked for: JSON when it has it, else the HTML that every index has.
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


class WheelError(Exception):
    """A reason why there is no wheel, in words for the operator."""


@dataclass(frozen=True)
class Link:
    """One file that an index offers. `sha256` is empty when the index does not tell it."""

    filename: str
    url: str
    sha256: str


class _Anchors(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]


def normalize(name: str) -> str:
    """The name of a project as an index spells it in its addresses (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def project_url(index_url: str, name: str) -> str:
    """The address of a project's page. An index in a directory has no server that would look for index.html."""
    url = f"{index_url.rstrip('/')}/{normalize(name)}/"
    return f"{url}index.html" if url.startswith("file:") else url


def without_credentials(url: str) -> str:
    """The address as it may be shown."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def hide_passwords(module: Any, *urls: str) -> None:
    """Keep the passwords of addresses out of all that a module says.

    With no_log the whole address would be missing from the messages that an operator needs; only the password is secret.
    """
    for url in urls:
        if password := urllib.parse.urlsplit(url).password:
            module.no_log_values |= {password, urllib.parse.unquote(password)}


def _absolute(base: str, href: str) -> str:
    """Resolve a link; a link to the index's own host is asked with the index's credentials."""
    url = urllib.parse.urljoin(base, href)
    base_parts, parts = urllib.parse.urlsplit(base), urllib.parse.urlsplit(url)
    own_host = base_parts.netloc.rpartition("@")[2] == parts.netloc and parts.scheme == base_parts.scheme
    return urllib.parse.urlunsplit(parts._replace(netloc=base_parts.netloc)) if own_host else url


def links(page: str, base: str) -> list[Link]:
    """Every file on a simple page. Whether it is JSON or HTML is seen from the page: mirrors mislabel it."""
    found: list[Link] = []
    if page.lstrip().startswith("{"):
        try:
            files = json.loads(page)["files"]
            for file in files:
                sha256 = file.get("hashes", {}).get("sha256", "")
                found.append(Link(file["filename"], _absolute(base, file["url"]), sha256.lower()))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WheelError(f"{without_credentials(base)} is not a simple page (PEP 691): {error!r}") from error
        return found
    parser = _Anchors()
    parser.feed(page)
    for href in parser.hrefs:
        url, fragment = urllib.parse.urldefrag(_absolute(base, href))
        digest = re.search(r"(?:^|&)sha256=([0-9a-fA-F]{64})", fragment)
        filename = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
        found.append(Link(filename, url, digest.group(1).lower() if digest else ""))
    return found


def choose(found: list[Link], name: str, version: str, architecture: str, sha256: str) -> Link:
    """The wheel of a version for a CPU: the one with the wanted hash, or one whose hash the index does not tell."""
    prefix = normalize(name)
    versions: set[str] = set()
    candidates: list[Link] = []
    for link in found:
        parts = link.filename.removesuffix(".whl").split("-")
        if not link.filename.endswith(".whl") or len(parts) < 5 or normalize(parts[0]) != prefix:
            continue
        versions.add(parts[1])
        platforms = parts[-1].split(".")
        fits = any(p == "any" or (p.startswith(("manylinux", "linux")) and p.endswith(architecture)) for p in platforms)
        if parts[1] == version and fits:
            candidates.append(link)
    if not candidates:
        if version in versions:
            raise WheelError(f"the index has {name} {version}, but no Linux wheel of it for {architecture}")
        known = ", ".join(sorted(versions, key=_order)[-5:]) or "no wheel of it at all"
        raise WheelError(f"version {version} of {name} is not on the index; its newest are: {known}")
    for link in candidates:
        if link.sha256 == sha256:
            return link
    for link in candidates:
        if not link.sha256:
            return link
    offered = ", ".join(f"{link.sha256} ({link.filename})" for link in candidates)
    raise WheelError(f"the hash differs: expected sha256 {sha256}, the index offers {offered}")


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
