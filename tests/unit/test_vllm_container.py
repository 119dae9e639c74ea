"""Instances in containers without an engine: names of images, the compose file, and what is told of a host."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import (
    generations_host,
    vllm,
    vllm_container,
    vllm_container_host,
    vllm_fit,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container import GIB
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container_host import ContainerError, Engine
from ansible_collections.gpufleet.llm.plugins.modules import container_image, vllm_generation

DIGEST = "sha256:" + "0123456789abcdef" * 4
IMAGE = f"registry.test:5000/team/vllm@{DIGEST}"


def wanted(**change: Any) -> dict[str, Any]:
    """An instance in a container."""
    container = {
        "image": IMAGE, "publish": "10.0.0.5:8000:8000", "cache": "/var/cache/vllm/chat", "stop_seconds": 90, "user": "root", "memory": "64g",
        "shm_size": "8g", "models_path": "/srv/models", "keys": "/etc/vllm-keys", "library": "/opt/vllm/lib", "serve": "/opt/vllm/bin/serve",
    }  # fmt: skip
    return {
        "name": "chat",
        "runtime": "docker",
        "gpus": [],
        "config": {"model": "/srv/models/qwen", "port": 8000},
        "environment": {"A": "1"},
        "gate": {"name": "chat"},
        "container": {**container, **change.pop("container", {})},
        **change,
    }


def service(**change: Any) -> dict[str, Any]:
    """The service of its compose file."""
    entry = wanted(**change)
    made = vllm_container.compose(entry, entry["config"], "998:997", entry["container"])
    found: dict[str, Any] = made["services"]["vllm"]
    return found


@pytest.mark.parametrize("image", [DIGEST, IMAGE, f"vllm/vllm-openai:v0.33.0@{DIGEST}", f"localhost/x@{DIGEST}"])
def test_what_is_named_by_what_it_is_is_accepted(image: str) -> None:
    assert vllm_container.image_problem(image, allow_tags=False) == ""


@pytest.mark.parametrize(
    ("image", "allow_tags", "expected"),
    [
        ("", False, "no image"),
        ("vllm/vllm-openai:v0.33.0", False, "write vllm/vllm-openai:v0.33.0@sha256:"),
        ("vllm/vllm-openai", False, "may mean another image tomorrow"),
        ("vllm/vllm-openai:v0.33.0", True, ""),
        (f"vllm@{DIGEST[:-1]}", True, "no name of an image"),
        ("--privileged", True, "no name of an image"),
        ("a b", True, "no name of an image"),
    ],
)
def test_what_could_be_anything_is_refused(image: str, allow_tags: bool, expected: str) -> None:
    told = vllm_container.image_problem(image, allow_tags)
    assert expected in told if expected else told == ""


def test_a_port_that_docker_holds_is_told_by_who_asks_docker() -> None:
    entry = wanted()
    held = [{"port": 8000, "program": "dockerd", "unit": "docker.service"}]
    assert vllm_fit.port_problems([entry], held) == []


def test_every_problem_is_told_with_its_instance() -> None:
    other = wanted(
        name="other", container={"image": "x:y", "publish": "[fd00::5]:8000:8000", "memory": "lots", "shm_size": "90%"}
    )
    told = vllm_container.problems([wanted(), other, {"name": "third"}], allow_tags=False)
    assert [line.split(":")[0] for line in told[:2]] == ["vllm_instances (other)"] * 2
    assert "networks of containers have IPv4 only" in told[1]
    assert "vllm_container_memory is 'lots'" in told[2]
    assert "vllm_container_shm_size is '90%'; it must be a size such as 512m or 16g" in told[3]
    assert len(told) == 4


def test_a_container_may_nothing() -> None:
    made = service()
    assert made["cap_drop"] == ["ALL"]
    assert made["security_opt"] == ["no-new-privileges:true"]
    assert made["read_only"] is True
    assert made["user"] == "998:997"
    assert made["ipc"] == "private"
    assert (made["pids_limit"], made["mem_limit"], made["shm_size"]) == (16384, 64 * GIB, "8g")
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices", "env_file"} & set(made)
    writable = [entry["target"] for entry in made["volumes"] if not entry["read_only"]]
    assert writable == ["/var/cache/vllm/chat"]
    assert not [entry for entry in made["volumes"] if "docker.sock" in entry["source"]]
    assert made["ports"] == ["10.0.0.5:8000:8000"]
    assert made["restart"] == "no"


def test_a_container_that_speaks_tls_sees_the_certificates_of_its_host() -> None:
    secured = {**wanted(), "config": {**wanted()["config"], **vllm.TLS_OPTIONS}}
    made = vllm_container.compose(secured, secured["config"], "998:997", secured["container"], "994")["services"][
        "vllm"
    ]
    directory = "/etc/ssl/vllm-fleet/fleet"
    assert [(entry["target"], entry["read_only"]) for entry in made["volumes"] if entry["source"] == directory] == [
        (directory, True)
    ]
    assert made["group_add"] == ["994"]
    assert "group_add" not in service()


def test_gpus_come_by_their_specification() -> None:
    made = service(gpus=[0, 3])
    [device] = made["deploy"]["resources"]["reservations"]["devices"]
    assert device == {
        "driver": "cdi",
        "device_ids": ["nvidia.com/gpu=0", "nvidia.com/gpu=3"],
        "capabilities": ["gpu"],
    }
    assert made["environment"]["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "deploy" not in service()


def test_the_gpus_of_a_compose_file_are_read_back() -> None:
    for gpus in ([0, 3], []):
        assert vllm_container.gpus_of(json.dumps({"services": {"vllm": service(gpus=gpus)}})) == gpus


def test_models_that_lie_elsewhere_are_seen_too() -> None:
    config = {
        "model": "/data/big",
        "lora-modules": [
            {"name": "a", "path": "/srv/models/.revisions/a"},
            {"name": "b", "path": "/mnt/b"},
            {"name": "c", "path": "/srv/models2/c"},
        ],
    }
    assert vllm_container.seen(wanted(), config, "/srv/models") == [
        "/srv/models",
        "/data/big",
        "/mnt/b",
        "/srv/models2/c",
    ]
    seen = {entry["source"]: entry for entry in service(config=config)["volumes"]}
    assert seen["/mnt/b"]["read_only"] is True


def test_a_dollar_sign_is_one() -> None:
    made = service(container={"models_path": "/srv/$HOME"}, config={"model": "/srv/$HOME/qwen"})
    assert "/srv/$$HOME" in [entry["source"] for entry in made["volumes"]]
    assert made["container_name"] == "${COMPOSE_PROJECT_NAME}"


@pytest.mark.parametrize(("memory", "expected"), [("512m", 512 * 1024**2), ("16g", 16 * GIB)])
def test_sizes(memory: str, expected: int) -> None:
    assert vllm_container.memory_bytes(memory) == expected


def test_a_share_of_the_memory_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PHYS_PAGES": 25 * GIB // 4096 - 17, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert vllm_container.memory_bytes("90%") == 22 * GIB


def test_the_environment_is_read_by_a_shell_as_systemd_reads_it(tmp_path: Path) -> None:
    """container_serve.sh.j2 sources the file that a unit of the other runtime reads."""
    hard = "a \"b\" $c \\d `e` 'f' #g"
    (tmp_path / "environment").write_text(vllm.render_environment({"QUOTED": hard}))
    done = subprocess.run(
        ["sh", "-c", 'set -a; . "$0"; set +a; printenv QUOTED', str(tmp_path / "environment")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{hard}\n"


# --- the engine, played


class Docker:
    """Answers commands by their words."""

    def __init__(self, **answers: tuple[int, str, str]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, command: list[str]) -> tuple[int, str, str]:
        self.asked.append(" ".join(command))
        key = "_".join(word for word in command[1:3] if not word.startswith("-"))
        return self.answers.get(key, (0, "", ""))


def engine_problems(docker: Docker, with_gpus: bool) -> list[str]:
    return vllm_container.engine_problems(Engine(docker).findings(), with_gpus)


def info(tmp_path: Path, **change: Any) -> tuple[int, str, str]:
    return 0, json.dumps({"ServerVersion": "28.5.2", "CDISpecDirs": [str(tmp_path)], **change}), ""


def test_an_engine_that_does_not_answer_is_told(tmp_path: Path) -> None:
    """`docker info` ends with 0 or 1 without an engine, by its version; both say that there is none."""
    no_program = (127, "", "/usr/bin/env: 'docker': No such file or directory")
    assert "No such file" in engine_problems(Docker(info=no_program), with_gpus=False)[0]
    down = (0, json.dumps({"ServerErrors": ["Cannot connect to the Docker daemon"]}), "")
    assert "Cannot connect" in engine_problems(Docker(info=down), with_gpus=False)[0]


def test_what_an_engine_lacks_is_told(tmp_path: Path) -> None:
    assert engine_problems(Docker(info=info(tmp_path)), with_gpus=False) == []
    no_compose = Docker(info=info(tmp_path), compose_version=(1, "", "unknown command"))
    assert "install its plugin" in engine_problems(no_compose, with_gpus=False)[0]
    old = Docker(info=info(tmp_path, ServerVersion="24.0", CDISpecDirs=None))
    assert "26.1 or newer" in engine_problems(old, with_gpus=True)[0]
    assert "says what nvidia.com/gpu is" in engine_problems(Docker(info=info(tmp_path)), with_gpus=True)[0]
    (tmp_path / "nvidia.yaml").write_text("kind: nvidia.com/gpu\n")
    assert engine_problems(Docker(info=info(tmp_path)), with_gpus=True) == []


def test_a_port_of_a_strangers_container_is_told() -> None:
    listed = (
        "web  127.0.0.1:8000->80/tcp\n"
        "range  0.0.0.0:9000-9002->9000-9002/tcp, [::]:9000-9002->9000-9002/tcp\n"
        "vllm-chat-1 chat 10.0.0.5:8001->8001/tcp\n"
        "quiet  \n"
    )
    docker = Docker(container_ls=(0, listed, ""), info=info(Path("/nowhere")))
    assert Engine(docker).published() == {8000: "web", 9000: "range", 9001: "range", 9002: "range"}
    published = [{"port": port, "container": name} for port, name in Engine(docker).published().items()]
    told = vllm_fit.published_problems([wanted(), wanted(name="other", config={"port": 8001})], published)
    assert told == ["vllm_instances (chat): port 8000 is published by the container web; choose another or stop it"]


def test_a_container_that_was_killed_may_take_its_time() -> None:
    slow = "cannot stop container: 7fa1: tried to kill container, but did not receive an exit event"
    for message, removals in ((slow, 3), ("permission denied", 1), (slow, vllm_container_host.KILLS)):
        answers = [(1, "", message)] * removals + [(0, "", "")]
        asked: list[list[str]] = []

        def docker(command: list[str], answers: Any = answers, asked: Any = asked) -> tuple[int, str, str]:
            if "down" not in command:
                return 0, "", ""
            asked.append(command)
            return answers[len(asked) - 1]  # type: ignore[no-any-return]

        containers = vllm_container_host.Containers(docker, "chat", Path("/etc/vllm/chat"))
        if removals == 3:
            containers.remove(2)
            assert len(asked) == 4
        else:
            with pytest.raises(ContainerError, match=message):
                containers.remove(2)
            assert len(asked) == removals


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("vllm/vllm-openai:v1", "https://index.docker.io/v1/"),
        ("docker.io/vllm/vllm-openai", "https://index.docker.io/v1/"),
        ("localhost/x", "localhost"),
        ("registry.test:5000/x", "registry.test:5000"),
        ("ubuntu", "https://index.docker.io/v1/"),
    ],
)
def test_a_password_goes_to_the_registry_of_the_image(image: str, expected: str) -> None:
    told = json.loads(container_image.credentials(image, "me", "secret"))
    assert told == {"auths": {expected: {"auth": base64.b64encode(b"me:secret").decode()}}}
    assert container_image.credentials(image, "", "") == "{}"


class FetchingModule:
    """Stands in for AnsibleModule; the image is there once it was pulled or loaded, if at all."""

    def __init__(self, tmp_path: Path, comes: bool = True, **parameters: Any) -> None:
        self.params = {
            "archive": None,
            "username": "",
            "password": "",
            "record": str(tmp_path / "images"),
            **parameters,
        }
        self.comes, self.there = comes, False
        self.commands: list[list[str]] = []
        self.configuration = ""

    def run_command(self, command: list[str]) -> tuple[int, str, str]:
        words = command[command.index("docker") :]
        self.commands.append(words)
        if "pull" in words:
            self.configuration = (Path(words[2]) / "config.json").read_text()
        if "inspect" in words:
            return (0, "", "") if self.there else (1, "", "No such image")
        self.there = self.comes
        return (0, "Loaded image: other", "") if self.comes or "load" in words else (1, "", "unauthorized")

    def fail_json(self, msg: str) -> None:
        raise AssertionError(msg)


def test_an_image_is_pulled_with_a_password_that_nobody_sees(tmp_path: Path) -> None:
    module = FetchingModule(tmp_path, username="me", password="secret")
    container_image.Fetcher(module).fetch([IMAGE])
    assert "secret" not in str(module.commands)
    assert "registry.test:5000" in module.configuration
    assert not Path(module.commands[0][2]).exists(), "gone with its directory"
    assert (tmp_path / "images").read_text() == f"{IMAGE}\n"


@pytest.mark.parametrize(
    ("image", "archive", "expected"),
    [
        (IMAGE, None, "unauthorized"),
        (DIGEST, None, "says nothing of a registry"),
        (DIGEST, "/a.tar", "has another one (Loaded image: other)"),
    ],
)
def test_what_cannot_be_fetched_is_told(tmp_path: Path, image: str, archive: str | None, expected: str) -> None:
    module = FetchingModule(tmp_path, comes=False, archive=archive)
    with pytest.raises(AssertionError) as told:
        container_image.Fetcher(module).fetch([image])
    assert expected in str(told.value)
    assert "What runs was not touched" in str(told.value)


# --- generations


class Module:
    """Stands in for AnsibleModule: records commands, and plays an engine with containers that run."""

    def __init__(self, path: Path, running: str = "", state: str = "active\n", **parameters: Any) -> None:
        self.state = state
        self.params = {
            "config_path": str(path / "etc"), "inputs": {}, "release": "/opt/r1", "keep": 2, "releases_path": str(path / "releases"), "wanted": [],
            "container_unit": str(path / "container.service"), "files_path": None, "user": "root", "idle": [], "generations": {}, "seconds": None,
            **parameters,
        }  # fmt: skip
        self.check_mode = False
        self.commands: list[str] = []
        self.running = running

    def run_command(self, command: list[str], **_options: object) -> tuple[int, str, str]:
        words = command[command.index("docker") :] if "docker" in command else command
        self.commands.append(" ".join(words))
        said = {"docker container": self.running, "systemctl is-active": self.state}
        return 0, said.get(" ".join(words[:2]), ""), ""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's directories."""
    monkeypatch.setattr(generations_host, "UNITS", tmp_path / "units")
    monkeypatch.setattr(generations_host, "RUNTIME", tmp_path / "run")
    for name in ("etc", "units", "run/chat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "container.service").write_text("[Unit]\n")
    return tmp_path


def run(host: Path, instance: dict[str, Any], confirm: bool = True, running: str = "") -> Module:
    """One run of the role with an instance; returns the module that switched."""
    vllm_generation.prepared(Module(host, wanted=[instance]))
    module = Module(host, running=running)
    chat = generations_host.Deployed(module, "chat")
    vllm_generation.activated(chat)
    (host / "run/chat/generation").write_text(f"{chat.current()}\n")
    if confirm:
        vllm_generation.confirmed(module, [chat])
    return module


def served(length: int = 1) -> dict[str, Any]:
    """The instance under systemd."""
    entry = {key: value for key, value in wanted().items() if key != "container"}
    return {**entry, "runtime": "systemd", "config": {**entry["config"], "max-model-len": length}}


def pending(host: Path, instance: dict[str, Any]) -> list[str]:
    told = vllm_generation.prepared(Module(host, wanted=[instance]))
    found: list[str] = told["pending"]
    return found


def test_a_container_is_made_before_anything_stops_and_has_a_unit_of_its_own(host: Path) -> None:
    module = run(host, wanted())
    commands = module.commands
    create = next(i for i, line in enumerate(commands) if "compose" in line and " create " in line)
    assert "--project-name vllm-chat-1" in commands[create]
    assert create < commands.index("systemctl stop vllm@chat.service")
    assert commands.index("systemctl daemon-reload") < commands.index("systemctl restart --no-block vllm@chat.service")
    assert (host / "units/vllm@chat.service").read_text() == "[Unit]\n"
    assert (host / "etc/chat/1/compose.json").stat().st_mode & 0o777 == 0o644
    assert (host / "etc/chat/1/environment").stat().st_mode & 0o777 == 0o640
    assert not (host / "etc/chat/1/release").exists()
    assert pending(host, wanted()) == []


def test_a_second_generation_in_a_container_stops_nothing_by_hand(host: Path) -> None:
    """One restart of the unit: its own words stop the one and start the other."""
    run(host, wanted())
    module = run(host, wanted(config={"model": "/srv/models/qwen", "port": 8000, "max-model-len": 5}))
    assert "systemctl stop vllm@chat.service" not in module.commands
    assert generations_host.Deployed(module, "chat").current() == 2


def test_an_instance_changes_its_runtime_and_back(host: Path) -> None:
    run(host, served())
    assert pending(host, wanted()) == ["chat"]
    run(host, wanted())
    assert (host / "units/vllm@chat.service").exists()
    module = run(host, served())
    assert not (host / "units/vllm@chat.service").exists()
    stop, disable, reload, restart = (
        module.commands.index(f"systemctl {words}")
        for words in ("stop vllm@chat.service", "disable --quiet vllm@chat.service", "daemon-reload", "restart --no-block vllm@chat.service")
    )  # fmt: skip
    assert stop < disable < reload < restart
    assert pending(host, served()) == []
    assert [generations_host.Deployed(module, "chat").in_container(number) for number in (2, 3)] == [True, False]


def test_a_container_that_runs_on_is_never_taken_for_what_follows(host: Path) -> None:
    run(host, wanted())
    with pytest.raises(ContainerError, match="vllm-chat-1 runs"):
        run(host, served(), running="vllm-chat-1\n")
    assert (host / "units/vllm@chat.service").exists()
    assert pending(host, served()) == ["chat"], "the next run goes on there"
    module = Module(host, state="inactive\n")
    assert vllm_generation.reverted(generations_host.Deployed(module, "chat")) == "restarted"
    assert module.commands[-1] == "systemctl restart --no-block vllm@chat.service", (
        "it was stopped for what did not follow"
    )


def test_going_back_goes_back_to_the_other_runtime_too(host: Path) -> None:
    run(host, served())
    module = run(host, wanted(), confirm=False)
    chat = generations_host.Deployed(module, "chat")
    assert vllm_generation.reverted(chat) == "reverted"
    assert chat.current() == 1
    assert not (host / "units/vllm@chat.service").exists()
    assert any("--project-name vllm-chat-2" in line and " down " in line for line in module.commands)


def test_containers_go_with_their_generations_and_images_with_the_last_that_names_them(host: Path) -> None:
    old, new = f"registry.test/old@{DIGEST}", f"registry.test/new@{DIGEST}"
    run(host, wanted(container={"image": old}))
    (host / "etc/images").write_text(f"{old}\n{new}\n")
    for length in range(2):
        module = run(host, wanted(container={"image": new, "shm_size": f"{length + 1}g"}))
    assert any("--project-name vllm-chat-1" in line and " down " in line for line in module.commands)
    assert f"docker image rm {old}" in module.commands
    assert (host / "etc/images").read_text() == f"{new}\n"
    assert generations_host.images(module) == {new}


def test_images_that_were_there_before_are_nobodys_to_remove(host: Path) -> None:
    for number in range(3):
        module = run(host, wanted(container={"image": f"registry.test/{number}@{DIGEST}"}))
    assert not [line for line in module.commands if "image rm" in line]


def test_an_instance_that_is_gone_leaves_no_unit(host: Path) -> None:
    module = run(host, wanted())
    vllm_generation.absent(generations_host.Deployed(module, "chat"))
    assert not (host / "units/vllm@chat.service").exists()
    assert not (host / "etc/chat").exists()
    assert any(" down " in line for line in module.commands)


def test_the_look_says_what_a_container_runs(host: Path) -> None:
    deployed = generations_host.Deployed(run(host, wanted(gpus=[0, 3])), "chat")
    found = generations_host.described(deployed.content(deployed.current()))
    assert (found["runtime"], found["runs"], found["port"], found["gpus"]) == ("docker", IMAGE, 8000, [0, 3])


def test_the_environment_of_a_container_is_in_no_diff(host: Path) -> None:
    told = vllm_generation.prepared(Module(host, wanted=[wanted(environment={"TOKEN": "hunter2"})]))
    assert "hunter2" not in json.dumps(told)
    assert IMAGE in told["diff"][0]["after"]


def test_files_of_one_runtime_are_no_concern_of_the_other(host: Path) -> None:
    file = host / "launcher"
    file.write_text("1")
    before = generations_host.fingerprints({"systemd": [], "docker": [str(file)]})
    file.write_text("2")
    after = generations_host.fingerprints({"systemd": [], "docker": [str(file)]})
    assert before["systemd"] == after["systemd"]
    assert before["docker"] != after["docker"]


def test_what_is_exported_needs_nothing_of_this_host(host: Path) -> None:
    [made] = vllm_generation.exported([wanted()])
    exported = made["compose"]["services"]["vllm"]
    assert made["compose"]["name"] == exported["container_name"] == "vllm-chat"
    sources = [entry["source"] for entry in exported["volumes"]]
    assert sources == [
        "./config.yaml",
        "./environment",
        "./serve",
        "./lib",
        "./keys",
        "/srv/models",
        "/var/cache/vllm/chat",
    ]
    assert exported["restart"] == "unless-stopped"
    assert (exported["read_only"], exported["cap_drop"], exported["image"]) == (True, ["ALL"], IMAGE)
    assert "${" not in json.dumps(made)
