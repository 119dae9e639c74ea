"""Mistakes in an inventory: found all at once, each named with what would be right."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import inputs

from tests.playbooks import playbook

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]
SPEC: dict[str, Any] = {
    "shop_port": {"type": "int"},
    "shop_open": {"type": "bool"},
    "shop_size": {"type": "str", "choices": ["small", "large"]},
    "shop_tags": {"type": "list", "elements": "str"},
    "shop_secret": {"type": "str", "no_log": True},
    "shop_items": {
        "type": "list",
        "elements": "dict",
        "options": {
            "name": {"type": "str", "required": True, "description": "Name of the item."},
            "price": {"type": "float"},
            "key": {"type": "int", "no_log": True},
        },
    },
}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("shop_port", "many", "shop_port is 'many', but must be a whole number"),
        ("shop_open", "perhaps", "shop_open is 'perhaps', but must be true or false"),
        ("shop_size", "medium", "shop_size is 'medium', but must be one of small, large"),
        ("shop_tags", "one, two", "shop_tags is 'one, two', but must be a list"),
        ("shop_tags", [{"a": 1}], "shop_tags[0] is {'a': 1}, but must be text"),
        ("shop_secret", ["hunter2"], "shop_secret must be text"),
        ("shop_items", None, "shop_items has no value; it must be a list, or be left out"),
        ("shop_items", [None], "shop_items[0] has no value; it must be a dictionary, or be left out"),
        ("shop_port", True, "shop_port is True, but must be a whole number"),
        ("shop_size", False, "shop_size is False, but must be text, in quotes"),
        ("shop_items", [{"nam": "x"}], "shop_items[0]: key 'nam' is unknown; did you mean name?"),
        ("shop_items", [{"price": 1}], "shop_items[0]: name is missing; it is: Name of the item"),
        ("shop_items", [{"name": "x", "price": "dear"}], "shop_items[0] (x): price is 'dear', but must be a number"),
        ("shop_items", [{"name": "x", "key": "hunter2"}], "shop_items[0] (x): key must be a whole number"),
        (
            "shop_items",
            [{"name": "x", "zzz": 1}],
            "shop_items[0] (x): key 'zzz' is unknown; known are name, price, key",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(name: str, value: object, problem: str) -> None:
    assert problem in inputs.value_problems(name, value, SPEC[name])


@pytest.mark.parametrize(
    ("name", "value"),
    [("shop_port", "80"), ("shop_open", "yes"), ("shop_tags", ["a", 1]), ("shop_items", [{"name": "x", "price": 2}])],
)
def test_what_ansible_accepts_passes(name: str, value: object) -> None:
    assert inputs.value_problems(name, value, SPEC[name]) == []


def test_misspelt_and_renamed_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inputs.RENAMED_VARIABLES, "shop_harbour", "shop_port")
    names = ["shop_prot", "shop_harbour", "shop_port", "shop_window_colour", "shop_item"]
    assert inputs.name_problems("shop", SPEC, names) == [
        "shop_harbour is called shop_port now; write that",
        "shop_item is not a variable of the role shop; did you mean shop_items?",
        "shop_prot is not a variable of the role shop; did you mean shop_port?",
    ]


def test_the_environment_of_a_program_is_text_by_name() -> None:
    spec = {"type": "dict"}
    assert inputs.value_problems("shop_environment", {"HTTPS_PROXY": "http://p:3128", "N": 1, "B": True}, spec) == []
    (problem,) = inputs.value_problems("shop_environment", {"HTTPS_PROXY": ["http://me:secret@p"]}, spec)
    assert problem == "shop_environment: HTTPS_PROXY is a list, but must be text"


def test_what_an_expression_leads_to_is_found_through_templates() -> None:
    variables = {"a": "{{ b.x }}", "b": {"x": "{{ c }}"}, "c": 1, "d": "no template: c", "hostvars": {"h": "{{ d }}"}}
    assert inputs.leads_to("a | length > 0", variables) == {"a", "b", "c"}
    assert inputs.leads_to(["d == 1", "{{ hostvars }}"], variables) == {"d", "hostvars"}


@pytest.fixture
def role(tmp_path: Path) -> Path:
    """A role with two variables, in a playbook's directory."""
    (tmp_path / "roles/shop/meta").mkdir(parents=True)
    (tmp_path / "roles/shop/tasks").mkdir()
    options = {"shop_port": {"type": "int", "default": 1}, "shop_name": {"type": "str", "default": "x"}}
    (tmp_path / "roles/shop/meta/argument_specs.yml").write_text(
        json.dumps({"argument_specs": {"main": {"options": options}}})
    )
    (tmp_path / "roles/shop/defaults").mkdir()
    (tmp_path / "roles/shop/defaults/main.yml").write_text("{shop_port: 1, shop_name: x}")
    checks = [
        {"that": "shop_port < 10", "fail_msg": "shop_port is {{ shop_port }}; it must be below 10."},
        {"that": ["shop_name != 'bad'"], "fail_msg": "shop_name is bad."},
        {"that": "nowhere.x == 1", "fail_msg": "{{ nowhere }}", "when": "shop_name == 'never'"},
        {"problems": "{{ [shop_name ~ ' is too long'] if shop_name | length > 4 else [] }}"},
        {"that": "shop_name != 'old'", "fail_msg": "shop_name is {{ shop_name }}, which ends soon.", "warning": True},
    ]
    (tmp_path / "roles/shop/tasks/look.yml").write_text(
        json.dumps([{"name": "Look", "gpufleet.llm.check_inputs": {"checks": checks}, "register": "__shop_checked"}])
    )
    return tmp_path


