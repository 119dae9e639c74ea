"""What the READMEs of the roles say lands on a host is what does, and their examples work as far as that can be seen without one."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.module_utils import inputs

from tests.playbooks import playbook
from tools import docs, lands

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())


def tasks(node: Any) -> Iterator[dict[str, Any]]:
    """Every task of a task file, those in blocks included."""
    for task in node or []:
        yield task
        for part in ("block", "rescue", "always"):
            yield from tasks(task.get(part))


# --- what lands where -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_the_readme_names_every_file_of_the_role(role: str) -> None:
    """By the folder and by the text of the tasks, not by the generator's reading of them."""
    path = ROOT / "roles" / role
    text = "".join(file.read_text() for file in path.glob("tasks/**/*.yml"))
    elsewhere = set(re.findall(r"template: (\S+?)[,}]?\s", text))  # these have a path of their own
    files = {str(file.relative_to(path / "templates")) for file in (path / "templates").rglob("*") if file.is_file()}
    files = {name for name in files if not name.endswith(".pyc")}  # other tests import the programs
    expected = {
        "/" + name.removesuffix(".j2")
        for name in files - elsewhere
        if "/" in name and not Path(name).name.startswith("_")
    }
    expected |= set(re.findall(r"(?:- path|dest): (/[\w./@-]+)$", text, re.MULTILINE))
    readme = (path / "README.md").read_text()
    assert [name for name in sorted(expected) if f"| `{name}` |" not in readme] == []
    rows = re.findall(r"^\| `/", readme.partition("## What lands where")[2], re.MULTILINE)
    assert len(rows) >= len(files - {name for name in files if Path(name).name.startswith("_")} - {"compose.yaml.j2"})


def written(path: Path, text: str) -> None:
    """A file with the directories that lead to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A small role."""
    role = tmp_path / "roles" / "shop"
    written(role / "templates/etc/shop/shop.conf.j2", "")
    written(role / "templates/etc/shop/_part.conf.j2", "")
    written(role / "templates/etc/systemd/system/shop@.service", "")
    written(role / "templates/etc/systemd/system/other.service.d/shop.conf.j2", "")
    written(role / "templates/keys.j2", "")
    written(role / "defaults/main.yml", "shop_home: /srv/shop\nshop_user: seller\nshop_group: ''\nshop_port: 8000\n")
    written(role / "vars/main.yml", "__shop_keys: '{{ shop_home }}/{{ ansible_facts.x }}-{{ shop_port + 1 }}.keys'\n")
    written(
        role / "tasks/configure.yml",
        """
- name: configure | The files are in place
  gpufleet.llm.tree:
    name: shop
    group: "{{ shop_user }}"
    modes: {/etc/shop/shop.conf: "{{ '0600' if shop_secret else '0644' }}"}
    when: {/etc/shop/shop.conf: "{{ shop_port | int > 0 }}"}
    secrets: "{{ ['/etc/shop/shop.conf'] if shop_secret else [] }}"
    files:
      - {path: "{{ __shop_keys }}", template: keys.j2, mode: "0600", secret: true}
    directories:
      - {path: "{{ shop_home }}", mode: "0700", owner: "{{ shop_user }}"}
    links:
      - {path: /usr/local/bin/shop, target: "{{ shop_home }}/bin"}
- name: configure | No more
  gpufleet.llm.tree: {name: shop, state: absent}
- name: configure | The rest is there
  when: shop_extra
  block:
    - name: configure | The places are there
      ansible.builtin.file: {path: "{{ shop_home }}/{{ item }}", state: directory, mode: "0755"}
      loop: [in, out]
    - name: configure | The token is there
      ansible.builtin.copy: {dest: /etc/shop.token, content: x, mode: "0400"}
      no_log: true
      when: [not ansible_check_mode, shop_token != '']
    - name: configure | The archive is there for a moment
      ansible.builtin.copy: {dest: /tmp/archive, src: x}
    - name: configure | The archive is gone again
      ansible.builtin.file: {path: /tmp/archive, state: absent}
- name: configure | The list is on the controller
  delegate_to: localhost
  ansible.builtin.copy: {dest: /tmp/on-the-controller, content: x}
- name: configure | The users are there
  ansible.builtin.user: {name: "{{ shop_user }}"}
- name: configure | The group is there
  ansible.builtin.group: {name: "{{ shop_group }}"}
- name: configure | The clock runs
  ansible.builtin.systemd_service: {name: chrony.service, state: started}
""",
    )
    return role


