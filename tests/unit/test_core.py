"""What the plugins lean on inside of ansible-core, which promises none of it. Runs on each core that requirements.lock has.

A test here names what is gone, where others would only show that something no longer works.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ansible.cli.playbook
import pytest
from ansible import constants
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.common.parameters import remove_values
from ansible.module_utils.common.yaml import yaml_load
from ansible.module_utils.errors import UnsupportedError
from ansible.parsing.dataloader import DataLoader
from ansible.playbook.play_context import PlayContext
from ansible.playbook.role import Role
from ansible.playbook.task import Task
from ansible.plugins.action import ActionBase
from ansible.plugins.become import BecomeBase
from ansible.plugins.connection.local import Connection as Local
from ansible.plugins.loader import connection_loader
from ansible.release import __version__
from ansible.template import Templar, generate_ansible_template_vars, trust_as_template
from packaging.version import Version

from tests.playbooks import playbook

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]
CALLS: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]] = [
    (ActionBase._execute_module, ["name", {}], {"task_vars": {}}),
    (ActionBase._find_needle, ["templates", "name"], {}),
    (ActionBase._is_pipelining_enabled, ["new"], {}),
    (ActionBase._low_level_execute_command, ["command"], {"in_data": b""}),
    (ActionBase._transfer_file, ["here", "there"], {}),
    (ActionBase.validate_argument_spec, [{}], {}),
    (BecomeBase.build_become_command, ["command", None], {}),
    (BecomeBase.check_password_prompt, [b""], {}),
    (Role.get_name, [], {"include_role_fqcn": False}),
]
# Writes down which process loads which of our files. Enabled, it stands before the loader of collections does its work.
LOADED = """
import os
from ansible.plugins.callback import CallbackBase
from ansible.utils.collection_loader import _collection_finder as finder

own = finder._AnsibleCollectionPkgLoaderBase.get_code

def get_code(self, fullname):
    with open(os.environ["LOADED"], "a") as file:
        file.write(f"{os.getpid()} {fullname}\\n")
    return own(self, fullname)

finder._AnsibleCollectionPkgLoaderBase.get_code = get_code

class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "loaded"
"""
# Says in a worker how many objects its garbage collector leaves alone.
FROZEN = """
import gc

class FilterModule:
    def filters(self):
        return {"frozen": lambda text: text % gc.get_freeze_count()}
