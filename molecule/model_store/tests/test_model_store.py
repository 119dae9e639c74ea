"""What the store promises, with the real huggingface_hub against a hub on the test host (files/hub.py).

What ModelScope and plain addresses have in common with it is not tested again in test_sources.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.roles import ROOT, applied, changed, environment, refused, role_command

FIRST, SECOND = "a" * 40, "b" * 40
GOOD, BAD = "hf_goodgoodgood", "hf_badbadbad"
STORE = "/srv/models"


def store(host: Host, models: list[dict[str, object]], **variables: object) -> str:
    """Apply the role with these models."""
    return applied(host, "model_store", model_store_models=models, **variables)


def refuse(host: Host, models: list[dict[str, object]], **variables: object) -> str:
    """Apply the role with these models, and expect a refusal."""
    return refused(host, "model_store", model_store_models=models, **variables)


def hub(name: str, repository: str = "acme/tiny", revision: str = FIRST) -> dict[str, object]:
    return {"name": name, "source": "huggingface", "repository": repository, "revision": revision}


def asked(host: Host) -> list[str]:
    """What the hub was asked since the test began."""
    return str(host.run("cat /srv/hub/log").stdout).splitlines()


def mode(host: Host, words: str) -> None:
    host.check_output(f"echo {words} >/srv/hub/mode")


@pytest.fixture(autouse=True)
def fresh_hub(host: Host) -> Iterator[None]:
    """Each test starts with a well-behaved hub that was asked nothing."""
    host.check_output("rm -f /srv/hub/log /srv/hub/mode")
    yield
    host.run("systemctl stop 'model-download-*'")


def test_every_source_is_under_its_name(host: Host) -> None:
    assert host.file(f"{STORE}/tiny-mounted").linked_to == "/srv/mounted/tiny"
    for name in ("tiny-copied", "tiny-hub", "tiny-modelscope", "tiny-url"):
        directory = host.check_output(f"readlink {STORE}/{name}")
        assert directory.startswith(f".revisions/{name}-")
        manifest = json.loads(host.file(f"{STORE}/{name}/.model.json").content_string)
        for file, wanted in manifest["files"].items():
            there = host.file(f"{STORE}/{name}/{file}")
            assert (there.user, there.mode, there.size) == ("model-store", 0o644, wanted["size"])
            assert there.sha256sum == wanted["sha256"]
    weights = hashlib.shake_256(FIRST.encode()).digest(8_000_000)
    for name in ("tiny-hub", "tiny-modelscope", "tiny-url"):
        assert host.file(f"{STORE}/{name}/model.safetensors").sha256sum == hashlib.sha256(weights).hexdigest()
        # other formats of the same weights are left out
        assert not host.file(f"{STORE}/{name}/original").exists
    assert host.check_output(f"ls -A {STORE}/.partial") == ""


def test_the_user_cannot_log_in(host: Host) -> None:
    user = host.user("model-store")
    assert user.uid < 1000
    assert user.shell == "/usr/sbin/nologin"


def test_a_second_run_asks_no_hub_and_makes_one_call(host: Host) -> None:
    said = applied(host, "model_store", "-vvv")
    assert not changed(said)
    assert asked(host) == []
    calls = re.findall(r"Using module file \S*/(\w+)\.py", said)
    assert [call for call in calls if call not in ("setup", "host_facts")] == ["model_store"]


@pytest.mark.parametrize(
    ("token", "models"),
    [
        (BAD, {"acme/tiny": "refuses the token. model_store_hf_token is wrong, expired or revoked"}),
        (
            "",
            {
                "acme/gated": "acme/gated is gated and without a token there is no access. Ask for access at",
                "acme/secret": "has no repository acme/secret: it is misspelt, or private",
                "acme/huge": "acme/huge needs 1000000.0 GB more, but /srv/models has",
            },
        ),
        (
            GOOD,
            {
                "acme/gated": "acme/gated is gated and this token has no access. Ask for access at",
                "acme/none": "has no repository acme/none: it is misspelt, or this token may not see it",
                "acme/tiny": f"acme/tiny has no revision {'c' * 40}; its commits are at",
            },
        ),
    ],
    ids=["bad-token", "no-token", "good-token"],
)
def test_what_cannot_be_had_is_told_apart_before_any_download(host: Host, token: str, models: dict[str, str]) -> None:
    """One run each: a model that is refused does not keep the next one from being asked for."""
    wanted = [
        hub(f"bad{number}", repository, "c" * 40 if token == GOOD and repository == "acme/tiny" else FIRST)
        for number, repository in enumerate(models)
    ]
    said = refuse(host, wanted, model_store_hf_token=token)
    for message in models.values():
        assert message in said
    assert not [line for line in asked(host) if line.startswith("GET /acme/")], "a file was downloaded"
    assert host.run(f"ls -d {STORE}/bad*").rc != 0


def test_a_good_token_opens_what_is_private_and_stays_secret(host: Host) -> None:
    said = store(host, [hub("private", "acme/secret")], model_store_hf_token=GOOD)
    assert "GET /api/whoami-v2 -" in asked(host)
    assert host.file(f"{STORE}/private/config.json").exists
    assert GOOD not in said
    assert GOOD not in host.check_output("journalctl --no-pager --quiet --output=verbose")
    assert host.run(f"grep -rlF {GOOD} /etc /opt/model-store /run /srv/models /tmp /var/lib /root").stdout == ""


def test_a_damaged_file_is_refused_and_fetched_anew(host: Host) -> None:
    mode(host, "corrupt")
    said = refuse(host, [hub("damaged")])
    assert "model.safetensors is not what the hub says: expected 8000000 bytes" in said
    assert not host.file(f"{STORE}/damaged").exists
    assert host.run(f"ls {STORE}/.revisions").stdout.count("damaged") == 0
    mode(host, "well-behaved")
    host.check_output("rm /srv/hub/log")
    store(host, [hub("damaged")])
    assert host.file(f"{STORE}/damaged/config.json").exists
    assert not [line for line in asked(host) if "GET /acme/tiny" in line and "config.json" in line], "fetched twice"


def test_a_connection_that_is_cut_is_taken_up_again(host: Host) -> None:
    mode(host, "cut")
    store(host, [hub("cut")])
    ranges = [line.rsplit(" ", 1)[1] for line in asked(host) if line.startswith("GET") and "safetensors" in line]
    assert ranges[0] == "-"
    assert ranges[-1].startswith("bytes=")
    assert not ranges[-1].startswith("bytes=0-"), ranges
    assert host.file(f"{STORE}/cut/config.json").exists


def wait_for_download(host: Host) -> None:
    for _ in range(120):
        if any(line.startswith("GET") and "safetensors" in line for line in asked(host)):
            return
        time.sleep(0.5)
    pytest.fail("the download did not begin")


def test_a_killed_playbook_loses_nothing_and_the_token_shows_nowhere(host: Host, tmp_path: Path) -> None:
    mode(host, "slow")
    wanted = {
        "model_store_models": [hub("slow", "acme/secret")],
        "model_store_hf_token": GOOD,
        "__model_store_progress_seconds": 2,
    }
    secret = tmp_path / "vars.json"
    secret.write_text(json.dumps(wanted))
    playbook = role_command(host, "model_store", f"--extra-vars=@{secret}")
    killed = subprocess.Popen(
        playbook,
        cwd=ROOT,
        env=environment("model_store"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_download(host)
    # while it runs, the token is in no command line, unit or environment that others may see
    assert GOOD not in host.check_output(
        "ps -eo args --no-headers 2>/dev/null || cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
    )
    unit = host.check_output("systemctl show model-download-slow.service")
    assert "User=model-store" in unit
    assert GOOD not in unit
    assert host.run("ls -A /run/model-download").stdout == ""
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert host.check_output("systemctl is-active model-download-slow") == "active"
    assert not host.file(f"{STORE}/slow").exists

    again = subprocess.Popen(
        playbook, cwd=ROOT, env=environment("model_store"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert again.stdout
    said = ""
    for line in again.stdout:
        said += line
        if " kB/s, about " in line:
            mode(host, "well-behaved")
    assert again.wait() == 0, said
    assert "model-store-debian12: slow is already on its way; watching it" in said
    assert " of 8.0 MB, " in said
    assert GOOD not in said
    assert len([line for line in asked(host) if line.startswith("GET") and "safetensors" in line]) == 1
    assert host.file(f"{STORE}/slow/config.json").exists


def test_a_download_that_was_stopped_goes_on_where_it_was(host: Host) -> None:
    mode(host, "slow")
    running = subprocess.Popen(
        role_command(host, "model_store", model_store_models=[hub("stopped")]),
        cwd=ROOT, env=environment("model_store"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_download(host)
    for _ in range(60):  # what arrived is written in pieces of a megabyte
        if host.run(f"find {STORE}/.partial/stopped-{FIRST[:12]}/.cache/parts -size +1023k").stdout:
            break
        time.sleep(0.5)
    host.check_output("systemctl kill --signal=KILL model-download-stopped")
    said, _ = running.communicate()
    assert running.returncode != 0
    assert "model-download-stopped stopped by itself. Its last lines:" in said
    mode(host, "well-behaved")
    host.check_output("rm /srv/hub/log")
    store(host, [hub("stopped")])
    ranges = [line.rsplit(" ", 1)[1] for line in asked(host) if line.startswith("GET") and "safetensors" in line]
    assert len(ranges) == 1
    assert ranges[0].startswith("bytes=")
    assert ranges[0] != "bytes=0-"


def test_a_new_revision_takes_the_name_and_the_previous_one_stays(host: Host) -> None:
    store(host, [hub("moving")])
    before = host.check_output(f"readlink -f {STORE}/moving")
    said = store(host, [hub("moving", revision=SECOND)])
    assert changed(said)
    after = host.check_output(f"readlink -f {STORE}/moving")
    assert after.endswith(f"moving-{SECOND[:12]}")
    assert host.file(f"{before}/model.safetensors").exists
    # and back, without the hub
    host.check_output("rm /srv/hub/log")
    store(host, [hub("moving")])
    assert host.check_output(f"readlink -f {STORE}/moving") == before
    assert asked(host) == []
    # a file that lost bytes on the disk is noticed, and fetched again
    host.check_output(f"truncate --size=-1 {STORE}/moving/model.safetensors")
    store(host, [hub("moving")])
    assert host.file(f"{STORE}/moving/model.safetensors").size == 8_000_000


def test_revisions_of_a_copied_model_come_and_go(host: Host, tmp_path: Path) -> None:
    directories = []
    for number in range(3):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "tiny", "number": number}))
        model: dict[str, object] = {"name": "grown", "source": "path", "path": str(tmp_path), "copy": True}
        store(host, [model])
        directories.append(host.check_output(f"readlink -f {STORE}/grown"))
        assert json.loads(host.file(f"{STORE}/grown/config.json").content_string)["number"] == number
    assert [host.file(directory).exists for directory in directories] == [False, True, True]
    assert not changed(store(host, [model]))


def test_a_disk_that_is_too_small_is_refused_before_the_download(host: Host, tmp_path: Path) -> None:
    host.check_output("mkdir -p /srv/small && mount -t tmpfs -o size=4m tmpfs /srv/small")
    try:
        said = refuse(host, [hub("large")], model_store_path="/srv/small")
        assert "acme/tiny needs 0.0 GB more, but /srv/small has 0.0 GB free" in said
        assert not [line for line in asked(host) if line.startswith("GET /acme/")]
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(bytes(5_000_000))
        copied: dict[str, object] = {"name": "large", "source": "path", "path": str(tmp_path), "copy": True}
        said = refuse(host, [copied], model_store_path="/srv/small")
        assert "large take 0.0 GB, but /srv/small has 0.0 GB free" in said
        assert "large" not in host.check_output("ls /srv/small")
    finally:
        host.check_output("umount /srv/small")


def test_a_disk_that_is_not_mounted_is_named(host: Host) -> None:
    gone: dict[str, object] = {"name": "gone", "source": "path", "path": "/srv/nfs/gone"}
    said = refuse(host, [gone])
    assert "gone: there is no /srv/nfs/gone/config.json on this host; is the disk mounted?" in said


def test_what_makes_no_sense_is_refused_before_any_change(host: Host) -> None:
    plain: dict[str, object] = {"name": "plain", "source": "url", "repository": "acme/tiny"}
    plain["files"] = [{"url": "https://mirror.example/config.json", "sha256": "abc"}]
    said = refuse(host, [hub("twice", revision="main"), hub("twice"), plain])
    assert "plain: `repository` means nothing for source url; it takes files" in said
    assert "plain: config.json: sha256 is `abc`; it takes the 64 hexadecimal digits" in said
    assert "the name `twice` is given 2 times" in said
    assert "twice: revision is `main`; it takes the 40 hexadecimal digits of a commit" in said
    assert asked(host) == []


def test_a_branch_passes_when_asked_to(host: Host) -> None:
    store(host, [hub("branch", revision="main")], model_store_allow_moving_revisions=True)
    assert json.loads(host.file(f"{STORE}/branch/.model.json").content_string)["commit"] == FIRST