def test_what_a_role_writes_is_read_from_its_tasks(shop: Path) -> None:
    Landing = lands.Landing  # noqa: N806 -- the class
    group = {"group": "seller"}
    assert {one.path: one for one in lands.Role(shop).landings} == {
        one.path: one
        for one in [
            Landing(
                "/etc/shop/shop.conf", "file or secret", "0600 if shop_secret else 0644", when="shop_port | int > 0", **group
            ),
            Landing("/etc/systemd/system/shop@.service", "file", "0644", **group),
            Landing("/etc/systemd/system/other.service.d/shop.conf", "file", "0644", **group),
            Landing("/srv/shop/*-8001.keys", "secret", "0600", **group),
            Landing("/srv/shop", "directory", "0700", "seller", **group),
            Landing("/usr/local/bin/shop", "link to `/srv/shop/bin`"),
            Landing("/srv/shop/in", "directory", "0755", when="shop_extra"),
            Landing("/srv/shop/out", "directory", "0755", when="shop_extra"),
            Landing("/etc/shop.token", "secret", "0400", when="shop_extra and shop_token != ''"),
        ]
    }  # fmt: skip
    assert lands.Role(shop).units() == ["chrony.service", "other.service", "shop@.service"]
    assert lands.Role(shop).users() == ["the group that `shop_group` names", "user `seller` (`shop_user`)"]


def test_a_new_file_of_a_role_makes_its_readme_stale(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "ROOT", shop.parents[1])
    options: dict[str, dict[str, Any]] = {"shop_port": {"type": "int", "default": 8000}, "shop_export": {"type": "int"}}
    before = docs.what_lands("shop", options)
    assert before.splitlines()[-1] == "- Variables that are ports: `shop_port` (8000)."
    written(shop / "templates/etc/shop/new.conf.j2", "")
    new = set(docs.what_lands("shop", options).splitlines()) - set(before.splitlines())
    assert new == {"| `/etc/shop/new.conf` | file | `0644`, root:seller |  |"}


# --- examples -------------------------------------------------------------------------------------------------------

VAULT = {
    "vault_vllm_internal_key": "0123456789abcdef0123456789abcdef",
    "vault_team_a_key": "fedcba9876543210fedcba9876543210",
}
GIB = 1024**3
FACTS = {
    "distribution": "Debian", "release": "13", "codename": "trixie", "architecture": "x86_64", "container": "", "python": "3.13.5",
    "packages": {}, "units": {}, "users": {}, "groups": {}, "group_members": {}, "programs": {}, "ports": [], "mounts": [],
    "memory_bytes": 256 * GIB,
    "gpu_error": "",
    "gpus": [
        {"index": 0, "name": "NVIDIA H200", "driver": "580.159.03", "memory_mib": 143771, "mig": False, "compute_capability": 9.0},
    ],
}  # fmt: skip


def example(role: str) -> dict[str, Any]:
    """The one play of a role's example."""
    [play] = yaml.safe_load((ROOT / "roles" / role / "meta" / "example.yml").read_text())
    return play  # type: ignore[no-any-return]


def own_variables(role: str) -> dict[str, Any]:
    """The variables of an example that belong to the role, with those of the vault filled in."""
    text = json.dumps(example(role)["vars"])
    for name, value in VAULT.items():
        text = text.replace(f"{{{{ {name} }}}}", value)
    return {name: value for name, value in json.loads(text).items() if name.startswith(f"{role}_")}


def options_of(role: str) -> dict[str, Any]:
    """The options of a role."""
    specs = yaml.safe_load((ROOT / "roles" / role / "meta" / "argument_specs.yml").read_text())
    return specs["argument_specs"]["main"].get("options", {})  # type: ignore[no-any-return]


