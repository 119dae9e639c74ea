"""The frame of the repository: what every role, scenario, inventory and document has in common."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ansible
import pytest
import tomllib
import yaml
from ansible_collections.gpufleet.llm.plugins.module_utils.inputs import OUTPUTS
from packaging.version import Version

from tests import run

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())
STAGES = ["install", "configure", "service", "verify"]
# The one is itself a step of every other role, the other stands around the acts of others: neither is a thing that a host gets.
NOT_STAGED = {"host_support", "turn"}
SCENARIOS = run.scenarios()
INJECTED = re.compile(
    r"\bansible_(distribution\w*|os_family|architecture|hostname|fqdn|nodename|domain|default_ipv[46]|all_ipv[46]_addresses"
    r"|memtotal_mb|memory_mb|processor\w*|kernel|service_mgr|pkg_mgr|env|date_time|python_version|lsb|mounts|interfaces"
    r"|machine|system|virtualization\w*|devices|selinux|apparmor|user_id|local|userspace_bits|uptime_seconds)\b"
)


def load(path: Path) -> Any:
    """Read a YAML file."""
    return yaml.safe_load(path.read_text())


def tasks(node: Any) -> Iterator[dict[str, Any]]:
    """Every task of a task file, those in blocks included."""
    for task in node or []:
        yield task
        for part in ("block", "rescue", "always"):
            yield from tasks(task.get(part))


def role_files(role: str, *patterns: str) -> list[Path]:
    """Files of a role."""
    return sorted(path for pattern in patterns for path in (ROOT / "roles" / role).glob(pattern) if path.is_file())


def load_module(path: Path) -> ModuleType:
    """Import a program that is not part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_role_has_the_files_that_every_role_has(role: str) -> None:
    wanted = ["README.md", "tasks/main.yml", "defaults/main.yml"]
    wanted += [f"meta/{name}.yml" for name in ("main", "argument_specs", "example")]
    assert [name for name in wanted if not (ROOT / "roles" / role / name).is_file()] == []


@pytest.mark.parametrize("role", sorted(set(ROLES) - NOT_STAGED))
def test_main_checks_and_applies(role: str) -> None:
    """The same three steps in every role; playbooks that checked all hosts first take `apply` alone."""
    names = [
        task.get("ansible.builtin.import_tasks") or task["ansible.builtin.include_role"]["name"]
        for task in load(ROOT / "roles" / role / "tasks/main.yml")
    ]
    assert names == ["gpufleet.llm.host_support", "preflight.yml", "apply.yml"]


@pytest.mark.parametrize("role", sorted(set(ROLES) - NOT_STAGED))
def test_apply_is_a_table_of_contents_with_the_stages_in_order(role: str) -> None:
    """Conditions are names, whose meaning stands in vars/main.yml under "What there is to do"."""
    defined = load(ROOT / "roles" / role / "vars/main.yml")
    included = []
    for task in load(ROOT / "roles" / role / "tasks/apply.yml"):
        stage = str(task.get("ansible.builtin.include_tasks") or task.get("ansible.builtin.import_tasks") or "")
        wanted = f"__{role}_{stage.removesuffix('.yml')}_due"
        if not stage:
            assert task["ansible.builtin.meta"] == "end_role"
            wanted = f"__{role}_nothing_left"
        else:
            included.append(stage.removesuffix(".yml"))
        assert task.get("when", wanted) == wanted
        assert "when" not in task or wanted in defined
    assert [stage for stage in included if stage not in STAGES] == []
    assert included == sorted(included, key=STAGES.index)
    assert included[-1] == "verify"


@pytest.mark.parametrize("role", ROLES)
def test_a_role_uses_no_inner_variable_of_another(role: str) -> None:
    others = sorted(set(ROLES) - {role}, key=len, reverse=True)
    foreign = re.compile(rf"\b__({'|'.join(others)})_\w+")
    own = f"__{role}_"
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in role_files(
            role, "tasks/**/*.yml", "vars/*.yml", "defaults/*.yml", "handlers/*.yml", "templates/**/*.j2"
        )
        for match in foreign.finditer(path.read_text())
        if not match[0].startswith(own)
    ]
    assert found == []


