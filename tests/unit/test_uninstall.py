"""What uninstall.yml takes away: every role names all that it puts on a host, and what the module does with that."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.module_utils import package_record, uninstall, uninstall_host
from ansible_collections.gpufleet.llm.plugins.module_utils.tree import Entry
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_host import Tree
from ansible_collections.gpufleet.llm.plugins.modules import uninstall as module

from tools import lands

ROOT = Path(__file__).resolve().parents[2]
TABLE = list(yaml.safe_load((ROOT / "playbooks/group_vars/all/roles.yml").read_text())["fleet_roles"])
# Directories that systemd makes for a unit, and where.
OF_UNITS = {"StateDirectory": "/var/lib", "CacheDirectory": "/var/cache", "LogsDirectory": "/var/log"}

# --- every role names all that it puts on a host -------------------------------------------------------------------------


def declared(role: lands.Role) -> dict[str, Any]:
    """The arguments of the task that takes the role away, with a * for what a host or a run decides."""
    [(given, _task)] = list(role.calls("gpufleet.llm.uninstall"))

    def plain(value: Any) -> list[str]:
        if isinstance(value, list):
            return [role.rendered(one["path"] if isinstance(one, dict) else one) for one in value]
        try:
            found: Any = role.value(value.strip().removeprefix("{{").removesuffix("}}"))
        except lands.HostDecidesError:
            # of a choice, all that is named
            names = re.findall(r"\b(?:__)?[a-z]\w+", value)
            lists = [role.variables[name] for name in names if isinstance(role.variables.get(name), list)]
            words = [[role.variables[name]] for name in re.findall(r"\[(\w+)\]", value) if name in role.variables]
            found = [one for listed in [*lists, *words, re.findall(r"'(/[^']+)'", value)] for one in listed]
        return [role.rendered(one) for one in found]

    return {name: plain(value) if isinstance(value, list | str) else value for name, value in given.items()}


def undeclared(path: Path) -> list[str]:
    """What a role puts on a host, and does not name where it is taken away."""
    role = lands.Role(path)
    given = {**{name: [] for name in module.ARGUMENTS}, **declared(role)}
    places = [*given["paths"], *given["kept"], *given["directories"], *given["links"], *uninstall_host.SHARED]

    def named(path: str) -> bool:
        return any(
            path == place or fnmatch.fnmatchcase(path, f"{place.rstrip('*')}*/*") or fnmatch.fnmatchcase(path, place)
            for place in places
        )

    found = []
    for call, _task in role.calls("gpufleet.llm.tree"):
        name = role.rendered(call["name"])
        if call.get("state", "present") not in ("settled", "absent") and name not in given["trees"]:
            found.append(f"the tree {name}")
    vendor = role.variables.get(f"__{path.name}_vendor")
    if vendor and f"{vendor['name'].replace('-', '_')}_apt" not in given["trees"]:
        found.append(f"the tree of {vendor['name']}")
    found += [landing.path for landing in role.of_modules() if not named(landing.path.replace("*", "x"))]
    for file in sorted(one for one in (path / "templates").rglob("*.service*") if one.is_file()):
        for kind, name in re.findall(r"^(\w+Directory)=([\w-]+)", file.read_text(), re.MULTILINE):
            if kind in OF_UNITS and not named(f"{OF_UNITS[kind]}/{name}"):
                found.append(f"{OF_UNITS[kind]}/{name}")
        unit = file.name.removesuffix(".j2")
        if "systemd/system/" in str(file) and not any(
            fnmatch.fnmatchcase(unit.replace("@", "@x"), one) for one in given["units"]
        ):
            found += [unit] if not file.parent.name.endswith(".d") and unit.endswith(".service") else []
    for call, _task in role.calls("ansible.builtin.user"):
        name = role.rendered(call["name"])
        found += [f"user {name}"] if name not in (*given["users"], "*", "") else []
    return found


@pytest.mark.parametrize("role", TABLE)
def test_a_role_names_all_that_it_puts_on_a_host(role: str) -> None:
    assert undeclared(ROOT / "roles" / role) == []


def test_what_a_role_does_not_name_is_found(tmp_path: Path) -> None:
    role = tmp_path / "shop"
    for name in ("tasks", "defaults", "templates/etc/systemd/system"):
        (role / name).mkdir(parents=True)
    (role / "defaults/main.yml").write_text("shop_user: seller\nshop_home: /srv/shop\n")
    (role / "templates/etc/systemd/system/shop.service.j2").write_text("[Service]\nStateDirectory=shop\n")
    (role / "tasks/configure.yml").write_text(
        """
