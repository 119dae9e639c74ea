"""A gateway for libraries: stand-ins for vLLM behind it, and one backend that a test tells what to answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.gateway.backends import INTERNAL, Backend
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running
from tests.stand_in.local import unpack, up

# The key of a client that may do one thing at a time, and only with the model `odd`.
FEW = "few-0123456789abcdef0123456789abcdef"
PATHS = [CHAT, "/v1/completions", "/v1/messages", "/v1/messages/count_tokens"]


class StandIn(Backend):
    """A stand-in for vLLM behind the gateway."""

    def __post_init__(self) -> None:
        """Its port is told by who started it."""


@contextlib.contextmanager
def served(directory: Path, odd: Backend, settings: dict[str, Any] | None = None, **more: Any) -> Iterator[Gateway]:
    """The models `generate` (also as gpt-4o) and `embed` of stand-ins, and `odd`. Settings of its fleet.json; more for who runs it."""
    site, backends = unpack(directory), []
    with contextlib.ExitStack() as stack:
        for kind in ("generate", "embed"):
            home = directory / kind
            home.mkdir()
            (home / "stand_in.json").write_text('{"start_seconds": 0, "seconds_per_token": 0.01}')
            options: dict[str, Any] = {
                "model": str(tiny_models.write(home, kind)),
                "served-model-name": [kind],
                "max-model-len": "auto",
            }
            server = up(site, home, INTERNAL, **options)
            stack.callback(server.process.wait)
            stack.callback(server.process.kill)
            backends.append(StandIn(f"{kind}@gpu-1"))
            backends[-1].port = server.port
        chat, embed = backends
        routes = [
            route("generate", [chat], aliases=["gpt-4o"]),
            route("embed", [embed], paths=["/v1/embeddings"]),
            route("odd", [odd], paths=PATHS),
        ]
        clients: dict[str, dict[str, Any]] = {"team-a": {}, "few": {"concurrent_requests": 1, "models": ["odd"]}}
        keys = {KEY: {"client": "team-a"}, FEW: {"client": "few"}}
        told = document(routes, [chat, embed, odd], clients, keys)
        told["settings"] |= settings or {}
        yield stack.enter_context(running(directory / "gateway", told, **more))
