"""The end state of ordinary/site.yml as operations of pyinfra, for comparison: `pyinfra INVENTORY tests/bench/pyinfra_deploy.py -y`.

noop.py makes the inventory (groups gateway and vllm, sudo) and the directory ORDINARY_FILES with what is on each host.
"""

from __future__ import annotations

import os
from pathlib import Path

from pyinfra import host  # type: ignore[import-not-found]
from pyinfra.facts.files import File as FileFact  # type: ignore[import-not-found]
from pyinfra.facts.files import FindFiles
from pyinfra.facts.files import Link as LinkFact
from pyinfra.facts.server import Command  # type: ignore[import-not-found]
from pyinfra.operations import apt, files, server, systemd  # type: ignore[import-not-found]

FILES = Path(os.environ["ORDINARY_FILES"]) / host.name
TLS = "/etc/ssl/vllm-fleet"


def put(path: str, mode: str = "644") -> None:
    """A file with the content that it has."""
    files.put(src=str(FILES / path.lstrip("/")), dest=path, user="root", group="root", mode=mode, add_deploy_dir=False)


def directory(path: str, mode: str = "755") -> None:
    """A directory of root's."""
    files.directory(path, user="root", group="root", mode=mode)


def all_hosts() -> None:
    """The role base."""
    packages = ["ca-certificates", "curl", "jq", "acl", "pciutils", "lsof"]
    apt.packages(packages, no_recommends=True)
    apt.packages(["chrony"], no_recommends=True)
    directory("/etc/systemd/journald.conf.d")
    put("/etc/systemd/journald.conf.d/50-vllm-fleet.conf")
    files.directory("/etc/chrony/sources.d")
    systemd.service("systemd-journald.service", running=True)
    files.directory("/var/log/journal")


def vllm_hosts() -> None:
    """The roles uv and vllm, without the release and the weights."""
    assert host.get_fact(LinkFact, "/usr/local/bin/uv"), "uv is not there"
    assert host.get_fact(LinkFact, "/usr/local/bin/uvx"), "uvx is not there"
    host.get_fact(Command, "/usr/local/bin/uv --version")
    directory("/etc/uv")
    put("/etc/uv/uv.toml")
    host.get_fact(Command, "/usr/local/bin/uv python find --no-python-downloads --no-project '>=3.11'")
    apt.packages(["libnuma1"], no_recommends=True)
    for user in ("vllm", "model-store"):
        server.group(user, system=True)
        server.user(user, home="/nonexistent", shell="/usr/sbin/nologin", system=True, ensure_home=False)  # noqa: S604 - its login shell
    for path in (
        "/etc/vllm",
        "/etc/vllm/chat",
        "/etc/vllm-keys",
        "/opt/vllm/releases",
        "/opt/vllm/locks",
        "/opt/vllm/bin",
        "/opt/vllm/lib",
    ):
        directory(path)
    files.directory("/srv/models")
    put("/etc/vllm/internal_key", "600")
    files.put(
        src=str(FILES / "etc/vllm-keys/accepted"), dest="/etc/vllm-keys/accepted", user="root", group="vllm", mode="640", add_deploy_dir=False
    )  # fmt: skip
    put("/opt/vllm/lib/fleet_internal_key.py")
    put("/etc/systemd/system/vllm@.service")
    put("/opt/vllm/bin/vllm-serve", "755")
    put("/opt/vllm/bin/dump_options.py")
    put("/etc/vllm/chat/current/config.yaml")
    put("/etc/vllm/chat/current/environment", "600")
    assert host.get_fact(FileFact, "/etc/vllm/chat/current/release/.complete"), "the release is not whole"
    assert host.get_fact(FileFact, "/srv/models/smollm2-135m-instruct/config.json"), "the model is not there"
    systemd.service("vllm@chat.service", running=True, enabled=True)
    host.get_fact(Command, f"curl --fail --silent --show-error http://{host.data.ssh_hostname}:8000/health")


def gateway_hosts() -> None:
    """The roles tls_certificate and gateway."""
    apt.packages(["openssl", "python3-cryptography"], no_recommends=True)
    files.directory(f"{TLS}/pairs/own", mode="755")
    files.file(f"{TLS}/ca.key", mode="600")
    files.file(f"{TLS}/pairs/own/privkey.pem", mode="600")
    put(f"{TLS}/ca.pem")
    put(f"{TLS}/pairs/own/fullchain.pem")
    files.link(f"{TLS}/current", target="pairs/own")
    files.link(f"{TLS}/fullchain.pem", target="current/fullchain.pem")
    files.link(f"{TLS}/privkey.pem", target="current/privkey.pem")
    for certificate in ("ca.pem", "fullchain.pem"):
        host.get_fact(Command, f"openssl x509 -in {TLS}/{certificate} -noout -pubkey -checkend 8640000")
    host.get_fact(Command, f"openssl pkey -in {TLS}/privkey.pem -pubout")
    apt.packages(["nginx"], no_recommends=True)
    directory("/etc/nginx/keys", "700")
    for key in host.get_fact(FindFiles, "/etc/nginx/keys"):
        files.file(key, user="root", group="root", mode="600")
    directory("/etc/systemd/system/nginx.service.d")
    put("/etc/systemd/system/nginx.service.d/50-vllm-fleet.conf")
    put("/etc/nginx/nginx.conf")
    host.get_fact(Command, "nginx -t -q")
    systemd.service("nginx.service", running=True, enabled=True)
    host.get_fact(
        Command, "curl --fail --silent --show-error --insecure -H 'Host: localhost' https://127.0.0.1/healthz"
    )
    host.get_fact(
        Command,
        "curl --silent --insecure -X POST -H 'Host: localhost' https://127.0.0.1/v1/chat/completions | grep error",
    )


all_hosts()
if "vllm" in host.groups:
    vllm_hosts()
if "gateway" in host.groups:
    gateway_hosts()