- gpufleet.llm.tree: {name: shop}
- ansible.builtin.user: {name: "{{ shop_user }}"}
- ansible.builtin.copy: {dest: "{{ shop_home }}/list", content: x}
"""
    )
    task = "- gpufleet.llm.uninstall: {role: shop%s}\n"
    (role / "tasks/uninstall.yml").write_text(task % "")
    assert undeclared(role) == ["the tree shop", "/srv/shop/list", "/var/lib/shop", "shop.service", "user seller"]
    names = (
        ", trees: [shop], paths: ['{{ shop_home }}', /var/lib/shop], units: [shop.service], users: ['{{ shop_user }}']"
    )
    (role / "tasks/uninstall.yml").write_text(task % names)
    assert undeclared(role) == []


@pytest.mark.parametrize("role", TABLE)
def test_a_role_says_what_became_of_it_where_the_playbook_reads_it(role: str) -> None:
    tasks = yaml.safe_load((ROOT / f"roles/{role}/tasks/uninstall.yml").read_text())
    [found] = [task for task in tasks if "gpufleet.llm.uninstall" in task]
    assert found["register"] == f"{role}_uninstalled"
    assert found["gpufleet.llm.uninstall"]["role"] == role
    assert found["gpufleet.llm.uninstall"]["others"] == "{{ uninstall_others | default([]) }}"


# --- packages ------------------------------------------------------------------------------------------------------------

# package -> what it needs; all of them are installed
NEEDS = {"nginx": {"common"}, "lua": {"nginx"}, "common": set(), "tool": set(), "theirs": {"tool"}, "sudo": set()}


def removal(names: Sequence[str], orphans: bool) -> list[str]:
    """What apt would remove."""
    gone = set(names)
    while more := {name for name, needs in NEEDS.items() if needs & gone} - gone:
        gone |= more
    if orphans:
        gone |= {
            name
            for name in ("common",)
            if not any(name in needs for other, needs in NEEDS.items() if other not in gone)
        }
    return sorted(gone)


def test_what_a_role_brought_goes_with_what_came_along() -> None:
    gone, stays = uninstall.packages(["common", "lua", "nginx", "sudo"], NEEDS, ["nginx", "lua"], True, removal)
    assert gone == ["common", "lua", "nginx"]
    assert stays == {"sudo": "the host is administered by it"}


def test_what_somebody_else_needs_stays() -> None:
    gone, stays = uninstall.packages(["nginx", "tool"], NEEDS, ["nginx", "lua"], False, removal)
    assert gone == []
    assert stays["nginx"] == "lua cannot do without it"
    assert stays["tool"] == "theirs cannot do without it"
    assert stays["lua"].startswith("it was there before the role")


def test_tools_stay_while_other_roles_are_there() -> None:
    gone, stays = uninstall.packages(["lua", "tool"], NEEDS, ["lua"], True, removal)
    assert gone == ["lua"]
    assert stays == {"tool": "other roles on the host may use it; it goes with the last of them"}


def test_packages_are_noted_by_role(tmp_path: Path) -> None:
    package_record.record("gateway", ["nginx", "lua"], tmp_path)
    assert package_record.recorded("gateway", tmp_path) == ["lua", "nginx"]
    assert (
        (tmp_path / "gateway").read_text().startswith("# Packages that the role gateway of vLLM Fleet installed here.")
    )
    package_record.record("gateway", [], tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the module ----------------------------------------------------------------------------------------------------------


class Host:
    """A host in a directory. It notes what was run."""

    def __init__(self, root: Path) -> None:
        self.root, self.ran = root, list[str]()
        self.write(
            "/etc/passwd", "seller:x:990:990::/nonexistent:/usr/sbin/nologin\nada:x:1000:1000::/home/ada:/bin/sh\n"
        )

    def write(self, path: str, text: str = "") -> Path:
        """A file."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def run(self, command: list[str], **_more: Any) -> tuple[int, str, str]:
        """What a command says."""
        self.ran.append(" ".join(command))
        if "--simulate" in command:
            return (
                0,
                "".join(f"Remv {name} [1]\n" for name in command[command.index("remove") + 1 :])
                if "remove" in command
                else "",
                "",
            )
        if "--showformat=${db:Status-Abbrev} ${Package}\\n" in command:
            return 0, "rc  engine\nun  tool\n", ""
        if command[1] == "list-units":
            return 0, "shop.service loaded active running\nother.service loaded active running\n", ""
        return 0, "", ""

    def leaves(self, check: bool = False, **given: Any) -> uninstall_host.Leaves:
        """What is asked of it."""
        defaults = {name: option.get("default") for name, option in module.ARGUMENTS.items()}
        return uninstall_host.Leaves({**defaults, "role": "shop", **given}, self.run, check, self.root)


