"""`tree`: the engine on a directory, with a crash at every call that changes the disk; the task by real ansible-core."""

from __future__ import annotations

import errno
import fcntl
import grp
import json
import os
import pwd
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.action.tree import mirrored
from ansible_collections.gpufleet.llm.plugins.module_utils import tree_seen
from ansible_collections.gpufleet.llm.plugins.module_utils.tree import Entry, TreeError, handlers, pack, unpack
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_host import Tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.playbooks import playbook

ROOT = Path(__file__).resolve().parents[2]
USER, GROUP = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
ALL = {"*": ["H"]}

Snapshot = dict[str, tuple[Any, ...]]


def entry(path: str, content: bytes | str = b"", **more: Any) -> Entry:
    """A file of the current user."""
    content = content.encode() if isinstance(content, str) else content
    return Entry(path, content=content, owner=USER, group=GROUP, **more)


def directory(path: str, mode: str = "0755") -> Entry:
    return Entry(path, "directory", mode=mode, owner=USER, group=GROUP)


def link(path: str, target: str) -> Entry:
    return Entry(path, "link", target=target)


class Crash(BaseException):
    """The machine is off."""


@dataclass
class Machine:
    """Makes the engine's calls, until it crashes before one of them (a write is half done then), or until its disk is full."""

    calls: int = 10**9
    error: OSError | None = None
    full: bool = False
    made: list[str] = field(default_factory=list)

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.calls == 0 and not self.full:
            if self.error:
                self.calls = -1
                raise self.error
            if function is os.write:
                os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            raise Crash
        if self.calls == 0 and function in (os.open, os.write, os.mkdir, os.symlink, os.link):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.calls -= self.calls > 0
        self.made.append(function.__name__)
        # What sync is for is not seen without a power cut, and it is slow.
        return None if function is os.fsync else function(*arguments, **options)


@dataclass
class Host:
    """A directory that stands for a host's file system."""

    base: Path

    def __post_init__(self) -> None:
        self.root = self.base / "root"
        self.state = self.base / "state" / "x"
        self.root.mkdir()

    def tree(self, machine: Machine | None = None) -> Tree:
        return Tree(self.state, self.root, machine or Machine())

    def present(self, *entries: Entry, **more: Any) -> dict[str, Any]:
        return self.tree(more.pop("machine", None)).present(entries, **more)

    def at(self, path: str) -> Path:
        return self.root / path[1:]

    def write(self, path: str, text: str = "foreign\n", mode: int = 0o644) -> Path:
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).write_text(text)
        self.at(path).chmod(mode)
        return self.at(path)

    def snapshot(self) -> Snapshot:
        found: Snapshot = {}
        for path in sorted(self.root.rglob("*")):
            name, mode = f"/{path.relative_to(self.root)}", stat.S_IMODE(path.lstat().st_mode)
            if path.is_symlink():
                found[name] = ("link", str(path.readlink()))
            else:
                found[name] = ("directory", mode) if path.is_dir() else ("file", path.read_bytes(), mode)
        return found

    def manifest(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.state / "manifest.json").read_text())
        return read

    def remembered(self) -> list[str]:
        """What is in the memory, without the file that is only a help."""
        names = {path.name for path in self.state.iterdir()} if self.state.is_dir() else set()
        return sorted(names - {tree_seen.SEEN})

    def unchanged(self) -> str | None:
        """What a look at the host says: the digest of what is there, if anything can be said."""
        return tree_seen.unchanged(self.state.parent, self.root).get(self.state.name)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# ------------------------------------------------------------------------------------------------------------ the engine


def test_files_directories_and_links_are_put_in_place(host: Host) -> None:
    wanted = [
        entry("/etc/app/app.conf", b"\xff\x00raw", mode="0640"),
        directory("/etc/keys", "0700"),
        link("/usr/bin/app", "/opt/app/1/app"),
    ]
    result = host.present(*wanted)
    assert result["changed"]
    assert host.snapshot() == {
        "/etc": ("directory", 0o755),
        "/etc/app": ("directory", 0o755),
        "/etc/app/app.conf": ("file", b"\xff\x00raw", 0o640),
        "/etc/keys": ("directory", 0o700),
        "/usr": ("directory", 0o755),
        "/usr/bin": ("directory", 0o755),
        "/usr/bin/app": ("link", "/opt/app/1/app"),
    }
    assert host.remembered() == ["manifest.json"]
    machine = Machine()
    assert not host.present(*wanted, machine=machine)["changed"]
    assert machine.made == []  # not one call that writes


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_do_not_depend_on_the_umask(host: Host, umask: int) -> None:
    former = os.umask(umask)
    try:
        host.present(entry("/a/b", mode="0664"))
    finally:
        os.umask(former)
    assert host.snapshot() == {"/a": ("directory", 0o755), "/a/b": ("file", b"", 0o664)}
    assert stat.S_IMODE(host.state.stat().st_mode) == 0o700


def test_a_file_that_was_right_before_is_taken_over_without_a_change(host: Host) -> None:
    host.write("/a", "x")
    assert not host.present(entry("/a", "x"))["changed"]
    assert host.present()["paths"] == ["/a"]
    assert host.snapshot() == {}