"""


def test_the_core_is_the_one_that_the_lock_has_for_this_python() -> None:
    """A run on Python 3.11 is the proof for 2.19, one on a newer Python that for the newest."""
    assert (Version(__version__) < Version("2.20")) == (sys.version_info < (3, 12))
    assert Version(__version__) >= Version("2.19")


@pytest.mark.parametrize(("method", "arguments", "options"), CALLS, ids=[call[0].__qualname__ for call in CALLS])
def test_methods_are_called_as_they_are_defined(
    method: Callable[..., Any], arguments: list[Any], options: dict[str, Any]
) -> None:
    inspect.signature(method).bind(None, *arguments, **options)


def test_the_validator_says_what_is_secret_and_what_is_unsupported() -> None:
    validator = ArgumentSpecValidator({"key": {"type": "str", "no_log": True}, "n": {"type": "int", "default": 3}})
    found = validator.validate({"key": "sesame"})
    assert found._no_log_values == {"sesame"}
    assert found.validated_parameters == {"key": "sesame", "n": 3}
    assert not found.error_messages
    assert "sesame" not in str(remove_values({"msg": "it is sesame"}, found._no_log_values))
    wrong = validator.validate({"kye": "sesame"})
    assert isinstance(wrong.errors[0], UnsupportedError)
    assert "kye" in wrong.errors.msg


def test_a_task_has_what_actions_read_of_it() -> None:
    task = Task.load({"name": "Some name", "debug": {"msg": "x"}, "notify": ["Reload app"]})
    assert (task.action, task.args, task.notify) == ("debug", {"msg": "x"}, ["Reload app"])
    assert (task.async_val, task.delegate_to, task._role) == (0, None, None)
    assert not task.check_mode
    assert not task.diff
    assert not any(task.environment or [])
    assert task._uuid
    assert task.get_name() == "Some name"


def test_a_file_is_rendered_as_a_template(tmp_path: Path) -> None:
    (tmp_path / "part").write_text("part")
    (tmp_path / "file").write_text(
        "{% include 'part' %}, {{ name }}\n{% if true %}\n  in {{ template_path }}\n{% endif %}\n"
    )
    loader = DataLoader()
    text = trust_as_template(loader.get_text_file_contents(str(tmp_path / "file")))
    of_file = generate_ansible_template_vars("file", str(tmp_path / "file"), "/there")
    assert {"ansible_managed", "template_path"} <= set(of_file)
    templar = Templar(loader).copy_with_new_env(
        searchpath=[str(tmp_path)], available_variables={**of_file, "name": r"a\nb"}
    )
    overrides = {"trim_blocks": True, "lstrip_blocks": False, "newline_sequence": "\n"}
    rendered = templar.template(text, escape_backslashes=False, overrides=overrides)
    assert rendered == "part, a\\nb\n  in file\n"
    assert templar.evaluate_conditional(trust_as_template("name is defined"))
    real = loader.get_real_file(str(tmp_path / "part"))
    assert Path(real).read_text() == "part"
    loader.cleanup_tmp_file(real)
    assert (tmp_path / "part").exists()


def test_a_connection_is_made_once_more_with_other_options() -> None:
    own = connection_loader.get("ssh", PlayContext())
    own.set_options(direct={"host": "192.0.2.1", "ssh_args": "-o A=b"})
    options = own.get_options()
    assert (own.transport, options["ssh_args"]) == ("ssh", "-o A=b")
    assert {"ssh_extra_args", "timeout", "reconnection_retries", "verbosity", "host", "port"} <= set(options)
    assert own.ansible_name == "ansible.builtin.ssh"  # which only a program of Ansible's finds
    again = connection_loader.get("ssh", PlayContext().copy())
    again.set_options(direct={**options, "timeout": 3})
    assert again is not own
    assert (again.get_option("host"), again.get_option("timeout")) == ("192.0.2.1", 3)
    inspect.signature(again.exec_command).bind("true", sudoable=False)
    assert Local.transport == "local"


def test_the_interpreter_of_a_host_is_asked_of_the_configuration() -> None:
    asked = {"ansible_python_interpreter": "/opt/python"}
    assert constants.config.get_config_value("INTERPRETER_PYTHON", variables=asked) == "/opt/python"


def test_yaml_is_loaded_without_marks_of_where_it_stands() -> None:
    assert type(yaml_load("a: [b]")["a"][0]) is str


def test_ansible_playbook_can_be_loaded_once_and_run_often() -> None:
    """tests/playbooks.py"""
    assert callable(ansible.cli.playbook.main)
    assert Path(constants.DEFAULT_LOCAL_TMP).is_absolute()


def test_workers_load_no_module_and_no_filter_of_ours_again(tmp_path: Path) -> None:
    """plugin_utils/preload.py: an action plugin is loaded before the process of its task is forked."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/loaded.py").write_text(LOADED)
    task = {"gpufleet.llm.host_facts": {"gather": ["system"]}}
    told = {"ansible.builtin.debug": {"msg": "{{ ['a.example'] | gpufleet.llm.uncovered_names(['a.example']) }}"}}
    (tmp_path / "filter_plugins").mkdir()
    (tmp_path / "filter_plugins/frozen.py").write_text(FROZEN)
    frozen = {"ansible.builtin.debug": {"msg": "{{ 'frozen: %d' | frozen }}"}}
    (tmp_path / "play.yml").write_text(
        json.dumps([{"hosts": "all", "gather_facts": False, "tasks": [task, told, frozen]}])
    )
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_CALLBACK_PLUGINS": str(tmp_path / "callbacks"),
        "ANSIBLE_CALLBACKS_ENABLED": "loaded",
        "LOADED": str(tmp_path / "loaded"),
    }
    variables = json.dumps({"ansible_connection": "local", "ansible_python_interpreter": sys.executable})
    done = playbook("-i", "one,two,", "-e", variables, tmp_path / "play.yml", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(count) for count in re.findall(r"frozen: (\d+)", done.stdout)]
    assert len(counts) == 2
    assert min(counts) > 50_000, "the garbage collector of a worker looks at what ansible-playbook has loaded"
    lines = [line.split() for line in (tmp_path / "loaded").read_text().splitlines()]
    ours = [(pid, name) for pid, name in lines if ".llm.plugins.filter." in name or ".llm.plugins.modules." in name]
    assert {name.rpartition(".")[2] for _pid, name in ours} >= {"host_facts", "gateway", "vllm", "fleet"}
    assert len({pid for pid, _name in ours}) == 1, sorted(set(ours))
