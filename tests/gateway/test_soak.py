"""What a turn reads of a gateway once an instance is back: a release that fails, cuts its streams or is slow is told from the others, a good one is not."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import soak
from ansible_collections.gpufleet.llm.plugins.modules import gateway_soak

from tests.gateway.backends import Asked, Backend, Handler
from tests.gateway.harness import CHAT, Gateway, document, route, running
from tests.gateway.test_account import account_of, chunks, event

NEW, OLD = Backend("chat@gpu-1"), Backend("chat@gpu-2")
FLEET = document([route("small", [NEW, OLD], retry=False)], [NEW, OLD])
Answers = Callable[[Handler, Asked], None]


def streaming(before_first: float = 0.0, ends: bool = True) -> Answers:
    """A backend that streams three tokens."""

    def answer(handler: Handler, _asked: Asked) -> None:
        def parts() -> Iterator[bytes]:
            time.sleep(before_first)
            yield from chunks(3)
            if ends:
                yield event(
                    {
                        "id": "c",
                        "object": "chat.completion.chunk",
                        "model": "small",
                        "choices": [],
                        "usage": account_of(5, 3),
                    }
                )
                yield event("[DONE]")

        handler.stream(parts())

    return answer


def failing(handler: Handler, _asked: Asked) -> None:
    handler.reply(500, {"error": {"message": "no"}})


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    for backend in (NEW, OLD):
        backend.reset()
        backend.answer = streaming()
    with running(tmp_path, FLEET, [NEW.id, OLD.id]) as gateway:
        yield gateway


def look(gateway: Gateway) -> dict[str, Any]:
    """What the module says of this gateway."""
    backends = soak.read(gateway_soak.scrape(str(gateway.directory / "run/vllm-gateway/admin.sock")))
    return {"item": "gw-1", "backends": backends, "problem": ""}


def requests(found: dict[str, Any]) -> float:
    return sum(soak.counts(one).requests for one in found["backends"].values())


@pytest.mark.parametrize(
    ("answers", "wrong"),
    [
        (streaming(), ""),
        (failing, "ended with an error"),
        (streaming(ends=False), "were cut or given up"),
        (streaming(before_first=0.6), "of its streams began after"),
    ],
    ids=["good", "fails", "cuts", "slow"],
)
def test_a_worse_release_is_told_from_the_others(gateway: Gateway, answers: Answers, wrong: str) -> None:
    NEW.answer, enough = answers, 40
    if answers is failing:
        # it is avoided, unless the others have much to do
        OLD.answer, enough = streaming(before_first=0.2), 2
    assert soak.idle([look(gateway)], [NEW.id])[-1].endswith("has ever had a request for chat: nothing is watched")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ask = lambda _number: gateway.ask(CHAT, {"model": "small", "stream": True})  # noqa: E731 -- short
        list(pool.map(ask, range(4)))
        gateway.until(lambda: requests(look(gateway)) == 4)
        first = look(gateway)
        assert soak.idle([first], [NEW.id]) == []
        while len(NEW.asked) <= enough or len(OLD.asked) <= 40:
            list(pool.map(ask, range(24)))
        asked = len(NEW.asked) + len(OLD.asked)
        gateway.until(lambda: requests(look(gateway)) == asked)
        second = look(gateway)
    found = soak.summary([first], [second], [NEW.id], [NEW.id], soak.Rules())
    assert found["silent"] == []
    assert found["verdicts"][0]["verdict"] == ("bad" if wrong else "good"), found
    assert wrong in " ".join(found["wrong"])
    assert bool(found["wrong"]) == bool(wrong)


def test_without_a_gateway_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        gateway_soak.scrape(str(tmp_path / "admin.sock"))
