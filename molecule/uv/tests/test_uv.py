"""What the uv role promises: a pinned uv, one set of sources for every later call, and a Python that is new enough."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from testinfra.host import Host

from tests.playbooks import playbook
from tests.roles import ROOT, applied, changed, environment, refused, role_command, until

UNPRIVILEGED = "setpriv --reuid=65534 --regid=65534 --clear-groups env HOME=/tmp UV_CACHE_DIR=/tmp/c"


@pytest.fixture
def restored(host: Host) -> Iterator[None]:
    """Give the host back as the role leaves it."""
    yield
    host.check_output("rm -rf /opt/uv/python /usr/local/bin/python3* /srv/test /etc/pip.conf /etc/uv")
    applied(host, "uv")


def test_uv_is_the_pinned_one(host: Host) -> None:
    assert host.check_output("/usr/local/bin/uv --version").startswith("uv 0.13.8 ")
    assert host.check_output("/usr/local/bin/uvx --version").startswith("uvx 0.13.8 ")


def test_nothing_that_the_inventory_does_not_say_decides_where_packages_come_from(host: Host) -> None:
    """Whoever calls uv or pip gets what the host is configured with, and no role wrote that."""
    assert not host.file("/etc/uv").exists
    assert not host.file("/etc/pip.conf").exists
    configuration = host.file("/opt/uv/uv.toml").content_string
    assert "://" not in configuration
    assert host.check_output("UV_CONFIG_FILE=/opt/uv/uv.toml uv cache dir") == "/var/cache/uv"


def public_index(host: Host) -> str:
    """The index that pip goes to by itself, as pip has it: no name of one stands in this project."""
    python = f"{host.check_output('readlink -f /usr/local/bin/uv').rpartition('/')[0]}/python3"
    asked = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    return str(host.check_output(f'{python} -c "{asked}"'))


@pytest.mark.one_host
@pytest.mark.usefixtures("restored")
def test_a_virtual_environment_gets_a_package_from_the_configured_index(host: Host) -> None:
    """Real use: a virtual environment with a package from the index, over TLS, trusting the system's store."""
    index = public_index(host)
    assert changed(applied(host, "uv", uv_index_url=index))
    host.check_output("rm -rf /srv/venv && uv venv --quiet --python '>=3.11' /srv/venv")
    said = host.run("uv pip install --no-cache --verbose --python /srv/venv/bin/python iniconfig==2.1.0")
    assert said.rc == 0, said.stderr
    assert f"{index}/iniconfig/" in said.stderr
    assert (
        host.check_output("/srv/venv/bin/python -c 'import iniconfig, sys; print(sys.version_info >= (3, 11))'")
        == "True"
    )
    # the cache is the configured one
    assert host.check_output("uv cache dir") == "/var/cache/uv"
    said = host.run("uv venv --python 3.10 /srv/venv310")
    assert said.rc != 0, "uv downloads a Python as a side effect"
    assert "No interpreter found for Python 3.10" in said.stderr
    # Without credentials in it, the configuration is readable: otherwise uv would fail for everybody but root.
    said = host.run(f"{UNPRIVILEGED} uv python find '>=3.11'")
    assert said.rc == 0, said.stderr
    # what the inventory does not say any more is gone
    applied(host, "uv")
    assert not host.file("/etc/uv").exists


def test_uv_works_for_an_unprivileged_user_too(host: Host) -> None:
    said = host.run(f"{UNPRIVILEGED} UV_CONFIG_FILE=/opt/uv/uv.toml uv python find '>=3.11'")
    assert said.rc == 0, said.stderr


def test_uv_downloads_no_python_as_a_side_effect(host: Host) -> None:
    said = host.run("UV_CONFIG_FILE=/opt/uv/uv.toml uv venv --python 3.10 /srv/venv310")
    assert said.rc != 0
    assert "No interpreter found for Python 3.10" in said.stderr


@pytest.mark.one_host
@pytest.mark.usefixtures("restored")
def test_credentials_of_an_index_stay_secret(host: Host) -> None:
    index = "http://me:s3cret-in-url@127.0.0.1:9/simple"
    assert "s3cret" not in applied(host, "uv", "--diff", "-vvv", uv_extra_index_urls=[index]).replace(
        json.dumps(index), "(what the test itself passed)"
    )
    assert host.file("/etc/uv/uv.toml").mode == 0o600
    assert index in host.file("/etc/uv/uv.toml").content_string
    assert "s3cret" not in host.run("journalctl --no-pager --quiet").stdout