def kept(path: str, always: bool = False) -> dict[str, Any]:
    """What stays."""
    return {"path": path, "why": "it is yours", "always": always}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_nothing_is_stopped_where_the_role_never_was(host: Host) -> None:
    for path in ("/srv/goods", "/srv/theirs"):
        host.write(path)
    given: dict[str, Any] = {"units": ["shop.service"], "trees": ["shop"], "paths": ["/opt/shop"], "users": ["seller"]}
    leaves = host.leaves(**given, kept=[kept("/srv/goods", always=True), kept("/srv/theirs")])
    leaves.remove()
    assert (leaves.removed, host.ran) == ([], [])
    assert leaves.kept == [{"what": "/srv/goods", "why": "it is yours"}]


def test_units_users_and_files_go_and_what_is_kept_is_said(host: Host) -> None:
    host.write("/opt/shop/bin/shop")
    host.write("/srv/goods/apple")
    tree = Tree(host.root / "var/lib/vllm-fleet/tree/shop", host.root)
    (host.root / "etc").mkdir(exist_ok=True)
    user, group = (host.root.owner(), host.root.group())
    directory = Entry("/opt/shop/sockets", kind="directory", mode="0755", owner=user, group=group)
    tree.present([directory, Entry("/etc/shop/shop.conf", content=b"x", owner=user, group=group)])
    host.write("/opt/shop/sockets/socket")  # so that the tree cannot remove it
    given: dict[str, Any] = {
        "units": ["shop*.service"], "trees": ["shop"], "paths": ["/opt/shop"], "users": ["seller", "ada"],
        "kept": [kept("/srv/goods"), kept("/srv/none")],
    }  # fmt: skip
    looked = host.leaves(check=True, **given)
    looked.remove()
    assert (host.root / "opt/shop/bin/shop").exists() and (host.root / "etc/shop/shop.conf").exists()
    assert "systemctl stop shop.service" not in host.ran
    leaves = host.leaves(**given)
    leaves.remove()
    assert leaves.removed[: len(looked.removed)] == looked.removed
    assert {"unit shop.service stopped", "user seller", "/etc/shop", "/opt/shop"} <= set(leaves.removed)
    assert not (host.root / "opt/shop").exists() and not (host.root / "etc/shop").exists()
    assert not (host.root / "var/lib/vllm-fleet").exists()
    assert "systemctl stop shop.service" in host.ran and "systemctl stop other.service" not in host.ran
    assert leaves.kept == [
        {"what": "user ada", "why": "it is not as the role makes it, so it is somebody's own"},
        {"what": "/srv/goods", "why": "it is yours"},
    ]


def test_packages_with_data_of_others_are_not_purged(host: Host) -> None:
    """Debian's docker.io deletes all containers and volumes when it is purged."""
    paragraphs = [
        f"Package: {name}\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n" for name in ("engine", "tool")
    ]
    host.write("/var/lib/dpkg/status", "\n".join(paragraphs))
    records = host.root / "var/lib/vllm-fleet/packages"
    package_record.record("shop", ["engine", "tool"], records)
    leaves = host.leaves(packages=["engine"], unpurged="it is yours")
    leaves.remove()
    [ran] = [command for command in host.ran if command.startswith("apt-get") and "--simulate" not in command]
    assert ran.endswith(" remove engine tool") and "purge" not in ran
    assert leaves.removed[:2] == ["package engine", "package tool"]
    assert leaves.kept == [{"what": "the configuration of engine", "why": "it is yours"}]
    package_record.record("shop", ["engine"], records)
    host.leaves(packages=["engine"]).remove()
    assert host.ran[-2].endswith(" purge engine")
    assert not records.exists()


def test_what_is_mounted_is_left(host: Host) -> None:
    """A store or a cache that other hosts have mounted too would be lost to them."""
    for path in ("/opt/shop/a", "/srv/disk/.shop", "/srv/net/.shop", "/var/cache/shop/x"):
        host.write(path)
    host.write(
        "/proc/self/mounts",
        "/dev/a / ext4 rw\n/dev/b /srv/disk xfs rw\nc:/ /srv/net nfs4 rw\n/dev/d /var/cache/shop ext4 rw\n",
    )
    leaves = host.leaves(paths=["/opt/shop", "/srv/*/.shop", "/var/cache/shop"])
    leaves.remove()
    assert leaves.removed == ["/opt/shop", "/srv/disk/.shop"]
    assert [one["what"] for one in leaves.kept] == ["/srv/net/.shop", "/var/cache/shop"]
    assert (host.root / "srv/net/.shop").exists() and (host.root / "var/cache/shop/x").exists()
    again = host.leaves(paths=["/srv/net/.shop"], units=["shop.service"])
    again.remove()
    assert again.removed == []


