"""Modes of what roles write are those that they have everywhere, whatever umask the login gives a module (CIS and STIG: 027, or 077)."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import stat
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.playbooks import playbook
from tests.unit.test_apt_host import FINGERPRINT, VENDOR
from tests.unit.test_frame import ROLES, ROOT, role_files, tasks
from tests.unit.test_vllm_modules import wanted

MODULES = sorted((ROOT / "plugins/modules").glob("*.py"))
# Modules of Ansible that make a file or a directory. What apt and systemd's units write has modes of its own.
WRITERS = {
    *(
        f"ansible.builtin.{name}"
        for name in ("assemble", "blockinfile", "copy", "file", "get_url", "lineinfile", "template", "unarchive")
    ),
    *(f"community.crypto.{name}" for name in ("openssl_csr", "openssl_privatekey", "x509_certificate")),
}
# They leave a file that is there the mode that it has.
CHANGES = {"ansible.builtin.lineinfile", "ansible.builtin.blockinfile"}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_begins_with_the_usual_umask(path: Path) -> None:
    """That of the login counts otherwise, where a module is not run the quick way: a task has an environment, pipelining is off."""
    for function in functions(path):
        if function.name == "main":
            _docstring, first, *_rest = function.body
            assert ast.unparse(first) == "os.umask(18)"


def test_every_task_that_writes_says_the_mode() -> None:
    found = []
    for role in ROLES:
        for path in role_files(role, "tasks/**/*.yml", "handlers/*.yml"):
            for task in tasks(yaml.safe_load(path.read_text())):
                for module in set(task) & WRITERS:
                    arguments = task[module]
                    changes = module in CHANGES and not arguments.get("create")
                    goes = arguments.get("state") in ("absent", "link")
                    needed = {"mode", *(["directory_mode"] if str(arguments.get("src", "")).endswith("/") else [])}
                    if not (changes or goes or needed <= set(arguments)):
                        found.append(f"{role}/{path.name}: {task['name']}")
    assert found == []


def python_archive(path: Path) -> tuple[str, str]:
    """An archive that passes for a Python of its own: its address and SHA-256."""
    text = b"#!/bin/sh\necho Python 3.12.16\n"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("python/bin/python3.12")
        entry.size, entry.mode = len(text), 0o755
        archive.addfile(entry, io.BytesIO(text))
    return path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()


def written(path: Path, umask: int, pipelining: bool) -> dict[str, str]:
    """The modes of everything that some modules write when the login has this umask."""
    place = path / f"{umask:03o}-{pipelining}"
    place.mkdir()
    python = path / f"python-{umask:03o}"
    python.write_text(f'#!/bin/sh\numask {umask:03o}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (path / "key").write_bytes(VENDOR)
    url, digest = python_archive(path / "python.tar.gz")
    listed: list[dict[str, Any]] = [
        {"gpufleet.llm.apt_source": {"state": "trusted", "key_path": f"{place}/apt/keyrings/vendor.asc", "key_url": (path / "key").as_uri(),
                                     "key_fingerprints": [FINGERPRINT]}},
        {"gpufleet.llm.vllm_generation": {"state": "prepared", "config_path": f"{place}/vllm", "release": "/opt/r1", "wanted": [wanted()]}},
        {"gpufleet.llm.managed_python": {"version": "3.12.16", "directory": f"{place}/python", "link_directory": str(place), "archive_url": url,
                                         "archive_sha256": digest}},
    ]  # fmt: skip
    (place / "vllm").mkdir()
    (path / "bin").mkdir(exist_ok=True)
    (path / "bin/systemctl").write_text("#!/bin/sh\n")  # no systemd here: it writes nothing
    (path / "bin/systemctl").chmod(0o755)
    variables = {"ansible_connection": "local", "ansible_python_interpreter": str(python)}
    (path / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "all", "gather_facts": False, "vars": variables, "tasks": listed}])
    )
    environment = {
        **os.environ,
        "PATH": f"{path}/bin:{os.environ['PATH']}",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_PIPELINING": str(pipelining),
        "ANSIBLE_STDOUT_CALLBACK": "default",
    }
    done = playbook("-i", "here,", path / "play.yml", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(one.relative_to(place)): stat.filemode(one.lstat().st_mode) for one in sorted(place.rglob("*"))}


@pytest.mark.parametrize("pipelining", [True, False])
def test_modes_do_not_depend_on_the_umask_of_the_login(tmp_path: Path, pipelining: bool) -> None:
    usual = written(tmp_path, 0o022, pipelining)
    assert usual["vllm/chat"] == usual["apt/keyrings"] == usual["python"] == "drwxr-xr-x"
    assert written(tmp_path, 0o077, pipelining) == usual
