"""One proxy for every download of every role: what is asked for, the words of each program, and that nobody is left out."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.filter.proxy import proxy_environment, proxy_problems, proxy_settings
from ansible_collections.gpufleet.llm.plugins.module_utils import uv_host

from tests.unit.test_frame import ROLES, ROOT, role_files, tasks

HOSTVARS: dict[str, dict[str, Any]] = {
    "gpu-1": {"ansible_host": "10.0.0.1", "group_names": ["vllm"]},
    "gpu-2": {
        "fleet_address": "10.0.0.2",
        "ansible_host": "gpu-2.corp.example",
        "group_names": ["doors"],
        "gateway_group": "doors",
    },
    "named": {"ansible_host": "named.corp.example", "group_names": ["vllm"]},
    "printer": {"ansible_host": "10.0.0.9", "group_names": ["others"]},
}
ASKED = {
    "http": "http://fleet:gehe%40im@proxy.example:3128",
    "no_proxy": [".corp.example", "10.9.0.0/16", "apt.example"],
}
DIRECT = "localhost,127.0.0.1,::1,10.0.0.1,10.0.0.2,.corp.example,10.9.0.0/16,apt.example"


# --- what is asked for


@pytest.mark.parametrize(
    "asked",
    [
        {}, ASKED, {"http": "", "https": "https://proxy.example:3128/"}, {"http": "http://[2001:db8::1]:3128", "no_proxy": ["[::1]", "*"]},
        {"http": "http://proxy"},
    ],
)  # fmt: skip
def test_what_is_right_passes(asked: dict[str, Any]) -> None:
    assert proxy_problems(asked) == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (None, "must be a dictionary, such as {http: 'http://proxy.example:3128'"),
        ("http://user:geheim@proxy:1", "must be a dictionary"),
        ([], "must be a dictionary"),
        ({"HTTP": "http://proxy"}, "key 'HTTP' is unknown; known are http, https, no_proxy"),
        ({"http": None}, "http is no address of a proxy"),
        ({"http": 3128}, "http is no address of a proxy"),
        ({"https": "proxy.example:3128"}, "https is no address of a proxy; it is http://NAME:PORT"),
        ({"https": "socks5://proxy.example:3128"}, "https is no address of a proxy"),
        ({"http": "http://u:geheim@x@proxy"}, "special characters in them as % and two digits"),
        ({"http": 'http://proxy";Acquire'}, "http is no address of a proxy"),
        ({"http": "http://proxy:99999"}, "http is no address of a proxy"),
        ({"http": "http://proxy", "no_proxy": "a,b"}, "no_proxy must be a list of names and addresses"),
        ({"http": "http://proxy", "no_proxy": None}, "no_proxy must be a list"),
        ({"http": "http://proxy", "no_proxy": ["a,b"]}, "no_proxy has 'a,b'; an entry is a name"),
        ({"http": "http://proxy", "no_proxy": [3]}, "no_proxy has 3"),
    ],
)
def test_what_is_wrong_is_told_by_name_and_shows_no_password(asked: Any, words: str) -> None:
    told = " ".join(proxy_problems(asked))
    assert words in told
    assert "geheim" not in told
    assert proxy_settings(asked, HOSTVARS) == {"apt": "", "docker": {}, "secret": False}


# --- the words of each program


def test_the_environment_has_loopback_and_the_fleet_and_both_spellings() -> None:
    found = proxy_environment(ASKED, HOSTVARS)
    assert found["no_proxy"] == DIRECT
    assert found["https_proxy"] == ASKED["http"], "of the other scheme, when it is left out"
    assert {name.lower() for name in found} == {"http_proxy", "https_proxy", "no_proxy"}
    assert {found[name.upper()] == found[name] for name in ("http_proxy", "https_proxy", "no_proxy")} == {True}
    assert "https_proxy" not in proxy_environment({"http": "http://proxy", "https": ""}, HOSTVARS)
    assert proxy_environment({}, HOSTVARS) == proxy_environment({"no_proxy": ["x"]}, HOSTVARS) == {}


def test_a_variable_of_a_role_counts_more_however_it_is_spelt() -> None:
    found = proxy_environment(ASKED, HOSTVARS, {"HTTPS_PROXY": "http://own", "UV_HTTP_TIMEOUT": 60})  # type: ignore[dict-item]
    assert found["https_proxy"] == found["HTTPS_PROXY"] == "http://own"
    assert found["http_proxy"] == ASKED["http"]
    assert found["UV_HTTP_TIMEOUT"] == "60"
    assert "uv_http_timeout" not in found
    assert proxy_environment({}, {}, {"https_proxy": "http://own"}) == {
        "https_proxy": "http://own",
        "HTTPS_PROXY": "http://own",
    }


def test_docker_has_its_own_names() -> None:
    found = proxy_settings(ASKED, HOSTVARS)
    assert found["docker"] == {"http-proxy": ASKED["http"], "https-proxy": ASKED["http"], "no-proxy": DIRECT}
    assert found["secret"]
    assert not proxy_settings({"http": "http://proxy"}, {})["secret"]


@pytest.mark.skipif(not shutil.which("apt-config"), reason="apt is the judge")
def test_apt_reads_what_is_written(tmp_path: Path) -> None:
    def apt(asked: dict[str, Any]) -> str:
        (tmp_path / "apt.conf").write_text(proxy_settings(asked, HOSTVARS)["apt"])
        command = ["apt-config", "-c", str(tmp_path / "apt.conf"), "dump"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    said = apt(ASKED)
    for scheme in ("http", "https"):
        assert f'Acquire::{scheme}::Proxy "{ASKED["http"]}";' in said
        for name in ("localhost", "127.0.0.1", "10.0.0.2", "apt.example"):
            assert f'Acquire::{scheme}::Proxy::{name} "DIRECT";' in said
    assert "corp.example" not in said
    assert 'Acquire::https::Proxy "DIRECT";' in apt({"http": "http://proxy", "https": ""})


def test_uv_goes_by_the_proxy_that_pip_is_configured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the inventory names none: uv does not read pip's configuration."""
    for name in uv_host.PROXIES:
        monkeypatch.delenv(name, raising=False)
    found = uv_host.as_uv_has_it({"proxy": "http://corp.example:3128"})
    assert found["HTTPS_PROXY"] == found["https_proxy"] == "http://corp.example:3128"
    monkeypatch.setenv("https_proxy", "http://other.example")
    assert uv_host.as_uv_has_it({"proxy": "http://corp.example:3128"}) == {}