@pytest.mark.parametrize("role", ROLES)
def test_task_files_are_short(role: str) -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in role_files(role, "tasks/**/*.yml")}
    assert {name: size for name, size in sizes.items() if size >= 150} == {}


@pytest.mark.parametrize("role", ROLES)
def test_task_names_say_which_file_they_are_in(role: str) -> None:
    wrong = []
    for path in role_files(role, "tasks/**/*.yml"):
        for task in tasks(load(path)):
            name = str(task.get("name", ""))
            # ansible-lint wants no prefix in main.yml, and one everywhere else.
            good = bool(name) and " | " not in name if path.stem == "main" else f"{path.stem} | " in name
            if not good and not (set(task) & {"block"} and "name" not in task):
                wrong.append(f"{path.name}: {name!r}")
    assert wrong == []


def test_task_names_say_what_they_are_about() -> None:
    """In a log a name stands alone: `They are installed` says nothing there. Things are reported and inspected, not told and looked at."""
    pronoun = re.compile(
        r"(It|Its|They|Them|Their|This|That|These|Those|One|Both|Some(thing|body)|Who|Why)\b|.*\b(told|said|looked at)\b"
    )
    files = [path for role in ROLES for path in role_files(role, "tasks/**/*.yml", "handlers/*.yml")]
    files += [*sorted((ROOT / "playbooks").glob("*.yml")), *sorted((ROOT / "playbooks/plays").glob("*.yml"))]
    found = []
    for path in files:
        listed = load(path) or []
        for task in tasks(
            [task for play in listed for task in play.get("tasks", [])] if "playbooks" in path.parts else listed
        ):
            if pronoun.match(str(task.get("name", "")).rpartition(" | ")[2]):
                found.append(f"{path.relative_to(ROOT)}: {task['name']}")
    assert found == []


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_argument_specs_agree(role: str) -> None:
    defaults = load(ROOT / "roles" / role / "defaults" / "main.yml") or {}
    options = load(ROOT / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]["main"].get("options", {})
    required = {name for name, option in options.items() if option.get("required")}
    assert set(options) - required - set(defaults) == set(), "in the specs, not in the defaults"
    assert set(defaults) - set(options) == set(), "in the defaults, not in the specs"
    assert {
        name: (option.get("default"), defaults[name])
        for name, option in options.items()
        if name in defaults and option.get("default") != defaults[name]
    } == {}, "default in the specs, default in defaults/main.yml"


@pytest.mark.parametrize("role", ROLES)
def test_no_default_needs_the_facts_of_the_host(role: str) -> None:
    """Ansible renders them for its check of the arguments: before the role's first task, and so before the host is known."""

    def in_specs(node: Any) -> Iterator[Any]:
        for name, value in node.items() if isinstance(node, dict) else []:
            yield from [value] if name == "default" else in_specs(value)

    defaults = load(ROOT / "roles" / role / "defaults" / "main.yml")
    values = [defaults, *in_specs(load(ROOT / "roles" / role / "meta" / "argument_specs.yml"))]
    # internal variables stand for facts, too
    assert [value for value in values if re.search(r"ansible_facts|\b__", str(value))] == []


@pytest.mark.parametrize("role", ROLES)
def test_every_option_has_a_type_and_a_description(role: str) -> None:
    def bare(options: dict[str, Any], above: str = "") -> Iterator[str]:
        for name, option in options.items():
            if not option.get("description") or "type" not in option:
                yield above + name
            if option.get("type") == "list" and "elements" not in option:
                yield f"{above}{name} (elements)"
            yield from bare(option.get("options", {}), f"{above}{name}.")

    spec = load(ROOT / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]["main"]
    assert list(bare(spec.get("options", {}))) == []


@pytest.mark.parametrize("role", ROLES)
def test_public_names_begin_with_the_role_and_internal_ones_with_underscores(role: str) -> None:
    shared = {"vllm_group", "gateway_group", "fleet_address"}
    defaults = set(load(ROOT / "roles" / role / "defaults" / "main.yml") or {})
    assert {name for name in defaults - shared if not name.startswith(f"{role}_")} == set()
    internal = {name for path in role_files(role, "vars/*.yml") for name in load(path) or {}}
    assert {name for name in internal - OUTPUTS if not name.startswith(f"__{role}_")} == set()


