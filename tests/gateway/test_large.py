"""A fleet of 500 routes and 10,000 clients: how long a gateway takes to start and to reload, and what a request costs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gateway.backends import Backend, Handler
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running

ROUTES, CLIENTS = 500, 10_000


def answer(handler: Handler, _asked: object) -> None:
    handler.reply(200, b"{}")


def large(backend: Backend, routes: int = ROUTES, clients: int = CLIENTS) -> dict[str, Any]:
    """So many routes, whose backends are all at one place, and so many clients with a key each."""
    backends = [Backend.__new__(Backend) for _ in range(routes)]
    for number, one in enumerate(backends):
        one.id, one.host, one.port = f"instance{number}@gpu-{number % 50}", backend.host, backend.port
    made = [route(f"model-{number}", [one], aliases=[f"alias-{number}"]) for number, one in enumerate(backends)]
    names: dict[str, dict[str, Any]] = {f"client-{number}": {} for number in range(clients)}
    keys = {key_of(number): {"client": f"client-{number}"} for number in range(clients)} | {KEY: {"client": "client-0"}}
    return document(made, backends, names, keys)


def key_of(number: int) -> str:
    return f"{number:032d}"


def seconds_of_requests(gateway: Gateway, models: Sequence[str], keys: Sequence[str]) -> float:
    """The median of requests for these models with these keys, one after the other."""
    return gateway.median_seconds((json.dumps({"model": model}), key) for model, key in zip(models, keys, strict=True))


def test_a_large_fleet(tmp_path: Path) -> None:
    backend = Backend("all@gpu-1", answer=answer)
    fleet = large(backend)
    begun = time.monotonic()
    with running(tmp_path, fleet, list(fleet["backends"])) as gateway:
        assert time.monotonic() - begun < 10
        models = [f"model-{number * 37 % ROUTES}" for number in range(200)]
        cost = seconds_of_requests(gateway, models, [key_of(number * 97 % CLIENTS) for number in range(200)])
        assert cost < 0.05
        del fleet["keys"][next(iter(fleet["keys"]))]
        begun = time.monotonic()
        gateway.configure(fleet)
        assert time.monotonic() - begun < 5
        assert gateway.ask(CHAT, {"model": "alias-499"}, key=key_of(9999)).status == 200
        assert gateway.ask(CHAT, {"model": "model-0"}, key=key_of(0)).status == 401
        listed = gateway.ask("/v1/models").json["data"]
        assert len(listed) == ROUTES
