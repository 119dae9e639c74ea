"""The built collection: what is in it, and that it serves roles and playbooks by FQCN where there is no clone."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix, "bin")
LIMIT = 2_000_000  # bytes; the collection is text


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in a directory, without the configuration of the clone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=cwd,
        env={**inherited, "LC_ALL": "C.UTF-8", "PATH": f"{BIN}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection as `make build` makes it."""
    target = tmp_path_factory.mktemp("build")
    done = run("ansible-galaxy", "collection", "build", "--output-path", str(target), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = target.glob("gpufleet-llm-*.tar.gz")
    return file


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory with nothing but the installed collection."""
    directory = tmp_path_factory.mktemp("installed")
    done = run(
        "ansible-galaxy", "collection", "install", "--offline", "--collections-path", "collections", str(built),
        cwd=directory,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_it_holds_what_users_need_and_nothing_else(built: Path) -> None:
    with tarfile.open(built) as archive:
        names = archive.getnames()
    tops = {name.split("/")[0] for name in names}
    assert tops <= {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "FILES.json",
        "LICENSE",
        "MANIFEST.json",
        "README.md",
        "changelogs",
        "docs",
        "meta",
        "playbooks",
        "plugins",
        "requirements.yml",
        "roles",
    }
    assert {"roles", "playbooks", "plugins", "README.md"} <= tops
    assert [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".retry"))] == []


def test_it_is_small(built: Path) -> None:
    assert built.stat().st_size < LIMIT


def test_its_playbooks_are_found_by_name(installed: Path) -> None:
    (installed / "hosts.yml").write_text(
        "vllm: {hosts: {gpu-1: {ansible_host: 192.0.2.1}}}\ngateway: {hosts: {gw-1: {ansible_host: 192.0.2.2}}}\n"
    )
    names = [f"gpufleet.llm.{playbook.stem}" for playbook in sorted((ROOT / "playbooks").glob("*.yml"))]
    done = run(
        "ansible-playbook",
        *names,
        "-i",
        "hosts.yml",
        "--syntax-check",
        cwd=installed,
        ANSIBLE_COLLECTIONS_PATH="collections",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name in names if f"{name.rpartition('.')[2]}.yml" not in done.stdout] == []


def test_its_roles_and_modules_are_found_by_name(installed: Path) -> None:
    listed = run(
        "ansible-doc", "--type", "role", "--list", "--json", "gpufleet.llm",
        cwd=installed, ANSIBLE_COLLECTIONS_PATH="collections",
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    for role in sorted(path.parents[1].name for path in (ROOT / "roles").glob("*/meta/argument_specs.yml")):
        assert f"gpufleet.llm.{role}" in listed.stdout
    modules = [f"gpufleet.llm.{path.stem}" for path in sorted((ROOT / "plugins" / "modules").glob("*.py"))]
    done = run("ansible-doc", *modules, cwd=installed, ANSIBLE_COLLECTIONS_PATH="collections")
    assert done.returncode == 0, done.stderr
    assert "was not found" not in done.stdout + done.stderr