@pytest.mark.parametrize("role", ROLES)
def test_an_example_applies_its_role_with_variables_that_it_has(role: str) -> None:
    play = example(role)
    used = [entry["role"].removeprefix("gpufleet.llm.") for entry in play["roles"]]
    assert used[-1] == role
    known = {name for one in used for name in options_of(one)}
    assert set(play["vars"]) - known == set()
    mine = own_variables(role)
    assert mine, "an example shows the main variables"
    assert inputs.name_problems(role, options_of(role), mine) == []
    assert [
        text for name, value in mine.items() for text in inputs.value_problems(name, value, options_of(role)[name])
    ] == []
    assert f"```yaml\n{docs.example(role)}\n```" in (ROOT / "roles" / role / "README.md").read_text()


def test_no_two_roles_have_the_same_example() -> None:
    assert len({docs.example(role) for role in ROLES}) == len(ROLES)


def test_ansible_reads_the_examples(tmp_path: Path) -> None:
    (tmp_path / "hosts.yml").write_text(
        yaml.safe_dump({"vllm": {"hosts": {"gpu-1": {}}}, "gateway": {"hosts": {"gw-1": {}}}})
    )
    files = [str(ROOT / "roles" / role / "meta" / "example.yml") for role in ROLES]
    done = playbook("--syntax-check", "-i", tmp_path / "hosts.yml", *files)
    assert done.returncode == 0, done.stdout + done.stderr


def judged(path: Path, change: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What each role's check of its variables finds in its example, with some of them changed. Of the roles nothing else is run."""
    book = []
    for role in sorted(set(ROLES) - {"host_support"}):
        [checks] = [
            task
            for task in tasks(yaml.safe_load((ROOT / "roles" / role / "tasks" / "preflight.yml").read_text()))
            if task["name"] == "preflight | The variables make sense"
        ]
        written(path / "roles" / role / "tasks" / "main.yml", yaml.safe_dump([checks], sort_keys=False))
        for part in ("defaults", "vars", "meta", "files", "templates"):
            if (ROOT / "roles" / role / part).is_dir():
                (path / "roles" / role / part).symlink_to(ROOT / "roles" / role / part)
        play = example(role)
        task = {"name": role, "ansible.builtin.include_role": {"name": role, "rolespec_validate": False}}
        tell = {
            "name": "Tell",
            "ansible.builtin.debug": {"msg": f"<{role} {{{{ __{role}_checked.problems | to_json | b64encode }}}}>"},
        }
        host = "gw-1" if play["hosts"] == "gateway" else "gpu-1"
        variables = {**play["vars"], **change.get(role, {}), "check_inputs_collect": True, "host_support_facts": {}}
        book.append({"hosts": host, "gather_facts": False, "vars": variables, "tasks": [task, tell]})
    facts = {"name": "Facts", "ansible.builtin.set_fact": {"gpufleet": FACTS, "cacheable": True}}
    (path / "book.yml").write_text(
        yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": [facts]}, *book], sort_keys=False)
    )
    instances = example("vllm")["vars"]["vllm_instances"]
    groups = {
        "vllm": {"hosts": {"gpu-1": {"fleet_address": "192.0.2.11", "vllm_instances": instances}}},
        "gateway": {"hosts": {"gw-1": {"fleet_address": "192.0.2.10"}, "gw-2": {"fleet_address": "192.0.2.12"}}},
    }
    (path / "hosts.yml").write_text(yaml.safe_dump({"all": {"vars": VAULT, "children": groups}}))
    done = playbook("-i", path / "hosts.yml", path / "book.yml", directory=path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"<(\w+) ([A-Za-z0-9+/=]+)>", re.sub(r"\n\s*", "", done.stdout))
    return {role: json.loads(base64.b64decode(found)) for role, found in told}


def test_the_roles_find_nothing_wrong_with_their_examples(tmp_path: Path) -> None:
    assert judged(tmp_path / "good", {}) == {role: [] for role in sorted(set(ROLES) - {"host_support"})}
    wrong = judged(tmp_path / "wrong", {"gateway": {"gateway_clients": []}, "vllm": {"vllm_start_proof_timeout": 5}})
    assert [role for role, problems in wrong.items() if problems] == ["gateway", "vllm"]
