"""The same list of assertions for both runtimes, and what is true of containers only.

Converged are `chat` in a container and `plain` under systemd: one release, once in an image and once on the host. It is the stand-in for vLLM
(tests/stand_in); with the real vLLM and a real small model tests/drills/test_real_container.py runs this file. The tests of this file come
first: those after it have these instances removed.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.contained import ROLE, Instances
from tests.roles import ROOT
from tests.served import KEY, MODEL, ends_before_a_stop

CHAT, PLAIN = yaml.safe_load((ROOT / f"molecule/shared/inventory/group_vars/{ROLE}.yml").read_text())["vllm_instances"]
PORTS = {entry["name"]: entry["port"] for entry in (CHAT, PLAIN)}
# Some seconds of the real vLLM, and of the stand-in when it is told so.
LONG: dict[str, Any] = {"tokens": 60, "ignore_eos": True, "stand_in": {"seconds_per_token": 0.1}}
both = pytest.mark.parametrize("name", list(PORTS))


def process(instances: Instances, name: str) -> str:
    """The first process of vLLM itself, which the unit of a container only attaches to."""
    return instances.pid(name) if name == "chat" else instances.show(name, "MainPID")


# --- parity: what the runtime is makes no difference


@both
def test_an_instance_answers(instances: Instances, name: str) -> None:
    status, answer = instances.ask(PORTS[name], tokens=4)
    assert status == 200, answer
    assert "Paris" in answer["choices"][0]["text"]


@both
def test_an_answer_is_streamed(instances: Instances, name: str) -> None:
    status, text = instances.ask(PORTS[name], tokens=5, stream=True, ignore_eos=True)
    assert status == 200
    pieces = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert len(pieces) >= 5
    assert pieces[-1] == "[DONE]"
    assert json.loads(pieces[0])["model"] == MODEL


def test_both_say_the_same(instances: Instances) -> None:
    """One release, one model, no chance: not a word differs."""
    texts = {instances.ask(port, tokens=24)[1]["choices"][0]["text"] for port in PORTS.values()}
    assert len(texts) == 1


@both
def test_nothing_is_answered_without_the_key(instances: Instances, name: str) -> None:
    assert instances.ask(PORTS[name], key="wrong")[0] == 401


@both
def test_it_listens_on_loopback_only(instances: Instances, name: str) -> None:
    [address] = instances.sh("hostname -I").split()[:1]
    asked = "curl -sS -m 5 -o /dev/null -w '%{http_code}' http://" + f"{address}:{PORTS[name]}/health"
    assert instances.host.run(asked).stdout == "000"
    assert instances.host.run(asked.replace(address, "127.0.0.1")).stdout == "200"


@both
def test_the_unit_has_the_same_words(instances: Instances, name: str) -> None:
    assert instances.show(name, "ActiveState") == "active"
    assert instances.show(name, "UnitFileState") == "enabled"
    assert instances.show(name, "Restart") == "always"
    assert instances.show(name, "NRestarts") == "0"
    assert (
        instances.host.file(f"/etc/vllm/{name}/current").linked_to == f"/etc/vllm/{name}/{instances.generation(name)}"
    )
    assert instances.host.file(f"/etc/vllm/{name}/current/confirmed").exists


@both
def test_the_log_is_the_journal_of_the_unit(instances: Instances, name: str) -> None:
    told = instances.sh("journalctl --unit vllm@%s --output cat --no-pager", name)
    assert "Application startup complete" in told
    assert "non-default args" in told


@both
def test_the_key_is_seen_by_nobody(instances: Instances, name: str) -> None:
    places = (
        f"systemctl show vllm@{name}; systemctl cat vllm@{name}; cat /etc/vllm/{name}/*/* /opt/vllm/bin/*; journalctl --no-pager;"
        " cat /proc/[0-9]*/cmdline | tr '\\0' ' '; docker inspect $(docker ps --all --quiet); docker logs $(docker ps --quiet) 2>&1"
    )
    told = instances.host.run(f"{places}; tr '\\0' ' ' </proc/{process(instances, name)}/environ").stdout
    assert MODEL in told
    assert "FLEET_INTERNAL_KEYS=" in told
    assert KEY not in told
    assert instances.host.file("/etc/vllm/internal_key").mode == 0o600
    keys = instances.host.file("/etc/vllm-keys/accepted")
    assert (keys.mode, keys.user, keys.group) == (0o640, "root", "vllm")
    assert not instances.host.file("/etc/vllm/container_key").exists


@both
def test_no_process_of_it_has_any_rights(instances: Instances, name: str) -> None:
    """As the host sees it: no root, no capability to have or to get, a filter for system calls."""
    first = process(instances, name)
    tree = instances.sh("pgrep -P %s || true", first).split()
    assert tree, "the engine is a process of its own"
    vllm = instances.sh("id -u vllm")
    for pid in (first, *tree):
        status = dict(
            line.split(":", 1) for line in instances.sh("cat /proc/%s/status", pid).splitlines() if ":" in line
        )
        assert set(status["Uid"].split()) == {vllm}
        assert {int(status[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"].strip() == "1"
        assert status["Seccomp"].strip() == "2"


@both
def test_it_writes_to_its_caches_and_nowhere_else(instances: Instances, name: str) -> None:
    cache = instances.host.file(f"/var/cache/vllm/{name}")
    assert (cache.mode, cache.user) == (0o700, "vllm")
    assert instances.host.file(f"/var/cache/vllm/{name}/vllm").is_directory
    found = instances.sh(
        "nsenter --target %s --mount setpriv --reuid=vllm --regid=vllm --clear-groups"
        " find / -path /proc -prune -o -path /dev -prune -o -type d -writable -print -prune 2>/dev/null || true".replace(
            "=vllm", "=$(id -u vllm)"
        ),
        process(instances, name),
    ).split()
    here = {"chat": {"/tmp"}, "plain": {"/tmp", "/var/tmp", "/run/vllm/plain"}}  # noqa: S108
    assert set(found) == {f"/var/cache/vllm/{name}", *here[name]}


def test_a_running_request_ends_before_its_service_stops(instances: Instances) -> None:
    ends_before_a_stop(instances.host, "plain", lambda: instances.ask(PORTS["plain"], **LONG), LONG["tokens"])


# --- only containers


def test_the_container_is_what_it_should_be(instances: Instances, images: dict[str, str]) -> None:
    found = instances.inspected("chat")
    assert found["Image"] == images["real"]
    settings = found["HostConfig"]
    assert settings["CapDrop"] == ["ALL"]
    assert settings["ReadonlyRootfs"]
    assert not settings["Privileged"]
    assert settings["IpcMode"] == "private"
    assert settings["PidsLimit"] == 16384
    assert settings["ShmSize"] == 8 * 1024**3
    assert 0 < settings["Memory"] <= 0.9 * 1024 * int(instances.sh("awk '/MemTotal/ {print $2}' /proc/meminfo"))
    assert settings["RestartPolicy"]["Name"] == "no"
    assert settings["PortBindings"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8000"}]}
    assert not [mount for mount in found["Mounts"] if "docker.sock" in mount["Source"]]
    assert [mount["Destination"] for mount in found["Mounts"] if mount["RW"]] == ["/var/cache/vllm/chat"]


def test_a_running_request_ends_before_its_container_stops(instances: Instances) -> None:
    ends_before_a_stop(instances.host, "chat", lambda: instances.ask(PORTS["chat"], **LONG), LONG["tokens"])