def test_mode_alone_is_a_change(host: Host) -> None:
    host.present(entry("/a", "x"), directory("/d", "0755"))
    assert host.present(entry("/a", "x", mode="0600"), directory("/d", "0700"))["paths"] == ["/d", "/a"]
    assert host.snapshot() == {"/a": ("file", b"x", 0o600), "/d": ("directory", 0o700)}


def test_a_link_in_the_place_of_a_file_is_replaced_itself(host: Host) -> None:
    target = host.write("/real")
    host.at("/conf").symlink_to("real")
    host.present(entry("/conf", "new"))
    assert target.read_text() == "foreign\n"
    assert host.snapshot()["/conf"] == ("file", b"new", 0o644)


def test_directories_that_are_links_are_followed(host: Host) -> None:
    host.at("/data").mkdir()
    host.at("/etc").symlink_to("data")
    wanted = [entry("/etc/app/a"), directory("/etc/app", "0750")]
    host.present(*wanted)
    assert host.snapshot()["/data/app/a"] == ("file", b"", 0o644)
    assert host.snapshot()["/data/app"] == ("directory", 0o750)
    assert host.at("/etc").is_symlink()
    assert not host.present(*wanted)["changed"]


def test_what_is_wanted_no_more_is_removed_with_the_directories_that_were_made(host: Host) -> None:
    host.write("/etc/foreign")
    host.present(entry("/etc/app/d/a"), link("/etc/app/l", "x"), entry("/var/app/b"))
    host.write("/var/app/theirs")
    result = host.present()
    assert result["paths"] == ["/etc/app/d/a", "/etc/app/l", "/var/app/b", "/etc/app/d", "/etc/app"]
    assert sorted(host.snapshot()) == ["/etc", "/etc/foreign", "/var", "/var/app", "/var/app/theirs"]
    # What was made and could not go stays known, and goes as soon as it can.
    host.at("/var/app/theirs").unlink()
    assert host.present()["paths"] == ["/var/app", "/var"]
    assert not host.state.exists()
    assert not host.present()["changed"]


def test_a_path_that_has_another_name_now_is_not_removed(host: Host) -> None:
    host.at("/real").mkdir()
    host.at("/alias").symlink_to("real")
    host.present(entry("/alias/a", "x"))
    assert host.present(entry("/real/a", "x"))["paths"] == []
    assert host.snapshot()["/real/a"] == ("file", b"x", 0o644)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([("relative", {})], "path: 'relative' must be absolute"),
        ([("/a/../b", {})], "path: '/a/../b' must be absolute"),
        ([("/a/", {})], "path: '/a/' must be"),
        ([("//a", {})], "path: '//a' must be"),
        ([("/", {})], "path: '/' must be"),
        ([("/a", {}), ("/a", {})], "path: /a is stated twice"),
        ([("/a", {}), ("/a/b", {})], "path: /a is wanted as a file, and as a directory"),
        ([("/a", {"mode": 420})], '/a: mode must be a quoted octal string such as "0644", not 420'),
        ([("/a", {"mode": "u=rw"})], "/a: mode must be"),
        ([("/new", {}), ("/a", {"owner": "nobody-here"})], "/a: owner 'nobody-here' is unknown on this host"),
        ([("/new", {}), ("/a", {"group": "nobody-here"})], "/a: group 'nobody-here' is unknown on this host"),
        ([("/new", {}), ("/there", {})], "/there is a directory; a file is wanted there"),
        ([("/new", {}), ("/pipe", {})], "/pipe is a device, socket or pipe; a file is wanted there"),
        ([("/new", {}), ("/foreign/a", {})], "/foreign is no directory; one is wanted there"),
        ([("/there/a", {}), ("/alias/a", {})], "/alias/a"),
        ([("/a", {"kind": "link"})], "/a: target of the link must not be empty"),
    ],
)
def test_bad_input_is_refused_before_any_change(host: Host, wanted: list[Any], message: str) -> None:
    host.at("/there").mkdir()
    host.at("/alias").symlink_to("there")
    host.write("/foreign")
    os.mkfifo(host.at("/pipe"))
    before = sorted(host.root.rglob("*"))
    with pytest.raises(TreeError) as refused:
        host.present(*(Entry(path, **{"owner": USER, "group": GROUP, **more}) for path, more in wanted))
    assert message in str(refused.value)
    assert sorted(host.root.rglob("*")) == before
    assert not host.state.exists()


@pytest.mark.parametrize("who", [{"group": "nobody-here"}, {"owner": "nobody-here"}])
def test_in_a_check_owners_may_be_what_an_earlier_task_would_make(host: Host, who: dict[str, Any]) -> None:
    owners: dict[str, Any] = {"owner": USER, "group": GROUP, **who}
    wanted = Entry("/a", **owners)
    result = host.present(wanted, check=True, diff=True)
    assert result["paths"] == ["/a"]
    assert "nobody-here" in result["diff"][0]["after"]
    assert not host.at("/a").exists()
    with pytest.raises(TreeError, match="unknown on this host"):
        host.present(wanted)