@pytest.mark.parametrize("role", ROLES)
def test_every_default_has_a_comment_before_it(role: str) -> None:
    text = (ROOT / "roles" / role / "defaults" / "main.yml").read_text()
    bare: list[str] = []
    block_commented = False
    for line in text.splitlines():
        if not line.strip() or line.startswith("---"):
            block_commented = False
        elif line.startswith("#"):
            block_commented = True
        elif re.match(r"\w", line) and not block_commented and " #" not in line:
            bare.append(line)
    assert bare == []


@pytest.mark.parametrize("role", ROLES)
def test_no_injected_facts_and_no_unquoted_modes(role: str) -> None:
    wrong = []
    for path in role_files(role, "*/**/*.yml", "templates/**/*"):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if line.lstrip().startswith("#"):
                continue
            if INJECTED.search(line) or (path.suffix == ".yml" and re.search(r"\bmode:\s*[0-9u=]", line)):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert wrong == []


@pytest.mark.parametrize("role", sorted(set(ROLES) - {"turn"}))
def test_role_has_a_scenario(role: str) -> None:
    """A turn takes a fleet: tests/e2e has it."""
    assert role in SCENARIOS


# --- playbooks and inventories --------------------------------------------------------------------------------------


def played(path: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The tasks of a playbook, and their tags. Of what is included the own tags count."""
    for play in load(path):
        for task in play.get("tasks", []):
            if file := task.get("ansible.builtin.include_tasks"):
                assert task["tags"] == ["always"], f"{path.name}: --skip-tags would leave out all of {file}"
                yield from ((inner, inner["tags"]) for inner in load(path.parent / file))
            else:
                yield task, task.get("tags", play.get("tags", []))


def test_playbooks_name_roles_by_fqcn_with_a_tag_of_their_name() -> None:
    seen, wrong = set(), []
    for path in sorted((ROOT / "playbooks/plays").glob("*.yml")):
        for task, tags in played(path):
            role = task.get("ansible.builtin.import_role") or task.get("ansible.builtin.include_role") or {}
            if "apply" in role:
                assert role["apply"] == {"tags": task["tags"]}, "else its tasks have no tag"
            elif "ansible.builtin.import_role" not in task:
                continue
            namespace, collection, name = role["name"].split(".")
            if name in NOT_STAGED:
                continue
            seen.add(name)
            if (namespace, collection) != ("gpufleet", "llm") or tags != [name]:
                wrong.append(f"{path.name}: {task['name']}")
    assert wrong == []
    assert seen == set(ROLES) - NOT_STAGED, (
        "every role has its place in a playbook; host_support is called by the others"
    )


def test_one_table_says_which_host_gets_which_role() -> None:
    """The plays have its roles in its order, each under its condition; where all hosts of a play get a role, that goes without saying."""
    table = list(load(ROOT / "playbooks/group_vars/all/roles.yml")["fleet_roles"])
    assert sorted(table) == sorted(set(ROLES) - NOT_STAGED)
    assert (ROOT / "playbooks/plays/group_vars").readlink() == Path("../group_vars"), "plays see what is beside them"
    for path in (ROOT / "playbooks").rglob("*.yml"):
        assert "vars_files:" not in path.read_text(), f"{path.name}: it would be read for each task of each host"
    roles = []
    for name in ("provision", "equip", "serve", "gateway"):
        for task, [role] in played(ROOT / f"playbooks/plays/{name}.yml"):
            roles.append(role)
            included = task.get("ansible.builtin.include_role") or task.get("ansible.builtin.import_role") or {}
            if included.get("name", "").rpartition(".")[2] == role:
                assert task.get("when", f"fleet_roles.{role}") == f"fleet_roles.{role}"
    assert list(dict.fromkeys(roles)) == table


def test_every_variable_that_a_playbook_reads_is_described() -> None:
    """What a play sets itself, or registers, is its own."""
    described = set(load(ROOT / "meta" / "fleet_specs.yml")["options"]) | OUTPUTS
    for role in ROLES:
        for entry_point in load(ROOT / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"].values():
            described |= set(entry_point.get("options", {}))
    own, read = set(), set()
    for path in sorted((ROOT / "playbooks").rglob("*.yml")):
        text = path.read_text()
        own |= set(re.findall(r"^\s*([a-z_]+):", text, re.MULTILINE)) | set(re.findall(r"register: (\w+)", text))
        read |= set(
            re.findall(
                r"\b((?:fleet|verify|vllm|gateway|model_store|tls_certificate|cuda_toolkit|compose)_[a-z_]+)\b(?!\.| ?\()",
                text,
            )
        )
    read -= set(ROLES) | {path.stem for path in (ROOT / "plugins" / "filter").glob("*.py")}
    filters = set(
        re.findall(r"gpufleet\.llm\.(\w+)", "".join(path.read_text() for path in (ROOT / "playbooks").rglob("*.yml")))
    )
    assert read - own - described - filters == set()
    assert {"fleet_skip_roles", "verify_client", "compose_path"} <= read, "the look at the playbooks sees nothing"


def test_documents_have_short_lines() -> None:
    """Tables and examples of code cannot be wrapped."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = []
    for path in documents:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for line in text.splitlines():
            if len(line) > 120 and not line.startswith(("|", "    ")) and not re.fullmatch(r"[- ]*`[^`]*`\S?", line):
                found.append(f"{path.relative_to(ROOT)}: {line}")
    assert found == []


@pytest.mark.parametrize("inventory", ["demo", "prod"])
def test_inventories_link_the_shared_variables_in(inventory: str) -> None:
    link = ROOT / "inventories" / inventory / "group_vars" / "all" / "00-shared.yml"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / "group_vars" / "all" / "shared.yml"


def test_plays_and_roles_have_the_same_default_groups() -> None:
    shared = load(ROOT / "group_vars" / "all" / "shared.yml")
    assert (shared["vllm_group"], shared["gateway_group"]) == ("vllm", "gateway")
    for path in sorted((ROOT / "playbooks").rglob("*.yml")):
        for group, name in re.findall(r"(\w+_group) \| default\('(\w+)'\)", path.read_text()):
            assert shared[group] == name, path.name


def test_shipped_configuration_is_safe_and_fast() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "ansible.cfg")
    assert "host_key_checking" not in config["defaults"]
    assert config["defaults"]["inject_facts_as_vars"] == "false"
    assert config["connection"]["pipelining"] == "true"


