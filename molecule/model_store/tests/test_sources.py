"""ModelScope through the real modelscope_hub, and plain addresses, both against the stand-in on the test host (files/hub.py)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.roles import ROOT, applied, environment, refused, role_command

testinfra_hosts = ["ansible://model-store-debian12"]  # nothing here depends on the release of the host

COMMIT = "a" * 40
GOOD, BAD = "hf_goodgoodgood", "hf_badbadbad"
STORE, SERVER = "/srv/models", "http://127.0.0.1:8199"
CONTENTS = {
    "config.json": json.dumps({"model_type": "tiny", "commit": COMMIT}).encode(),
    "model.safetensors": hashlib.shake_256(COMMIT.encode()).digest(8_000_000),
}


def modelscope(name: str, repository: str = "acme/tiny", revision: str = COMMIT) -> dict[str, object]:
    return {"name": name, "source": "modelscope", "repository": repository, "revision": revision}


def url(name: str, folder: str = "open", query: str = "", **sha256: str) -> dict[str, object]:
    """Config and weights from the file server; `sha256` gives one of them another hash."""
    files = [
        {
            "url": f"{SERVER}/files/{folder}/{COMMIT}/{file}{query}",
            "sha256": sha256.get(file.split(".")[0], hashlib.sha256(content).hexdigest()),
        }
        for file, content in CONTENTS.items()
    ]
    return {"name": name, "source": "url", "files": files}


def asked(host: Host) -> list[str]:
    """What the server was asked since the test began."""
    return str(host.run("cat /srv/hub/log").stdout).splitlines()


def begun(host: Host) -> list[str]:
    """The ranges that the storage server was asked for, but for the first byte, by which the size is asked."""
    lines = [line for line in asked(host) if line.startswith("GET /storage/")]
    return [line.rsplit(" ", 1)[1] for line in lines if not line.endswith("bytes=0-0")]


def mode(host: Host, words: str) -> None:
    host.check_output(f"echo {words} >/srv/hub/mode; rm -f /srv/hub/log")


@pytest.fixture(autouse=True)
def fresh_server(host: Host) -> Iterator[None]:
    mode(host, "well-behaved")
    yield
    host.run("systemctl stop 'model-download-*'")


@pytest.mark.parametrize(
    ("token", "wanted"),
    [
        (
            BAD,
            [
                (modelscope("bad1"), "refuses the token. model_store_modelscope_token is wrong, expired or revoked"),
                (
                    url("bad2", "closed"),
                    "config.json is refused (401): model_store_url_headers has a wrong header for it",
                ),
            ],
        ),
        (
            "",
            [
                (modelscope("bad1", "acme/secret"), "has no repository acme/secret: it is misspelt, or private"),
                (modelscope("bad2", "acme/gated"), "acme/gated is restricted and without a token there is no access"),
                (modelscope("bad3", "acme/huge"), "acme/huge needs 1000000.0 GB more, but /srv/models has"),
                (url("bad4", "closed"), "config.json is refused (401): model_store_url_headers has no header for it"),
            ],
        ),
        (
            GOOD,
            [
                (modelscope("bad1", "acme/none"), "has no repository acme/none: it is misspelt, or this token may not"),
                (modelscope("bad2", "acme/gated"), "acme/gated is restricted and this token has no access. Ask for"),
                (modelscope("bad3", revision="c" * 40), f"acme/tiny has no revision {'c' * 40}; its commits are at"),
                (url("bad4", "none/none"), "config.json cannot be had: 404 Not Found"),
            ],
        ),
    ],
    ids=["bad-token", "no-token", "good-token"],
)
def test_what_cannot_be_had_is_told_apart_before_any_download(
    host: Host, token: str, wanted: list[tuple[dict[str, object], str]]
) -> None:
    said = refused(
        host,
        "model_store",
        model_store_models=[model for model, _message in wanted],
        model_store_modelscope_token=token,
        model_store_url_headers={f"{SERVER}/files/closed/": {"Authorization": f"Bearer {token}"}} if token else {},
    )
    for _model, message in wanted:
        assert message in said
    files = [line for line in asked(host) if "/files/" in line or "FilePath=" in line]
    assert all(line.endswith("bytes=0-0") for line in files), "a file was downloaded"
    assert host.run(f"ls -d {STORE}/bad*").rc != 0


def test_secrets_open_what_is_closed_and_show_nowhere(host: Host, tmp_path: Path) -> None:
    """The server would refuse a request to its storage that shows a token."""
    variables = tmp_path / "vars.json"
    secret = {
        "model_store_models": [modelscope("private-ms", "acme/secret"), url("private-url", "closed", "?X-Signature=5ecret5")],
        "model_store_modelscope_token": GOOD,
        "model_store_url_headers": {f"{SERVER}/files/closed": {"Authorization": f"Bearer {GOOD}"}},
    }  # fmt: skip
    variables.write_text(json.dumps(secret))
    said = applied(host, "model_store", "-vvv", f"--extra-vars=@{variables}")
    assert any("config.json?X-Signature=5ecret5" in line for line in asked(host))
    for name in ("private-ms", "private-url"):
        assert host.file(f"{STORE}/{name}/model.safetensors").size == 8_000_000
    journal = host.check_output("journalctl --no-pager --quiet --output=verbose")
    for word in (GOOD, "5ecret5"):
        assert word not in said
        assert word not in journal
        assert host.run(f"grep -rlF {word} /etc /opt/model-store /run /srv/models /tmp /var/lib /root").stdout == ""


def test_a_stopped_download_goes_on_and_a_damaged_file_is_refused_and_fetched_anew(host: Host) -> None:
    models = [modelscope("halted-ms"), url("halted-url")]
    mode(host, "slow")
    running = subprocess.Popen(
        role_command(host, "model_store", model_store_models=models),
        cwd=ROOT, env=environment("model_store"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for name in ("halted-ms", "halted-url"):
        for _ in range(240):
            if host.run(f"find {STORE}/.partial/{name}-* -size +1023k").stdout:
                break
            time.sleep(0.5)
        host.check_output(f"systemctl kill --signal=KILL model-download-{name}")
    said, _ = running.communicate()
    assert running.returncode != 0, said
    assert said.count("stopped by itself. Its last lines:") >= 2

    # the last byte is damaged, so that what goes on in the middle gets it
    mode(host, "corrupt")
    said = refused(host, "model_store", model_store_models=models)
    ranges = begun(host)
    for first in (ranges[0], ranges[-1]):
        assert first.startswith("bytes="), ranges
        assert first != "bytes=0-", ranges
    assert "halted-ms: model.safetensors is not what the hub says" in said
    assert "halted-url: model.safetensors is not what model_store_models says: sha256 is" in said
    assert host.run(f"ls -d {STORE}/halted* {STORE}/.revisions/halted*").stdout == ""

    mode(host, "well-behaved")
    applied(host, "model_store", model_store_models=models)
    assert begun(host) == ["-", "-"]
    small = [line for line in asked(host) if "config.json" in line and not line.endswith("bytes=0-0")]
    assert small == [], "what was whole was fetched again"
    for name in ("halted-ms", "halted-url"):
        there = host.file(f"{STORE}/{name}/model.safetensors")
        assert there.sha256sum == hashlib.sha256(CONTENTS["model.safetensors"]).hexdigest()


def test_the_same_files_from_elsewhere_are_not_fetched_again(host: Host) -> None:
    """What a model from addresses is, its hashes say: a newer signature or another mirror changes nothing."""
    applied(host, "model_store", model_store_models=[url("tiny-url", "elsewhere", "?X-Signature=new")])
    assert asked(host) == []
    said = refused(host, "model_store", model_store_models=[url("tiny-url", config="0" * 64)])
    assert f"config.json is not what model_store_models says: sha256 is {'0' * 64} there, but" in said
    assert host.file(f"{STORE}/tiny-url/config.json").exists, "the revision before went away"
