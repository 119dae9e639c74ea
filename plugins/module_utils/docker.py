# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What is done about a host's Docker engine: a function of what was found there and of what is asked for, and nothing else."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.dpkg import below, is_version, means, newest, older, split

# What a running engine takes over from its file when it is told to reload (moby, daemon/reload.go). Logging is not among it, nor are features:
# the first is read by containers that are made later, but from what the engine was started with, the second when it starts.
RELOADABLE = {
    "debug", "insecure-registries", "labels", "live-restore", "max-concurrent-downloads", "max-concurrent-uploads", "max-download-attempts",
    "registry-mirrors", "runtimes", "default-runtime", "shutdown-timeout",
}  # fmt: skip
# Without a word in the file these go back to their defaults; the others stay as they were until the engine starts again.
RESET_BY_RELOAD = {"max-concurrent-downloads", "max-concurrent-uploads", "max-download-attempts"}
FORBIDDEN = {
    "hosts": "the unit says where the engine listens, and with both it does not start",
    "tls": "the engine listens on its socket only",
    "iptables": "published ports and networks need it",
}
SOURCES = {"docker": "Docker's repository", "distribution": "the distribution"}


def due(running: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What makes a running engine take over its file, and for which keys: nothing, reload or restart.

    `running` is what it runs with; nothing is known of an engine whose file was changed after it was started.
    """
    if running is None:
        return "restart", sorted(wanted)
    keys = sorted(key for key in {*running, *wanted} if running.get(key) != wanted.get(key))
    if not keys:
        return "", []
    reloads = all(key in RELOADABLE and (key in wanted or key in RESET_BY_RELOAD) for key in keys)
    return "reload" if reloads else "restart", keys


def after_reload(running: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an engine runs with when it has reloaded its file."""
    if running is None:
        return None
    left = {key: value for key, value in running.items() if key not in RESET_BY_RELOAD or key in wanted}
    return {**left, **{key: value for key, value in wanted.items() if key in RELOADABLE}}


# --- packages


def plan(
    asked: Mapping[str, Any], installed: Mapping[str, str], available: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is to be installed, what stands in the way, and what is worth a word.

    `asked` has host, release (`Debian 13`), source, packages (the engine first), same_version (those that go together), others (of the other
    source), version, upgrade, floors, archive (what the archive of the release is known to have, where its lists are not there yet).
    """
    planned: dict[str, Any] = {"problems": mixed(asked, installed), "install": [], "notes": [], "pending": False}
    if planned["problems"]:
        return planned
    engine = asked["packages"][0]
    have, target = installed.get(engine, ""), ""
    if wants_engine(asked, have, planned["notes"]):
        offered = available.get(engine, {})
        versions = list(offered.get("versions", []))
        if not versions and engine in asked["archive"]:
            versions = [asked["archive"][engine]]
        planned["pending"] = not versions
        target = "" if versions else "?"  # one of those that are not known yet
        if versions:
            target = chosen(asked, offered.get("candidate") or newest(versions), versions, planned["problems"])
        if target not in ("", "?") and have and not older(have, target):
            planned["notes"].append(
                f"{engine} {have} on {asked['host']} is as new as anything that {SOURCES[asked['source']]} has"
            )
            target = ""
        if not have and not target:
            target = "?"
    for name in asked["packages"]:
        planned["install"] += wanted_package(asked, name, installed, available, target or have, target != "")
    if target == "?" and planned["problems"]:
        planned["install"] = []
    if any(name.partition("=")[0] not in available for name in planned["install"]):
        planned["pending"] = True
    return planned


def mixed(asked: Mapping[str, Any], installed: Mapping[str, str]) -> list[str]:
    """The packages of the other source that are there."""
    there = [f"{name} {installed[name]}" for name in asked["others"] if name in installed]
    if not there:
        return []
    other = next(name for name in SOURCES if name != asked["source"])
    names = " ".join(entry.split()[0] for entry in there)
    return [
        f"{asked['host']} has {', '.join(there)} from {SOURCES[other]}, and docker_source is {asked['source']}: the packages of both exclude each "
        f"other, and to change them stops the engine and every container. Set docker_source: {other}; or drain the host, run `apt-get remove "
        f"--allow-change-held-packages {names}` on it, and run this again (images and volumes stay)"
    ]


def wants_engine(asked: Mapping[str, Any], have: str, notes: list[str]) -> bool:
    """Whether another version of the engine is wanted than the one that is there."""
    engine, version = asked["packages"][0], asked["version"]
    if not have or below(asked["floors"], {engine: have}):
        return True
    if version:
        if means(version, have):
            return False
        newer = older(version, have) if "-" in version else older(split(version)[1], split(have)[1])
        if newer:
            notes.append(
                f"{engine} {have} on {asked['host']} is newer than docker_version ({version}); it is kept, because images and containers of a newer "
                "engine need not work with an older one"
            )
        return not newer
    return bool(asked["upgrade"])


def chosen(asked: Mapping[str, Any], candidate: str, versions: Sequence[str], problems: list[str]) -> str:
    """The version of the engine that is installed, empty when none will do."""
    engine = asked["packages"][0]
    found = candidate
    if asked["version"]:
        found = newest(version for version in versions if means(asked["version"], version))
        if not found:
            problems.append(
                f"docker_version is {asked['version']}, but {SOURCES[asked['source']]} has {engine} {', '.join(versions)} for {asked['release']}"
            )
            return ""
    if floor := below(asked["floors"], {engine: found}).get(engine):
        problems.append(too_old(asked, engine, found, floor))
        return ""
    return found


def too_old(asked: Mapping[str, Any], engine: str, version: str, floor: str) -> str:
    """Why a version will not do, and what would."""
    if asked["source"] == "distribution":
        return (
            f"docker_source is distribution, but {asked['release']} has {engine} {version}, and {floor} is the oldest that will do here: containers "
            "get their GPUs by CDI, which engines before 26.1 do not have or do not read as NVIDIA's toolkit writes it. Set docker_source: docker"
        )
    return (
        f"{engine} {version} is older than {floor}, the oldest that will do here: in older ones a published port may be reached past the address that "
        "it was published on. Set docker_version to a newer one, or leave it empty"
    )


def wanted_package(
    asked: Mapping[str, Any],
    name: str,
    installed: Mapping[str, str],
    available: Mapping[str, Mapping[str, Any]],
    version: str,
    engine_changes: bool,
) -> list[str]:
    """What apt is asked for about one package: nothing, its name, or its name and version."""
    have, offered = installed.get(name, ""), available.get(name, {})
    if name in asked["same_version"]:
        if have and (not engine_changes or have == version):
            return []
        exact = version in offered.get("versions", [])
        return [f"{name}={version}" if exact else name]
    outdated = bool(have) and bool(below(asked["floors"], {name: have}))
    newer = bool(have) and asked["upgrade"] and older(have, offered.get("candidate") or have)
    return [name] if not have or outdated or newer else []


# --- what a host asks for


def route_conflicts(pools: Iterable[Mapping[str, Any]], options: Mapping[str, Any], routes: Iterable[str]) -> list[str]:
    """Networks that containers would get and the host reaches something else by, one sentence each."""
    wanted = [("docker_address_pools", str(pool["base"])) for pool in pools]
    wanted += [
        (f"docker_daemon_options ({key})", str(options[key])) for key in ("bip", "fixed-cidr") if options.get(key)
    ]
    found = []
    for variable, text in wanted:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            continue  # dockerd itself says so
        taken = [route for route in routes if network.version == 4 and network.overlaps(ipaddress.ip_network(route))]
        if taken:
            found.append(
                f"{variable} has {text}, and the host has a route to {', '.join(taken)}: packets to it would go to a container; "
                "take another network, or set docker_route_conflicts: warn"
            )
    return found


# --- what the inventory asks for


def problems(asked: Mapping[str, Any], addresses: Iterable[str]) -> list[str]:
    """What is wrong with the variables. `addresses` are those of the hosts, which no pool may take away."""
    found = []
    version = asked["version"]
    if version and not is_version(version):
        found.append(
            f"docker_version is {version!r}; it is a version such as 28.5.2, or of the package, such as 5:28.5.2-1~debian.13~trixie"
        )
    found += [
        f"docker_minimum_versions has {floor!r} for {name}; it takes a version such as 5:28.3.3 for each package of a source"
        for floors in asked.get("minimum_versions", {}).values()
        for name, floor in floors.items()
        if isinstance(floor, list | dict) or floor is None or not is_version(str(floor))
    ]
    for key, value in asked["daemon_options"].items():
        if not isinstance(key, str) or value is None:
            found.append(
                f"docker_daemon_options has {key!r}: {value!r}; it takes options of dockerd, such as log-driver, with their values"
            )
    for key in sorted({key for key in asked["daemon_options"] if isinstance(key, str)} & set(FORBIDDEN)):
        if key != "iptables" or not asked["daemon_options"][key]:
            found.append(f"docker_daemon_options has {key}: {FORBIDDEN[key]}; leave it out")
    pools = []
    for number, pool in enumerate(asked["address_pools"]):
        where = f"docker_address_pools[{number}]"
        try:
            network = ipaddress.ip_network(pool["base"])
        except ValueError as error:
            found.append(f"{where}: base is {pool['base']!r}; {error}")
            continue
        if not network.prefixlen <= int(pool["size"]) <= network.max_prefixlen - 2:
            found.append(
                f"{where}: size is {pool['size']}; it is the length of the prefix of each network, {network.prefixlen} to "
                f"{network.max_prefixlen - 2} for {network}"
            )
        pools.append(network)
    for address in sorted(set(addresses)):
        try:
            at = ipaddress.ip_address(address)
        except ValueError:
            continue  # a name; what it stands for is not known here
        found += [
            f"docker_address_pools has {network}, and {address} is the address of a host: packets to it would go to a container; take another network"
            for network in pools
            if at in network
        ]
    try:
        publish = ipaddress.ip_address(asked["publish_address"])
    except ValueError:
        publish = None
    if not isinstance(publish, ipaddress.IPv4Address):
        found.append(
            f"docker_publish_address is {asked['publish_address']!r}; it is one IPv4 address of the host, 0.0.0.0 for all"
        )
    return found
