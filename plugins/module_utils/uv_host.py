# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The uv of a host: what it was installed from, and what it has to be told because it does not read pip's configuration."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read

PROGRAMS = ("uv", "uvx")
LINKS = Path("/usr/local/bin")
RELEASES = Path("/opt/uv/releases")
RECORD = "complete.json"
# The configuration of the role uv when the inventory names no source of packages: only calls of the roles read it.
ROLE_CONFIGURATION = Path("/opt/uv/uv.toml")
SYSTEM_CONFIGURATION = Path("/etc/uv/uv.toml")
NAMES_INDEX = re.compile(r"^\s*(?:index-url\s*=|no-index\s*=\s*true)|\bdefault\s*=\s*true", re.MULTILINE)
# What uv calls the settings of pip, and what stands between the entries of one.
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
}

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


class UvError(Exception):
    """A reason why uv cannot be had or called, in words for the operator."""


def program_state(path: Path) -> dict[str, int]:
    """What tells cheaply whether a program was touched."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "mode": status.st_mode & 0o7777}


def release_state(release: Path) -> dict[str, Any]:
    """What has to stay as it is: the programs, and the Python of the pip beside them, which an upgrade of the system may replace."""
    programs = {name: program_state(release / "bin" / name) for name in PROGRAMS}
    return {"programs": programs, "python": os.path.realpath(release / "bin/python")}


def installed(links: Path = LINKS) -> str:
    """The requirements that uv and uvx were installed from. Empty when they are not there, or somebody touched them."""
    try:
        (release,) = {(links / name).readlink().parent.parent for name in PROGRAMS}
        known = json.loads((release / RECORD).read_text())
        if known["state"] == release_state(release):
            return str(known["requirements"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return ""


def pip(links: Path = LINKS) -> list[str]:
    """The pip that installed uv; nothing where something else did."""
    python = (links / "uv").resolve().parent / "python"
    return [str(python), "-I", "-m", "pip"] if (python.parent.parent / RECORD).is_file() else []


def pip_settings(command: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    """What `pip install` goes by on this host: its files and variables."""
    done = subprocess.run([*command, "config", "list"], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UvError(f"pip cannot read its configuration: {(done.stderr or done.stdout).strip()}")
    found: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        name, _equals, value = line.partition("=")
        section, _dot, key = name.rpartition(".")
        with contextlib.suppress(ValueError, SyntaxError):
            found.setdefault(section, {})[key] = str(ast.literal_eval(value))
    return {key: value for section in ("global", "install", ":env:") for key, value in found.get(section, {}).items()}


def as_uv_has_it(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings of pip as variables for uv. Where pip passes over a directory that is not there, uv would end."""
    places = [place for place in settings.get("find-links", "").split() if "://" in place or Path(place).exists()]
    settings = {**settings, "find-links": " ".join(places)}
    found = {
        name: separator.join(settings[key].split())
        for key, (name, separator) in SETTINGS.items()
        if settings.get(key, "").strip()
    }
    if settings.get("proxy") and not any(map(os.environ.get, PROXIES)):
        found.update(dict.fromkeys(PROXIES, settings["proxy"]))
    if "UV_INDEX" in found:
        # As pip does: a package is looked for on all indexes. What may be installed is decided by the hashes.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def configurations() -> list[str]:
    """The configurations that uv finds by itself when root calls it, the system's first."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    places = [SYSTEM_CONFIGURATION, home / "uv/uv.toml"]
    if named := os.environ.get("UV_CONFIG_FILE"):
        places = [Path(named)]
    return [text for text in map(read, places) if text.strip()]


def names_index(texts: list[str]) -> bool:
    """Whether uv knows an index without pip's help: from its configuration or its variables."""
    return any(map(NAMES_INDEX.search, texts)) or any(
        os.environ.get(name) for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL")
    )


def adopt(environment: Mapping[str, Any]) -> list[str]:
    """Let what a task says of the environment go for every program that is started. Returns its values, some of which nobody may read.

    An option of the module and not the keyword of the task: that one is written into a command, where every user of the host sees it.
    """
    values = {name: str(value) for name, value in environment.items()}
    os.environ.update(values)
    return list(values.values())


def call_environment(links: Path = LINKS) -> dict[str, str]:
    """The variables for a call of uv.

    What uv is configured with on the host counts. Without such a configuration uv gets the role's, and where no index is named in
    one, it is pip's.
    """
    found: dict[str, str] = {}
    texts = configurations()
    if not texts and ROLE_CONFIGURATION.is_file():
        found["UV_CONFIG_FILE"] = str(ROLE_CONFIGURATION)
    if not names_index(texts) and (command := pip(links)):
        found.update(as_uv_has_it(pip_settings(command, os.environ)))
    return found