# --- scenarios ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_has_a_role_a_host_group_and_tests(scenario: str) -> None:
    inventory = ROOT / "molecule" / "shared" / "inventory"
    variables = inventory / "group_vars" / f"{scenario}.yml"
    role = load(variables).get("role_under_test") if variables.is_file() else None
    assert (role or scenario) in ROLES
    assert (ROOT / "molecule" / scenario / "molecule.yml").is_file()
    groups = load(inventory / "hosts.yml")["all"]["children"]
    assert groups.get(scenario, {}).get("hosts"), "no hosts in molecule/shared/inventory/hosts.yml"
    assert run.test_functions(scenario), "no test function"


def test_a_scenario_without_a_test_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "molecule" / "empty" / "tests").mkdir(parents=True)
    (tmp_path / "molecule" / "empty" / "molecule.yml").touch()
    (tmp_path / "molecule" / "empty" / "tests" / "test_empty.py").write_text("def helper() -> None: ...\n")
    (job,) = run.molecule_jobs(["empty"])
    done = subprocess.run(list(job.command), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no test function" in done.stdout


# --- the runner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "code", "expected"),
    [
        ("===== 12 passed in 1.00s =====\n", 0, ("ok", 12, 0)),
        ("===== 1 failed, 2 passed, 1 error in 1.00s =====\n", 1, ("failed", 2, 2)),
        ("== 3 passed in 1s ==\nthe destroy step fell over\n", 1, ("failed", 3, 1)),
        ("nothing was collected\n", 0, ("no tests", 0, 1)),
        ("===== no tests ran in 0.01s =====\n", 5, ("failed", 0, 1)),
    ],
)
def test_the_runner_counts_what_pytest_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, code: int, expected: tuple[str, int, int]
) -> None:
    monkeypatch.setattr(run, "LOGS", tmp_path)
    job = run.Job("some job", [], pytest=True)
    job.log.write_text(log)
    job.count(code)
    assert (job.status, job.passed, job.failed) == expected