# --- nobody is left out

# Modules of this collection that bring something from elsewhere -> the option that has the environment with the proxy. What Docker's engine fetches,
# it fetches by its own configuration.
DOWNLOADS = {
    "gpufleet.llm.apt_source": "environment",
    "gpufleet.llm.managed_python": "environment",
    "gpufleet.llm.model_download": "environment",
    "gpufleet.llm.python_environment": "environment",
    "gpufleet.llm.uv_release": "environment",
    "gpufleet.llm.vllm_release": "environment",
    "gpufleet.llm.container_image": "",
}
# Those that speak to hosts of the fleet only.
OF_THE_FLEET = {
    "completion_gate",
    "endpoint",
    "docker_host",
    "model_server",
    "host_sockets",
    "start_proof_host",
    "model_kinds_host",
    "instance_state_host",
    "instance_proof_host",
    "gateway_soak",
    "gateway_checks_host",
    "instance_tls",
}
# Modules of Ansible by which something could come past the proxy, or with its password among the processes. `uri` asks hosts of the fleet.
FOREIGN = re.compile(
    r"ansible\.builtin\.(get_url|git|pip|unarchive|apt_key|apt_repository|deb822_repository|subversion)$|community\.docker\."
)
NETWORK = re.compile(r"urllib\.request|http\.client|open_url|import socket|call_environment|\"pull\"")


def all_tasks() -> Iterator[tuple[Path, dict[str, Any]]]:
    for role in ROLES:
        for path in role_files(role, "tasks/**/*.yml", "handlers/*.yml"):
            for task in tasks(yaml.safe_load(path.read_text())):
                yield path, task


