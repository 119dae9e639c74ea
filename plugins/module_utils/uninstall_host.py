# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Takes from this host what a role has put there: units, packages, users and files, in this order."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import (
    host,
    host_mounts,
    host_units,
    package_record,
    uninstall,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_host import Tree
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_seen import STATE_PATH

APT = [
    "apt-get", "--yes", "--allow-change-held-packages", "--option=DPkg::Lock::Timeout=600",
    "--option=APT::AutoRemove::SuggestsImportant=false", "--option=APT::AutoRemove::RecommendsImportant=false",
]  # fmt: skip
QUIET = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
# What roles have in common, the innermost first: it goes with the last of them.
SHARED = (
    STATE_PATH, str(package_record.RECORDS), "/var/lib/vllm-fleet", "/etc/vllm-fleet", "/etc/ssl/vllm-fleet", "/opt/vllm-fleet",
    "/usr/local/lib/vllm-fleet",
)  # fmt: skip
# A user that a role has made is one like this. Another one of the same name is somebody's own.
HOMELESS = "/nonexistent"
FIRST_PERSON = 1000


class UninstallError(Exception):
    """A reason why something is still there, in words for the operator."""


class Leaves:
    """What there is of a role on this host. `run` runs a command: its status, its output, its errors."""

    def __init__(
        self,
        given: Mapping[str, Any],
        run: Callable[..., tuple[int, str, str]],
        check: bool,
        root: Path = Path("/"),
    ) -> None:
        self.given, self.run, self.check, self.root = given, run, check, root
        self.removed: list[str] = []
        self.kept: list[dict[str, str]] = []
        self.states = self.at(STATE_PATH)
        self.records = self.at(str(package_record.RECORDS))
        self.brought = package_record.recorded(given["role"], self.records)
        self.useless: set[str] = set()
        # what is not the role's alone is not a sign of it either
        self.paths = {path: self.elsewhere(path) for pattern in given["paths"] for path in self.matching(pattern)}

    def at(self, path: str) -> Path:
        """A path of the host."""
        return self.root / path.lstrip("/")

    def matching(self, pattern: str) -> list[str]:
        """The paths that match a pattern, as the host calls them."""
        found = glob.glob(str(self.at(pattern)))  # noqa: PTH207 -- that of Path does not see a link that leads nowhere
        return sorted("/" + os.path.relpath(path, self.root) for path in found)

    def there(self) -> bool:
        """Whether the role has left anything here. A unit or a user alone may be somebody else's."""
        trees = any((self.states / name).is_dir() for name in self.given["trees"])
        return bool(self.brought) or trees or any(not why for why in self.paths.values())

    def elsewhere(self, path: str) -> str:
        """Why a path is not removed although it is the role's: others may have it too. Nothing where it is on a disk of the host."""
        mounts = host_mounts.parse_mounts(read(self.at("/proc/self/mounts")))
        if any(mount["path"] == path or below(mount["path"], path) for mount in mounts):
            return "a file system of its own is mounted there; remove what is in it where nobody else uses it"
        over = [(len(mount["path"]), mount["network"]) for mount in mounts if below(path, mount["path"])]
        return "it is on a file system of the network, which other hosts may use" if over and max(over)[1] else ""

    def remove(self) -> None:
        """All of it. A call that was killed is finished by the next one: the files, which tell that the role is here, go last."""
        there = self.there()
        if there:
            self.remove_units()
            gone = self.remove_packages()
            self.remove_users()
            files = self.remove_files()
            self.forget()
            if not self.check:
                self.say_conffiles(files, gone)
                self.restart()
        for one in [one for one in self.given["kept"] if there or one["always"]]:
            for path in self.matching(one["path"]):
                self.kept.append({"what": path, "why": one["why"]})

    def done(self, what: str, *command: str, **more: Any) -> None:
        """Run a command that has to succeed."""
        status, output, error = self.run(list(command), environ_update=QUIET, **more)
        if status:
            raise UninstallError(f"{what}: {' '.join(command)}: {(error or output).strip()}")

    # ------------------------------------------------------------------------------------------------------------- units

    def remove_units(self) -> None:
        """Units that run or start with the host do neither any more."""
        units = host_units.units(self.run(host_units.LIST_UNITS)[1], self.root)
        for pattern in [*self.given["units"], *(self.given["services"] if self.brought else [])]:
            for name in fnmatch.filter(units, pattern):
                state = units[name]
                if "@." in name:
                    continue
                runs = state["active"] not in ("inactive", "failed", "")
                starts = state["enabled"] in ("enabled", "enabled-runtime", "linked")
                if not (runs or starts):
                    continue
                self.removed.append(f"unit {name} {'stopped' if runs else 'disabled'}")
                if self.check:
                    continue
                if runs:
                    self.done(name, "systemctl", "stop", name)
                if starts:
                    self.done(name, "systemctl", "disable", "--quiet", name)
                self.run(["systemctl", "reset-failed", name])  # fails where there is nothing to reset

    def restart(self) -> None:
        """What reads the files that are gone reads the others."""
        self.done("systemd", "systemctl", "daemon-reload")
        for name in [*self.given["restart"], *([] if self.brought else self.given["services"])]:
            if self.run(["systemctl", "is-active", "--quiet", name])[0] == 0:
                self.done(name, "systemctl", "restart", name)
        for command in self.given["commands"]:
            self.done("afterwards", *command.split())

    # ------------------------------------------------------------------------------------------------------------- files

    def remove_files(self) -> list[str]:
        """Files by the manifests of `tree`, then what the role has wholly for itself."""
        files: list[str] = []
        for name in self.given["trees"]:
            if (self.states / name).is_dir():
                paths = Tree(self.states / name, self.root).present([], check=self.check)["paths"]
                files += paths
        for path, why in self.paths.items():
            if why:
                self.kept.append({"what": path, "why": why})
                continue
            files.append(path)
            if not self.check:
                erase(self.at(path))
        for path in [path for pattern in self.given["links"] for path in self.matching(pattern)]:
            target = os.path.realpath(self.at(path))
            if self.at(path).is_symlink() and any(below(target, str(self.at(other))) for other in self.given["paths"]):
                files.append(path)
                if not self.check:
                    erase(self.at(path))
        # one line for a directory, not one for each file in it
        self.removed += [path for path in dict.fromkeys(files) if not any(below(path, other) for other in files)]
        return files

    def forget(self) -> None:
        """The memory of the trees, which still has directories that were not empty then, and directories that nobody has anything in any more."""
        if self.check:
            return
        for name in self.given["trees"]:
            erase(self.states / name)
        for path in (*self.given["directories"], *SHARED):
            with contextlib.suppress(OSError):
                self.at(path).rmdir()
                self.removed.append(path)

    def say_conffiles(self, files: Sequence[str], gone: Sequence[str]) -> None:
        """Files that a package had before the role replaced them. The package stays, and misses them."""
        lost = [path for path in files if not os.path.lexists(self.at(path))]
        # one line for each that a package knows; a status that is not 0 says that there are others
        known = self.run(["dpkg-query", "--search", *lost], environ_update=QUIET)[1] if lost else ""
        for line in known.splitlines():
            package, _colon, path = line.partition(": ")
            if path in lost and package not in gone:
                mend = f"apt-get install --reinstall -o Dpkg::Options::=--force-confmiss {package}"
                self.kept.append(
                    {
                        "what": f"package {package}, without its {path}",
                        "why": f"the role had replaced that file; {mend} brings it back",
                    }
                )

    # ---------------------------------------------------------------------------------------------------------- packages

    def removal(self, names: Sequence[str], orphans: bool) -> list[str]:
        """What apt would remove with some packages, and on request what was installed for them alone."""
        more = ["--auto-remove"] if orphans else []
        status, output, error = self.run([*APT, "--simulate", *more, "remove", *names], environ_update=QUIET)
        if status:
            raise UninstallError(f"apt cannot say what goes with {', '.join(names)}: {(error or output).strip()}")
        return [name for name in uninstall.simulated(output) if name not in self.useless]

    def remove_packages(self) -> list[str]:
        """The packages that the role has brought and that nothing else needs."""
        there = host.packages(self.root)
        if not self.brought and not any(name in there for name in self.given["packages"]):
            return []
        # what apt would remove anyhow is not ours to judge
        simulated = self.run([*APT, "--simulate", "autoremove"], environ_update=QUIET)[1] if self.brought else ""
        self.useless = set(uninstall.simulated(simulated)) - set(self.brought)
        gone, stays = uninstall.packages(
            self.brought, there, self.given["packages"], bool(self.given["others"]), self.removal
        )
        self.removed += [f"package {name}" for name in gone]
        self.kept += [{"what": f"package {name}", "why": why} for name, why in stays.items()]
        if gone and not self.check:
            units = set(host_units.UnitFiles(self.root).files)
            self.done("packages", *APT, "remove" if self.given["unpurged"] else "purge", *gone)
            for name in sorted(units - set(host_units.UnitFiles(self.root).files)):
                self.run(
                    ["systemctl", "stop", name]
                )  # some packages leave theirs running; what does not run is no matter
            if self.given["unpurged"]:
                self.say_configuration(gone)
        if not self.check:
            package_record.record(
                self.given["role"], [name for name in self.brought if name in stays and name not in gone], self.records
            )
        return gone

    def say_configuration(self, gone: Sequence[str]) -> None:
        """Packages that are removed and not purged leave their configuration."""
        command = ["dpkg-query", "--show", "--showformat=${db:Status-Abbrev} ${Package}\\n", *gone]
        known = [line.split() for line in self.run(command, environ_update=QUIET)[1].splitlines()]
        if left := sorted(words[1] for words in known if words[0] == "rc"):
            self.kept.append({"what": f"the configuration of {', '.join(left)}", "why": self.given["unpurged"]})

    # ------------------------------------------------------------------------------------------------------------- users

    def remove_users(self) -> None:
        """Users that the role has made, with the groups of their names."""
        for name in self.given["users"]:
            line = next((line for line in read(self.at("/etc/passwd")).splitlines() if line.startswith(f"{name}:")), "")
            if not line:
                continue
            _name, _password, number, _group, _comment, home, _shell = line.split(":")
            if home != HOMELESS or int(number) >= FIRST_PERSON:
                self.kept.append(
                    {"what": f"user {name}", "why": "it is not as the role makes it, so it is somebody's own"}
                )
                continue
            if not self.check:
                status, output, error = self.run(["userdel", name])
                if status:
                    self.kept.append({"what": f"user {name}", "why": (error or output).strip()})
                    continue
            self.removed.append(f"user {name}")


def below(path: str, other: str) -> bool:
    """Whether a path is below another one."""
    return path.startswith(other.rstrip("/") + "/")


def erase(path: Path) -> None:
    """Remove a file, a link, or a directory with all in it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
