"""The fleet goes again: an instance, roles, and all of it, from a gateway and an inference host, which are compared with what they were before.

vLLM is the stand-in; the tests run in this order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests import footprint
from tests.e2e.conftest import FIGURES, ROOT, Done, on
from tests.hosts import hosts
from tests.stand_in import fleet as stand_ins
from tests.stand_in.fleet import Fleet

NAME = "e2e-uninstall"
GATEWAY, WORKER = f"{NAME}-gw1", f"{NAME}-gpu1"
BEFORE: dict[str, dict[str, str]] = {}
LEFT = re.compile(r"([\w-]+): left: (.+?) \(")
CHAT = {"name": "chat", "model": "tiny", "port": 8000, "options": {"max-model-len": 2048}}
# What the report says of every host, by the places; and the cache that all test hosts have mounted.
EVERYWHERE = [
    "/var/log", "/var/lib/apt", "/var/lib/ucf", "/var/cache/apt", "/var/cache/debconf", "/root/.ansible", "/home/fleet/.ansible",
    "/var/cache/uv",
]  # fmt: skip


def look(host: str) -> dict[str, str]:
    """What there is on a host."""
    return footprint.of(lambda command: on(host, command))


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """The fleet, deployed on hosts that were looked at before."""
    found = stand_ins.up(
        NAME, ROOT / ".cache" / NAME, ["gw1"], ["gpu1"], vllm_instances=[CHAT, {**CHAT, "name": "extra", "port": 8001}],
    )  # fmt: skip
    try:
        BEFORE.update({host: look(host) for host in (GATEWAY, WORKER)})
        found.run(check=True)
        yield found
    finally:
        hosts.down(NAME)


def uninstall(fleet: Fleet, *arguments: str) -> Done:
    """Run the playbook."""
    done = fleet.run(*arguments, playbook="playbooks/uninstall.yml")
    FIGURES[f"uninstall.yml {' '.join(arguments)}"] = f"{done.seconds:.0f} s"
    return done


def said(done: Done) -> str:
    """What a run said, its line breaks undone."""
    return " ".join(done.output.split())


def left(done: Done, host: str) -> list[str]:
    """What a run says that it has left on a host: paths and things."""
    return [what for where, what in LEFT.findall(said(done)) if where == host]


def answers(fleet: Fleet) -> bool:
    """Whether clients are served."""
    status, answer, _headers = fleet.ask(
        GATEWAY, "POST", "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
    )
    return status == 200 and bool(answer["choices"])


def test_what_names_nothing_or_too_much_is_refused(fleet: Fleet) -> None:
    for arguments, complaint in (
        ([], "-e uninstall_all=true all roles but base, firewall"),
        (["-e", "uninstall_roles=gatway"], "did you mean gateway?"),
        (["-e", "uninstall_roles=tls_certificate"], f"gateway on {GATEWAY} cannot do without tls_certificate"),
        (
            ["--limit", GATEWAY, "-e", "uninstall_all=true"],
            f"{GATEWAY} is the last of the gateways, and {WORKER} would serve nobody",
        ),
        (["-e", "fleet_instance=chat"], f"route tiny would be left without a backend in use, without chat@{WORKER}"),
        (["-e", "fleet_instance=chta"], "no host of this run has an instance chta"),
    ):
        done = uninstall(fleet, *arguments)
        assert done.status != 0
        assert complaint in said(done)
    assert answers(fleet)


def test_check_shows_what_would_go_and_changes_nothing(fleet: Fleet) -> None:
    seen = {host: look(host) for host in BEFORE}
    done = uninstall(fleet, "-e", "uninstall_all=true", "--check", "--diff")
    assert done.status == 0, done.output
    for line in (
        "-unit nginx.service stopped",
        "-package nginx",
        "-user vllm-gateway",
        "-/opt/uv",
        "-/etc/nginx/nginx.conf",
    ):
        assert line in done.output.splitlines(), line
    assert f"{GATEWAY}: would be removed (--check)" in said(done)
    alive = [*EVERYWHERE, "/var/lib/vllm-gateway", "/var/lib/vllm-gateway-budgets"]
    assert {host: footprint.differences(seen[host], look(host), alive) for host in seen} == {GATEWAY: [], WORKER: []}
    assert answers(fleet)


def test_an_instance_goes_and_the_others_serve_on(fleet: Fleet) -> None:
    pid = on(WORKER, "systemctl show --property=MainPID --value vllm@chat")
    done = uninstall(fleet, "-e", "fleet_instance=extra")
    assert done.status == 0, done.output
    assert f"{WORKER}: removed: instance extra" in said(done)
    assert "site.yml brings back instance extra while vllm_instances has it" in said(done)
    there = [name for name in look(WORKER) if re.search(r"vllm[@/-]?extra|vllm/extra|/extra(\.json)?$", name)]
    # packages have directories of that name, too
    assert [name for name in there if not name.startswith("/var/cache/uv/")] == []
    assert on(WORKER, "systemctl show --property=MainPID --value vllm@chat") == pid
    assert answers(fleet)


def test_all_of_it_goes_but_for_what_is_listed(fleet: Fleet) -> None:
    done = uninstall(fleet, "-e", "uninstall_all=true")
    assert done.status == 0, done.output
    for host in BEFORE:
        listed = left(done, host)
        after = look(host)
        assert footprint.differences(BEFORE[host], after, [*EVERYWHERE, *listed, *owners(host, after)]) == []
        assert [what for what in listed if not any(name.startswith(what) for name in after)] == [], (
            "what is listed is there"
        )
    # all test hosts have one cache
    assert left(done, WORKER) == ["/srv/models", "/var/cache/uv"]
    assert left(done, GATEWAY) == ["/etc/ssl/vllm-fleet/authority"]
    again = uninstall(fleet, "-e", "uninstall_all=true")
    assert again.status == 0, again.output
    assert all(counters["changed"] == 0 for counters in again.recap().values()), again.output


def owners(host: str, after: dict[str, str]) -> list[str]:
    """The user who owns the models, which the report names with them."""
    return [name for name in after if host == WORKER and name.startswith(("user model-store:", "group model-store:"))]


def test_models_and_the_authority_go_when_they_are_named(fleet: Fleet) -> None:
    done = uninstall(fleet, "-e", "uninstall_all=true", "-e", "uninstall_models=true", "-e", "uninstall_authority=true")
    assert done.status == 0, done.output
    for host in BEFORE:
        assert left(done, host) == []
        assert footprint.differences(BEFORE[host], look(host), EVERYWHERE) == []


def test_ssh_firewall_and_base_go_by_their_names(fleet: Fleet) -> None:
    """SSH takes a new login afterwards: the next run comes by it."""
    fleet.run(
        "--limit",
        GATEWAY,
        "--tags",
        "base,firewall,ssh_hardening",
        check=True,
        fleet_skip_roles=[],
        base_time_sync=False,
    )
    assert "vllm_fleet" in on(GATEWAY, "nft list tables")
    assert "permitrootlogin no" in on(GATEWAY, "sshd -T")
    done = uninstall(fleet, "--limit", GATEWAY, "-e", "uninstall_roles=base,firewall,ssh_hardening")
    assert done.status == 0, done.output
    assert "all other ports are open to everybody" in said(done)
    listed = left(done, GATEWAY)
    # kernel settings are left, which is said; and a package that another role may use is not a file
    found = footprint.differences(BEFORE[GATEWAY], look(GATEWAY), [*EVERYWHERE, *listed])
    assert [name for name in found if " setting " not in name and name.split()[-2] not in packages(listed)] == []
    assert [what for what in listed if not what.startswith("package ")] == [
        "/etc/ssh/ssh_host_rsa_4096_key", "/etc/ssh/ssh_host_rsa_4096_key.pub", "/etc/ssh/sshd_config", "/proc/sys",
    ]  # fmt: skip


def packages(listed: list[str]) -> list[str]:
    """The packages among what is listed."""
    return [what.removeprefix("package ") for what in listed if what.startswith("package ")]
