"""The filters of the gateway, and what its configuration becomes with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.errors import AnsibleFilterError, AnsibleUndefinedVariable
from ansible.plugins.filter.core import FilterModule as CoreFilters
from ansible.plugins.filter.mathstuff import FilterModule as MathFilters
from ansible_collections.gpufleet.llm.plugins.filter import checks, gateway
from ansible_collections.gpufleet.llm.plugins.filter import fleet as fleet_filters
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet

ROLE = Path(__file__).resolve().parents[2] / "roles" / "gateway"
FILTERS = {
    name: filter
    for module in (gateway, checks, fleet_filters)
    for name, filter in module.FilterModule().filters().items()
}
KEYS = [character * 32 for character in "abcdef"]


def client(name: str, rate: int = 600, concurrent: int = 32, **more: Any) -> dict[str, Any]:
    """A client with a key of its own."""
    return {
        "name": name, "key": f"{name}-{KEYS[0]}", "requests_per_minute": rate, "concurrent_requests": concurrent, **more,
    }  # fmt: skip


def test_every_filter_is_described() -> None:
    for name in FILTERS:
        described = yaml.safe_load((ROLE.parents[1] / "plugins" / "filter" / f"{name}.yml").read_text())
        assert described["DOCUMENTATION"]["name"] == name


def test_mistakes_in_the_inventory_are_errors_that_name_the_host() -> None:
    hostvars = {"gpu1": {"vllm_instances": [{"name": "chat", "port": 8000}]}}
    for call in (
        lambda: gateway.gateway_fleet_with_backends(
            {"version": 1, "routes": [{"instance": "chat"}]}, hostvars, ["gpu1"], ["lb1"]
        ),
        lambda: fleet_filters.bind_address(hostvars, "gpu1", ["lb1"]),
        lambda: fleet_filters.fleet_address(hostvars, "gpu1"),
    ):
        with pytest.raises(AnsibleFilterError, match="gpu1: ansible_host is not set"):
            call()


@pytest.mark.parametrize(("rate", "burst"), [(1, 5), (30, 5), (60, 10), (601, 101)])
def test_the_burst_that_a_client_has_without_saying(rate: int, burst: int) -> None:
    assert fleet.Client.of(client("a", rate)).burst == burst


def test_gateways_outside_of_the_limit_are_judged_by_the_inventory() -> None:
    hostvars: dict[str, dict[str, Any]] = {
        "gpu1": {"vllm_instances": [{"name": "chat", "port": 8000}], "fleet_address": "10.0.0.1"},
        "good": {"gateway_routes": [{"model": "m", "instance": "chat"}], "gateway_server_names": ["llm.test"]},
        "nowhere": {"gateway_routes": [{"model": "m", "instance": "chatt"}], "gateway_server_names": ["llm.test"]},
        "nameless": {"gateway_routes": [{"model": "m", "instance": "chat"}]},
        "empty": {},
    }
    gateways = ["good", "nowhere", "nameless", "empty"]
    assert gateway.gateway_outside_problems(hostvars, [], ["gpu1"], gateways, "vllm") == []
    assert gateway.gateway_outside_problems(hostvars, ["good"], ["gpu1"], gateways, "vllm") == []
    problems = gateway.gateway_outside_problems(hostvars, gateways[1:], ["gpu1"], gateways, "vllm")
    assert [problem.partition(":")[0] for problem in problems] == [
        f"{name} (outside of --limit)" for name in gateways[1:]
    ]
    assert "no host of the group vllm has it" in problems[0]
    assert "gateway_server_names must list" in problems[1]
    assert "gateway_routes has no entry" in problems[2]


def test_variables_of_hosts_that_are_not_contacted_are_judged() -> None:
    good = {"vllm_instances": [{"name": "chat", "model": "m", "port": 8000}], "gateway_https_port": 443}
    typo = {**good, "vllm_instances": [{"name": "chat", "model": "m", "prot": 8000}], "gateway_server_name": ["x"]}
    assert fleet_filters.fleet_variable_problems({"gpu1": good, "gpu2": typo}, ["gpu1"]) == []
    found = fleet_filters.fleet_variable_problems({"gpu1": good, "gpu2": typo, "gpu3": typo}, ["gpu1", "gpu2", "gpu3"])
    assert found[:2] == [
        "gpu2, gpu3: gateway_server_name is not a variable of the role gateway; did you mean gateway_server_names?",
        "gpu2, gpu3: vllm_instances[0] (chat): key 'prot' is unknown; did you mean port?",
    ]
    assert [problem.partition(";")[0] for problem in found[2:]] == [
        "gpu2, gpu3: vllm_instances[0] (chat): port is missing"
    ]


def test_what_cannot_be_read_without_contact_is_no_mistake() -> None:
    class Facts(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise AnsibleUndefinedVariable("'ansible_facts' has no 'gpufleet'")

    assert fleet_filters.fleet_variable_problems({"gpu2": Facts(vllm_instances="...")}, ["gpu2"]) == []


def test_names_of_servers() -> None:
    assert checks.host_name_problems(["llm.example.com", "192.0.2.1", "2001:db8::1"], "names") == []
    assert len(checks.host_name_problems(["LLM", "a b", "a", "a"], "names")) == 3
    assert checks.subject_alt_names(["a.b", "192.0.2.1"]) == ["DNS:a.b", "IP:192.0.2.1"]


def test_names_that_a_certificate_covers() -> None:
    alternatives = ["DNS:a.test", "DNS:*.b.test", "IP:192.0.2.1", "IP Address:192.0.2.2"]
    assert checks.uncovered_names(["a.test", "x.b.test", "192.0.2.1", "192.0.2.2"], alternatives) == []
    assert checks.uncovered_names(["b.test", "y.x.b.test", "192.0.2.3"], alternatives) == [
        "b.test",
        "y.x.b.test",
        "192.0.2.3",
    ]


def render(template: str = "etc/nginx/nginx.conf.j2", release: str = "Debian-13", **more: Any) -> str:
    """The configuration as Ansible would write it, with the role's defaults."""
    values = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    internals = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    can = internals["__gateway_releases"][release]
    values |= {
        "ansible_managed": "Ansible managed",
        "__gateway_can": can,
        "__gateway_tls_ciphers": internals["__gateway_tls_ciphers"],
        "__gateway_tls_groups": (["?X25519MLKEM768"] if can["mlkem"] else []) + ["X25519", "prime256v1", "secp384r1"],
        **{name: text for name, text in internals.items() if name.endswith(("_file", "_directory"))},
        "__gateway_fleet_file": "/etc/vllm-gateway/fleet.json",
        "__gateway_internal_key_file": "/etc/vllm-gateway/internal_key",
        "__gateway_program_id": "0123456789ab",
        "__gateway_fleet_certificates": internals["__gateway_fleet_certificates"],
        "__gateway_backend_tls": True,
        "gateway_acme_webroot": "/var/lib/acme",
        "inventory_hostname": "gw-1",
        "groups": {"gateway": ["gw-1", "gw-2"]},
        "hostvars": {
            "gw-1": {"fleet_address": "10.0.0.1"},
            "gw-2": {"fleet_address": "fd00::2", "gateway_http_port": 80},
        },
        "gateway_server_names": ["llm.example.com", "2001:db8::1"],
        "gateway_routes": [{"model": "m", "instance": "chat"}],
        "gateway_clients": [client("a", 600), client("b", 60, 1), client("c", 600)],
        "gateway_internal_key": "internal-" + KEYS[1],
        **more,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROLE / "templates"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, keep_trailing_newline=True, autoescape=False,  # noqa: S701 - this is no HTML
    )  # fmt: skip
    environment.filters |= (
        CoreFilters().filters()
        | MathFilters().filters()
        | {f"gpufleet.llm.{name}": each for name, each in FILTERS.items()}
    )
    return environment.get_template(template).render(values)


