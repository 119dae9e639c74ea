"""Every public variable in every wrong shape, as a whole and one level down, and what the preflight of its role says of each.

The cases are made of the argument specs, so a new variable is here by itself. They are judged by the action that a preflight runs, with the
values below, in one process, which prints a line of JSON for each. With a role and facts of a host in JSON as arguments, it prints what the role
says of such a host instead. A program of its own because Ansible finds the filters of a collection only
where its loader came before the first import. tests/unit/test_shapes.py starts it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template
from jinja2 import Environment

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, Any] = {
    "null": None, "text": "a word", "number": -3, "fraction": 0.5, "truth": True, "list": ["x"], "dictionary": {"k": "v"},
    "list of null": [None], "list of lists": [["x"]], "list of dictionaries": [{"k": "v"}], "dictionary of null": {"k": None},
    "dictionary of dictionaries": {"k": {"k": ["x"]}}, "dictionary with a number for a name": {5: "x"},
}  # fmt: skip
# Of the facts of a host, what decides here. The rest is this machine's.
FACTS = {
    "architecture": "x86_64", "distribution": "Debian", "release": "12", "python": "3.11.2", "gpus": [], "service_manager": "systemd",
    "packages": {}, "units": {}, "ports": [],
}  # fmt: skip
HOST = "host-1"
DECIDES = DataLoader().load_from_file(str(ROOT / "playbooks/group_vars/all/roles.yml"), trusted_as_template=True)
VALUES: dict[str, Any] = {
    "vllm_internal_key": "a" * 64, "vllm_device": "cpu", "ssh_hardening_login_users": ["root"], "gateway_server_names": ["llm.example.com"],
    "tls_certificate_names": ["llm.example.com"], "fleet_address": "10.0.0.11",
    "gateway_routes": [
        {
            "model": "tiny", "instance": "chat", "aliases": ["small"], "paths": ["/v1/completions"], "clients": ["team-a"], "balance": "session",
            "session_header": "x-chat",
        },
    ],
    "firewall_admin_networks": ["10.0.0.0/8"],
    "gateway_clients": [
        {
            "name": "team-a", "keys": [{"key": "b" * 64, "expires": "2999-01-01"}], "requests_per_minute": 60, "concurrent_requests": 3,
            "models": ["tiny"],
        },
    ],
    "model_store_models": [{"name": "tiny", "source": "huggingface", "repository": "acme/tiny", "revision": "c" * 40}],
    "vllm_instances": [{"name": "chat", "model": "tiny", "port": 8000, "gpus": [], "options": {"max-model-len": 4096}}],
    "docker_daemon_options": {"log-driver": "local"},
    "model_store_url_headers": {"https://mirror.example/": {"Authorization": "Bearer of-nobody"}},
}  # fmt: skip
# A valid entry of each list of dictionaries that the values above leave empty is made of its spec.


class Host(Mapping[str, Any]):
    """What others read of a host: each value when it is asked for."""

    def __init__(self, variables: Mapping[str, Any], templar: Templar) -> None:
        self.variables, self.templar = variables, templar

    def __getitem__(self, name: str) -> Any:
        return self.templar.template(self.variables[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.variables)

    def __len__(self) -> int:
        return len(self.variables)


@functools.cache
def facts() -> dict[str, Any]:
    """What the module host_facts finds, so that a new fact is here by itself."""
    told: dict[str, Any] = {}
    parameters = {name: option.get("default") for name, option in host_facts.ARGUMENTS.items()}
    module = SimpleNamespace(params=parameters, exit_json=told.update, warn=print)
    with mock.patch.object(host_facts, "AnsibleModule", lambda **_options: module):
        host_facts.main()
    return {**told["ansible_facts"]["gpufleet"], **FACTS}


@functools.cache
def role(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The variables that a role brings, and the checks of its preflight that need no look at the host."""
    loader = DataLoader()
    found: dict[str, Any] = {}
    for place in ("defaults", "vars"):
        if (file := ROOT / "roles" / name / place / "main.yml").exists():
            found |= loader.load_from_file(str(file), trusted_as_template=True) or {}
    tasks = ROOT / "roles" / name / "tasks"
    file = tasks / "preflight.yml" if (tasks / "preflight.yml").exists() else tasks / "main.yml"
    first = next(
        task
        for task in loader.load_from_file(str(file), trusted_as_template=True)
        if "gpufleet.llm.check_inputs" in task
    )
    return found | first.get("vars", {}), first["gpufleet.llm.check_inputs"]["checks"]


