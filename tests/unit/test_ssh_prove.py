"""The proof that one still gets in, without a network: what is asked, how often, and what is made of the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.action import ssh_prove
from ansible_collections.gpufleet.llm.plugins.action.ssh_prove import ActionModule, UnprovedError
from ansible_collections.gpufleet.llm.plugins.module_utils.ssh_known import Settings

Answer = list[str] | str


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def words(port: int, user: str = "fleet") -> list[str]:
    """What a host answers that was reached by that port of its own."""
    return ["192.0.2.7", "50000", "192.0.2.1", str(port), user]


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ActionModule, list[int | None]]]:
    """The action with a host that gives these answers, and the ports that it is asked by."""
    monkeypatch.setattr(ssh_prove, "time", Clock())

    def action(*answers: Answer, settings: Settings | None = None) -> tuple[ActionModule, list[int | None]]:
        made, asked, waiting = ActionModule.__new__(ActionModule), [], list(answers)

        def once(port: int | None) -> Answer:
            asked.append(port)
            return waiting.pop(0) if len(waiting) > 1 else waiting[0]

        replaced: dict[str, Any] = {
            "once": once,
            "settings": lambda: settings or Settings("h", 22),
            "known": lambda _settings: {},
        }
        for name, function in replaced.items():
            monkeypatch.setattr(made, name, function)
        return made, asked

    return action


def given(ports: list[int], came_by: int | None = 22) -> dict[str, Any]:
    """The arguments of the task."""
    return {"ports": ports, "came_by": {"port": came_by} if came_by else {}, "offered": [], "seconds": 10}


def test_each_port_is_tried_and_the_own_one_as_ansible_does(prove: Any) -> None:
    action, asked = prove(words(22), words(2222))
    assert action.after(given([22, 2222])) == [
        "a new connection logged in as fleet by port 22",
        "a new connection logged in as fleet by port 2222",
    ]
    assert asked == [None, 2222]


def test_a_moment_without_a_listener_is_waited_for(prove: Any) -> None:
    action, asked = prove("Connection refused", "Connection reset by peer", words(22))
    assert action.after(given([22]))
    assert len(asked) == 3


def test_a_closed_port_is_given_up_in_time(prove: Any) -> None:
    action, asked = prove("ssh: connect to host h port 2222: Connection timed out")
    with pytest.raises(UnprovedError, match=r"No new login works after the change \(port 2222\).*does a firewall"):
        action.after(given([2222]))
    assert 5 < len(asked) < 15


def test_a_refused_login_is_not_tried_again(prove: Any) -> None:
    """Each one counts against the controller's address."""
    action, asked = prove("fleet@h: Permission denied (publickey).")
    with pytest.raises(UnprovedError, match="does not accept the key"):
        action.after(given([22]))
    assert asked == [None]


def test_another_server_is_no_proof(prove: Any) -> None:
    action, _ = prove(words(22))
    with pytest.raises(UnprovedError, match="port 2222 was asked for, but it led to port 22"):
        action.after(given([2222]))


def test_through_a_port_forwarding_only_the_own_port_can_be_proved(prove: Any) -> None:
    forwarded = Settings("h", 2201)
    action, asked = prove(words(22), settings=forwarded)
    assert action.before(given([22])) and action.after(given([22]))
    assert asked == [None, None]
    with pytest.raises(
        UnprovedError, match=r"reaches port 22 of the host through port 2201.*Leave ssh_hardening_ports at \[22\]"
    ):
        action.before(given([22, 2222]))


def test_before_the_change_a_key_has_to_do(prove: Any) -> None:
    action, asked = prove("fleet@h: Permission denied (publickey,password).")
    with pytest.raises(UnprovedError, match="No login with a key alone works now"):
        action.before(given([22]))
    assert asked == [None]


def test_before_the_change_the_host_has_to_be_known(prove: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    action, asked = prove(words(22))
    monkeypatch.setattr(action, "known", lambda _settings: {"ecdsa-sha2-nistp256 AAAA": "/known_hosts"})
    with pytest.raises(UnprovedError, match="by a key of the type ecdsa-sha2-nistp256 only"):
        action.before({**given([22]), "offered": ["ssh-ed25519 BBBB"]})
    assert asked == []
