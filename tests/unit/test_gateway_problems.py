"""What is wrong with routes and clients is said with the variable, the mistake and what is right, and without any key."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.filter import gateway
from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, gateway_problems

KEY, OTHER = "Sk/" + "x" * 20, "y" * 32
INTERNAL = "internal" * 4
NOW = float(fleet.moment("2027-01-01"))
HOSTS = ["gpu1", "gpu2"]
GATEWAYS = ["gw1"]


def inventory(**options: Any) -> dict[str, dict[str, Any]]:
    """Two hosts that have the same two instances."""
    instances = [
        {"name": "chat", "model": "qwen", "port": 8000, "options": options},
        {"name": "embed", "model": "bge", "port": 8001, "options": {"runner": "pooling", "convert": "embed"}},
    ]
    return {host: {"vllm_instances": instances, "fleet_address": f"10.0.0.{host[-1]}"} for host in HOSTS}


def route(model: str = "qwen", instance: str = "chat", **more: Any) -> dict[str, Any]:
    """A route."""
    return {"model": model, "instance": instance, **more}


def client(name: str = "a", **more: Any) -> dict[str, Any]:
    """A client; its key is its own unless keys are given."""
    own = {} if "keys" in more or "key" in more else {"key": f"{name}-{OTHER}"}
    return {"name": name, "requests_per_minute": 600, "concurrent_requests": 32, **own, **more}


def digest(text: str) -> str:
    """The SHA-256 of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_routes(routes: list[dict[str, Any]], hostvars: dict[str, Any] | None = None) -> list[str]:
    """What the preflight says of routes."""
    return gateway.gateway_route_problems(hostvars or inventory(), routes, HOSTS, GATEWAYS, "vllm")


def of_paths(routes: list[dict[str, Any]], default: list[str], hostvars: dict[str, Any] | None = None) -> list[str]:
    """What it says of their paths."""
    return gateway.gateway_path_problems(hostvars or inventory(), routes, HOSTS, GATEWAYS, default)


def of_clients(*clients: dict[str, Any], routes: list[dict[str, Any]] | None = None) -> list[str]:
    """What it says of clients."""
    said = gateway_problems.client_problems(clients, INTERNAL, NOW)
    return said + gateway_problems.access_problems([route()] if routes is None else routes, clients)


