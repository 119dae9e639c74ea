"""What a request needs to reach a backend, and what reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.backends import INTERNAL, Backend
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running

FIRST, SECOND = Backend("chat@gpu-1"), Backend("code@gpu-2")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("gateway")
    routes = [route("small", [FIRST], aliases=["gpt-4o"]), route("big", [SECOND])]
    with running(directory, document(routes, [FIRST, SECOND]), [FIRST.id, SECOND.id]) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh() -> None:
    FIRST.reset()
    SECOND.reset()


def test_the_model_chooses_the_route(gateway: Gateway) -> None:
    assert gateway.ask(CHAT, {"model": "small"}).json["backend"] == FIRST.id
    assert gateway.ask(CHAT, {"model": "big"}).json["backend"] == SECOND.id
    (asked,) = FIRST.asked
    assert (asked.method, asked.path, asked.json) == ("POST", CHAT, {"model": "small"})
    assert asked.headers["authorization"] == f"Bearer {INTERNAL}"
    assert KEY not in str(asked)