def variables(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a task of a role reads."""
    magic = {
        "inventory_hostname": HOST, "group_names": ["vllm", "gateway"], "groups": {"vllm": [HOST], "gateway": [HOST], "all": [HOST]},
        "ansible_facts": {"gpufleet": facts()}, "role_path": str(ROOT / "roles" / name), "ansible_host": "10.0.0.11",
        "ansible_play_hosts": [HOST], "ansible_play_hosts_all": [HOST], "playbook_dir": str(ROOT / "playbooks"), "ansible_check_mode": False,
        "ansible_connection": "ssh", "ansible_user": "root", "ansible_port": 22, "ansible_run_tags": ["all"], "ansible_skip_tags": [],
    }  # fmt: skip
    own, _checks = role(name)
    return {**own, **VALUES, **magic, **values, "hostvars": {}}


def judge(name: str, values: Mapping[str, Any]) -> list[str]:
    """What the preflight of a role says of these values."""
    every = variables(name, values)
    templar = Templar(DataLoader(), every)
    every["hostvars"][HOST] = Host(every, templar)
    action = check_inputs.ActionModule(
        task=SimpleNamespace(args={}, _role=None), connection=None, play_context=None, loader=DataLoader(), templar=templar,
        shared_loader_obj=None,
    )  # fmt: skip
    action.spec = specs.roles()[name]
    problems, wrong = action._variables(name, every)
    checks = [check for check in role(name)[1] if inputs.leads_to(list(check.values()), every) & {*values, "hostvars"}]
    return [*problems, *action._checks(checks, every, wrong, tolerant=bool(problems))]


@functools.cache
def plays(file: str) -> list[dict[str, Any]]:
    """The plays of a playbook."""
    found: list[dict[str, Any]] = DataLoader().load_from_file(
        str(ROOT / f"playbooks/{file}.yml"), trusted_as_template=True
    )
    return found


def judge_fleet(values: Mapping[str, Any]) -> list[str]:
    """What the playbooks say that read what no role owns; that which decides about roles can be asked, whatever it is."""
    said: list[str] = []
    for play in [play for file in ("preflight", "verify", "rollback") for play in plays(file)]:
        for task in play.get("tasks", []):
            if "gpufleet.llm.check_inputs" not in task and "loop" not in task:
                continue
            groups = f"Groups vllm and gateway{', batches of ' if 'fleet_batch' in values else ''}"
            given = {
                **DECIDES,
                **play.get("vars", {}),
                **task.get("vars", {}),
                "ansible_play_name": groups,
                "fleet_instance": "chat",
            }
            every = variables("vllm", {**given, **values})
            templar = Templar(DataLoader(), every)
            every["hostvars"][HOST] = Host(every, templar)
            if "loop" in task:
                list(templar.template(task["loop"]))
                continue
            action = check_inputs.ActionModule(
                task=SimpleNamespace(args={}, _role=None), connection=None, play_context=None, loader=DataLoader(), templar=templar,
                shared_loader_obj=None,
            )  # fmt: skip
            said += action._checks(task["gpufleet.llm.check_inputs"]["checks"], every, set(), tolerant=False)
    return list(dict.fromkeys(said))


def shapes(value: Any, option: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A value in every shape, and each thing one level down in every shape: keys that the spec has, else those that the value has."""
    yield from SHAPES.items()
    yield "undefined", "{{ nobody_has_this }}"
    yield "no template", "a {{ brace"
    many = option.get("type") == "list"
    entry = (value[0] if many and value else value) or {}
    if not isinstance(entry, dict):
        return
    options = option.get("options") or {}
    for key in options or list(entry)[:1]:
        for label, shape in [
            *SHAPES.items(),
            *(("below: " + label, below) for label, below in deeper(entry.get(key), options.get(key, {}))),
        ]:
            changed = {**entry, key: shape}
            yield f"{key}: {label}", [changed] if many else changed


def deeper(value: Any, option: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A dictionary in an entry, or the first of a list of such, with each thing that it has or may have in every shape."""
    many = isinstance(value, list)
    inner = value[0] if many and value else value
    for key in {**(option.get("options") or {}), **inner} if isinstance(inner, dict) else ():
        for label, shape in SHAPES.items():
            yield f"{key}: {label}", [{**inner, key: shape}] if many else {key: shape}


def wrong(value: Any, spec: Mapping[str, Any]) -> bool:
    """Whether a value is none at all, or of another kind than its type, or something in it is."""
    kind = spec.get("type", "str")
    if value is None:
        return True
    if kind == "list":
        entry = {"type": spec.get("elements", "raw"), "options": spec.get("options")}
        return not isinstance(value, list) or (entry["type"] != "raw" and any(wrong(one, entry) for one in value))
    if kind == "dict":
        options = spec.get("options") or {}
        keys = {key: options.get(key, {"type": "none"}) for key in value} if options and isinstance(value, dict) else {}
        if not isinstance(value, dict) or (not options and None in value.values()):
            return True
        return any(wrong(value[key], option) for key, option in keys.items())
    if isinstance(value, list | dict) or kind == "none":
        return True
    return isinstance(value, bool) != (kind == "bool") or (kind == "int" and value in ("a word", "v", "x", 0.5))


def remembered(compile_text: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's compiler, asked once for each text: the same checks are asked thousands of times, and that is most of what they take."""
    known: dict[tuple[Any, ...], Any] = {}

    def compiled(environment: Environment, source: Any, *more: Any, **options: Any) -> Any:
        key = (type(environment), str(source), environment.variable_start_string, *more, *sorted(options.items()))
        if key not in known:
            known[key] = compile_text(environment, source, *more, **options)
        return known[key]

    return compiled


def judge_facts(name: str, changed: Mapping[str, Any]) -> list[str]:
    """What the preflight of a role says of a host with these facts, and right variables."""
    given = {option: VALUES[option] for option in specs.roles()[name] if option in VALUES}
    return judge(name, {**given, "ansible_facts": {"gpufleet": {**facts(), **changed}}})


def main() -> None:
    """Judge all cases."""
    Environment.compile = remembered(Environment.compile)  # type: ignore[method-assign]
    judges = {name: functools.partial(judge, name) for name in specs.roles()}
    owned = {name: option for options in specs.roles().values() for name, option in options.items()}
    deciding = {name: owned[name] for name in specs.decisive()}
    for name, judged in (judges | {"playbooks": judge_fleet}).items():
        options = specs.roles().get(name) or {**specs.fleet(), **deciding}
        given = {option: VALUES[option] for option in options if option in VALUES}
        print(
            json.dumps(
                {"role": name, "option": "", "shape": "as given", "said": judged(given), "wrong": False, "shown": ""}
            )
        )
        for option, spec in options.items():
            early = name == "playbooks" and option in deciding  # of these, the role tells what is no template
            for label, value in shapes(VALUES.get(option, spec.get("default")), {} if early else spec):
                undefined = label in ("undefined", "no template")
                said = judged({option: trust_as_template(value) if undefined else value})
                case = {"role": name, "option": option, "shape": label, "said": said, "shown": repr(value)}
                print(json.dumps(case | {"wrong": undefined or (wrong(value, spec) and not early)}))


if __name__ == "__main__":
    init_plugin_loader([str(ROOT / ".collections")])
    from ansible_collections.gpufleet.llm.plugins.action import check_inputs
    from ansible_collections.gpufleet.llm.plugins.module_utils import inputs
    from ansible_collections.gpufleet.llm.plugins.modules import host_facts
    from ansible_collections.gpufleet.llm.plugins.plugin_utils import specs

    if len(sys.argv) == 3:
        print(json.dumps(judge_facts(sys.argv[1], json.loads(sys.argv[2]))))
    else:
        main()