COLLECTED = "{{ query('vars', *query('varnames', '^__[a-z_]+_checked$')) | map(attribute='problems') | flatten }}"


def play(directory: Path, collect: bool = False, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run the role's check twice, as two roles would, in a real Ansible."""
    task = {"name": "Role", "include_role": {"name": "shop", "tasks_from": "look.yml", "rolespec_validate": False}}
    last = {
        "name": "Report",
        "gpufleet.llm.check_inputs": {"checks": [{"problems": COLLECTED}]},
        "vars": {"check_inputs_collect": False},
    }
    tasks = [task, task, last]
    book = [{"hosts": "localhost", "gather_facts": False, "vars": {"check_inputs_collect": collect}, "tasks": tasks}]
    (directory / "play.yml").write_text(json.dumps(book))
    environment = {
        **os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"), "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml", "ANSIBLE_INJECT_FACT_VARS": "0",
    }  # fmt: skip
    return playbook(
        "play.yml", "-i", "localhost,", "-e", json.dumps(variables), directory=directory, environment=environment
    )


def test_all_is_well(role: Path) -> None:
    assert play(role).returncode == 0
    assert play(role, collect=True).returncode == 0


def test_what_is_a_warning_stops_nothing(role: Path) -> None:
    done = play(role, shop_name="old")
    assert done.returncode == 0
    assert (done.stdout + done.stderr).count("shop_name is old, which ends soon.") == 1


def test_everything_is_told_at_once(role: Path) -> None:
    done = play(role, shop_port=11, shop_name="longer", shop_nam=1)
    assert done.returncode != 0
    for problem in (
        "3 problems with the variables of localhost; nothing has been changed.",
        "- shop_nam is not a variable of the role shop; did you mean shop_name?",
        "- shop_port is 11; it must be below 10.",
        "- longer is too long",
    ):
        assert problem in done.stdout


def test_what_is_collected_is_told_at_the_end_and_once(role: Path) -> None:
    done = play(role, collect=True, shop_name="bad", shop_port="many")
    assert done.returncode != 0
    assert "2 problems" in done.stdout
    assert done.stdout[done.stdout.index("fatal:") :].count("- shop_name is bad.") == 1
    assert "- shop_port is 'many', but must be a whole number" in done.stdout
    assert "cannot be checked" not in done.stdout, "what has the wrong type has been told already"


def test_a_missing_secret_is_told_by_the_variable_that_needs_it(role: Path) -> None:
    done = play(role, shop_name="{{ vault_shop_name }}")
    assert (
        "- shop_name cannot be read: 'vault_shop_name' is undefined; a secret of that name may be missing"
        in done.stdout
    )


def test_what_comes_as_text_from_the_command_line_is_compared_as_a_number(role: Path) -> None:
    assert play(role, shop_port="9").returncode == 0
    assert "- shop_port is 11; it must be below 10." in play(role, shop_port="11").stdout


def test_a_check_that_needs_a_wrong_shape_is_not_asked_and_the_others_are(role: Path) -> None:
    done = play(role, shop_port=["many"], shop_name="longer")
    assert "2 problems" in done.stdout
    assert "- shop_port is ['many'], but must be a whole number" in done.stdout
    assert "- longer is too long" in done.stdout
    done = play(role, shop_name=["one", "two", "three", "four", "five"])
    assert "1 problem with" in done.stdout, "its length is that of a list, and says nothing"


def test_a_value_that_a_check_cannot_read_is_told_with_its_variable(role: Path) -> None:
    done = play(role, shop_name="{{ vault")
    assert "- shop_name cannot be read: unexpected end of template" in " ".join(done.stdout.split())
    assert "text with braces is a template for Ansible, unless it is marked with !unsafe" in " ".join(
        done.stdout.split()
    )


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"vllm_instances": None}, "vllm_instances has no value; it must be a list, or be left out"),
        ({"fleet_skip_roles": 5}, "fleet_skip_roles is 5, but must be a list"),
        ({"vllm_device": "{{ nobody }}"}, "vllm_device cannot be read: 'nobody' is undefined"),
    ],
)
def test_rollback_looks_at_what_it_reads_before_it_asks_a_host(
    tmp_path: Path, variables: dict[str, Any], problem: str
) -> None:
    dead = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
    groups = {"vllm": {"hosts": {"good": dead, "bad": {**dead, **variables}}}, "gateway": {"hosts": {"good": {}}}}
    (tmp_path / "hosts.json").write_text(json.dumps({"all": {"children": groups}}))
    done = playbook("-i", tmp_path / "hosts.json", "playbooks/rollback.yml", "-e", "fleet_instance=chat")
    said = " ".join(done.stdout.split())
    assert done.returncode == 2
    assert f"- bad: {problem}" in said
    assert "UNREACHABLE" not in said
