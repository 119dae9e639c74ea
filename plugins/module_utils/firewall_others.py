# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Firewalls of others: whether what the kernel or a file has would refuse connections that this role lets in.

Only what refuses whatever it does not name is one. A rule that drops a port, an address or an invalid packet is the business of who wrote it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Where what is for this host, or for all, is refused.
HOOKS = ("input", "prerouting")
FAMILIES = ("ip", "ip6", "inet")
VERDICTS = ("drop", "reject")
# What a rule may look at and still refuse nearly everything: where a packet came in, TCP as a whole, new connections.
BROAD_KEYS = ("iif", "iifname", "iifgroup", "nfproto")
BROAD_OPTIONS = {"-i", "-m", "--comment", "-p", "--syn", "--ctstate", "--state"}
NEW = {"new", "NEW"}

Table = tuple[str, str]
Rules = Mapping[str, Sequence[Mapping[str, Any]]]


def base_chains(listing: Mapping[str, Any]) -> dict[Table, list[dict[str, Any]]]:
    """The chains of `nft -j list chains` that could refuse what comes in, by their tables."""
    found: dict[Table, list[dict[str, Any]]] = {}
    for entry in listing.get("nftables", []):
        chain = entry.get("chain") or {}
        if chain.get("hook") in HOOKS and chain.get("family") in FAMILIES:
            found.setdefault((chain["family"], chain["table"]), []).append(chain)
    return found


def walls(chains: Sequence[Mapping[str, Any]], listing: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """The refusals of these chains, by `nft -j list table` of their table: the chain, and the handle of the rule, none for the chain's policy."""
    rules: dict[str, list[Mapping[str, Any]]] = {}
    for entry in listing.get("nftables", []):
        if rule := entry.get("rule"):
            rules.setdefault(rule["chain"], []).append(rule)
    for chain in chains:
        if chain.get("policy") == "drop":
            yield chain["name"], None
        for rule in rules.get(chain["name"], []):
            if refuses(rule, rules, {chain["name"]}):
                yield chain["name"], rule["handle"]


def refuses(rule: Mapping[str, Any], rules: Rules, seen: set[str]) -> bool:
    """Whether a rule refuses whatever comes to it, itself or in the chain that it leads to."""
    for part in rule["expr"]:
        if part is None or len(part) != 1:
            return False
        ((kind, value),) = part.items()
        if kind in VERDICTS or (kind == "xt" and value and value.get("name") in ("REJECT", "DROP")):
            return True
        if kind in ("jump", "goto"):
            target = value["target"]
            return target not in seen and any(refuses(one, rules, {*seen, target}) for one in rules.get(target, []))
        if kind == "match":
            if not broad(value):
                return False
        elif kind not in ("counter", "log") and not (kind == "xt" and value and value.get("name") == "comment"):
            return False
    return False


def broad(match: Mapping[str, Any]) -> bool:
    """Whether nearly everything that comes in is matched."""
    left, right = match.get("left"), match.get("right")
    if not isinstance(left, Mapping):
        return False
    key = (left.get("meta") or {}).get("key", "")
    if (left.get("ct") or {}).get("key") == "state":
        several = right.get("set") if isinstance(right, Mapping) else right
        return bool(NEW.intersection(several if isinstance(several, list) else [str(several)]))
    if key == "l4proto":
        return "tcp" in ((right.get("set") or []) if isinstance(right, Mapping) else [right])
    if key in BROAD_KEYS:
        return right not in ("lo", {"set": ["lo"]}) or match.get("op") == "!="
    return False


# --- the same, as iptables-save writes it


def saved_walls(text: str) -> list[int]:
    """The lines by which the table `filter` of iptables refuses what comes in: rules of its chain INPUT, and its policy."""
    rules: dict[str, list[tuple[int, list[str]]]] = {}
    found = []
    table = ""
    for number, line in enumerate(text.splitlines()):
        if line.startswith("*"):
            table = line[1:].strip()
        if table != "filter":
            continue
        if line.split()[:2] == [":INPUT", "DROP"]:
            found.append(number)
        if line.startswith("-A "):
            words = shlex.split(line)
            rules.setdefault(words[1], []).append((number, words[2:]))
    return found + [number for number, words in rules.get("INPUT", []) if saved_refuses(words, rules, {"INPUT"})]


def saved_refuses(words: Sequence[str], rules: Mapping[str, Sequence[tuple[int, list[str]]]], seen: set[str]) -> bool:
    """Whether a rule refuses whatever comes to it, itself or in the chain that it leads to."""
    jumps = [number for number, word in enumerate(words) if word in ("-j", "-g")]
    if not jumps:
        return False
    conditions, target = words[: jumps[0]], words[jumps[0] + 1]
    if conditions[:2] == ["!", "-i"]:  # all interfaces but one
        conditions = conditions[3:]
    for option, value in zip(conditions, [*conditions, ""][1:], strict=True):
        states = not NEW & set(value.split(","))
        narrow = {"-i": value == "lo", "-p": value != "tcp", "--ctstate": states, "--state": states, "!": True}
        if narrow.get(option, option.startswith("-") and option not in BROAD_OPTIONS):
            return False
    if target in ("REJECT", "DROP"):
        return True
    return target not in seen and any(
        saved_refuses(one, rules, {*seen, target}) for _line, one in rules.get(target, [])
    )


def opened(text: str) -> str:
    """The text without what refuses, everything else as it was."""
    refusals = set(saved_walls(text))
    lines = text.splitlines(keepends=True)
    return "".join(
        line if number not in refusals else line.replace("DROP", "ACCEPT", 1) if line.startswith(":") else ""
        for number, line in enumerate(lines)
    )