def asks_apt(task: dict[str, Any]) -> bool:
    """Whether a task has apt fetch something: what removes, or installs a file that is there, does not."""
    arguments = task.get("ansible.builtin.apt")
    if arguments:
        return arguments.get("state") != "absent" and "deb" not in arguments
    command = str(task.get("ansible.builtin.command", ""))
    return (
        "apt-get" in command and "install" in command and "keyring_path" not in command
    )  # a file, which needs no other package


def test_no_task_downloads_by_other_means() -> None:
    assert [(path.name, task["name"]) for path, task in all_tasks() if any(map(FOREIGN.match, task))] == []


def test_every_plugin_that_reaches_elsewhere_is_known() -> None:
    """A new one belongs into one of the tables above, and its tasks hand the proxy over."""
    plugins = [*(ROOT / "plugins/modules").glob("*.py"), *(ROOT / "plugins/module_utils").glob("*.py")]
    found = {path.stem for path in plugins if NETWORK.search(path.read_text())}
    assert found - {name.rpartition(".")[2] for name in DOWNLOADS} - OF_THE_FLEET == {"apt_host", "uv_host"}
    assert found > {"managed_python", "container_image"}, "the look at the plugins sees nothing"


@pytest.mark.parametrize("module", [name for name, option in DOWNLOADS.items() if option])
def test_every_task_that_downloads_gets_the_proxy(module: str) -> None:
    seen = 0
    for path, task in all_tasks():
        arguments = task.get(module)
        if arguments is None or (module.endswith("apt_source") and "key_url" not in arguments):
            continue
        seen += 1
        said = str(arguments.get(DOWNLOADS[module], ""))
        role = next(part for part in path.parts if part in ROLES)
        if inner := re.fullmatch(r"{{ (__\w+) }}", said):
            said = yaml.safe_load((ROOT / "roles" / role / "vars/main.yml").read_text())[inner[1]]
        assert "fleet_proxy | default({}) | gpufleet.llm.proxy_environment(hostvars" in said, f"{path}: {task['name']}"
    assert seen, f"no task has {module} download something"


def test_apt_knows_the_proxy_before_it_is_asked_for_anything() -> None:
    """In the same file: a run begins with any role, and what an earlier run told may be of yesterday."""
    told = re.compile(r"apt_proxy")
    late = []
    for role in ROLES:
        for path in role_files(role, "tasks/**/*.yml"):
            if told.search(path.name):
                continue
            before = False
            for task in tasks(yaml.safe_load(path.read_text())):
                before = before or bool(told.search(str(task.get("ansible.builtin.include_tasks", "")))) or bool(
                    told.search(str(task.get("ansible.builtin.include_role", "")))
                )  # fmt: skip
                if asks_apt(task) and not before:
                    late.append(f"{role}/{path.name}: {task['name']}")
    assert late == []


def test_no_secret_is_in_the_environment_of_a_task() -> None:
    """Ansible puts that into the arguments of a shell. The variables of two roles that are older than fleet_proxy say so."""
    found = {
        (path.parents[1].name, str(task["environment"]))
        for path, task in all_tasks()
        if re.search("proxy|_environment", str(task.get("environment", "")))
    }
    assert {variable for _role, variable in found} == {
        "{{ nvidia_driver_environment }}",
        "{{ cuda_toolkit_environment }}",
        "{{ vllm_cuda_home | gpufleet.llm.vllm_kernel_environment(__vllm_release) if vllm_cuda_home != '' else {} }}",
    }


def test_instances_are_offline() -> None:
    """A proxy is for what is brought to a host; vLLM asks nobody, unless vllm_environment says so."""
    role = ROOT / "roles/vllm"
    texts = [
        path
        for path in [*role.rglob("*.j2"), *role.rglob("vars/*.yml"), *role.rglob("tasks/*.yml")]
        if "proxy" in path.read_text()
    ]
    assert [path.name for path in texts] == ["release.yml"]
