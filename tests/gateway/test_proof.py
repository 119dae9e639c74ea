"""From an inventory to the proof from the outside: data as the role makes it, a gateway, stand-ins for vLLM behind it, and what verify.yml asks.

So what the programs of docs/clients.md meet is what the page says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from ansible_collections.gpufleet.llm.plugins.filter import gateway as filters
from ansible_collections.gpufleet.llm.plugins.module_utils import endpoint_checks, endpoint_keys, model_kinds
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import Endpoint

from tests import tiny_models
from tests.gateway.backends import INTERNAL
from tests.gateway.harness import NAME, ROOT, Gateway, running, sha256
from tests.stand_in import local

HOSTS, GATEWAYS = ["gpu1"], ["gw1"]
WIDE, NARROW, OLD, HASHED = (
    "Wide/Key-of.Another=System",
    "narrow-0123456789abcdef",
    "old-0123456789abcdef0",
    "hashed-0123456789abcdef",
)
LIMITS = {"requests_per_minute": 60000, "burst": 1000, "concurrent_requests": 10}
CLIENTS: list[dict[str, Any]] = [
    {"name": "hashed", "keys": [{"sha256": sha256(HASHED)}], **LIMITS},
    {"name": "wide", "keys": [{"key": OLD, "expires": "2020-01-01"}, {"key": WIDE}], **LIMITS},
    {"name": "narrow", "key": NARROW, "models": ["tiny-embedding"], **LIMITS},
]
ROUTES: list[dict[str, Any]] = [
    {"model": "small", "instance": "chat", "aliases": ["gpt-4o"], "clients": ["wide", "hashed"]},
    {"model": "tiny-embedding", "instance": "embed", "aliases": ["acme/embed"]},
    {"model": "small", "instance": "other", "weight": 2, "aliases": ["gpt-4o"], "clients": ["wide"]},
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, Any]]]:
    """The gateway, and the variables of the hosts."""
    site = local.unpack(tmp_path_factory.mktemp("stand_in"))
    homes = {name: tmp_path_factory.mktemp(name) for name in ("chat", "embed", "other")}
    model = tiny_models.write(tmp_path_factory.mktemp("models"), "embed")
    embeds = {"model": str(model), "served-model-name": ["tiny-embedding"], "max-model-len": "auto"}
    started = {
        name: local.up(site, home, INTERNAL, **(embeds if name == "embed" else {})) for name, home in homes.items()
    }
    options = {"embed": {"runner": "pooling"}}
    instances = [
        {
            "name": name, "model": "tiny-embedding" if name == "embed" else "small", "port": server.port,
            "options": options.get(name, {}),
        }
        for name, server in started.items()
    ]  # fmt: skip
    # loopback is nothing that another host could reach, so it is not in the inventory but put in afterwards
    hostvars = {"gpu1": {"vllm_instances": instances, "fleet_address": "10.0.0.1"}}
    asked = {
        "routes": ROUTES, "clients": CLIENTS, "paths": model_kinds.open_paths(), "internal_key": INTERNAL, "hosts": HOSTS,
        "gateways": GATEWAYS, "settings": {"cors_origins": []},
    }  # fmt: skip
    data = filters.gateway_fleet(hostvars, "gw1", asked)
    for backend in data["backends"].values():
        backend["address"] = "127.0.0.1"
    try:
        with running(tmp_path_factory.mktemp("gateway"), data, list(data["backends"])) as gateway:
            yield gateway, hostvars
    finally:
        for server in started.values():
            server.process.kill()


def endpoint(gateway: Gateway, key: str) -> Endpoint:
    """What verify.yml asks, with the key of a client."""
    return Endpoint(f"https://{NAME}:{gateway.port}", key, "127.0.0.1", str(gateway.ca_file), timeout=20)


def proof(fleet: tuple[Gateway, dict[str, Any]], wanted: str = "") -> tuple[dict[str, Any], list[dict[str, str]]]:
    """As whom verify.yml asks, and what comes of it."""
    gateway, hostvars = fleet
    asker = filters.gateway_asker(hostvars, ROUTES, CLIENTS, HOSTS, GATEWAYS, wanted)
    routes = [endpoint_checks.Route.of(entry) for entry in asker["routes"]]
    return asker, endpoint_checks.verify(endpoint(gateway, asker["key"]), routes, ["/metrics", "/invocations"], 7)


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ("", ["completion small", "streaming small", "alias gpt-4o", "embedding tiny-embedding", "alias acme/embed"]),
        ("narrow", ["embedding tiny-embedding", "alias acme/embed"]),
    ],
)
def test_every_route_of_a_client_is_proved(fleet: tuple[Gateway, dict[str, Any]], wanted: str, rows: list[str]) -> None:
    asker, found = proof(fleet, wanted)
    assert [row for row in found if row["result"] != "ok"] == []
    assert [row["check"] for row in found][3:-3] == rows
    assert [row["check"] for row in found][-3] == "unknown model"
    assert asker["others"] == (["small"] if wanted else [])


def test_a_client_sees_its_own_models_and_no_others(fleet: tuple[Gateway, dict[str, Any]]) -> None:
    gateway, _hostvars = fleet
    routes = [endpoint_checks.Route("small"), endpoint_checks.Route("tiny-embedding")]
    found = endpoint_checks.verify(endpoint(gateway, NARROW), routes, [], 7)
    assert {row["check"] for row in found if row["result"] != "ok"} == {"models", "completion small", "streaming small"}


def test_keys_are_taken_and_refused_as_the_inventory_says(fleet: tuple[Gateway, dict[str, Any]]) -> None:
    gateway, _hostvars = fleet
    keys = [endpoint_keys.Shown.of(entry) for entry in filters.gateway_key_checks(CLIENTS)]
    rows = endpoint_keys.check_keys(endpoint(gateway, ""), [*keys, endpoint_keys.Shown("hashed", True, HASHED)])
    assert [row for row in rows if row["result"] != "ok"] == []
    assert sorted(row["detail"] for row in rows) == ["200, taken"] * 3 + ["401, refused"]


def test_the_page_for_clients_works_as_it_is_printed(fleet: tuple[Gateway, dict[str, Any]]) -> None:
    gateway, _hostvars = fleet
    page = (ROOT / "docs/clients.md").read_text().replace("qwen2.5-7b", "gpt-4o").replace("bge-m3", "tiny-embedding")
    python = page.partition("### openai for Python")[2].partition("```python\n")[2].partition("```")[0]
    curl = page.partition("### curl\n")[2].partition('`"stream"')[0].replace("ca.pem", str(gateway.ca_file))
    told = {
        **os.environ, "FLEET": gateway.base_url.removesuffix("/v1"), "FLEET_KEY": WIDE, "SSL_CERT_FILE": str(gateway.ca_file),
    }  # fmt: skip
    for command, right in (([sys.executable, "-c", python], "numbers: 16"), (["sh", "-c", curl], '"choices"')):
        done = subprocess.run(command, env=told, capture_output=True, text=True, check=False, cwd=Path("/"))
        assert done.returncode == 0, done.stderr
        assert right in done.stdout


def test_the_library_of_openai_reads_the_errors(fleet: tuple[Gateway, dict[str, Any]]) -> None:
    gateway, _hostvars = fleet
    http = openai.DefaultHttpxClient(verify=gateway.tls, trust_env=False)
    with openai.OpenAI(base_url=gateway.base_url, api_key=NARROW, http_client=http, max_retries=0) as client:
        for call, code in (
            (lambda: client.completions.create(model="small", prompt="Hi"), "model_not_found"),
            (lambda: client.completions.create(model="tiny-embedding", prompt="Hi"), "not_served"),
            (lambda: client.models.retrieve("small"), "model_not_found"),
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                call()
            assert refused.value.code == code
        assert client.models.retrieve("tiny-embedding").id == "tiny-embedding"