@pytest.mark.one_host
@pytest.mark.usefixtures("restored")
def test_a_changed_index_is_shown_and_used(host: Host) -> None:
    """The index in a directory on the host: what an air-gapped site has."""
    host.check_output("mkdir -p /srv/test/simple/empty")
    shown = applied(host, "uv", "--diff", uv_index_url="file:///srv/test/simple", uv_offline=True)
    assert '+url = "file:///srv/test/simple"' in shown
    said = host.run("uv pip install --dry-run --target /tmp/nothing iniconfig")
    assert said.rc != 0
    assert str(urlsplit(public_index(host)).hostname) not in said.stderr


@pytest.mark.one_host
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"uv_index_url": "pypi.example.org"}, "take addresses that begin with https://"),
        ({"uv_sha256": {"x86_64": "abc", "aarch64": "abc"}}, "uv_sha256 has no SHA-256 for"),
        ({"uv_python": "system", "uv_python_minimum": "3.99"}, "uv_python is `system`, but the Python of"),
        ({"uv_python": "managed", "uv_python_version": "3.12"}, "It takes an exact version, such as 3.12.16"),
        ({"uv_python_archive_url": "file:///srv/x.tar.gz"}, "but uv_python_archive_sha256 is ``"),
        ({"uv_python": "newest"}, "value of uv_python must be one of: auto, system, managed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused_before_any_change(
    host: Host, variables: dict[str, object], message: str
) -> None:
    assert message in refused(host, "uv", **variables)


@pytest.mark.one_host
def test_a_wrong_hash_and_a_missing_version_are_refused_by_name(host: Host) -> None:
    """The uv that was there stays in use, whatever goes wrong with the new one."""
    before = host.check_output("readlink /usr/local/bin/uv && sha256sum /usr/local/bin/uv")
    wrong = {"x86_64": "0" * 64, "aarch64": "0" * 64}
    assert f"Expected sha256 {'0' * 64}" in refused(host, "uv", uv_sha256=wrong)
    assert "No matching distribution found for uv==99.0" in refused(host, "uv", uv_version="99.0", uv_sha256=wrong)
    said = refused(
        host,
        "uv",
        uv_index_url="http://me:s3cret@127.0.0.1:9/simple",
        uv_sha256=wrong,
        uv_environment={"PIP_RETRIES": "1"},
    )
    assert "pip could not install uv" in said
    assert "/simple/uv/" in said
    assert host.check_output("readlink /usr/local/bin/uv && sha256sum /usr/local/bin/uv") == before
    assert host.check_output("ls /opt/uv/releases | wc -l") == "1"
    assert "s3cret" not in host.run("journalctl --no-pager --quiet").stdout


@pytest.fixture
def mirrored(host: Host) -> Iterator[None]:
    """An index on the host that has uv and one package and wants a password; the host's pip is configured with it, and with no other."""
    host.check_output(
        "mkdir -p /srv/test/wheels && /opt/uv/releases/*/bin/pip download --quiet --no-deps --only-binary :all:"
        " --cert /etc/ssl/certs/ca-certificates.crt --dest /srv/test/wheels uv==0.13.8 iniconfig==2.1.0"
    )
    host.check_output("printf '%s' {} >/srv/test/index.py".format("'" + INDEX.replace("'", "'\\''") + "'"))
    host.check_output("systemd-run --quiet --unit=test-index /usr/bin/python3 /srv/test/index.py")
    host.check_output(
        "for i in 1 2 3 4 5 6 7 8 9 10; do curl -s -o /dev/null http://127.0.0.1:8098/up && break; sleep 0.5; done"
    )
    host.check_output("printf '[global]\\nindex-url = http://me:s3cret@127.0.0.1:8098/simple\\n' >/etc/pip.conf")
    yield
    host.check_output("systemctl stop test-index")


