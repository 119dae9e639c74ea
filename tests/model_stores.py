"""What the tests of the scenario model_store have in common: models to ask for, and the hub that is on every host (files/hub.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from testinfra.host import Host

from tests.roles import applied, apply_role, told

FIRST, SECOND = "a" * 40, "b" * 40
GOOD, BAD = "hf_goodgoodgood", "hf_badbadbad"
STORE, SERVER = "/srv/models", "http://127.0.0.1:8199"
SIZE = 8_000_000
CONTENTS = {
    "config.json": json.dumps({"model_type": "tiny", "commit": FIRST}).encode(),
    "model.safetensors": hashlib.shake_256(FIRST.encode()).digest(SIZE),
}
WEIGHTS = hashlib.sha256(CONTENTS["model.safetensors"]).hexdigest()

Model = dict[str, object]


def hub(name: str, repository: str = "acme/tiny", revision: str = FIRST) -> Model:
    return {"name": name, "source": "huggingface", "repository": repository, "revision": revision}


def modelscope(name: str, repository: str = "acme/tiny", revision: str = FIRST) -> Model:
    return {**hub(name, repository, revision), "source": "modelscope"}


def url(name: str, folder: str = "open", query: str = "", **sha256: str) -> Model:
    """Config and weights from the file server; `sha256` gives one of them another hash."""
    files = [
        {
            "url": f"{SERVER}/files/{folder}/{FIRST}/{file}{query}",
            "sha256": sha256.get(file.split(".")[0], hashlib.sha256(content).hexdigest()),
        }
        for file, content in CONTENTS.items()
    ]
    return {"name": name, "source": "url", "files": files}


def store(hosts: Sequence[Host], models: Sequence[Model], *options: str, **variables: object) -> str:
    """Apply the role with these models."""
    return applied(hosts, "model_store", *options, model_store_models=models, **variables)


def refuse(hosts: Sequence[Host], models: Sequence[Model], **variables: object) -> list[str]:
    """Apply the role with these models, expect a refusal by every host, and return what each of them said."""
    done = apply_role(hosts, "model_store", model_store_models=models, **variables)
    assert done.returncode != 0, done.stdout
    said = [told(done.stdout, host) for host in hosts]
    for host, words in zip(hosts, said, strict=True):
        assert "failed: [" in words or "fatal: [" in words, f"{host}: {done.stdout}{done.stderr}"
    return said


def asked(host: Host) -> list[str]:
    """What the hub of a host was asked since the test began."""
    return str(host.run("cat /srv/hub/log").stdout).splitlines()


def forget(*hosts: Host) -> None:
    """The hubs were asked nothing."""
    for host in hosts:
        host.check_output("rm -f /srv/hub/log")


def mode(hosts: Sequence[Host], words: str) -> None:
    """How the hubs behave from now on."""
    for host in hosts:
        host.check_output(f"echo {words} >/srv/hub/mode")


def ranges(host: Host, way: str = "") -> list[str]:
    """The parts of the weights that a hub was asked for, `-` for all, but for the first byte, by which the size is asked.

    `way` is /acme/ for Hugging Face and /storage/ for ModelScope and addresses.
    """
    lines = [line for line in asked(host) if line.startswith(f"GET {way}") and "model.safetensors" in line]
    return [line.rsplit(" ", 1)[1] for line in lines if not line.endswith("bytes=0-0") and "/repo?" not in line]


def has_begun(host: Host, name: str, path: str = STORE) -> bool:
    """Whether some of a model's weights is on the disk; they are written in pieces of a megabyte."""
    return bool(host.run(f"find {path}/.partial/{name}-* -size +1023k").stdout)


def has_ended(host: Host, unit: str) -> bool:
    """Whether a unit does not run any more."""
    return bool(host.run(f"systemctl is-active {unit}").rc != 0)