def test_good_routes_have_no_problems() -> None:
    routes = [
        route(aliases=["gpt-4o"], weight=3, min_available=2, balance="session", session_header="X-Chat"),
        route("qwen", "embed2", aliases=["gpt-4o"], min_available=0, balance="prefix"),
        route("bge", "embed"),
    ]
    hostvars = inventory(**{"served-model-name": ["other", "qwen"]})
    hostvars["gpu1"]["vllm_instances"] = [
        *hostvars["gpu1"]["vllm_instances"],
        {"name": "embed2", "model": "qwen", "port": 8002},
    ]
    assert of_routes(routes, hostvars) == []


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        ([route(instance="chatt")], "gateway_routes[0] (qwen) names the instance chatt, but no host of the group vllm has it in vllm_instances; there"),
        ([route("Qwen")], "gateway_routes[0] (Qwen): model must be the name by which the instance chat of gpu1 serves its model, qwen; other names"),
        ([route(), route()], "gateway_routes[1] (qwen) has the model and the instance of gateway_routes[0] (qwen); routes of one model share"),
        ([route(aliases=["qwen"])], "the alias qwen is the model itself; leave it out"),
        ([route(aliases=["bge"]), route("bge", "embed")], "gateway_routes[0] (qwen): the alias bge is the model of gateway_routes[1] (bge); choose another"),
        ([route(aliases=["x"]), route("bge", "embed", aliases=["x"])], "gateway_routes[1] (bge): the alias x is one of qwen as well; leave it to one"),
        ([route(aliases=[""])], "gateway_routes[0] (qwen): '' is no name of a model"),
        ([route(aliases=["a\n"])], "gateway_routes[0] (qwen): 'a\\n' is no name of a model"),
        ([route(weight=0)], "gateway_routes[0] (qwen): weight is 0; it must be at least 1"),
        ([route(weight=-1)], "weight is -1"),
        ([route(min_available=3)], "gateway_routes[0] (qwen): min_available is 3; it must be from 0 to 2, since the instance chat has 2 backends"),
        ([route(min_available=-1)], "min_available is -1"),
        ([route(session_header="x-chat")], "session_header has a meaning for `balance: session` only, and balance is least"),
        ([route(balance="session", session_header="x chat")], "session_header is 'x chat'; it must be the name of a header, such as x-session-id"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_route(routes: list[dict[str, Any]], said: str) -> None:
    problems = of_routes(routes)
    assert said in "\n".join(problems)
    assert len(problems) <= 2


def test_a_host_that_cannot_be_reached_is_named_once() -> None:
    hostvars = inventory()
    hostvars["gpu1"]["fleet_address"] = "gpu1.example"
    assert of_routes([route(min_available=1)], hostvars) == [
        "gateway_routes[0] (qwen): gpu1: fleet_address is 'gpu1.example'; it must be an IP address"
    ]
    assert of_paths([route()], ["/v1/models"], hostvars) == []


def test_an_adapter_may_be_a_model() -> None:
    assert of_routes([route("support")], inventory(**{"enable-lora": True})) == []


NONE = (
    "gateway_routes[0] (qwen): gateway_paths has none of the paths of the instance chat, whose options say runner: pooling; "
    "give the route `paths`, some of /v1/embeddings, /v2/embed, /v1/rerank"
)
NOT_THIS = (
    "gateway_routes[0] (bge): /v1/completions in paths is none that the instance embed can have, "
    "whose options say runner: pooling, convert: embed; it can have /v1/embeddings,"
)


@pytest.mark.parametrize(
    ("entry", "default", "options", "told"),
    [
        (route(), ["/v1/chat/completions"], {}, ""),
        (route(), ["/v1/chat/completions", "/v1/models"], {"runner": "pooling"}, NONE),
        (route(), ["/v1/rerank"], {"runner": "pooling"}, ""),
        (route(), ["/v1/embeddings"], {"convert": "classify"}, "whose options say convert: classify; give the route `paths`, some of /v1/rerank"),
        (route(), ["/v1/models"], {}, "gateway_paths has none of the paths of the instance chat; give the route `paths`, some of /v1/completions"),
        (route(), ["/v1/rerank"], "not a dictionary", ""),  # told by the argument spec of the role vllm
        (route(paths=["/v1/messages", "/tokenize", "/v1/models"]), [], {}, ""),
        (route(paths=[]), ["/v1/completions"], {}, "gateway_routes[0] (qwen): paths is empty"),
        (route("bge", "embed", paths=["/v1/embeddings", "/v1/completions"]), [], {}, NOT_THIS),
        (route(paths=["/nowhere"]), [], {}, ""),  # told by the argument spec, with those that there are
    ],
)  # fmt: skip
def test_paths_that_lead_to_no_model_are_told_beforehand(
    entry: dict[str, Any], default: list[str], options: Any, told: str
) -> None:
    hostvars = inventory()
    hostvars["gpu1"]["vllm_instances"][0]["options"] = options
    problems = of_paths([entry], default, hostvars)
    assert len(problems) == bool(told)
    assert told in "".join(problems)


@pytest.mark.parametrize(
    ("clients", "said"),
    [
        ([client("A")], "gateway_clients[0]: name is 'A'"),
        ([client("-a")], "gateway_clients[0]: name is '-a'"),
        ([client("a\n", key=KEY)], "gateway_clients[0]: name is"),
        ([client(), client(key=KEY)], "the name a is used twice"),
        ([client(key="short")], "the key of a is not at least 16 printable characters of ASCII without spaces; `openssl rand -hex 32` makes one"),
        ([client(key=KEY + " x")], "the key of a is not"),
        ([client(key=KEY + "\n")], "the key of a is not"),
        ([client(key=KEY + "é")], "the key of a is not"),
        ([client(keys=[{"key": KEY}, {"key": "short"}])], "keys[1] of a is not at least 16"),
        ([client(key=KEY, keys=[{"key": OTHER}])], "a has both `key` and `keys`; put the key into `keys`"),
        ([{**client(), "key": None}], "a has neither `key` nor `keys`"),
        ([client(keys=[])], "a has neither `key` nor `keys`"),
        ([client(keys=[{"key": KEY, "sha256": digest(KEY)}])], "keys[0] of a has both `key` and `sha256`"),
        ([client(keys=[{"expires": "2030-01-01"}])], "keys[0] of a has neither `key` nor `sha256`"),
        ([client(keys=[{"sha256": KEY}])], "sha256 of keys[0] of a is not 64 hexadecimal digits"),
        ([client(keys=[{"key": KEY, "expires": "next year"}])], "expires of keys[0] of a is 'next year'; it must be a date such as 2027-01-31, from which on"),
        ([client(key=KEY), client("b", key=KEY)], "a and b have the same key"),
        ([client(key=KEY), client("b", keys=[{"sha256": digest(KEY).upper()}])], "a and b have the same key"),
        ([client(keys=[{"key": KEY}, {"sha256": digest(KEY)}])], "keys[1] of a is there twice"),
        ([client(key=INTERNAL)], "the key of a is the internal key (gateway_internal_key, by default vllm_internal_key)"),
        ([client(keys=[{"key": KEY, "expires": "2026-01-01"}, {"sha256": digest(OTHER), "expires": "2027-01-01"}])], "every key of a has expired"),
        ([client(requests_per_minute=0)], "requests_per_minute of a is 0; it must be at least 1"),
        ([client(concurrent_requests=0)], "concurrent_requests of a is 0"),
        ([client(burst=-1)], "burst of a is -1; it must be at least 0"),
        ([client(tokens_per_month=0)], "tokens_per_month of a is 0"),
        ([client(models=["bge"])], "gateway_clients: bge in models of a is no model of gateway_routes; there are qwen"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_clients_is_said_without_their_keys(clients: list[dict[str, Any]], said: str) -> None:
    problems = of_clients(*clients)
    assert len(problems) == 1
    assert said in problems[0]
    assert not any(key in problems[0] for key in (KEY, OTHER, INTERNAL, "short"))


def test_good_clients_have_no_problems() -> None:
    several = client(
        "default", burst=0, models=["qwen"], keys=[{"key": KEY, "expires": "2020-01-01"}, {"sha256": digest(OTHER)}]
    )
    assert of_clients(client(key="a" * 16), several, routes=[route(clients=["a", "default"])]) == []


@pytest.mark.parametrize(
    ("routes", "clients", "said"),
    [
        ([route(clients=["b", "tea"])], [client("b"), client("team")], "(qwen): tea in clients is none of gateway_clients; did you mean team?"),
        ([route(clients=["x"])], [client("b")], "gateway_routes[0] (qwen): x in clients is none of gateway_clients; there are b"),
        ([route(clients=[])], [client("b")], "gateway_routes[0] (qwen): clients is empty, so nobody may ask"),
        ([route(aliases=["gpt"])], [client("b", models=["gpt"])], "gpt in models of b is no model of gateway_routes; it is an alias of qwen, name that"),
    ],
)  # fmt: skip
def test_who_may_use_what_has_to_exist(routes: list[dict[str, Any]], clients: list[dict[str, Any]], said: str) -> None:
    problems = of_clients(*clients, routes=routes)
    assert len(problems) == 1
    assert said in problems[0]


@pytest.mark.parametrize(
    ("clients", "options", "said"),
    [
        ([client()], {}, ""),
        ([client(keys=[{"key": KEY, "expires": "2026-12-31"}, {"key": OTHER}])], {}, "a key of a expired on 2026-12-31; take it out of gateway_clients"),
        ([client(keys=[{"key": KEY, "expires": "2027-01-10"}])], {}, "the last key of a expires on 2027-01-10; give it another one in `keys`"),
        ([client(keys=[{"key": KEY, "expires": "2027-01-10"}, {"key": OTHER, "expires": "2027-03-01"}])], {}, ""),
        ([client(priority=1)], {}, "priority of a has no effect: none of the instances that it may ask has the option scheduling-policy: priority"),
        ([client(priority=1)], {"scheduling-policy": "priority"}, ""),
        ([client(models=["bge"])], {}, "a may ask for no model"),
    ],
)  # fmt: skip
def test_what_may_not_be_meant(clients: list[dict[str, Any]], options: dict[str, Any], said: str) -> None:
    there = gateway_problems.Fleet.of(inventory(**options), HOSTS, GATEWAYS)
    found = gateway_problems.warnings([route()], clients, there, NOW)
    assert len(found) == bool(said)
    assert said in "".join(found)
    assert KEY not in "".join(found)


def test_many_routes_and_clients_are_judged_in_no_time() -> None:
    instances = [{"name": f"i{number}", "model": f"m{number}", "port": 8000 + number} for number in range(500)]
    reads = 0

    class Counted(dict[str, Any]):
        """Variables of a host, each look at which Ansible would render."""

        def get(self, name: str, default: Any = None) -> Any:
            nonlocal reads
            reads += 1
            return super().get(name, default)

    hostvars = {host: Counted(vllm_instances=instances, fleet_address=f"10.0.0.{host[-1]}") for host in HOSTS}
    routes = [route(f"m{number}", f"i{number}", clients=["c0", "c9999"]) for number in range(500)]
    clients = [client(f"c{number}", models=["m1"]) for number in range(10000)]
    began = time.monotonic()
    assert of_routes(routes, hostvars) + of_paths(routes, ["/v1/completions"], hostvars) == []
    assert of_clients(*clients, routes=routes) == []
    assert len(gateway.gateway_warnings(hostvars, routes, clients, HOSTS, GATEWAYS)) == 9998
    asked = {
        "routes": routes, "clients": clients, "paths": ["/v1/completions"], "internal_key": INTERNAL, "hosts": HOSTS, "gateways": GATEWAYS,
        "settings": {},
    }  # fmt: skip
    assert len(gateway.gateway_fleet(hostvars, "gw1", asked)["keys"]) == 10000
    assert time.monotonic() - began < 20, "a few seconds"
    assert reads <= 4 * len(HOSTS) * len(fleet.OF_BACKENDS) + 2 * len(HOSTS)


# --- what stands in front


def test_proxies_are_addresses_and_networks() -> None:
    assert gateway.gateway_proxy_problems(["10.0.0.5", "10.0.8.0/24", "fd00:8:0::/64", "fd00::1", "10.0.0.5/32"]) == []


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("balancer.test", "balancer.test is neither an address nor a network; write it as 10.0.0.5"),
        ("10.0.0.0/33", "10.0.0.0/33 is neither an address nor a network"),
        ("0.0.0.0/0", "0.0.0.0/0 is everybody, so every client could choose its address"),
        ("::/0", "::/0 is everybody"),
        ("10.0.8.1/24", "write 10.0.8.1 for the one or 10.0.8.0/24 for the other"),
        ("unix:", "unix: is neither an address nor a network"),
    ],
)
def test_a_proxy_that_cannot_be_trusted_is_a_problem(network: str, said: str) -> None:
    [problem] = gateway.gateway_proxy_problems(["10.0.0.5", network])
    assert problem.startswith("gateway_trusted_proxies: ")
    assert said in problem


def test_origins_are_what_browsers_send() -> None:
    right = [
        "https://chat.example.com",
        "http://localhost:3000",
        "https://[2001:db8::1]:8443",
        "tauri://localhost",
        "http://a.test:443",
    ]
    assert gateway.gateway_origin_problems(right) == []


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "chat.example.com", "https://chat.example.com/", "https://Chat.example.com", "https://*.example.com", "https://a.test:443",
     "http://a.test:80", "https://a.test/page", "https://a.test, https://b.test", ""],
)  # fmt: skip
def test_what_is_no_origin_is_a_problem(origin: str) -> None:
    [problem] = gateway.gateway_origin_problems(["https://chat.example.com", origin])
    assert problem.startswith(f"gateway_cors_origins: {origin} is no exact origin; write ")
