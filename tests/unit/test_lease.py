"""The lease of a host: one run at a time, and what a controller knows of runs that are over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ansible_collections.gpufleet.llm.plugins.action import host_lease
from ansible_collections.gpufleet.llm.plugins.module_utils.lease import Holder, Lease, LeaseError, holder

ALICE = Holder("run-a", "alice", "ctl1", 11, "here")
BOB = Holder("run-b", "bob", "ctl2", 22, "there")


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    return Lease(tmp_path / "run" / "lease.json")


def test_the_second_run_is_told_who_holds_the_host(lease: Lease) -> None:
    taken = lease.take(ALICE)
    assert (taken.run, taken.who, len(taken.since)) == ("run-a", "alice", 19)
    assert lease.take(BOB) == taken
    assert str(taken).startswith("alice on ctl1 (process 11), since 20")


def test_who_has_it_keeps_it(lease: Lease) -> None:
    assert lease.take(ALICE) == lease.take(ALICE)


def test_only_the_holder_lets_go(lease: Lease) -> None:
    lease.take(ALICE)
    assert not lease.release("run-b")
    assert lease.release("run-a")
    assert not lease.release("run-a")
    assert lease.take(BOB).run == "run-b"


def test_it_is_taken_over_only_from_the_run_that_was_named(lease: Lease) -> None:
    lease.take(ALICE)
    assert lease.take(BOB, instead_of="run-z").run == "run-a"
    assert lease.take(BOB, instead_of="run-a").run == "run-b"


def test_one_of_many_at_once_gets_it(lease: Lease) -> None:
    answers: list[str] = []
    runs = [Holder(f"run-{number}", "x", "y", number) for number in range(20)]
    threads = [threading.Thread(target=lambda run=run: answers.append(lease.take(run).run)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1


def test_a_broken_file_is_told_and_not_overwritten(lease: Lease) -> None:
    lease.path.parent.mkdir()
    for text in ("{", "[]", '{"run": "x"}'):
        lease.path.write_text(text)
        with pytest.raises(LeaseError, match=r"lease\.json"):
            lease.take(ALICE)
        assert lease.path.read_text() == text


def test_what_a_newer_release_adds_is_left_out() -> None:
    assert holder({**vars(ALICE), "new": 1}) == ALICE


def test_a_run_of_this_controller_is_over_when_its_process_is_gone() -> None:
    where = host_lease.place()
    assert where
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        run = Holder(host_lease.run_name(process.pid, where), "x", "y", process.pid, where)
        assert not host_lease.is_over(run)
        # the same number, another process
        assert host_lease.is_over(Holder("other", "x", "y", process.pid, where))
        process.communicate(b"\n")
    assert host_lease.is_over(run)


def test_nothing_is_known_of_another_place() -> None:
    assert not host_lease.is_over(BOB)
    assert not host_lease.is_over(Holder("r", "x", "y", 0, ""))


def test_tasks_of_one_run_are_the_same_run() -> None:
    program = (
        f"import sys, os; sys.path.insert(0, {str(Path.cwd() / '.collections')!r})\n"
        "from ansible_collections.gpufleet.llm.plugins.action import host_lease\n"
        "print(__import__('json').dumps(vars(host_lease.this_run())))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
        for _ in "ab"
    ]
    assert runs[0] == runs[1]
    assert runs[0]["pid"] == os.getpid()