def test_nothing_is_put_below_a_link_that_is_about_to_go(host: Host) -> None:
    host.at("/real").mkdir()
    host.present(link("/l", "real"))
    with pytest.raises(TreeError, match="/l is a link that a former run made"):
        host.present(entry("/l/a"))


def test_a_refused_change_is_undone_and_tells_why(host: Host) -> None:
    host.present(entry("/etc/a", "old", mode="0600"), entry("/gone", "x"), directory("/d", "0700"))
    host.write("/etc/a.txt")
    before, manifest = host.snapshot(), host.manifest()
    told = host.at("/etc/seen")
    program = f"sh -c 'cat {host.at('/etc/a')} {host.at('/new/b')}; ls {host.root} >&2; exit 3'"
    with pytest.raises(TreeError) as refused:
        host.present(
            entry("/etc/a", "new "), entry("/new/b", "more"), directory("/d", "0755"), validate=["true", program]
        )
    assert "ended with 3: new more" in str(refused.value)
    assert "gone" not in str(refused.value).split("new more")[1]  # it saw the new files alone
    assert not told.exists()
    assert (host.snapshot(), host.manifest(), host.remembered()) == (before, manifest, ["manifest.json"])
    with pytest.raises(TreeError, match=r"validate: 'no-such-program' cannot be run.*every file is as it was"):
        host.present(entry("/etc/a", "new"), validate=["no-such-program"])
    assert host.snapshot() == before


def test_what_a_change_requires_is_looked_for_before_it(host: Host) -> None:
    requires = [
        {"path": "/etc/there", "fail_msg": "there"},
        {"path": "/etc/pem", "fail_msg": "/etc/pem (pem) is not there"},
    ]
    host.write("/etc/there")
    before = host.snapshot()
    with pytest.raises(TreeError, match=r"^/etc/pem \(pem\) is not there$"):
        host.present(entry("/etc/a"), requires=requires)
    assert host.snapshot() == before
    host.present(entry("/etc/a"), requires=requires, check=True)
    host.write("/etc/pem")
    assert host.present(entry("/etc/a"), requires=requires)["changed"]
    (host.root / "etc/pem").unlink()
    assert not host.present(entry("/etc/a"), requires=requires)["changed"]


def test_validation_runs_only_for_a_change(host: Host) -> None:
    host.present(entry("/a"), validate=["true"])
    host.present(entry("/a"), validate=["false"])


def test_what_a_command_quotes_of_a_secret_is_blackened(host: Host) -> None:
    secret = entry("/key", 'token = "sk-0123456789";\n', secret=True)
    with pytest.raises(TreeError, match=r'token = "\*{8}"') as refused:
        host.present(secret, validate=[f"sh -c 'cat {host.at('/key')}; exit 1'"])
    assert "sk-0" not in str(refused.value)


