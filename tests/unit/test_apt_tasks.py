"""Every way of installing waits for another apt or dpkg: a cloud image updates itself at its first boot, and people work on hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.unit.test_frame import ROLES, role_files, tasks


def all_tasks() -> Iterator[tuple[Path, dict[str, Any]]]:
    for role in ROLES:
        for path in role_files(role, "tasks/**/*.yml", "handlers/*.yml"):
            for task in tasks(yaml.safe_load(path.read_text())):
                yield path, task


def test_the_module_apt_waits_and_installs_no_file() -> None:
    """A file is installed by dpkg, which does not wait, whatever the module is told."""
    found = [(path, task["ansible.builtin.apt"]) for path, task in all_tasks() if "ansible.builtin.apt" in task]
    assert len(found) > 9
    assert [path for path, arguments in found if "lock_timeout" not in arguments or "deb" in arguments] == []


def test_programs_wait() -> None:
    waiting = {"apt-get": "DPkg::Lock::Timeout=", "dpkg": "was locked by"}
    seen = set()
    for path, task in all_tasks():
        command = str(task.get("ansible.builtin.command", ""))
        for program, how in waiting.items():
            if f"{program} " in command or f"'{program}'" in command:
                seen.add(program)
                assert how in f"{command} {task.get('until', '')}", f"{path}: {task['name']}"
    assert seen == set(waiting)
