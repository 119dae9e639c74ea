"""What `systemctl show` prints."""

from __future__ import annotations

from ansible_collections.gpufleet.llm.plugins.module_utils import systemctl

SHOWN = """Id=vllm@chat.service
LoadState=loaded
ActiveState=active
Environment=A=1 B=2

Id=ssh.socket
LoadState=loaded
Listen=0.0.0.0:22 (Stream)
Listen=[::]:22 (Stream)
Description=

Id=gone.service
LoadState=not-found
ActiveState=inactive
"""


def test_each_unit_has_its_properties() -> None:
    chat, ssh, gone = systemctl.shown(SHOWN)
    assert chat == {"Id": "vllm@chat.service", "LoadState": "loaded", "ActiveState": "active", "Environment": "A=1 B=2"}
    assert ssh["Listen"].splitlines() == ["0.0.0.0:22 (Stream)", "[::]:22 (Stream)"]
    assert ssh["Description"] == ""
    assert gone["ActiveState"] == "inactive"


def test_those_that_are_not_there_are_left_out() -> None:
    assert list(systemctl.by_unit(SHOWN)) == ["vllm@chat.service", "ssh.socket"]


def test_who_is_not_told_finds_nothing() -> None:
    """Without systemd, or where it is too busy to tell."""
    for text in ("", "\n", "System has not been booted with systemd as init system (PID 1). Can't operate.\n"):
        assert systemctl.shown(text) == [{}]
        assert systemctl.by_unit(text) == {}
