"""What the store promises, with the real clients of both hubs and plain addresses, against a hub on each host (files/hub.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.model_stores import (
    BAD,
    FIRST,
    GOOD,
    SECOND,
    SERVER,
    SIZE,
    STORE,
    WEIGHTS,
    Model,
    asked,
    forget,
    has_begun,
    hub,
    mode,
    modelscope,
    ranges,
    refuse,
    store,
    url,
)
from tests.roles import ROOT, applied, changed, environment, host_name, refused, role_command, told, until


def test_every_source_is_under_its_name(both: list[Host]) -> None:
    for host in both:
        assert host.file(f"{STORE}/tiny-mounted").linked_to == "/srv/mounted/tiny"
        for name in ("tiny-copied", "tiny-hub", "tiny-modelscope", "tiny-url"):
            directory = host.check_output(f"readlink {STORE}/{name}")
            assert directory.startswith(f".revisions/{name}-")
            manifest = json.loads(host.file(f"{STORE}/{name}/.model.json").content_string)
            for file, wanted in manifest["files"].items():
                there = host.file(f"{STORE}/{name}/{file}")
                assert (there.user, there.mode, there.size) == ("model-store", 0o644, wanted["size"])
                assert there.sha256sum == wanted["sha256"]
        for name in ("tiny-hub", "tiny-modelscope", "tiny-url"):
            assert host.file(f"{STORE}/{name}/model.safetensors").sha256sum == WEIGHTS
            # other formats of the same weights are left out
            assert not host.file(f"{STORE}/{name}/original").exists
        assert host.check_output(f"ls -A {STORE}/.partial") == ""


def test_the_user_cannot_log_in(both: list[Host]) -> None:
    for host in both:
        user = host.user("model-store")
        assert user.uid < 1000
        assert user.shell == "/usr/sbin/nologin"


def test_a_second_run_asks_no_hub_and_makes_one_call(both: list[Host]) -> None:
    said = applied(both, "model_store", "-vvv")
    assert not changed(said)
    calls = re.findall(r"Using module file \S*/(\w+)\.py", said)
    assert [call for call in calls if call not in ("setup", "host_facts")] == ["model_store"] * len(both)
    for host in both:
        assert asked(host) == []


BAD_TOKEN: list[tuple[Model, str]] = [
    (hub("bad1"), "refuses the token. model_store_hf_token is wrong, expired or revoked"),
    (modelscope("bad2"), "refuses the token. model_store_modelscope_token is wrong, expired or revoked"),
    (url("bad3", "closed"), "config.json is refused (401): model_store_url_headers has a wrong header for it"),
]
NO_TOKEN: list[tuple[Model, str]] = [
    (hub("bad1", "acme/gated"), "acme/gated is gated and without a token there is no access. Ask for access at"),
    (hub("bad2", "acme/secret"), "bad2: http://127.0.0.1:8199 has no repository acme/secret: it is misspelt, or private"),
    (hub("bad3", "acme/huge"), "bad3: acme/huge needs 1000000.0 GB more, but /srv/models has"),
    (modelscope("bad4", "acme/secret"), "bad4: http://127.0.0.1:8199 has no repository acme/secret: it is misspelt, or private"),
    (modelscope("bad5", "acme/gated"), "acme/gated is restricted and without a token there is no access"),
    (modelscope("bad6", "acme/huge"), "bad6: acme/huge needs 1000000.0 GB more, but /srv/models has"),
    (url("bad7", "closed"), "config.json is refused (401): model_store_url_headers has no header for it"),
]  # fmt: skip
GOOD_TOKEN: list[tuple[Model, str]] = [
    (hub("bad1", "acme/gated"), "acme/gated is gated and this token has no access. Ask for access at"),
    (hub("bad2", "acme/none"), "bad2: http://127.0.0.1:8199 has no repository acme/none: it is misspelt, or this token may not see it"),
    (hub("bad3", revision="c" * 40), f"bad3: acme/tiny has no revision {'c' * 40}; its commits are at"),
    (modelscope("bad4", "acme/none"), "bad4: http://127.0.0.1:8199 has no repository acme/none: it is misspelt, or this token may not"),
    (modelscope("bad5", "acme/gated"), "acme/gated is restricted and this token has no access. Ask for"),
    (modelscope("bad6", revision="c" * 40), f"bad6: acme/tiny has no revision {'c' * 40}; its commits are at"),
    (url("bad7", "none/none"), "config.json cannot be had: 404 Not Found"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("token", "wanted"),
    [(BAD, BAD_TOKEN), ("", NO_TOKEN), (GOOD, GOOD_TOKEN)],
    ids=["bad-token", "no-token", "good-token"],
)
def test_what_cannot_be_had_is_told_apart_before_any_download(
    hosts: list[Host], token: str, wanted: list[tuple[Model, str]]
) -> None:
    """One run each: a model that is refused does not keep the next one from being asked for."""
    said = refuse(
        hosts,
        [model for model, _message in wanted],
        model_store_hf_token=token,
        model_store_modelscope_token=token,
        model_store_url_headers={f"{SERVER}/files/closed/": {"Authorization": f"Bearer {token}"}} if token else {},
    )
    for host, words in zip(hosts, said, strict=True):
        for _model, message in wanted:
            assert message in words
        files = [
            line for line in asked(host) if "/files/" in line or "FilePath=" in line or line.startswith("GET /acme/")
        ]
        assert all(line.endswith("bytes=0-0") for line in files), "a file was downloaded"
        assert host.run(f"ls -d {STORE}/bad*").rc != 0


def test_secrets_open_what_is_closed_and_show_nowhere(hosts: list[Host], tmp_path: Path) -> None:
    """The server would refuse a request to its storage that shows a token. The weights come by Xet, and first it is too busy."""
    mode(hosts, "xet")
    for host in hosts:
        host.check_output("echo 8 >/srv/hub/busy")
    variables = tmp_path / "vars.json"
    secret = {
        "model_store_models": [
            modelscope("private-ms", "acme/secret"), hub("private", "acme/secret"), url("private-url", "closed", "?X-Signature=5ecret5"),
        ],
        "model_store_hf_token": GOOD,
        "model_store_modelscope_token": GOOD,
        "model_store_url_headers": {f"{SERVER}/files/closed": {"Authorization": f"Bearer {GOOD}"}},
    }  # fmt: skip
    variables.write_text(json.dumps(secret))
    said = applied(hosts, "model_store", "-vvv", f"--extra-vars=@{variables}")
    for host in hosts:
        assert not [line for line in asked(host) if "whoami" in line or "users/me" in line], "nobody was refused"
        assert "GET /cas/blocks/" in "\n".join(asked(host))
        assert ranges(host, "/acme/") == [], "not by Xet"
        assert any("config.json?X-Signature=5ecret5" in line for line in asked(host))
        for name in ("private", "private-ms", "private-url"):
            assert host.file(f"{STORE}/{name}/model.safetensors").size == SIZE
        journal = host.check_output("journalctl --no-pager --quiet --output=verbose")
        for word in (GOOD, "5ecret5", "hf_of_xet"):
            assert word not in said
            assert word not in journal
            assert host.run(f"grep -rlF {word} /etc /opt/model-store /run /srv/models /tmp /var/lib /root").stdout == ""


def test_a_stopped_download_goes_on_and_a_damaged_file_is_refused_and_fetched_anew(hosts: list[Host]) -> None:
    models = [hub("halted-hf"), modelscope("halted-ms"), url("halted-url")]
    mode(hosts, "brisk")
    running = subprocess.Popen(
        role_command(hosts, "model_store", model_store_models=models),
        cwd=ROOT, env=environment("model_store"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for model in models:
        for host in hosts:
            name = str(model["name"])
            until(partial(has_begun, host, name), 120, f"{name} did not begin")
            host.check_output(f"systemctl kill --signal=KILL model-download-{name}")
    said, _ = running.communicate()
    assert running.returncode != 0, said
    for host in hosts:
        words = told(said, host)
        for model in models:
            assert f"model-download-{model['name']} stopped by itself. Its last lines:" in words

    # The last byte is damaged, so that what goes on in the middle gets it. And what is there stays when its successor is refused.
    mode(hosts, "corrupt")
    forget(*hosts)
    for host, words in zip(hosts, refuse(hosts, [*models, url("tiny-url", config="0" * 64)]), strict=True):
        # ModelScope's client asks again before it gives up. Of tiny-url no weights come: its configuration is verified before.
        stored = ranges(host, "/storage/")
        for first in (*ranges(host, "/acme/"), stored[0], stored[-1]):
            assert first.startswith("bytes="), asked(host)
            assert first != "bytes=0-", asked(host)
        assert len(ranges(host, "/acme/")) == 1
        assert "halted-hf: model.safetensors is not what the hub says: expected 8000000 bytes" in words
        assert "halted-ms: model.safetensors is not what the hub says" in words
        assert "halted-url: model.safetensors is not what model_store_models says: sha256 is" in words
        assert f"config.json is not what model_store_models says: sha256 is {'0' * 64} there, but" in words
        assert host.run(f"ls -d {STORE}/halted* {STORE}/.revisions/halted*").stdout == ""
        assert host.file(f"{STORE}/tiny-url/config.json").exists, "the revision before went away"

    mode(hosts, "well-behaved")
    forget(*hosts)
    store(hosts, models)
    for host in hosts:
        assert (ranges(host, "/acme/"), ranges(host, "/storage/")) == (["-"], ["-", "-"])
        small = [line for line in asked(host) if line.startswith("GET") and "config.json" in line]
        assert [line for line in small if not line.endswith("bytes=0-0")] == [], "what was whole was fetched again"
        for model in models:
            assert host.file(f"{STORE}/{model['name']}/model.safetensors").sha256sum == WEIGHTS


def test_a_killed_playbook_loses_nothing_and_the_token_shows_nowhere(hosts: list[Host], tmp_path: Path) -> None:
    mode(hosts, "slow")
    wanted = {
        "model_store_models": [hub("slow", "acme/secret")],
        "model_store_hf_token": GOOD,
        "__model_store_progress_seconds": 2,
    }
    secret = tmp_path / "vars.json"
    secret.write_text(json.dumps(wanted))
    playbook = role_command(hosts, "model_store", f"--extra-vars=@{secret}")
    killed = subprocess.Popen(
        playbook,
        cwd=ROOT,
        env=environment("model_store"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for host in hosts:
        until(partial(ranges, host), 60, "the download did not begin")
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
    for host in hosts:
        assert host.check_output("systemctl is-active model-download-slow") == "active"
        assert not host.file(f"{STORE}/slow").exists

    again = subprocess.Popen(
        playbook, cwd=ROOT, env=environment("model_store"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert again.stdout
    said = ""
    for line in again.stdout:
        said += line
        mode(
            [host for host in hosts if f"{host_name(host)}: slow " in line and " kB/s, about " in line], "well-behaved"
        )
    assert again.wait() == 0, said
    assert " of 8.0 MB, " in said
    assert GOOD not in said
    for host in hosts:
        assert f"{host_name(host)}: slow is already on its way; watching it" in said
        assert len(ranges(host)) == 1
        assert host.file(f"{STORE}/slow/config.json").exists


def test_revisions_come_go_and_come_back(hosts: list[Host], tmp_path: Path) -> None:
    """Four runs with models that do not meet: on a line that is cut, at a branch, moved on and back, damaged on disk, grown on the controller."""
    copied: Model = {"name": "grown", "source": "path", "path": str(tmp_path), "copy": True}
    grown: list[list[str]] = []

    def run(number: int, *models: Model) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "tiny", "number": number}))
        forget(*hosts)
        said = store(hosts, [copied, *models], model_store_allow_moving_revisions=True)
        grown.append([host.check_output(f"readlink -f {STORE}/grown") for host in hosts])
        for host in hosts:
            assert json.loads(host.file(f"{STORE}/grown/config.json").content_string)["number"] == number
        return said

    mode(hosts, "cut")
    run(0, hub("cut"), hub("branch", revision="main"), hub("moving"))
    before = [host.check_output(f"readlink -f {STORE}/moving") for host in hosts]
    for host in hosts:
        # a connection that is cut is taken up again
        first, second, *_others = ranges(host)
        assert first == "-"
        assert second.startswith("bytes=")
        assert not second.startswith("bytes=0-"), second
        assert host.file(f"{STORE}/cut/config.json").exists
        # a branch passes when asked to
        assert json.loads(host.file(f"{STORE}/branch/.model.json").content_string)["commit"] == FIRST
        # a file that lost bytes on the disk is noticed, and fetched again
        host.check_output(f"truncate --size=-1 {STORE}/cut/model.safetensors")

    assert changed(run(1, hub("cut"), hub("moving", revision=SECOND)))
    for host, directory in zip(hosts, before, strict=True):
        assert host.file(f"{STORE}/cut/model.safetensors").size == SIZE
        # a new revision takes the name, and the previous one stays
        assert host.check_output(f"readlink -f {STORE}/moving").endswith(f"moving-{SECOND[:12]}")
        assert host.file(f"{directory}/model.safetensors").exists

    run(2, hub("cut"), hub("moving"))
    for host, directory in zip(hosts, before, strict=True):
        # and back, without the hub
        assert host.check_output(f"readlink -f {STORE}/moving") == directory
        assert asked(host) == []
    for number, host in enumerate(hosts):
        assert [host.file(directories[number]).exists for directories in grown] == [False, True, True]
    # nothing to do, also for the same files from another mirror and by a newer signature: what such a model is, its hashes say
    assert not changed(
        store(hosts, [copied, hub("cut"), hub("moving"), url("tiny-url", "elsewhere", "?X-Signature=new")])
    )
    for host in hosts:
        assert asked(host) == []


def test_a_disk_that_is_too_small_is_refused_before_the_download(hosts: list[Host], tmp_path: Path) -> None:
    for host in hosts:
        host.check_output("mkdir -p /srv/small && mount -t tmpfs -o size=4m tmpfs /srv/small")
    try:
        for host, words in zip(hosts, refuse(hosts, [hub("large")], model_store_path="/srv/small"), strict=True):
            assert "acme/tiny needs 8.0 MB more, but /srv/small has 4.2 MB free and 0.0 kB shall stay free" in words
            assert not [line for line in asked(host) if line.startswith("GET /acme/")]
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(bytes(5_000_000))
        copied: Model = {"name": "large", "source": "path", "path": str(tmp_path), "copy": True}
        for host, words in zip(hosts, refuse(hosts, [copied], model_store_path="/srv/small"), strict=True):
            assert "large take 5.0 MB, but /srv/small has 4.2 MB free" in words
            assert "large" not in host.check_output("ls /srv/small")
    finally:
        for host in hosts:
            host.check_output("umount /srv/small")


def test_a_disk_that_fills_up_is_named_and_the_next_run_goes_on(hosts: list[Host]) -> None:
    """There is room for all of it when it begins; then another file grows. Each source in turn."""
    small = "/srv/filling"
    for host in hosts:
        host.check_output(f"mkdir -p {small} && mount -t tmpfs -o size=48m tmpfs {small}")
    try:
        store(hosts, [hub("full-hf")], model_store_path=small)
        models = [hub("full-hf", revision=SECOND), modelscope("full-ms"), url("full-url")]
        mode(hosts, "brisk")
        forget(*hosts)
        running = subprocess.Popen(
            role_command(hosts, "model_store", model_store_models=models, model_store_path=small),
            cwd=ROOT, env=environment("model_store"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        for model in models:
            name = str(model["name"])
            for host in hosts:
                until(partial(has_begun, host, name, small), 120, f"{name} did not begin")
                # the next model, which begins when this one has failed on both hosts, finds room again
                fill = (
                    f"head -c 64M /dev/zero >{small}/other; "
                    f"while systemctl --quiet is-active model-download-{name}; do sleep 0.1; done; rm {small}/other"
                )
                host.check_output(f"systemd-run --quiet --collect sh -c '{fill}'")
        said, _ = running.communicate()
        assert running.returncode != 0, said
        for host in hosts:
            words = told(said, host)
            for model in models:
                what = model.get("repository", model["name"])
                assert re.search(
                    rf"{model['name']}: {small} is full \(No space left on device\): {what} needs [1-7]\.\d MB more, and 0\.0 kB are",
                    words,
                ), words
            # what was there is as it was, and nothing else has a name
            assert host.check_output(f"ls {small}") == "full-hf"
            assert host.check_output(f"readlink {small}/full-hf") == f".revisions/full-hf-{FIRST[:12]}"
            assert host.file(f"{small}/full-hf/model.safetensors").sha256sum == WEIGHTS

        mode(hosts, "well-behaved")
        forget(*hosts)
        store(hosts, models, model_store_path=small)
        for host in hosts:
            begun = [*ranges(host, "/acme/"), *ranges(host, "/storage/")]
            assert len(begun) == len(models), begun
            for first in begun:
                assert int(first.removeprefix("bytes=").partition("-")[0]) >= 1_000_000, begun
            for name in ("full-ms", "full-url"):
                assert host.file(f"{small}/{name}/model.safetensors").sha256sum == WEIGHTS
            assert host.check_output(f"readlink {small}/full-hf") == f".revisions/full-hf-{SECOND[:12]}"
    finally:
        for host in hosts:
            host.run("systemctl stop 'model-download-*'")
            host.check_output(f"umount {small}")


def test_a_disk_that_is_not_mounted_is_named(hosts: list[Host]) -> None:
    gone: Model = {"name": "gone", "source": "path", "path": "/srv/nfs/gone"}
    for words in refuse(hosts, [gone]):
        assert "gone: there is no /srv/nfs/gone/config.json on this host; is the disk mounted?" in words


def test_what_makes_no_sense_is_refused_before_any_change(hosts: list[Host]) -> None:
    plain: Model = {"name": "plain", "source": "url", "repository": "acme/tiny"}
    plain["files"] = [{"url": "https://mirror.example/config.json", "sha256": "abc"}]
    models = [hub("twice", revision="main"), hub("twice"), plain]
    said = refused(hosts, "model_store", model_store_models=models)
    assert "plain: `repository` means nothing for source url; it takes files" in said
    assert "plain: config.json: sha256 is `abc`; it takes the 64 hexadecimal digits" in said
    assert "the name `twice` is given 2 times" in said
    assert "twice: revision is `main`; it takes the 40 hexadecimal digits of a commit" in said
    for host in hosts:
        assert f"variables of {host_name(host)}" in said
        assert asked(host) == []
