"""Models that hosts copy from each other. Each host has a hub of its own, so that it shows who asked one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.model_stores import (
    SIZE,
    STORE,
    WEIGHTS,
    asked,
    forget,
    has_begun,
    has_ended,
    hub,
    modelscope,
    ranges,
    store,
    url,
)
from tests.roles import ROOT, environment, host_name, role_command, until

SHARE = {"model_store_share": True}
PORT = 8990


def whole(host: Host, *names: str) -> None:
    """These models are under their names, with the right weights."""
    for name in names:
        assert host.file(f"{STORE}/{name}/model.safetensors").sha256sum == WEIGHTS
        assert host.file(f"{STORE}/{name}/config.json").user == "model-store"


def asked_for_files(host: Host) -> list[str]:
    """What a hub was asked for beside what there is."""
    return [line for line in asked(host) if "config.json" in line or "safetensors" in line]


def nothing_is_left(hosts: list[Host], *names: str) -> None:
    """No server, no unit, no port, no credential, and nothing on its way."""
    for host in hosts:
        assert host.run("systemctl list-units --all --no-legend 'model-share*' 'model-download*'").stdout == ""
        assert f":{PORT} " not in host.check_output("ss -ltn")
        assert host.run("ls -A /run/model-download").stdout == ""
        for name in names:
            assert host.run(f"ls -Ad {STORE}/.partial/{name}*").stdout == ""


@pytest.fixture
def thin_line(both: list[Host]) -> Iterator[None]:
    """The first host sends a megabyte and a half in a second, so that a copy from it takes long enough to be disturbed."""
    command = "tc qdisc add dev eth0 root tbf rate 12mbit burst 32kbit latency 400ms"
    both[0].check_output(command)
    yield
    both[0].check_output("tc qdisc del dev eth0 root")


def test_the_hub_is_asked_once_for_all_hosts(both: list[Host]) -> None:
    models = [hub("shared-hf"), modelscope("shared-ms"), url("shared-url")]
    said = store(both, models, **SHARE)
    first, second = both
    # each model by one host; none by the other, which does not even need the client libraries
    assert asked(second) == []
    assert (len(ranges(first, "/acme/")), len(ranges(first, "/storage/"))) == (1, 2)
    for host in both:
        whole(host, "shared-hf", "shared-ms", "shared-url")
    # what it is and where it is from is the same on both
    for name in ("shared-hf", "shared-ms", "shared-url"):
        manifests = [json.loads(host.file(f"{STORE}/{name}/.model.json").content_string) for host in both]
        assert manifests[0] == manifests[1]
    assert "is not copied from another host" not in said
    nothing_is_left(both, "shared")
    forget(*both)
    # nor does a second run
    assert " changed=0 " in store(both, models, **SHARE)
    assert [asked(host) for host in both] == [[], []]


def test_a_host_that_has_it_already_counts_also_when_its_turn_comes_later(both: list[Host], tmp_path: Path) -> None:
    """And with --limit, or one host, nobody else is asked."""
    first, second = both
    store([second], [hub("held")], **SHARE)
    assert len(ranges(second)) == 1
    assert not first.file(f"{STORE}/held").exists
    forget(*both)
    playbook = tmp_path / "serial.yml"
    play = json.loads(
        '[{"hosts": "model_store", "gather_facts": false, "serial": 1, "roles": ["gpufleet.llm.model_store"]}]'
    )
    playbook.write_text(json.dumps(play))
    command = role_command(both, "model_store", model_store_models=[hub("held")])
    command[1] = str(playbook)
    # as in an inventory: what a host whose turn comes later would say, only that can tell
    inventory = tmp_path / "inventory.json"
    inventory.write_text(json.dumps({"model_store": {"vars": SHARE}}))
    command.append(f"--inventory={inventory}")
    done = subprocess.run(
        command, cwd=ROOT, env=environment("model_store"), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [asked(host) for host in both] == [[], []]
    whole(first, "held")
    nothing_is_left(both, "held")


def test_a_damaged_file_is_refused_and_a_copy_that_is_cut_goes_on_at_the_hub(both: list[Host], thin_line: None) -> None:
    first, second = both
    models = [hub("rotten"), hub("torn")]
    store([first], models, **SHARE)
    # same size, other content: only the hash tells
    first.check_output(f"printf X | dd of={STORE}/rotten/model.safetensors bs=1 seek=4000000 conv=notrunc")
    forget(*both)
    running = subprocess.Popen(
        role_command(both, "model_store", model_store_models=models, **SHARE),
        cwd=ROOT, env=environment("model_store"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    until(lambda: has_begun(second, "torn"), 120, "torn did not begin")
    first.check_output("systemctl kill --signal=KILL model-share")
    said, _ = running.communicate()
    assert running.returncode == 0, said
    said = " ".join(said.split())
    peer = f"http://{first.check_output('hostname -i')}:{PORT}"
    name = host_name(second)
    assert (
        f"{name}: rotten is not copied from another host: model.safetensors from {peer} is not what that host" in said
    )
    assert f"{name}: torn is not copied from another host: {peer} cannot be used after 5 attempts" in said
    whole(second, "rotten", "torn")
    assert asked(first) == []
    # of the one, only the damaged file is fetched; the other goes on where it was cut
    assert [line for line in asked(second) if line.startswith("GET") and "config.json" in line] == []
    begun = sorted(ranges(second))
    assert begun[0] == "-"
    assert len(begun) == 2
    assert int(begun[1].removeprefix("bytes=").removesuffix("-")) >= 1 << 20
    nothing_is_left(both, "rotten", "torn")


def test_a_run_that_is_killed_leaves_no_server_and_no_secret(both: list[Host], thin_line: None, tmp_path: Path) -> None:
    first, second = both
    models = [hub("orphan")]
    store([first], models, **SHARE)
    forget(*both)
    command = role_command(both, "model_store", "-vvv", model_store_models=models, __model_store_share_idle=10, **SHARE)
    printed = tmp_path / "printed"
    with printed.open("w") as output:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment("model_store"), stdout=output, stderr=output, start_new_session=True
        )
    until(lambda: has_begun(second, "orphan"), 120, "orphan did not begin")
    # the secret is where the two programs find it, and nowhere else
    secret = json.loads(first.check_output("cat /run/credentials/model-share.service/job"))["token"]
    assert len(secret) == 43
    # one address, one port, and one model in a store that is otherwise empty
    listening = first.check_output("ss -ltn").splitlines()
    assert [line.split()[3] for line in listening if f":{PORT} " in line] == [
        f"{first.check_output('hostname -i')}:{PORT}"
    ]
    pid = first.check_output("systemctl show --property=MainPID --value model-share")
    seen = first.check_output(f"nsenter --target {pid} --mount find {STORE} -maxdepth 2")
    assert sorted(seen.split()) == [STORE, f"{STORE}/.revisions", f"{STORE}/.revisions/orphan-{'a' * 12}"]
    assert first.check_output(f"ps -o user= -p {pid} || stat -c %U /proc/{pid}").strip() not in (
        "root",
        "model-store",
    )
    for host in both:
        for unit in ("model-share", "model-download-orphan"):
            assert secret not in host.run(f"systemctl show {unit}; systemctl cat {unit}").stdout
        assert secret not in host.run("cat /proc/[0-9]*/cmdline").stdout
        assert secret not in host.run("cat /proc/[0-9]*/environ").stdout
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert secret not in printed.read_text()
    # the copy goes on, and then both units end by themselves
    for host, unit in ((second, "model-download-orphan"), (first, "model-share")):
        until(partial(has_ended, host, unit), 90, f"{unit} goes on")
    assert f":{PORT} " not in first.check_output("ss -ltn")
    for host in both:
        assert secret not in host.check_output("journalctl --no-pager --quiet --output=verbose")
        assert host.run(f"grep -rlF {secret} /etc /opt/model-store /run /srv/models /tmp /var/lib /root").stdout == ""
    # the next run finds all of it there
    store(both, models, **SHARE)
    whole(second, "orphan")
    assert second.file(f"{STORE}/orphan/model.safetensors").size == SIZE
    assert [asked_for_files(host) for host in both] == [[], []]
    nothing_is_left(both, "orphan")
