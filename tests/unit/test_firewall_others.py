"""Firewalls of others: what refuses whatever it does not name is one, what refuses something that it names is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import firewall_others
from ansible_collections.gpufleet.llm.plugins.module_utils.firewall_others_host import PERSISTENT, Others

# A cloud's image of Ubuntu (rules.v4), and what nft 1.0.6 lists when iptables-nft has loaded it.
RECORDINGS = Path(__file__).parent / "recordings/firewall"
RULES = (RECORDINGS / "rules.v4-of-oracle").read_text()
LISTED = json.loads((RECORDINGS / "nft-1.0.6-iptables-of-oracle.json").read_text())


def match(key: str, right: Any, op: str = "==") -> dict[str, Any]:
    """What nft makes of a condition."""
    left = {"ct": {"key": "state"}} if key == "state" else {"meta": {"key": key}}
    return {"match": {"op": op, "left": left, "right": right}}


PORT = {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 7}}
DROP: dict[str, Any] = {"drop": None}


def walls(*rules: list[Any], policy: str = "accept", **chains: list[Any]) -> list[tuple[str, int | None]]:
    """By what a chain with these rules refuses, beside others that it may jump to."""
    base = {"family": "inet", "table": "theirs", "name": "input", "hook": "input", "policy": policy}
    listed = [{"rule": {"chain": "input", "handle": number, "expr": expr}} for number, expr in enumerate(rules)]
    listed += [{"rule": {"chain": name, "handle": 99, "expr": expr}} for name, expr in chains.items()]
    ((table, found),) = firewall_others.base_chains({"nftables": [{"chain": base}]}).items()
    assert table == ("inet", "theirs")
    return list(firewall_others.walls(found, {"nftables": listed}))


@pytest.mark.parametrize(
    "rule",
    [
        [DROP],
        [
            {"counter": {"packets": 0, "bytes": 0}},
            {"log": None},
            {"reject": {"type": "icmpx", "expr": "port-unreachable"}},
        ],
        [match("iifname", "eth0"), DROP],
        [match("iifname", "lo", "!="), DROP],
        [match("nfproto", "ipv6"), DROP],
        [match("l4proto", "tcp"), match("state", ["new", "invalid"]), DROP],
        [match("state", {"set": ["new", "untracked"]}), DROP],
        [match("l4proto", {"set": ["tcp", "udp"]}), DROP],
        [{"jump": {"target": "last"}}],
        [{"xt": {"type": "match", "name": "comment"}}, {"xt": {"type": "target", "name": "REJECT"}}],
    ],
)
def test_what_refuses_the_rest_is_a_wall(rule: list[Any]) -> None:
    assert walls([{"accept": None}], rule, last=[DROP]) == [("input", 1)]


@pytest.mark.parametrize(
    "rule",
    [
        [PORT, DROP],
        [match("state", "invalid"), DROP],
        # as firewalld has it
        [match("state", {"set": ["established", "related"]}), DROP],
        [match("l4proto", "icmp"), DROP],
        [match("iifname", "lo"), DROP],
        [{"xt": {"type": "match", "name": "recent"}}, DROP],
        [None],
        [{"accept": None}],
        [{"jump": {"target": "input"}}],
        [{"jump": {"target": "gone"}}],
        [PORT, {"jump": {"target": "last"}}],
    ],
)
def test_what_refuses_something_is_none(rule: list[Any]) -> None:
    assert walls(rule, last=[DROP]) == []


def test_a_policy_is_a_wall() -> None:
    assert walls(policy="drop") == [("input", None)]


def test_the_rules_of_a_cloud_as_the_kernel_has_them() -> None:
    chains = firewall_others.base_chains(LISTED)
    assert list(chains) == [("ip", "filter")]
    assert list(firewall_others.walls(chains["ip", "filter"], LISTED)) == [("INPUT", 10)]


def test_the_rules_of_a_cloud_as_they_are_saved() -> None:
    """Opened, everything else is as it was: what keeps users from the disk that the host boots from, for example."""
    assert [RULES.splitlines()[number] for number in firewall_others.saved_walls(RULES)] == [
        "-A INPUT -j REJECT --reject-with icmp-host-prohibited"
    ]
    opened = firewall_others.opened(RULES)
    assert firewall_others.saved_walls(opened) == []
    assert opened == RULES.replace("-A INPUT -j REJECT --reject-with icmp-host-prohibited\n", "")


@pytest.mark.parametrize(
    ("lines", "closed"),
    [
        (":INPUT DROP [0:0]", True),
        (":INPUT ACCEPT [0:0]", False),
        (":FORWARD DROP [0:0]", False),
        ("-A INPUT -i eth0 -j DROP", True),
        ("-A INPUT ! -i lo -m comment --comment 'the rest' -j DROP", True),
        ("-A INPUT -p tcp -m conntrack --ctstate INVALID,NEW -j DROP", True),
        ("-A INPUT -m conntrack --ctstate INVALID -j DROP", False),
        ("-A INPUT -p udp -j DROP", False),
        ("-A INPUT -i lo -j DROP", False),
        ("-A INPUT ! -s 10.0.0.0/8 -j DROP", False),
        ("-A INPUT -p tcp -m tcp --dport 22 -j f2b-sshd\n-A f2b-sshd -s 192.0.2.1/32 -j REJECT", False),
        ("-A INPUT -j mine\n-A mine -s 10.0.0.0/8 -j ACCEPT\n-A mine -j DROP", True),
        ("-A INPUT -j mine\n-A mine -j INPUT", False),
        ("COMMIT\n*nat\n:INPUT DROP [0:0]", False),
    ],
)
def test_saved_rules(lines: str, closed: bool) -> None:
    text = f"*filter\n{lines}\nCOMMIT\n"
    assert bool(firewall_others.saved_walls(text)) == closed
    assert not firewall_others.saved_walls(firewall_others.opened(text))


class Kernel:
    """Answers as nft and iptables-legacy-save do, and notes what it is told to do."""

    def __init__(self, root: Path, listed: Any, legacy: str = "") -> None:
        self.listed, self.legacy, self.done = listed, legacy, [""]
        self.others = Others(self.command, ("inet", "vllm_fleet"), root, root / "proc")
        (root / "proc/net").mkdir(parents=True)
        (root / "proc/net/ip_tables_names").write_text("filter\n" if legacy else "")
        (root / "etc/iptables").mkdir(parents=True)
        (root / "etc/iptables/rules.v4").write_text(RULES)
        (root / "etc/iptables/rules.v4").chmod(0o640)

    def command(self, command: list[str]) -> tuple[int, str, str]:
        if "--json" in command:
            return 0, json.dumps(self.listed), ""
        if command[0] == "iptables-legacy-save":
            return 0, self.legacy, ""
        self.done.append(" ".join(command))
        return 0, "", ""


ON = {PERSISTENT: ("active", "enabled")}


def test_iptables_is_found_in_the_kernel_and_at_the_next_boot(tmp_path: Path) -> None:
    assert Kernel(tmp_path / "now", LISTED).others.look({}) == (["iptables"], [])
    assert Kernel(tmp_path / "old", {}, legacy=RULES).others.look({}) == (["iptables"], [])
    assert Kernel(tmp_path / "boot", {}).others.look(ON) == (["iptables"], [])
    assert Kernel(tmp_path / "none", {}).others.look({}) == ([], [])


def test_iptables_is_opened_and_nothing_else_of_it(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, LISTED, legacy="*filter\n:INPUT DROP [0:0]\n-A INPUT -i eth0 -j DROP\nCOMMIT\n")
    assert kernel.others.open(ON) == []
    assert kernel.done[1:] == [
        "nft delete rule ip filter INPUT handle 10",
        "iptables-legacy -P INPUT ACCEPT",
        "iptables-legacy -D INPUT -i eth0 -j DROP",
    ]
    file = tmp_path / "etc/iptables/rules.v4"
    assert not firewall_others.saved_walls(file.read_text())
    assert file.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "var/lib/vllm-fleet/firewall/rules.v4").read_text() == RULES


def test_a_table_of_an_administrator_is_told_by_its_name(tmp_path: Path) -> None:
    chain = {"family": "inet", "table": "mine", "name": "in", "hook": "input", "policy": "drop"}
    own = {**chain, "table": "vllm_fleet"}
    assert Kernel(tmp_path, {"nftables": [{"chain": chain}, {"chain": own}]}).others.look({}) == ([], ["inet mine"])
