"""The client as which the playbooks ask a gateway."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.filter import gateway

KEY, OTHER = "k" * 32, "o" * 32
HOSTVARS: dict[str, dict[str, Any]] = {
    "gpu1": {
        "fleet_address": "10.0.0.1",
        "vllm_instances": [
            {"name": "chat", "model": "qwen", "port": 8000},
            {"name": "chat2", "model": "qwen", "port": 8001},
            {"name": "embed", "model": "bge", "port": 8002, "options": {"convert": "embed"}},
        ],
    },
}
ROUTES: list[dict[str, Any]] = [
    {"model": "qwen", "instance": "chat", "aliases": ["gpt"]},
    {"model": "qwen", "instance": "chat2", "aliases": ["gpt", "o1"], "paths": ["/v1/messages"], "clients": ["a"]},
    {"model": "bge", "instance": "embed", "clients": ["b"]},
]


def client(name: str, *keys: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A client."""
    return {"name": name, "keys": list(keys), "requests_per_minute": 60, "concurrent_requests": 4, **more}


HASHED = client("h", {"sha256": "0" * 64})
ENDED = client("e", {"key": KEY, "expires": "2020-01-01"})
A = client("a", {"key": KEY, "expires": "2999-01-01"}, {"key": OTHER})
B = client("b", {"key": KEY})


def asker(clients: list[dict[str, Any]], wanted: str = "", **more: Any) -> dict[str, Any]:
    """Who asks."""
    return gateway.gateway_asker(HOSTVARS, ROUTES, clients, ["gpu1"], ["gw1"], wanted, **more)


def test_the_first_client_with_a_known_key_asks_for_what_it_may() -> None:
    found = asker([HASHED, ENDED, A, B], paths=["/v1/chat/completions", "/v1/embeddings", "/v1/models"])
    assert found == {
        "name": "a", "key": OTHER, "others": ["bge"],
        "routes": [{"model": "qwen", "aliases": ["gpt", "o1"], "paths": ["/v1/chat/completions", "/v1/embeddings", "/v1/messages"]}],
    }  # fmt: skip


def test_another_client_asks_when_it_is_named() -> None:
    found = asker([A, B], "b")
    assert [(route["model"], route["paths"]) for route in found["routes"]][1] == (
        "bge",
        ["/v1/embeddings", "/v1/rerank", "/v1/score"],
    )
    assert (found["name"], found["key"], found["others"]) == ("b", KEY, [])


@pytest.mark.parametrize(
    ("clients", "wanted", "said"),
    [
        ([A], "c", "verify_client is c; it must be one of gateway_clients: a"),
        ([A, HASHED], "h", "verify_client is h, of which gateway_clients has no key that can be shown: only SHA-256"),
        ([HASHED, ENDED], "", "no client in gateway_clients has a key that can be shown"),
    ],
)
def test_nobody_can_ask(clients: list[dict[str, Any]], wanted: str, said: str) -> None:
    [problem] = gateway.gateway_asker_problems(clients, wanted)
    assert problem.startswith(said)
    assert KEY not in problem
    with pytest.raises(AnsibleFilterError, match="gateway_clients"):
        asker(clients, wanted)


def test_somebody_can() -> None:
    assert gateway.gateway_asker_problems([HASHED, A]) == []
