"""What is open on which host, decided from the inventory alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.filter import firewall as filters
from ansible_collections.gpufleet.llm.plugins.module_utils import firewall

ROOT = Path(__file__).resolve().parents[2]
HOSTVARS: dict[str, dict[str, Any]] = {
    "gw1": {"fleet_address": "10.0.0.1", "ansible_host": "gw1.example.com"},
    "gw2": {"fleet_address": "fd00::2"},
    "gpu1": {
        "fleet_address": "10.0.0.11",
        "vllm_instances": [{"name": "chat", "port": 8000}, {"name": "embed", "port": 8001}],
    },
    "gpu2": {"fleet_address": "10.0.0.12", "vllm_instances": []},
    "nameless": {"ansible_host": "gw3.example.com"},
}
ANY = ["0.0.0.0/0", "::/0"]
DEFAULTS: dict[str, Any] = {
    "admin_networks": ANY, "ssh_ports": [22], "gateways": ["gw1", "gw2"], "gateway_ports": [80, 443], "challenge_ports": [], "virtual_address": "",
    "client_networks": ANY, "agent_ports": [9440],
    "vllm_hosts": ["gpu1", "gpu2"], "model_ports": [], "monitoring_networks": [], "metrics_ports": [9100, 9400], "allow": [],
    "container_interfaces": ["docker0", "br-*"], "log_drops": False,
    "egress": "media", "egress_closed": ["10.0.0.0/8", "169.254.0.0/16", "fe80::/10"], "egress_allow": [], "vllm_user": 997,
}  # fmt: skip


def opened(host: str, **settings: Any) -> list[str]:
    """The lines of the table that open something for this host, without their comments."""
    found = firewall.rules(HOSTVARS, host, {**DEFAULTS, **settings})
    return [line.strip().rpartition(" comment ")[0] for line in firewall.lines(found, published=False).splitlines()]


SSH = "tcp dport { 22 } accept"
WEB = "tcp dport { 80, 443 } accept"


@pytest.mark.parametrize(
    ("host", "settings", "expected"),
    [
        ("gw1", {}, [SSH, WEB]),
        ("gpu1", {}, [
            SSH,
            "ip saddr { 10.0.0.1 } tcp dport { 8000 } accept", "ip6 saddr { fd00::2 } tcp dport { 8000 } accept",
            "ip saddr { 10.0.0.1 } tcp dport { 8001 } accept", "ip6 saddr { fd00::2 } tcp dport { 8001 } accept",
            "ip saddr { 10.0.0.1 } tcp dport { 9440 } accept", "ip6 saddr { fd00::2 } tcp dport { 9440 } accept",
        ]),
        ("gpu2", {}, [SSH]),
        # not a host of the group: what it calls instances is none
        ("gpu1", {"vllm_hosts": []}, [SSH]),
        ("gpu1", {"gateways": []}, [SSH]),
        # the only gateway is the host itself: vLLM listens on loopback
        ("gpu1", {"gateways": ["gpu1"]}, [SSH, WEB]),
        # whoever collects metrics asks the agent for those of the instances
        ("gpu1", {"gateways": ["gpu1"], "monitoring_networks": ["10.0.0.9"]}, [
            SSH, WEB, "ip saddr { 10.0.0.9 } tcp dport { 9440 } accept", "ip saddr { 10.0.0.9 } tcp dport { 9100, 9400 } accept",
        ]),
        ("gpu1", {"gateways": ["gpu1", "gw1"], "vllm_hosts": ["gpu1"]}, [
            SSH, WEB, "ip saddr { 10.0.0.1, 10.0.0.11 } tcp dport { 8000 } accept", "ip saddr { 10.0.0.1, 10.0.0.11 } tcp dport { 8001 } accept",
            "ip saddr { 10.0.0.1 } tcp dport { 9440 } accept",
        ]),
        # SSH is where it was and where it will be, from two networks of one family
        ("gpu2", {"ssh_ports": [2222, 22], "admin_networks": ["192.0.2.7", "10.0.0.0/8"]},
         ["ip saddr { 10.0.0.0/8, 192.0.2.7 } tcp dport { 22, 2222 } accept"]),
        # models are copied between inference hosts
        ("gpu2", {"model_ports": [8990]}, [SSH, "ip saddr { 10.0.0.11 } tcp dport { 8990 } accept"]),
        ("gw1", {"model_ports": [8990]}, [SSH, WEB]),
        ("gpu2", {"model_ports": [8990], "vllm_hosts": ["gpu2"]}, [SSH]),
        # gateways pass the challenges of a certificate authority on to each other
        ("gw1", {"challenge_ports": [80]}, [SSH, WEB, "ip6 saddr { fd00::2 } tcp dport { 80 } accept"]),
        ("gpu2", {"challenge_ports": [80]}, [SSH]),
        # gateways that share an address speak VRRP with each other, and with nobody else
        ("gw1", {"virtual_address": "10.0.0.9", "gateways": ["gw1", "gpu1"]}, [SSH, WEB, "ip saddr { 10.0.0.11 } ip protocol 112 accept"]),
        ("gpu2", {"virtual_address": "10.0.0.9"}, [SSH]),
        # everybody of one family is nobody of the other
        ("gpu2", {"admin_networks": ["0.0.0.0/0"]}, [f"meta nfproto ipv4 {SSH}"]),
        ("gpu2", {"admin_networks": ["::/0", "10.1.0.0/16"]}, [f"ip saddr {{ 10.1.0.0/16 }} {SSH}", f"meta nfproto ipv6 {SSH}"]),
        # what overlaps or touches is joined
        ("gpu2", {"admin_networks": ["10.0.0.0/9", "10.128.0.0/9", "10.1.2.3", "0.0.0.0/0", "2001:db8::1"]},
         [f"meta nfproto ipv4 {SSH}", f"ip6 saddr {{ 2001:db8::1 }} {SSH}"]),
        ("gw1", {"client_networks": ["10.0.0.0/8"], "gateway_ports": [8080, 8443]}, [SSH, "ip saddr { 10.0.0.0/8 } tcp dport { 8080, 8443 } accept"]),
        ("gpu2", {"monitoring_networks": ["10.0.0.9"]}, [SSH, "ip saddr { 10.0.0.9 } tcp dport { 9100, 9400 } accept"]),
        ("gpu2", {"monitoring_networks": ["10.0.0.9"], "metrics_ports": []}, [SSH]),
        ("gpu2", {"allow": [{"name": "a", "ports": ["5000-5010", 5005, "5011", 4000], "networks": ["::/0"], "protocol": "udp"}]},
         [SSH, "meta nfproto ipv6 udp dport { 4000, 5000-5011 } accept"]),
    ],
)  # fmt: skip
def test_what_is_open(host: str, settings: dict[str, Any], expected: list[str]) -> None:
    assert opened(host, **settings) == expected


def test_a_limited_run_opens_the_same() -> None:
    """Only the inventory is asked: of a host that the run does not reach there are variables, and no facts."""
    assert opened("gpu1") == opened("gpu1", gateways=("gw1", "gw2"))


def test_the_table_as_a_whole() -> None:
    text = filters.firewall_ruleset(HOSTVARS, "gpu1", DEFAULTS)
    assert (
        text.index("table inet vllm_fleet\n")
        < text.index("delete table inet vllm_fleet\n")
        < text.index("table inet vllm_fleet {")
    )
    assert "flush" not in text
    assert "policy drop" in text
    # a port of a container is the one that was asked for, under the same conditions
    assert 'ip saddr { 10.0.0.1 } meta l4proto tcp ct original proto-dst { 8000 } accept comment "vLLM chat"' in text
    published = text[text.index("chain published") :]
    assert published.rstrip().endswith("drop\n\t}\n}")
    assert "log prefix" not in text
    assert filters.firewall_ruleset(HOSTVARS, "gpu1", {**DEFAULTS, "log_drops": True}).count("log prefix") == 2


def test_a_name_cannot_break_out_of_its_comment() -> None:
    hostvars = {**HOSTVARS, "gpu1": {**HOSTVARS["gpu1"], "vllm_instances": [{"name": 'x" accept\n#', "port": 1024}]}}
    assert 'comment "vLLM x_ accept__"' in firewall.ruleset(hostvars, "gpu1", DEFAULTS)


def chain(text: str, name: str) -> list[str]:
    """The rules of one chain, and none where there is no such chain."""
    _before, found, rest = text.partition(f"\tchain {name} {{\n")
    return [line.strip() for line in rest.partition("\n\t}")[0].splitlines()] if found else []


def egress(options: dict[str, Any], runtime: str = "systemd", **settings: Any) -> str:
    """The table of a host with one instance that has these options."""
    instance = {"name": "see", "port": 8000, "options": options}
    hostvars = {**HOSTVARS, "gpu1": {**HOSTVARS["gpu1"], "vllm_instances": [instance], "vllm_runtime": runtime}}
    return filters.firewall_ruleset(
        hostvars, "gpu1", {**DEFAULTS, "gateways": ["gw1"], "vllm_hosts": ["gpu1", "gpu2", "nameless"], **settings}
    )


DOMAINS = {"allowed-media-domains": ["img.example"]}


def test_what_an_instance_that_fetches_may_connect_to() -> None:
    """The fleet, name servers and nothing else that is private, under whatever name IPv6 has for it."""
    text = egress(DOMAINS)
    assert chain(text, "output")[1:] == [
        'oif "lo" accept',
        "ct state established,related accept",
        "meta skuid 997 jump egress",
    ]
    assert chain(text, "leaving") == []
    refuse = "reject with icmpx admin-prohibited"
    assert chain(text, "egress") == [
        'ip daddr { 10.0.0.1, 10.0.0.11, 10.0.0.12 } accept comment "fleet"',
        'meta l4proto { tcp, udp } th dport 53 accept comment "names"',
        f"ip daddr {{ 10.0.0.0/8, 169.254.0.0/16 }} {refuse}",
        f"ip6 daddr {{ 64:ff9b::a00:0/104, 64:ff9b::a9fe:0/112, 2002:a00::/24, 2002:a9fe::/32, fe80::/10 }} {refuse}",
    ]
    allowed = {"name": "pictures", "ports": ["443"], "networks": ["10.0.9.0/24"]}
    rules = chain(egress(DOMAINS, egress_allow=[allowed], log_drops=True), "egress")
    assert rules[2] == 'ip daddr { 10.0.9.0/24 } tcp dport { 443 } accept comment "pictures"'
    assert [rule.count("log prefix") for rule in rules[3:]] == [1, 0, 1, 0]


def test_containers_are_held_back_by_their_interfaces() -> None:
    text = egress(DOMAINS, runtime="docker")
    assert chain(text, "output") == []
    assert chain(text, "leaving") == ['oifname "docker0" accept', 'oifname "br-*" accept', "jump egress", "accept"]
    assert 'iifname "docker0" jump leaving' in chain(text, "forward")
    assert 'iifname "docker0" accept' in chain(egress(DOMAINS), "forward")


@pytest.mark.parametrize(
    ("options", "settings", "held_back"),
    [
        ({}, {}, False),
        ({"allowed-media-domains": []}, {}, False),
        # the peer that has the cache of a prompt is named by the request, too
        ({"kv-transfer-config": {"kv_connector": "NixlConnector"}}, {}, True),
        (None, {"egress": "all"}, True),
        (DOMAINS, {"egress": "off"}, False),
        # as YAML reads off
        (DOMAINS, {"egress": False}, False),
        (DOMAINS, {"vllm_hosts": ["gpu2"]}, False),
        (DOMAINS, {"egress_closed": []}, True),
    ],
)
def test_who_is_held_back(options: Any, settings: dict[str, Any], held_back: bool) -> None:
    assert ("chain egress" in egress(options, **settings)) == held_back


RIGHT = "it takes networks and addresses such as 10.0.0.0/8, 192.0.2.7 and 2001:db8::/32"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, ""),
        ({"admin_networks": []}, "firewall_admin_networks is empty, so nobody could log in any more; say who may"),
        ({"ssh_ports": []}, "firewall_ssh_ports is empty, so nobody could log in any more; say which"),
        ({"ssh_ports": [0]}, "firewall_ssh_ports has '0'; a port is a number from 1 to 65535"),
        ({"gateway_ports": [65536]}, "firewall_gateway_ports has '65536'; a port is a number from 1 to 65535"),
        ({"metrics_ports": ["1-2"]}, "firewall_metrics_ports has '1-2'; a port is a number from 1 to 65535"),
        ({"admin_networks": ["10.0.0.0/33"]}, f"firewall_admin_networks has '10.0.0.0/33', which is no network; {RIGHT}"),
        ({"client_networks": ["office"]}, f"firewall_client_networks has 'office', which is no network; {RIGHT}"),
        ({"monitoring_networks": ["10.0.0.5/24"]},
         "firewall_monitoring_networks has 10.0.0.5/24, which is neither a network nor one address; write 10.0.0.0/24 or 10.0.0.5"),
        ({"allow": [{"name": "a;b", "ports": ["1"], "networks": ["::/0"]}]},
         "firewall_allow[0]: name is 'a;b'; it must be 1 to 63 letters, digits, blanks, dots, - and _"),
        ({"allow": [{"name": "a", "ports": ["1"], "networks": ["::/0"]}] * 2}, "firewall_allow: the name a is used twice; give each rule a name of its own"),
        ({"allow": [{"name": "a", "ports": ["20-10"], "networks": ["::/0"]}]},
         "firewall_allow[0] (a): ports has '20-10'; a port is a number from 1 to 65535, or a range such as 30000-30100"),
        ({"allow": [{"name": "a", "ports": [], "networks": ["::/0"]}]},
         "firewall_allow[0] (a): ports is empty, so it would open nothing; say which, or leave the rule out"),
        ({"allow": [{"name": "a", "ports": ["1"], "networks": ["x"]}]}, f"firewall_allow[0] (a): networks has 'x', which is no network; {RIGHT}"),
        ({"egress_allow": [{"name": "a", "ports": ["1"], "networks": ["x"]}]}, f"firewall_egress_allow[0] (a): networks has 'x', which is no network; {RIGHT}"),
        ({"egress_closed": ["10/8"]}, f"firewall_egress_closed has '10/8', which is no network; {RIGHT}"),
        ({"container_interfaces": ["*"]},
         "firewall_container_interfaces has '*'; it takes names of interfaces, of at most 15 characters, that may end in *, such as docker0 and br-*"),
        ({"container_interfaces": ['a" drop']},
         "firewall_container_interfaces has 'a\" drop'; it takes names of interfaces, of at most 15 characters, that may end in *, such as docker0 and br-*"),
        ({"gateways": ["nameless"]},
         "nameless: ansible_host is gw3.example.com, which is no IP address, and fleet_address is not set; set fleet_address to the IP address "
         "at which the other hosts reach nameless"),
        # a wrong type is told by the argument spec, and by it alone
        ({"admin_networks": "10.0.0.0/8"}, ""),
        ({"allow": [{"ports": ["1"]}]}, "firewall_allow[0]: name is ''; it must be 1 to 63 letters, digits, blanks, dots, - and _"),
        ({"allow": ["x"]}, ""),
    ],
)  # fmt: skip
def test_each_mistake_is_told_with_what_would_be_right(settings: dict[str, Any], problem: str) -> None:
    assert firewall.problems(HOSTVARS, "gpu1", {**DEFAULTS, **settings}) == ([problem] if problem else [])


def test_an_instance_without_a_port() -> None:
    hostvars = {**HOSTVARS, "gpu1": {"vllm_instances": [{"name": "chat"}]}}
    (problem,) = firewall.problems(hostvars, "gpu1", DEFAULTS)
    assert problem == "gpu1: vllm_instances (chat): port is None; it must be a number from 1024 to 65535"
    with pytest.raises(AnsibleFilterError, match=r"gpu1: vllm_instances \(chat\)"):
        filters.firewall_ruleset(hostvars, "gpu1", DEFAULTS)


def test_the_port_for_models_is_that_of_the_role_model_store() -> None:
    port = yaml.safe_load((ROOT / "roles/model_store/defaults/main.yml").read_text())["model_store_share_port"]
    assert f"model_store_share_port | default({port})" in (ROOT / "roles/firewall/vars/main.yml").read_text()


def test_the_filters_get_what_the_role_gives_them() -> None:
    given = yaml.safe_load((ROOT / "roles/firewall/vars/main.yml").read_text())["__firewall_settings"]
    assert set(given) == set(DEFAULTS)
    for name in filters.FilterModule().filters():
        described = yaml.safe_load((ROOT / "plugins/filter" / f"{name}.yml").read_text())
        assert described["DOCUMENTATION"]["name"] == name
