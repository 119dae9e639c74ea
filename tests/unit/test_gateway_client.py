"""The client as which the playbooks ask a gateway."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.llm.plugins.filter import gateway
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, gateway_client

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


def test_keys_are_told_by_whose_they_are_and_how_they_begin() -> None:
    now = float(fleet.moment("2027-01-01"))
    clients = [
        client("a", {"key": KEY, "expires": "2027-01-05"}, {"key": OTHER}),
        client("b", {"key": "1" * 32, "expires": "2026-12-01"}, {"key": "2" * 32}, {"key": "3" * 32}),
        client("c", {"sha256": "0" * 64, "expires": "2027-01-10"}),
        client("d", {"sha256": "1" * 64, "expires": "2027-06-01"}),
    ]
    gone = {"client": "gone", "expires": None}
    former = {fleet.sha256(text): {"client": "x", "expires": None} for text in (KEY, "1" * 32, "2" * 32, "3" * 32)}
    lines = gateway_client.key_lines(clients, {**former, "0" * 64: gone, "1" * 64: gone, "f" * 64: gone}, now)
    begins = [fleet.sha256(text)[:8] for text in (KEY, OTHER, "1" * 32, "2" * 32, "3" * 32)]
    assert lines == [
        f"a {begins[0]}  is taken until 2027-01-05",
        f"a {begins[1]}  is taken without an end, and is new",
        f"b {begins[2]}  is refused since 2026-12-01; take it out of gateway_clients",
        f"b {begins[3]}  is taken without an end",
        f"b {begins[4]}  is taken without an end",
        "c 00000000  is taken until 2027-01-10",
        "d 11111111  is taken until 2027-06-01",
        "gone ffffffff  is taken no more: it is not in gateway_clients",
        "a has to use its new key before 2027-01-05",
        "b has 2 keys without an end: give `expires` to those that are to go",
        "c has no key after 2027-01-10: give it another one",
    ]
    assert gateway_client.key_checks(clients, now) == [
        {"name": f"a {begins[0]}", "key": KEY, "accepted": True},
        {"name": f"a {begins[1]}", "key": OTHER, "accepted": True},
        {"name": f"b {begins[2]}", "key": "1" * 32, "accepted": False},
        {"name": f"b {begins[3]}", "key": "2" * 32, "accepted": True},
        {"name": f"b {begins[4]}", "key": "3" * 32, "accepted": True},
    ]
