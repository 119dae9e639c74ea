# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Firewalls of others on a host: found, and those of iptables opened without touching anything else that iptables does there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.firewall_others import (
    Table,
    base_chains,
    opened,
    saved_walls,
    walls,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Command

FIREWALLD = "firewalld.service"
# Loads what iptables-save wrote, at boot.
PERSISTENT = "netfilter-persistent.service"
SAVED = {"iptables": "etc/iptables/rules.v4", "ip6tables": "etc/iptables/rules.v6"}
KEPT = "var/lib/vllm-fleet/firewall"  # what those files were
LOADED = {
    "iptables": "net/ip_tables_names",
    "ip6tables": "net/ip6_tables_names",
}  # tables of the kernel's old interface
IPTABLES = (("ip", "filter"), ("ip6", "filter"))  # tables that iptables makes by the new one


@dataclass
class Others:
    """What else refuses connections on this host."""

    command: Command
    own: Table
    root: Path = Path("/")
    proc: Path = Path("/proc")

    def look(self, units: Mapping[str, tuple[str, str]]) -> tuple[list[str], list[str]]:
        """Firewalls that can be switched off or opened, and tables of nftables that are for a person."""
        found = []
        if "ENABLED=yes" in read(self.root / "etc/ufw/ufw.conf").replace('"', "").splitlines():
            found.append("ufw")
        active, enabled = units.get(FIREWALLD, ("", ""))
        if active in ("active", "activating", "reloading") or enabled == "enabled":
            found.append("firewalld")
        theirs = self.tables()
        if found:  # both have their rules by iptables, or in a table that goes with them
            theirs = [table for table in theirs if table not in IPTABLES and table[1] != "firewalld"]
        elif any(table in IPTABLES for table in theirs) or self.legacy() or self.saved(units):
            found.append("iptables")
        return found, [f"{family} {name}" for family, name in theirs if (family, name) not in IPTABLES]

    def listing(self, *words: str) -> dict[str, Any]:
        """What nft lists; nothing where it is not there."""
        status, output, _ = self.command(["nft", "--json", "list", *words])
        try:
            found: dict[str, Any] = json.loads(output) if status == 0 else {}
        except ValueError:
            found = {}
        return found

    def tables(self) -> list[Table]:
        """Tables of others that refuse what they do not name."""
        candidates = {
            table: chains for table, chains in base_chains(self.listing("chains")).items() if table != self.own
        }
        return [table for table, chains in candidates.items() if any(walls(chains, self.listing("table", *table)))]

    def legacy(self) -> dict[str, str]:
        """What the kernel's old interface has and refuses by, as iptables-save writes it."""
        found = {}
        for program, names in LOADED.items():
            if "filter" not in read(self.proc / names).split():
                continue  # asking for it would load it
            _, output, _ = self.command([f"{program}-legacy-save", "-t", "filter"])
            if saved_walls(output):
                found[program] = output
        return found

    def saved(self, units: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Files that are loaded at boot and refuse, with their text."""
        if units.get(PERSISTENT, ("", ""))[1] != "enabled" and units.get(PERSISTENT, ("", ""))[0] != "active":
            return {}
        texts = {name: read(self.root / name) for name in SAVED.values()}
        return {name: text for name, text in texts.items() if saved_walls(text)}

    def open(self, units: Mapping[str, tuple[str, str]]) -> list[str]:
        """Take away by what iptables refuses what comes in, now and at boot. What it does elsewhere stays. Returns commands that failed."""
        commands = []
        for table, chains in base_chains(self.listing("chains")).items():
            for chain, handle in walls(chains, self.listing("table", *table)) if table in IPTABLES else ():
                rule = ["delete", "rule", *table, chain, "handle", str(handle)]
                commands.append(
                    ["nft", *rule] if handle else ["nft", f"chain {' '.join(table)} {chain} {{ policy accept; }}"]
                )
        for program, text in self.legacy().items():
            lines = text.splitlines()
            for number in saved_walls(text):
                rule = shlex.split(lines[number])
                commands.append(
                    [
                        f"{program}-legacy",
                        *(["-P", "INPUT", "ACCEPT"] if lines[number][0] == ":" else ["-D", *rule[1:]]),
                    ]
                )
        failed = [" ".join(command) for command in commands if self.command(command)[0]]
        for name, text in self.saved(units).items():
            write(self.root / KEPT / Path(name).name, text)
            mode = (self.root / name).stat().st_mode & 0o777
            write(self.root / name, opened(text), mode=mode, durable=True)
        return failed