INDEX = r"""
import base64, http.server, pathlib
wheels = pathlib.Path("/srv/test/wheels")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:s3cret").decode()
        open("/srv/test/asked", "a").write(self.path + "\n")
        name = self.path.rstrip("/").rpartition("/")[2]
        if not known:
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic")
            data = b""
        elif (wheels / name).is_file():
            self.send_response(200)
            data = (wheels / name).read_bytes()
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            found = [one.name for one in wheels.glob(name + "-*")]
            data = ("<!DOCTYPE html>" + "".join(f'<a href="../../wheels/{one}">{one}</a>' for one in found)).encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
    do_HEAD = do_GET
http.server.ThreadingHTTPServer(("127.0.0.1", 8098), Handler).serve_forever()
"""

PLAY = """
- hosts: all
  gather_facts: false
  tasks:
    - gpufleet.llm.python_environment: {path: /srv/test/environment, lock: /srv/test/lock.txt}
"""


@pytest.mark.one_host
@pytest.mark.usefixtures("restored", "mirrored")
def test_where_only_pip_is_configured_its_index_is_used_by_pip_and_uv(host: Host, tmp_path: Path) -> None:
    host.check_output("rm -rf /opt/uv/releases /usr/local/bin/uv /usr/local/bin/uvx")
    said = " ".join(applied(host, "uv", "--diff", "-vvv", uv_cache_directory="/srv/test/cache").split())
    assert "come from http://127.0.0.1:8098/simple, as pip is configured on the host" in said
    assert "s3cret" not in said
    assert "/wheels/uv-0.13.8-" in host.file("/srv/test/asked").content_string
    assert not host.file("/etc/uv").exists

    digest = host.check_output("sha256sum /srv/test/wheels/iniconfig-*").split()[0]
    host.check_output(f"echo iniconfig==2.1.0 --hash=sha256:{digest} >/srv/test/lock.txt")
    (tmp_path / "play.yml").write_text(PLAY)
    _program, *arguments = role_command(host, "uv", "-vvv")
    arguments[0] = str(tmp_path / "play.yml")
    host.check_output("rm /srv/test/asked")
    done = playbook(*arguments, environment=environment("uv"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/wheels/iniconfig-2.1.0-" in host.file("/srv/test/asked").content_string
    host.check_output("/srv/test/environment/bin/python -c 'import iniconfig'")
    assert not changed(playbook(*arguments, environment=environment("uv")).stdout)
    assert "s3cret" not in done.stdout + done.stderr
    assert "s3cret" not in host.run("journalctl --no-pager --quiet").stdout


@pytest.mark.one_host
@pytest.mark.usefixtures("restored")
def test_a_configuration_of_the_host_is_left_as_it_is(host: Host) -> None:
    host.check_output("mkdir -p /etc/uv && echo 'index-url = \"http://127.0.0.1:9/own\"' >/etc/uv/uv.toml")
    host.check_output("rm /usr/local/bin/uvx")
    said = " ".join(applied(host, "uv").split())
    assert "come from what uv is configured with on the host; uv itself came from the default of pip" in said
    assert host.file("/etc/uv/uv.toml").content_string == 'index-url = "http://127.0.0.1:9/own"\n'


# Kills a pip that installs, and first what called it.
KILL = r"""
import os, pathlib, sys
for found in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if b"\0pip\0install\0" in (found / "cmdline").read_bytes():
            os.kill(int((found / "stat").read_text().rpartition(")")[2].split()[1]), 9)
            os.kill(int(found.name), 9)
            sys.exit()
    except OSError:
        continue
sys.exit(1)
"""


@pytest.mark.one_host
@pytest.mark.usefixtures("restored")
def test_a_run_that_is_killed_leaves_the_uv_that_was_there(host: Host) -> None:
    """Killed while pip is at work; the next run is as if there had been none."""
    host.check_output("rm /usr/local/bin/uvx")
    before = host.check_output("readlink /usr/local/bin/uv")
    with subprocess.Popen(
        role_command(host, "uv"), cwd=ROOT, env=environment("uv"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:
        kill = "/usr/bin/python3 -c '" + KILL + "'"
        until(lambda: host.run(kill).rc == 0, 120, "pip was never called")
        running.communicate(timeout=120)
    assert running.returncode != 0
    assert host.check_output("ls /opt/uv/releases | wc -l") == "2", "nothing was killed half way"
    assert host.check_output("readlink /usr/local/bin/uv") == before
    assert host.check_output("uv --version").startswith("uv 0.13.8 ")
    applied(host, "uv")
    assert host.check_output("uvx --version").startswith("uvx 0.13.8 ")
    assert host.check_output("ls /opt/uv/releases | wc -l") == "1"


@pytest.fixture
def archive(host: Host) -> tuple[str, str]:
    """A stand-in for an archive of python-build-standalone: the host's own Python in the same shape.

    The real archives come from GitHub, which the machines that test this cannot reach.
    """
    version = host.check_output("/usr/bin/python3 -c 'import platform; print(platform.python_version())'")
    short = version.rpartition(".")[0]
    host.check_output(
        f"rm -rf /srv/test/python && mkdir -p /srv/test/python/bin /srv/test/python/lib"
        f" && cp /usr/bin/python{short} /srv/test/python/bin/ && cp -r /usr/lib/python{short} /srv/test/python/lib/"
        f" && tar -C /srv/test -czf /srv/test/python.tar.gz python && rm -r /srv/test/python"
    )
    return version, host.check_output("sha256sum /srv/test/python.tar.gz").split()[0]


@pytest.mark.one_host
@pytest.mark.usefixtures("restored")
def test_a_managed_python_comes_from_a_pinned_archive(host: Host, archive: tuple[str, str]) -> None:
    version, sha256 = archive
    wanted: dict[str, object] = {
        "uv_python": "managed", "uv_python_version": version, "uv_offline": True,
        "uv_python_archive_url": "file:///srv/test/python.tar.gz", "uv_python_archive_sha256": sha256,
    }  # fmt: skip
    said = refused(host, "uv", **{**wanted, "uv_python_archive_sha256": "0" * 64})
    assert f"expected sha256 {'0' * 64}, got {sha256}" in said
    assert host.check_output("ls -A /opt/uv/python") == ""
    said = refused(host, "uv", **{**wanted, "uv_python_version": version + "9"})
    assert f"is not Python {version}9: python" in said

    assert changed(applied(host, "uv", **wanted))
    assert not changed(applied(host, "uv", **wanted))
    found = host.check_output("uv python find '>=3.11'")
    assert found.startswith(("/opt/uv/python/", "/usr/local/bin/python"))
    short = version.rpartition(".")[0]
    # (a virtual environment of this stand-in would fall back to the paths that Debian compiled into it)
    prefix = host.check_output(f"/usr/local/bin/python{short} -c 'import sys; print(sys.base_prefix)'")
    assert prefix.startswith(f"/opt/uv/python/cpython-{version}-")
    # python3 stays the system's
    assert host.check_output("python3 -c 'import sys; print(sys.base_prefix)'") == "/usr"


MIRROR = r"""
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        open("/srv/test/asked", "a").write(self.path + "\n")
        self.send_response(200)
        data = open("/srv/test/other.tar.gz", "rb").read()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
http.server.HTTPServer(("127.0.0.1", 8099), Handler).serve_forever()
"""


@pytest.fixture
def mirror(host: Host) -> Iterator[None]:
    """A mirror that has something else under every name."""
    host.check_output("mkdir -p /srv/test && rm -f /srv/test/asked")
    host.check_output(
        "mkdir -p /srv/test/python && tar -C /srv/test -czf /srv/test/other.tar.gz python && rmdir /srv/test/python"
    )
    host.check_output("printf '%s' {} >/srv/test/mirror.py".format("'" + MIRROR.replace("'", "'\\''") + "'"))
    host.check_output("systemd-run --quiet --unit=test-mirror /usr/bin/python3 /srv/test/mirror.py")
    host.check_output(
        "for i in 1 2 3 4 5 6 7 8 9 10; do curl -s -o /dev/null http://127.0.0.1:8099/up && break; sleep 0.5; done"
    )
    yield
    host.check_output("systemctl stop test-mirror")


@pytest.mark.one_host
@pytest.mark.usefixtures("restored", "mirror")
def test_uv_asks_the_mirror_and_refuses_a_python_that_it_does_not_know(host: Host) -> None:
    """uv carries the hash of every archive: it asks the mirror, and refuses what the mirror has instead."""
    said = refused(host, "uv", uv_python="managed", uv_python_mirror="http://127.0.0.1:8099/python")
    assert "uv could not install Python 3.12.16 from http://127.0.0.1:8099/python" in said
    assert "hash mismatch" in said.lower() or "checksum" in said.lower(), said
    asked = host.file("/srv/test/asked").content_string
    assert "/python/" in asked
    assert "cpython-3.12.16" in asked
    assert not host.file("/usr/local/bin/python3.12").exists