# --- versions, dependencies and documents ---------------------------------------------------------------------------


def test_collections_are_those_of_the_ansible_package() -> None:
    """Of the newest one; the one for Python 3.11 brings older collections, which are new enough."""
    bundled = Path(ansible.__path__[0]).parent / "ansible_collections"
    required = {entry["name"]: entry["version"] for entry in load(ROOT / "requirements.yml")["collections"]}
    brought = {
        name: json.loads((bundled / name.replace(".", "/") / "MANIFEST.json").read_text())["collection_info"]["version"]
        for name in required
    }
    if sys.version_info >= (3, 12):
        assert required == brought
    dependencies = load(ROOT / "galaxy.yml")["dependencies"]
    assert set(dependencies) <= set(required)
    too_old = [
        name for name, minimum in dependencies.items() if Version(brought[name]) < Version(minimum.removeprefix(">="))
    ]
    assert too_old == []


def test_one_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert load(ROOT / "galaxy.yml")["version"] == project["version"]


def test_the_uv_of_the_controller_is_the_uv_of_the_hosts() -> None:
    pinned = (ROOT / "tools" / "uv.txt").read_text()
    defaults = load(ROOT / "roles" / "uv" / "defaults" / "main.yml")
    assert f"uv=={defaults['uv_version']} " in pinned
    assert [cpu for cpu, digest in defaults["uv_sha256"].items() if f"sha256:{digest}" not in pinned] == []


def test_no_default_names_a_public_package_index() -> None:
    """Empty means what the host uses."""
    texts = [
        path
        for directory in ("defaults", "vars", "templates")
        for path in (ROOT / "roles").glob(f"*/{directory}/**/*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    assert len(texts) > 40
    assert [path for path in texts if re.search(r"pypi\.org|pythonhosted\.org", path.read_text())] == []


def test_generated_documents_are_up_to_date() -> None:
    assert load_module(ROOT / "tools" / "docs.py").stale() == [], "make docs"


def make_targets() -> list[str]:
    """The targets that `make help` lists."""
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return re.findall(r"^  make ([a-z0-9-]+)", done.stdout, re.MULTILINE)


def test_the_readme_names_every_make_target_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"`make ([a-z0-9-]+)", readme)) | {"help"} == set(make_targets()) | {"help"}


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]]
)
def test_links_in_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_python_of_the_plugins_runs_on_the_oldest_host() -> None:
    # Ubuntu 22.04 has Python 3.10: tomllib and the like are not there, which ruff's target version does not notice.
    newer = re.compile(r"^\s*(from|import) (tomllib|asyncio\.taskgroups)\b", re.MULTILINE)
    assert [path.name for path in (ROOT / "plugins").rglob("*.py") if newer.search(path.read_text())] == []
    assert sys.version_info >= (3, 11)


@pytest.mark.parametrize("file", ["playbooks/verify.yml", "roles/gateway/tasks/hear.yml"])
def test_what_is_asked_of_other_hosts_assumes_what_the_roles_default_to(file: str) -> None:
    text = (ROOT / file).read_text()
    assert " | default(443)" in text, "the look at the file sees nothing"
    defaults = {
        **load(ROOT / "roles" / "gateway" / "defaults" / "main.yml"),
        **load(ROOT / "roles" / "tls_certificate" / "defaults" / "main.yml"),
    }
    for name, value in re.findall(r"((?:gateway|tls_certificate)_\w+) \| default\('?([^'()\[\]]+)'?\)", text):
        # what is left out the module or filter takes from where the role has it
        assert name == "gateway_group" or value in ("omit", "none") or str(defaults[name]) == value, name


def test_secrets_in_inventories_are_encrypted() -> None:
    vaults = [path for path in (ROOT / "inventories").rglob("*vault*") if path.suffix in (".yml", ".yaml")]
    assert [str(path) for path in vaults if not path.read_text().startswith("$ANSIBLE_VAULT;")] == []
    example = load(ROOT / "inventories" / "prod" / "group_vars" / "all" / "vault.yml.example")
    used = re.findall(
        r"vault_\w+", "".join(path.read_text() for path in (ROOT / "inventories" / "prod").rglob("*.yml"))
    )
    assert set(example) == set(used)
    assert set(example.values()) == {""}
