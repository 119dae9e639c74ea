# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters about the settings of a host."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SYSCTL_NAME = re.compile(r"[a-z0-9_-]+(\.[A-Za-z0-9_-]+)+")
# What this host can make itself, and what a directory may call somebody: john.doe, jdoe@corp.example, CORP\\jdoe.
ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
KNOWN_ACCOUNT = re.compile(r"[\w][\w.@\\-]{0,254}\$?")
FORWARDING = re.compile(r"net\.ipv4\.ip_forward|net\.ipv[46]\.conf\..*\.(mc_)?forwarding")


def pattern_problems(patterns: Sequence[str], name: str) -> list[str]:
    """What is wrong with regular expressions that go into a file of apt."""
    problems = []
    for pattern in patterns:
        if not pattern or re.search(r'["\s;{}\\]', pattern.replace("\\.", "")):
            problems.append(
                f"{name} has {pattern!r}; a pattern has no blanks, quotes, braces, semicolons or backslashes but in \\."
            )
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{name} has {pattern!r}, which is no regular expression: {error}")
    return problems


def sysctl_problems(settings: Mapping[str, Any], name: str) -> list[str]:
    """What is wrong with settings of the kernel."""
    problems = []
    for key, value in settings.items():
        if not SYSCTL_NAME.fullmatch(str(key)):
            problems.append(f"{name} has {key!r}; a setting is written with dots, such as vm.swappiness")
        elif FORWARDING.fullmatch(str(key)):
            problems.append(
                f"{name} has {key}: a container engine switches forwarding on itself, and a host without one is no router; leave it out"
            )
        elif (
            value is None
            or isinstance(value, bool)
            or not re.fullmatch(r"[A-Za-z0-9_./:-]+( [A-Za-z0-9_./:-]+)*", str(value))
        ):
            problems.append(
                f"{name}: the value of {key} is {value!r}; it must be a number, or words with a blank between them"
            )
    return problems


def account_problems(accounts: Sequence[str], name: str) -> list[str]:
    """What is wrong with names of users and groups."""
    return [
        f"{name}: {account!r} is no name of a user or group; it has letters, digits, _, -, ., @ and \\, and begins with a letter"
        for account in accounts
        if not KNOWN_ACCOUNT.fullmatch(str(account)) or str(account).isdigit()
    ]


def admin_plan(lines: Sequence[str], group: str, users: Sequence[str]) -> dict[str, Any]:
    """How users get into a group, by what the host knows of it and of each of them: local, directory or none, and whether he is a member.

    Whoever a directory knows is added to the file of a local group, which needs no entry of his in /etc/passwd. A group of a directory is changed
    there. What nobody knows is made here, if it can be.
    """
    known, *each = [line.split() for line in lines]
    plan: dict[str, Any] = {"group": known[0] == "none", "local": [], "directory": [], "problems": []}
    if plan["group"] and not ACCOUNT.fullmatch(group):
        plan["problems"].append(
            f"base_admin_group is {group}, which the host does not know (getent group), and cannot make by that name"
        )
    for user, (kind, member) in zip(users, each, strict=True):
        if known[0] == "directory" and member == "no":
            plan["problems"].append(
                f"base_admin_users has {user}, who is not in {group}: that group is one of a directory, so add {user} there"
            )
        elif kind == "none" and not ACCOUNT.fullmatch(user):
            plan["problems"].append(
                f"base_admin_users has {user}, whom the host does not know (getent passwd {user}), and cannot make by that name"
            )
        elif known[0] != "directory":
            plan["directory" if kind == "directory" else "local"].append(user)
    return plan


def sysctl_differences(settings: Mapping[str, Any], names: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Settings that are not as wanted, from lines such as /proc/sys/vm/swappiness:10."""
    found = {}
    for line in lines:
        path, _, value = line.partition(":")
        found[path.removeprefix("/proc/sys/").replace("/", ".")] = " ".join(value.split())
    return [
        f"{name} (is {found.get(name, 'missing')})"
        for name in names
        if found.get(name) != " ".join(str(settings[name]).split())
    ]


def held_updates_text(updates: Mapping[str, Mapping[str, Any]], now: float | None = None) -> str:
    """Updates that wait, the oldest first, with the days that they have been waiting."""
    seconds = time.time() if now is None else now
    rows = sorted((entry["since"], name, entry["version"]) for name, entry in updates.items())
    days = [(int((seconds - since) // 86400), name, version) for since, name, version in rows]
    return ", ".join(
        f"{name} {version} ({'since today' if day < 1 else f'for {day} days'})" for day, name, version in days
    )


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        functions = (
            pattern_problems,
            sysctl_problems,
            account_problems,
            admin_plan,
            sysctl_differences,
            held_updates_text,
        )
        return {function.__name__: function for function in functions}