@pytest.mark.parametrize(
    ("release", "has", "has_not"),
    [
        ("Debian-12", ["ssl http2;", "ssl_session_tickets off"], ["http2 on", "MLKEM"]),
        ("Ubuntu-24.04", ["ssl http2;"], ["http2 on", "MLKEM", "ssl_session_tickets"]),
        ("Debian-13", ["http2 on;", "?X25519MLKEM768:X25519"], ["ssl http2", "ssl_session_tickets"]),
        ("Ubuntu-26.04", ["http2 on;", "?X25519MLKEM768:X25519"], ["ssl http2", "ssl_session_tickets"]),
    ],
)
def test_a_release_gets_what_its_nginx_and_openssl_can_do(release: str, has: list[str], has_not: list[str]) -> None:
    text = render(release=release)
    assert [part for part in has if part not in text] == []
    assert [part for part in has_not if part in text] == []


def test_nothing_of_routes_clients_and_keys_is_in_the_program() -> None:
    text = render()
    for word in ("internal-" + KEYS[1], KEYS[0], '"a"', "chat@"):
        assert word not in text


BEHIND = {
    "gateway_trusted_proxies": ["10.0.0.5", "fd00::/64"],
    "gateway_proxy_protocol": True,
    "gateway_plain_http": True,
    "gateway_client_ca_file": "/etc/ssl/clients.pem",
}


@pytest.mark.parametrize("more", [{}, BEHIND], ids=["outermost", "behind"])
def test_gixy_finds_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    """A judge of its own. try_files is skipped: its one name is never that of a file, it only delays the answer."""
    (tmp_path / "mime.types").write_text("types { text/html html; }\n")
    configuration = tmp_path / "nginx.conf"
    # gixy does not know the one and would take all that follows for its content
    text = (
        render(**more)
        .replace("exit_worker_by_lua_block", "init_worker_by_lua_block")
        .replace("/etc/nginx/mime.types", str(tmp_path / "mime.types"))
    )
    configuration.write_text(text)
    command = [str(Path(sys.executable).parent / "gixy"), "--skips=try_files_is_evil_too", str(configuration)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