def test_only_links_of_the_role_go(host: Host) -> None:
    host.write("/opt/shop/bin/shop")
    host.write("/usr/local/bin/till", "somebody's own")
    (host.root / "usr/local/bin/shop").symlink_to(host.root / "opt/shop/bin/shop")
    (host.root / "usr/local/bin/theirs").symlink_to("/usr/bin/env")
    host.leaves(paths=["/opt/shop"], links=["/usr/local/bin/*"]).remove()
    assert sorted(path.name for path in (host.root / "usr/local/bin").iterdir()) == ["theirs", "till"]


# --- what is asked for ---------------------------------------------------------------------------------------------------

ASKED = {
    "instance": "",
    "roles": "",
    "all": False,
    "models": False,
    "forced": False,
    "limit": "",
    "serve": ["g1"],
    "gateways": ["w1"],
}
HOSTVARS: dict[str, dict[str, Any]] = {"g1": {"vllm_instances": [{"name": "chat"}]}, "w1": {}}


def problems(hosts: Sequence[str] = ("g1", "w1"), **asked: Any) -> str:
    """What is wrong, in one text."""
    return " ".join(uninstall.problems(HOSTVARS, hosts, TABLE, {**ASKED, **asked}))


def test_what_cannot_be_meant_is_refused() -> None:
    assert "Nothing was named" in problems()
    assert "did you mean gateway?" in problems(roles="gatewy")
    assert "say one or the other" in problems(instance="chat", all=True)
    assert "no host of the fleet" in problems(hosts=["w1"], instance="chat")
    assert "last of the gateways, and g1 would serve nobody" in problems(hosts=["w1"], all=True)
    assert problems(hosts=["w1"], all=True, forced=True) == ""
    assert "from under w1, which this run leaves" in problems(hosts=["g1"], all=True, authority=True)
    assert problems(all=True, authority=True) == ""
    assert problems(all=True) == problems(roles="vllm,docker") == problems(instance="chat") == ""


def test_ssh_firewall_base_and_driver_go_only_by_name() -> None:
    table = dict.fromkeys(TABLE, True)
    planned = uninstall.plan(table, {**ASKED, "all": True}, ["g1", "w1"])
    assert planned["stay"] == ["base", "firewall", "ssh_hardening", "nvidia_driver"]
    assert planned["gone"][0] == "virtual_address" and planned["gone"][-1] == "fleet_authority"
    assert planned["others"] == {role: [] for role in planned["gone"]}
    assert planned["ends"] and planned["instances"]
    some = uninstall.plan(table, {**ASKED, "roles": "uv, docker"}, ["g1"])
    assert some["gone"] == ["uv", "docker"]
    assert (
        "vllm" in some["others"]["uv"] and "uv" not in some["others"]["docker"] and "base" not in some["others"]["uv"]
    )
    named = uninstall.plan(table, {**ASKED, "all": True, "roles": "firewall,ssh_hardening"}, ["g1"])
    assert named["stay"] == ["base", "nvidia_driver"]
    assert not named["ends"]


def test_a_role_that_others_need_is_refused() -> None:
    planned = uninstall.plan(dict.fromkeys(TABLE, True), {**ASKED, "roles": "host_agent"}, [])
    assert uninstall.host_problems("g1", planned) == [
        "vllm on g1 cannot do without host_agent. Name it as well, or leave host_agent out"
    ]


def test_the_report_lists_what_is_left() -> None:
    def left(why: str) -> dict[str, Any]:
        return {"removed": [], "kept": [{"what": "/x", "why": why}]}

    hostvars = {
        "g1": {
            "uninstall_done": True,
            "uninstall_planned": {"back": ["uv"]},
            "vllm_uninstalled_instances": ["chat"],
            "uninstall_results": {"uv": {"removed": ["/opt/uv"], "kept": []}, "docker": left("y"), "base": left("z")},
        },
        "w1": {},
    }
    lines = uninstall.report(hostvars, ["g1", "w1"], {"instance": "", "check": False})
    assert lines[0] == "g1: removed: instance chat, uv"
    assert lines[1] == "g1: left: /x (y; z)"
    assert "g1: site.yml brings back uv while the inventory says so" in lines
    assert next(line for line in lines if line.startswith("w1: ")).startswith("w1: not done")
    assert any(line.startswith("next: take what is gone out of the inventory") for line in lines)
    assert lines[-1].startswith("every host: left: ~/.ansible")
    assert json.dumps(lines)
