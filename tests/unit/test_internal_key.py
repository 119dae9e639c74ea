"""What stands in front of vLLM and asks for the internal key, asked as a server of ASGI asks it; and the file with the keys, as the role writes it."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import vllm_keys

PROGRAM = Path(__file__).resolve().parents[2] / "roles/vllm/files/fleet_internal_key.py"
OLD, NEW, THIRD = (letter * 40 for letter in "onx")
NOW = 1_000_000


class Front:
    """The middleware, in front of an application that says what reached it."""

    def __init__(self, file: Path, module: ModuleType) -> None:
        self.file = file
        self.reached: list[str] = []
        self.application = module.InternalKey(self.behind)

    async def behind(self, scope: Any, _receive: Any, send: Any) -> None:
        self.reached.append(scope["type"])
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for piece in (b"one", b"two"):
                await send({"type": "http.response.body", "body": piece, "more_body": piece == b"one"})

    def sent(self, **scope: Any) -> list[dict[str, Any]]:
        """What is sent for a request."""
        messages: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)

        whole = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], **scope}
        asyncio.run(self.application(whole, None, send))
        return messages

    def status(self, *authorization: str, **scope: Any) -> int:
        """The status of a request with such headers."""
        headers = [(b"authorization", value.encode("latin-1")) for value in authorization]
        return int(self.sent(headers=headers, **scope)[0]["status"])

    def write(self, text: str) -> None:
        """Replace the file by rename, as `tree` does."""
        aside = self.file.with_name("aside")
        aside.write_text(text)
        aside.rename(self.file)


def loaded(monkeypatch: pytest.MonkeyPatch, file: str | None) -> ModuleType:
    """The program, loaded as vLLM loads it."""
    if file is None:
        monkeypatch.delenv("FLEET_INTERNAL_KEYS", raising=False)
    else:
        monkeypatch.setenv("FLEET_INTERNAL_KEYS", file)
    spec = importlib.util.spec_from_file_location("fleet_internal_key", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Front:
    file = tmp_path / "accepted"
    file.write_text(f"{vllm_keys.digest(OLD)}\n")
    return Front(file, loaded(monkeypatch, str(file)))


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        ([f"Bearer {OLD}"], 200),
        ([f"bearer {OLD}"], 200),  # RFC 9110, 11.1: schemes have no case
        ([f"BEARER  {OLD}"], 200),
        ([], 401),
        ([""], 401),
        (["Bearer"], 401),
        (["Bearer "], 401),
        ([OLD], 401),
        ([f"Basic {OLD}"], 401),
        ([f"Bearer {OLD[:-1]}"], 401),
        ([f"Bearer {OLD}x"], 401),
        ([f"Bearer {OLD.upper()}"], 401),
        ([f"Bearer {vllm_keys.digest(OLD)}"], 401),  # what is read on the host lets nobody in
        (["Bearer \xff"], 401),
        ([f"Bearer {OLD}", f"Bearer {NEW}"], 401),  # which of them a proxy between would have meant, nobody knows
    ],
)
def test_who_is_let_in(front: Front, authorization: list[str], expected: int) -> None:
    assert front.status(*authorization) == expected
    assert front.reached == ["http"] * (expected == 200)


def test_an_answer_goes_through_piece_by_piece(front: Front) -> None:
    headers = [(b"authorization", f"Bearer {OLD}".encode())]
    assert [message.get("body") for message in front.sent(headers=headers)] == [None, b"one", b"two"]


def test_a_refusal_is_an_error_as_openai_tells_it(front: Front) -> None:
    start, body = front.sent()
    assert dict(start["headers"])[b"www-authenticate"] == b"Bearer"
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert body["body"].startswith(b'{"error": {"message": ')
    assert OLD.encode() not in body["body"]


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/health", 200),
        ("GET", "/metrics", 200),
        ("POST", "/health", 401),
        ("GET", "/health/", 401),
        ("GET", "//health", 401),
        ("GET", "/v1/models", 401),
        ("GET", "/version", 401),
        ("POST", "/invocations", 401),
        ("POST", "/scale_elastic_ep", 401),
        ("OPTIONS", "/v1/models", 401),
    ],
)
def test_what_is_asked_without_a_key(front: Front, method: str, path: str, expected: int) -> None:
    assert front.status(method=method, path=path) == expected


def test_a_websocket_is_asked_as_well(front: Front) -> None:
    socket: dict[str, Any] = {"type": "websocket", "path": "/health"}
    assert front.sent(**socket) == [{"type": "websocket.close", "code": 1008}]
    denied = front.sent(**socket, extensions={"websocket.http.response": {}})
    assert [(message["type"], message.get("status")) for message in denied] == [
        ("websocket.http.response.start", 401),
        ("websocket.http.response.body", None),
    ]
    assert front.reached == []
    front.sent(**socket, headers=[(b"authorization", f"Bearer {OLD}".encode())])
    front.sent(type="lifespan")
    assert front.reached == ["websocket", "lifespan"]


def test_a_change_of_the_file_counts_at_once(front: Front) -> None:
    shown = [f"Bearer {key}" for key in (OLD, NEW)]
    assert [front.status(key) for key in shown] == [200, 401]
    front.write(vllm_keys.accepted(front.file.read_text(), vllm_keys.digest(NEW), NOW))
    assert [front.status(key) for key in shown] == [200, 200]
    front.write(vllm_keys.ending(front.file.read_text(), vllm_keys.digest(NEW), int(time.time()) + 60))
    assert [front.status(key) for key in shown] == [200, 200]
    front.write(f"{vllm_keys.digest(NEW)}\n{vllm_keys.digest(OLD)} {int(time.time())}\n")
    assert [front.status(key) for key in shown] == [401, 200]


def unreadable(front: Front) -> None:
    front.file.unlink()
    front.file.mkdir()


@pytest.mark.parametrize(
    "broken",
    [
        lambda front: front.file.unlink(),
        lambda front: front.write(""),
        lambda front: front.write(f"{OLD}\n"),
        lambda front: front.write(f"{vllm_keys.digest(OLD)} soon\n"),
        unreadable,
    ],
)
def test_without_a_key_in_the_file_everybody_is_refused(
    front: Front, broken: Callable[[Front], object], caplog: pytest.LogCaptureFixture
) -> None:
    assert front.status(f"Bearer {OLD}") == 200
    broken(front)
    assert [front.status(f"Bearer {OLD}") for _ in range(3)] == [401] * 3
    assert front.status(method="GET", path="/health") == 200
    [told] = caplog.records
    assert "every request is refused" in told.getMessage()
    assert OLD not in told.getMessage()


def test_it_comes_back_with_the_file(front: Front) -> None:
    text = front.file.read_text()
    front.file.unlink()
    assert front.status(f"Bearer {OLD}") == 401
    front.write(text)
    assert front.status(f"Bearer {OLD}") == 200


def test_without_the_name_of_the_file_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="FLEET_INTERNAL_KEYS"):
        loaded(monkeypatch, None)


# --- the file


def test_a_new_key_is_taken_beside_the_former_one() -> None:
    before = vllm_keys.rendered({vllm_keys.digest(OLD): None})
    both = vllm_keys.accepted(before, vllm_keys.digest(NEW), NOW)
    assert vllm_keys.parsed(both) == {vllm_keys.digest(NEW): None, vllm_keys.digest(OLD): None}
    assert vllm_keys.former(before, vllm_keys.digest(NEW)), "while it is not yet written"
    assert vllm_keys.former(both, vllm_keys.digest(NEW))
    assert not vllm_keys.former(before, vllm_keys.digest(OLD))
    assert not vllm_keys.former("", vllm_keys.digest(NEW))
    assert vllm_keys.accepted("", vllm_keys.digest(NEW), NOW) == f"{hashlib.sha256(NEW.encode()).hexdigest()}\n"


def test_a_second_run_writes_the_same() -> None:
    """Also of a key that has ended: it goes with the next change, not with the clock."""
    text = vllm_keys.rendered({vllm_keys.digest(NEW): None, vllm_keys.digest(OLD): NOW - 1})
    assert vllm_keys.accepted(text, vllm_keys.digest(NEW), NOW) == text
    assert vllm_keys.parsed(vllm_keys.accepted(text, vllm_keys.digest(THIRD), NOW)) == {
        vllm_keys.digest(THIRD): None,
        vllm_keys.digest(NEW): None,
    }


def test_an_end_stays_where_it_was_and_a_key_may_come_back() -> None:
    text = vllm_keys.rendered(
        {vllm_keys.digest(NEW): None, vllm_keys.digest(OLD): NOW + 9, vllm_keys.digest(THIRD): None}
    )
    ended = vllm_keys.ending(text, vllm_keys.digest(NEW), NOW + 100)
    assert list(vllm_keys.parsed(ended).values()) == [None, NOW + 9, NOW + 100]
    back = vllm_keys.accepted(ended, vllm_keys.digest(OLD), NOW)
    assert vllm_keys.parsed(back) == {
        vllm_keys.digest(OLD): None,
        vllm_keys.digest(NEW): None,
        vllm_keys.digest(THIRD): NOW + 100,
    }


def test_what_an_operator_is_told() -> None:
    text = vllm_keys.rendered({vllm_keys.digest(NEW): None, vllm_keys.digest(OLD): NOW + 9})
    [told] = vllm_keys.notes(text, vllm_keys.digest(NEW), NOW)
    assert told == "A former internal key is taken as well, until 1970-01-12 13:46:49 UTC."
    assert vllm_keys.notes(text, vllm_keys.digest(NEW), NOW + 9) == []
    [told] = vllm_keys.notes(text, vllm_keys.digest(THIRD), NOW)
    assert "until site.yml has given the new one to every gateway" in told