def test_somebody_who_is_quicker_is_not_overwritten(host: Host) -> None:
    def quick(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if function is os.link:
            host.write("/a", "theirs")
        return function(*arguments, **options)

    with pytest.raises(TreeError, match="/a: File exists; every file is as it was"):
        Tree(host.state, host.root, quick).present([entry("/a", "ours")])
    assert host.at("/a").read_text() == "theirs"


def test_a_full_disk_is_named_and_leaves_everything_as_it_was(host: Host) -> None:
    host.present(entry("/a", "old"), entry("/gone"))
    before = host.snapshot()
    wanted = [entry("/a", "new"), entry("/d/b", "b"), link("/d/l", "x")]
    seen = set()
    for calls in range(100):
        try:
            host.present(*wanted, machine=Machine(calls, full=True))
        except TreeError as error:
            assert "No space left on device; every file is as it was" in str(error)
            seen.add(str(error).split(":")[0].replace(str(host.state), ""))
            assert host.snapshot() == before
            assert host.remembered() == ["manifest.json"]
        else:
            break
    assert seen == {"/journal.json", "/a", "/d", "/d/b", "/d/l", "/manifest.json"}
    assert host.snapshot()["/a"] == ("file", b"new", 0o644)


def test_any_call_may_fail(host: Host) -> None:
    host.present(entry("/a", "old"), entry("/gone"), directory("/d", "0700"))
    before, old = host.snapshot(), host.manifest()
    wanted = [entry("/a", "new"), entry("/d/b", "b"), directory("/d", "0755")]
    for calls in range(100):
        machine = Machine(calls, OSError(errno.EIO, "Input/output error"))
        try:
            host.present(*wanted, machine=machine)
        except TreeError:
            assert host.snapshot() == before or host.manifest() != old
        except OSError:
            assert host.manifest() != old  # it was done, only cleaning up failed
        if machine.calls > 0:
            break
        host.tree().settle()
        assert host.remembered() == ["manifest.json"]
        if host.manifest() != old:  # back to the start
            host.present(entry("/a", "old"), entry("/gone"), directory("/d", "0700"))
            old = host.manifest()
        assert host.snapshot() == before
    assert calls > 30


def test_check_mode_writes_nothing_and_shows_everything(host: Host) -> None:
    assert host.present(entry("/a", "x"), check=True, diff=True)["changed"]
    assert host.remembered() == []
    host.present(entry("/a", "one\n"), entry("/gone", "g\n"), entry("/b", b"\0"), link("/l", "1"), entry("/m", "m\n"))
    before = host.snapshot()
    machine = Machine()
    wanted = [
        *[entry("/a", "two\n"), entry("/b", b"\0\1"), link("/l", "2"), entry("/m", "m\n", mode="0600")],
        *[directory("/d", "0700"), entry("/d/n", "n\n")],
    ]
    result = host.present(*wanted, check=True, diff=True, machine=machine)
    assert machine.made == []
    assert host.snapshot() == before
    shown = {item["before_header"]: (item["before"], item["after"]) for item in result["diff"]}
    who = f"{USER}:{GROUP}"
    assert shown == {
        "/a": ("one\n", "two\n"),
        "/b": ("(binary content of 1 bytes)\n", "(binary content of 2 bytes)\n"),
        "/l": ("(link to 1)\n", "(link to 2)\n"),
        "/m": (f"(file, mode 0644, {who})\nm\n", f"(file, mode 0600, {who})\nm\n"),
        "/d": ("", f"(directory, mode 0700, {who})\n"),
        "/d/n": ("", f"(file, mode 0644, {who})\nn\n"),
        "/gone": (f"(file, mode 0644, {who})\ng\n", ""),
    }
    # ... and the run that follows does just that
    assert host.present(*wanted)["paths"] == result["paths"]


def test_a_secret_is_never_in_a_diff_even_when_it_goes(host: Host) -> None:
    def shown(*wanted: Entry) -> str:
        return json.dumps(host.present(*wanted, diff=True))

    assert "(secret, not shown)" in shown(entry("/k", "sesame-1", secret=True))
    changed = shown(entry("/k", "sesame-2", secret=True))
    assert '"before": "(secret, not shown)\\n", "after": "(another secret, not shown)\\n"' in changed
    told = changed + shown(entry("/k", "open", secret=False)) + shown(entry("/k", "sesame-3", secret=True)) + shown()
    assert "sesame" not in told


def test_secrets_are_in_no_file_but_their_own(host: Host) -> None:
    machine = Machine()
    for crash in range(100):
        machine = Machine(crash)
        try:
            host.present(entry("/key", "sesame", mode="0600", secret=True), machine=machine)
        except Crash:
            for path in [*host.root.rglob("*"), *host.state.rglob("*")]:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert path.parent == host.root or b"sesame" not in path.read_bytes()
            continue
        break
    assert crash > 10


def test_packed_entries_come_back_byte_for_byte() -> None:
    entries = [entry("/a", bytes(range(256)), secret=True), entry("/ü", "ü€\ud800".encode("utf-8", "surrogatepass"))]
    assert unpack(pack([*entries, link("/l", "x")])) == [*entries, link("/l", "x")]
    assert "sesame" not in repr(entry("/a", "sesame"))


def test_two_runs_never_interleave(host: Host) -> None:
    host.present(entry("/a", "1"))
    held = os.open(host.state, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    other = threading.Thread(target=lambda: host.present(entry("/a", "2")))
    other.start()
    other.join(0.3)
    assert other.is_alive()
    assert host.at("/a").read_text() == "1"
    os.close(held)
    other.join(5)
    assert host.at("/a").read_text() == "2"


def test_a_run_that_waited_for_one_that_removed_everything_begins_anew(host: Host) -> None:
    host.present(entry("/a", "1"))
    held = os.open(host.state, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    other = threading.Thread(target=lambda: host.present(entry("/a", "2")))
    other.start()
    other.join(0.2)
    for file in host.state.iterdir():
        file.unlink()
    host.state.rmdir()
    os.close(held)
    other.join(5)
    assert (host.at("/a").read_text(), host.remembered()) == ("2", ["manifest.json"])


# ------------------------------------------------------------------------------------------------------------ handlers


def test_patterns_name_handlers() -> None:
    notify = {"/etc/nginx/*": ["Reload"], "/etc/*.service": ["Units", "Reload"]}
    assert handlers(notify, ["/etc/nginx/a/b.conf", "/etc/x.service"]) == ["Reload", "Units"]
    assert handlers(notify, ["/var/x"]) == []


def test_handlers_are_due_until_they_have_run(host: Host) -> None:
    notify = {"/a*": ["A"], "/b*": ["B"]}
    first = host.present(entry("/a", "1"), entry("/c", "1"), notify=notify)
    assert (first["handlers"], first["unsettled"]) == (["A"], ["/a"])
    # the run died before its handlers; the next one changes something else
    second = host.present(entry("/a", "1"), entry("/b", "1"), entry("/c", "1"), notify=notify)
    assert (second["changed"], second["paths"], second["handlers"]) == (True, ["/b"], ["A", "B"])
    machine = Machine()
    third = host.present(entry("/a", "1"), entry("/b", "1"), entry("/c", "1"), notify=notify, machine=machine)
    assert (third["changed"], third["paths"], third["handlers"]) == (True, [], ["A", "B"])
    assert machine.made == []
    assert not host.tree().settle()["changed"]
    assert not host.present(entry("/a", "1"), entry("/b", "1"), entry("/c", "1"), notify=notify)["changed"]
    # a removed file has handlers too, and is forgotten when they have run
    assert host.present(notify=notify)["handlers"] == ["A", "B"]
    assert host.remembered() == ["manifest.json"]
    host.tree().settle()
    assert not host.state.exists()


def test_without_notify_nothing_is_unsettled(host: Host) -> None:
    host.present(entry("/a", "1"), notify=ALL)
    assert not host.present(entry("/a", "1"))["changed"]
    assert not host.present(entry("/a", "1"), notify=ALL)["changed"]


def test_handlers_of_what_was_live_for_a_while_are_due(host: Host) -> None:
    """A run died with the new file in place, the host was started anew, and then the operator wanted the old file again."""
    host.present(entry("/a", "old"))

    def kill(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if arguments[0] == host.state / "manifest.json.new":
            raise Crash
        return function(*arguments, **options)

    with pytest.raises(Crash):
        Tree(host.state, host.root, kill).present([entry("/a", "new")])
    assert host.at("/a").read_text() == "new"
    checked = host.present(entry("/a", "old"), notify=ALL, check=True)
    assert (checked["interrupted"], checked["paths"]) == ("left", ["/a"])
    result = host.present(entry("/a", "old"), notify=ALL)
    assert (result["interrupted"], result["paths"], result["handlers"]) == ("undone", [], ["H"])
    assert host.at("/a").read_text() == "old"


# -------------------------------------------------------------------------------------------- any sequence, any crash

FOLDERS = ["/a", "/a/b", "/c", "/a/b/d"]
LEAVES = [f"{folder}/{name}" for folder in ["", *FOLDERS] for name in ("x", "y")]
MODES = ["0644", "0600"]


def test_a_look_tells_what_is_in_place_until_anything_of_it_changes(host: Host) -> None:
    wanted = [entry("/etc/a", "one"), entry("/etc/b", "two"), directory("/etc/d", "0700"), link("/l", "etc/a")]
    assert host.unchanged() is None
    host.present(*wanted)
    right = tree_seen.digest(wanted)
    assert host.unchanged() == right
    assert tree_seen.digest(reversed(wanted)) == right
    a = host.at("/etc/a")

    def same_size_and_times() -> None:
        times = a.stat()
        a.write_text("eno")
        os.utime(a, ns=(times.st_atime_ns, times.st_mtime_ns))

    def another_link() -> None:
        host.at("/l").unlink()
        host.at("/l").symlink_to("etc/b")

    def another_directory() -> None:
        host.at("/etc").rename(host.at("/elsewhere"))
        host.write("/etc/a", "one")

    changes: list[Callable[[], object]] = [
        same_size_and_times, lambda: a.chmod(0o600), a.unlink, lambda: host.at("/etc/d").chmod(0o755), another_link, another_directory,
        lambda: (host.state / "seen.json").write_text("{"), lambda: (host.state / "seen.json").write_text("[]"),
        lambda: (host.state / "manifest.json").unlink(), lambda: (host.state / "journal.json").write_text("{}"),
    ]  # fmt: skip
    for change in changes:
        change()
        assert host.unchanged() is None, change
        (host.state / "journal.json").unlink(missing_ok=True)
        host.present(*wanted)
        assert host.unchanged() == right, change
    host.write("/etc/d/theirs")
    assert host.unchanged() == right, "what else is in a directory is not ours"


def test_a_look_says_nothing_while_handlers_are_due(host: Host) -> None:
    wanted = [entry("/a", "one")]
    host.present(*wanted, notify=ALL)
    assert host.unchanged() is None
    host.tree().settle()
    assert host.unchanged() == tree_seen.digest(wanted)


@pytest.mark.parametrize(
    "other",
    [{"content": b"2"}, {"mode": "0600"}, {"owner": "nobody"}, {"path": "/b"}, {"secret": True}, {"kind": "directory"}],
)
def test_every_wish_counts_in_the_digest(other: dict[str, Any]) -> None:
    one = Entry("/a", content=b"1")
    assert tree_seen.digest([one]) != tree_seen.digest([Entry(**{**vars(one), **other})])


def parents(path: str) -> list[str]:
    parts = path.split("/")[1:-1]
    return ["/" + "/".join(parts[: end + 1]) for end in range(len(parts))]


@st.composite
def wanted_trees(draw: st.DrawFn) -> list[Entry]:
    """Some files, links and directories."""
    entries = []
    for path in draw(st.lists(st.sampled_from(LEAVES), unique=True, max_size=5)):
        if draw(st.integers(0, 3)) == 0:
            entries.append(link(path, draw(st.sampled_from(["1", "2"]))))
        else:
            content = draw(st.sampled_from([b"", b"one", b"two", b"\xff"]))
            entries.append(entry(path, content, mode=draw(st.sampled_from(MODES)), secret=draw(st.booleans())))
    for path in draw(st.lists(st.sampled_from(FOLDERS), unique=True, max_size=2)):
        entries.append(directory(path, draw(st.sampled_from(["0755", "0700"]))))
    return entries


@dataclass
class Model:
    """What tree promises, as a dictionary."""

    files: Snapshot
    paths: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)

    def after(self, wanted: list[Entry]) -> Model:
        files, made = dict(self.files), set(self.made)
        stated = {item.path: item for item in wanted if item.kind == "directory"}
        leaves = {item.path: item for item in wanted if item.kind != "directory"}
        needed = {*stated, *(parent for item in wanted for parent in parents(item.path))}
        for path in needed:
            if path not in files:
                made.add(path)
                files[path] = ("directory", 0o755)
            if path in stated:
                files[path] = ("directory", int(stated[path].mode, 8))
        for path in self.paths - set(leaves):
            files.pop(path, None)
        for path, item in leaves.items():
            files[path] = ("link", item.target) if item.kind == "link" else ("file", item.content, int(item.mode, 8))
        for path in sorted(made - needed, reverse=True):
            if not any(other.startswith(f"{path}/") for other in files):
                files.pop(path, None)
                made.remove(path)
        return Model(files, set(leaves), made)


rounds = st.tuples(
    wanted_trees(),
    st.lists(st.integers(0, 45), max_size=3),  # where this call, and those that repeat it, crash
    st.sampled_from(["again", "again", "recover", "refused"]),
    st.booleans(),  # whether the handlers ran
)


@given(
    st.dictionaries(st.sampled_from([*LEAVES, "/a/theirs", "/c/theirs"]), st.sampled_from(["one", "z"]), max_size=4),
    st.lists(rounds, min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_wanted_and_wherever_it_crashes(foreign: dict[str, str], sequence: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as base:
        host = Host(Path(base))
        for path, text in foreign.items():
            host.write(path, text)
        model = Model(host.snapshot())
        heard = host.snapshot()  # what the handlers that ran last have seen
        wishes: dict[str, list[Entry]] = {}

        def what_a_look_tells_is_true() -> None:
            if (told := host.unchanged()) is not None:
                assert not host.present(*wishes[told], notify=ALL, check=True)["changed"]

        for wanted, crashes, ending, handled in sequence:
            goal = model.after(wanted)
            wishes[tree_seen.digest(wanted)] = wanted
            if ending == "refused" and goal.files != model.files:
                with pytest.raises(TreeError):
                    host.present(*wanted, notify=ALL, validate=["false"])
                assert host.snapshot() == model.files
                assert "journal.json" not in host.remembered()
                what_a_look_tells_is_true()
                continue
            for calls in crashes:
                machine = Machine(calls)
                try:
                    host.present(*wanted, notify=ALL, machine=machine)
                except Crash:
                    what_a_look_tells_is_true()
                else:
                    break
                if ending == "recover":
                    tree = host.tree()
                    with tree.locked(create=False, check=False):
                        tree.recover()
                    assert host.snapshot() in (model.files, goal.files)
                    assert host.remembered() in ([], ["manifest.json"])
            result = host.present(*wanted, notify=ALL, diff=True)
            now = host.snapshot()
            assert now == goal.files
            assert host.remembered() in ([], ["manifest.json"])
            lost = {path for path in {*now, *heard} if now.get(path) != heard.get(path)} - {*result["unsettled"]}
            assert lost == set()
            assert {item["before_header"] for item in result["diff"]} == set(result["paths"])
            if handled:
                with_crash = host.tree(Machine(crashes[0] if crashes else 100))
                try:
                    with_crash.settle()
                except Crash:
                    host.tree().settle()
                heard = now
                what_a_look_tells_is_true()
                assert not host.present(*wanted, notify=ALL)["changed"]
            machine = Machine()
            host.present(*wanted, notify=ALL, machine=machine)
            assert machine.made == []
            assert not handled or not host.remembered() or host.unchanged() == tree_seen.digest(wanted)
            model = goal


# -------------------------------------------------------------------------------------------- the task, by ansible-core

MODULE_PYTHON = os.environ.get("TREE_PYTHON", sys.executable)  # what the module runs on

PLAY = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: demo}
"""
TASKS = """
- name: in place
  gpufleet.llm.tree:
    name: demo
    state_path: "{{ base }}/state/tree"
    owner: "{{ user }}"
    group: "{{ group }}"
    files: "{{ keys + [
      {'path': out ~ '/etc/named', 'template': mirror ~ '/etc/named-only.j2', 'vars': {'value': 1}},
      {'path': out ~ '/etc/raw', 'source': 'raw.bin'},
      {'path': out ~ '/etc/left-out', 'content': 'x', 'when': false}] }}"
    modes: {"{{ out }}/etc/app.conf": "0640"}
    when: {"{{ out }}/etc/maybe": "{{ maybe | default(false) }}"}
    secrets: ["{{ out }}/etc/password"]
    exclude: ["*/keys/*.j2"]
    directories: [{path: "{{ out }}/etc/keys", mode: "0700"}]
    links: [{path: "{{ out }}/bin/app", target: /opt/app}]
    requires: "{{ needs | default([]) }}"
    validate: "{{ checks | default([]) }}"
    notify:
      "{{ out }}/etc/app.conf": Reload app
      "{{ out }}/etc/keys/*": [Reload keys, Reload app]
      "{{ out }}/bin/*": Link
  register: tree
- ansible.builtin.template: {src: "{{ mirror }}/etc/app.conf.j2", dest: "{{ base }}/builtin", mode: "0644"}
  when: compare | default(false)
- ansible.builtin.fail: {}
  when: die | default(false)
- ansible.builtin.meta: flush_handlers
- name: settled
  gpufleet.llm.tree: {name: demo, state_path: "{{ base }}/state/tree", state: settled}
  when: tree is changed
"""
HANDLERS = "".join(
    f"- name: {name}\n  ansible.builtin.debug: {{msg: ran {name}}}\n" for name in ("Reload app", "Reload keys", "Link")
)
TEMPLATE = """# {{ ansible_managed }}
{% include "_part.conf.j2" %}
{% if true %}
greeting = {{ greeting }} {{ template_path | basename }}
{% endif %}
  {% for i in range(2) %}
{{ i }}
{% endfor %}
ü

"""


@dataclass
class Play:
    """A playbook with a role that uses the task, and how it is run."""

    base: Path

    def __post_init__(self) -> None:
        self.out = self.base / "out"
        self.out.mkdir()
        self.mirror = str(self.out)[1:]
        for path, text in {
            "play.yml": PLAY,
            "roles/demo/tasks/main.yml": TASKS,
            "roles/demo/handlers/main.yml": HANDLERS,
            f"roles/demo/templates/{self.mirror}/etc/app.conf.j2": TEMPLATE,
            f"roles/demo/templates/{self.mirror}/etc/_part.conf.j2": "part {{ greeting }}\n",
            f"roles/demo/templates/{self.mirror}/etc/maybe.j2": "{{ maybe_text }}",
            f"roles/demo/templates/{self.mirror}/etc/plain": "{{ not a template }}",
            f"roles/demo/templates/{self.mirror}/etc/password.j2": "{{ password }}",
            f"roles/demo/templates/{self.mirror}/etc/keys/key.j2": "{{ greeting }} {{ value }}\n",
            f"roles/demo/templates/{self.mirror}/etc/named-only.j2": "{{ value }}",
            "roles/demo/templates/top.j2": "{{ undefined_variable }}",
        }.items():
            self.write(path, text)
        self.write("roles/demo/files/raw.bin", b"\xff\x00\n")

    def write(self, path: str, text: str | bytes) -> None:
        file = self.base / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)

    def run(self, *options: str, status: int = 0, **variables: Any) -> str:
        key = {
            "path": f"{self.out}/etc/keys/1",
            "template": f"{self.mirror}/etc/keys/key.j2",
            "vars": {"value": "sesame-key"},
            "mode": "0600",
            "secret": True,
        }
        values: dict[str, Any] = {
            "base": str(self.base), "out": str(self.out), "mirror": self.mirror, "user": USER, "group": GROUP, "keys": [key],
            "greeting": "hello", "password": "sesame-password", "ansible_python_interpreter": MODULE_PYTHON,
        }  # fmt: skip
        self.write("vars.json", json.dumps({**values, **variables}))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        environment |= {
            "LC_ALL": "C.UTF-8",
            "PATH": f"{Path(sys.prefix, 'bin')}:{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"),
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_NOCOLOR": "1",
        }
        arguments = ["play.yml", "-i", "localhost,", "-c", "local", "-e", "@vars.json", *options]
        done = playbook(*arguments, directory=self.base, environment=environment)
        told = done.stdout + done.stderr
        assert done.returncode == status, told
        assert "[WARNING]: Deprecation" not in told and "[DEPRECATION" not in told
        return told

    def files(self) -> dict[str, bytes]:
        found = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {str(path.relative_to(self.out)): path.read_bytes() for path in found}


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


def ran(told: str) -> list[str]:
    """Handlers that ran."""
    return [name for name in ("Reload app", "Reload keys", "Link") if f"ran {name}" in told]


@pytest.mark.core
def test_a_role_has_its_files_in_place(play: Play) -> None:
    shown = play.run("--check", "--diff")
    assert play.files() == {}
    assert not (play.base / "state").exists()
    assert "greeting = hello app.conf.j2" in shown
    assert "+(secret, not shown)" in shown

    told = play.run("-vvv", "--diff", compare=True)
    assert ran(told) == ["Reload app", "Reload keys", "Link"]
    assert "sesame" not in told.split("TASK [demo : in place]")[1]
    # one call for the task, and one that says that the handlers have run
    assert told.split("TASK [demo : in place]")[1].split("TASK [")[0].count(" EXEC ") == 1
    assert play.files() == {
        "etc/app.conf": (play.base / "builtin").read_bytes(),  # the same as ansible.builtin.template makes
        "etc/keys/1": b"hello sesame-key\n",
        "etc/named": b"1",
        "etc/password": b"sesame-password",
        "etc/plain": b"{{ not a template }}",
        "etc/raw": b"\xff\x00\n",
    }
    assert stat.S_IMODE((play.out / "etc/app.conf").stat().st_mode) == 0o640
    assert stat.S_IMODE((play.out / "etc/keys/1").stat().st_mode) == 0o600
    assert (play.out / "bin/app").readlink() == Path("/opt/app")

    again = play.run()
    assert "changed=0" in again
    assert ran(again) == []


@pytest.mark.core
def test_handlers_of_the_files_that_changed_run_and_none_is_lost(play: Play) -> None:
    play.run()
    assert ran(play.run(greeting="hi", keys=[])) == ["Reload app", "Reload keys"]
    assert "etc/keys/1" not in play.files()
    assert ran(play.run(password="other", keys=[])) == ["Reload app"]  # `greeting` again
    quiet = play.run(password="third", keys=[])
    assert ran(quiet) == []
    assert "changed=1" in quiet
    # a run that dies before its handlers, and one that finds nothing to do
    assert ran(play.run(greeting="moin", keys=[], die=True, status=2)) == []
    late = play.run(greeting="moin", keys=[])
    assert ran(late) == ["Reload app"]
    assert "changed=0" in play.run(greeting="moin", keys=[])


@pytest.mark.core
def test_a_mirrored_file_under_a_condition_comes_and_goes(play: Play) -> None:
    """Where it is not wanted, its template is not even rendered."""
    play.run()
    assert "etc/maybe" not in play.files()
    play.run(maybe=True, maybe_text="there")
    assert play.files()["etc/maybe"] == b"there"
    play.run(maybe=False)
    assert "etc/maybe" not in play.files()


def test_what_tools_leave_beside_a_role_is_not_mirrored(tmp_path: Path) -> None:
    """Editors, git, and Python, which writes bytecode beside a program that a test or a check imports."""
    left = ("app.py~", ".app.py.swp", ".gitkeep", "__pycache__/app.cpython-313.pyc", "app.pyc", "_part.j2")
    for name in (*left, "app.py"):
        (tmp_path / "opt" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "opt" / name).write_bytes(b"\xf3")
    assert mirrored(tmp_path, (), set()) == {"/opt/app.py": tmp_path / "opt/app.py"}


@pytest.mark.core
def test_a_refused_change_fails_the_task_and_changes_nothing(play: Play) -> None:
    play.run()
    before = play.files()
    told = " ".join(
        play.run(greeting="bad", checks=[f"grep -c bad {play.out}/etc/app.conf", "false"], status=2).split()
    )
    assert "demo: validate: 'false' ended with 1: ; every file is as it was" in told
    assert play.files() == before
    missing = play.run(greeting="bad", needs=[{"path": f"{play.out}/key", "fail_msg": "make a key"}], status=2)
    assert "demo: make a key" in " ".join(missing.split())
    assert play.files() == before
    assert ran(told) == []
    assert "changed=0" in play.run()


@pytest.mark.core
def test_mistakes_are_told_by_name(play: Play) -> None:
    path = f"{play.out}/etc/x"
    for file, expected in (
        ({"path": path, "template": "no.j2"}, "files: there is no template no.j2"),
        ({"path": path}, f"files: {path} needs exactly one of template, content and source"),
        ({"path": path, "content": "a", "source": "raw.bin"}, "and has ['content', 'source']"),
        ({"path": path, "content": "a", "mode": 420}, f"{path}: mode must be a quoted octal string"),
        (
            {"path": path, "template": "top.j2"},
            f"{path}: the template {play.base}/roles/demo/templates/top.j2 cannot be rendered",
        ),
    ):
        told = play.run(keys=[file], status=2)
        assert expected in " ".join(told.split()), told
        assert play.files() == {}


@pytest.mark.core
def test_the_keyword_of_the_task_and_a_play_without_a_role(play: Play) -> None:
    play.write("mirror/" + play.mirror + "/a.j2", "{{ greeting }}")
    task = f"name: demo, state_path: {play.base}/state/tree, owner: {USER}, group: {GROUP}"
    play.write(
        "play.yml",
        f"""
- hosts: all
  gather_facts: false
  tasks:
    - gpufleet.llm.tree: {{{task}, source: mirror, modes: {{"{play.out}/a": "0600"}}, notify: {{"*/b": Link}}}}
      notify: Reload app
    - gpufleet.llm.tree:
        name: "{{{{ item }}}}"
        state_path: {play.base}/state/tree
        owner: {USER}
        group: {GROUP}
        source: ""
        files: [{{path: "{play.out}/{{{{ item }}}}", content: x}}]
        notify: {{"*/one": "Reload keys", "*/two": "Link"}}
      loop: "{{{{ items }}}}"
    - gpufleet.llm.tree: {{{task}, state: absent}}
      when: gone | default(false)
  handlers:
"""
        + "".join(f"    {line}\n" for line in HANDLERS.splitlines()),
    )
    assert ran(play.run(items=["one"])) == ["Reload app", "Reload keys"]
    assert play.files() == {"a": b"hello", "one": b"x"}
    play.run(items=[], gone=True)
    assert play.files() == {"one": b"x"}
    assert not (play.base / "state/tree/demo").exists()
    play.write("play.yml", f"- hosts: all\n  gather_facts: false\n  tasks:\n    - gpufleet.llm.tree: {{{task}}}\n")
    assert "source: outside of a role" in play.run(status=2)
