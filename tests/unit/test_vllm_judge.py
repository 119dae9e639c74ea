"""vLLM's own judgement: what is asked, by which command, and what an answer means. What vLLM answers is in contract.py."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import (
    generations_host,
    vllm_container,
    vllm_fit,
    vllm_judge,
    vllm_judge_host,
)

JUDGE = Path(__file__).resolve().parents[2] / "roles/vllm/files/judge.py"
UNIT = """
[Unit]
After=network-online.target
[Service]
Type=exec
User=vllm
ExecStart=/opt/vllm/bin/vllm-serve %i
EnvironmentFile=/etc/vllm/%i/current/environment
LoadCredential=internal_key:/etc/vllm/internal_key
BindReadOnlyPaths=/etc/vllm/%i/current/release:/opt/vllm/release
CacheDirectory=vllm/%i
KillMode=mixed
TimeoutStopSec=90
Restart=always
# a comment = no property
UMask=0077
ProtectSystem=strict
DeviceAllow=char-nvidia* rw
[Install]
WantedBy=multi-user.target
"""
OWN_FILES = {"serve": "/opt/vllm/bin/vllm-container-serve", "library": "/opt/vllm/lib", "keys": "/etc/vllm-keys"}


def wanted(model: Path | str = "/srv/models/tiny", **more: Any) -> dict[str, Any]:
    return {
        "name": "chat",
        "gpus": [],
        "config": {"model": str(model), "max-model-len": 1024, "enable-prefix-caching": False},
        "environment": {"HOME": "/var/cache/vllm/chat", "TOKEN": "secret"},
        **more,
    }


def in_container() -> dict[str, Any]:
    container = {
        "image": "played@sha256:0", "publish": "127.0.0.1:8000:8000", "cache": "/var/cache/vllm/chat", "user": "vllm", "models_path": "/srv/models",
        **OWN_FILES, "shm_size": "1g", "memory": "2g", "stop_seconds": 50,
    }  # fmt: skip
    return wanted(gpus=[1], container=container, runtime="docker")


def test_it_is_asked_with_the_environment_of_the_instance_and_leaves_no_trace_in_its_caches() -> None:
    asked = vllm_judge.request(wanted(), wanted()["config"])
    assert asked["environment"]["TOKEN"] == "secret"
    assert asked["environment"]["HOME"].startswith("/tmp/")  # noqa: S108
    assert asked["wish"]["enable-prefix-caching"] is False
    assert "no-enable-prefix-caching: true\n" in asked["config"]


def test_vllm_gets_the_notes_that_the_instance_has_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, scratch = tmp_path / "instance", tmp_path / "scratch"
    asked = vllm_judge.request(wanted(environment={"VLLM_CACHE_ROOT": str(cache)}), {})
    assert asked["environment"]["VLLM_CACHE_ROOT"] != asked["cache"] == str(cache)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(scratch))
    bring_notes = runpy.run_path(str(JUDGE))["bring_notes"]
    bring_notes(asked["cache"])
    assert not scratch.exists(), "it never ran, or runs in a container"
    (cache / "modelinfos").mkdir(parents=True)
    (cache / "modelinfos/llama.json").write_text("{}")
    (cache / "torch_compile_cache").mkdir()
    bring_notes(asked["cache"])
    assert [path.relative_to(scratch).as_posix() for path in scratch.rglob("*.json")] == ["modelinfos/llama.json"]
    assert [path.name for path in scratch.iterdir()] == ["modelinfos"], "what is code stays"


def test_it_is_asked_in_the_sandbox_of_the_unit() -> None:
    command = vllm_judge.from_release("/opt/r1", "vllm", UNIT, "/run/x/judge.py")
    properties = [word.removeprefix("--property=") for word in command if word.startswith("--property=")]
    assert properties[:3] == ["UMask=0077", "ProtectSystem=strict", "DeviceAllow=char-nvidia* rw"]
    assert {"User=vllm", "PrivateNetwork=yes"} <= set(properties)
    assert command[-2:] == ["/opt/r1/bin/python", "/run/x/judge.py"]
    assert "ProtectSystem=strict" in " ".join(vllm_judge.from_release("/opt/r1", "vllm", "", "/p")), "no unit yet"


def test_in_a_container_it_sees_what_the_instance_sees_and_no_secret() -> None:
    instance = in_container()
    compose = vllm_container.compose(instance, instance["config"], "990:990", OWN_FILES)
    command = vllm_judge.from_image(compose["services"]["vllm"], list(OWN_FILES.values()), "/run/x/judge.py")
    told = " ".join(command)
    assert {"--network=none", "--read-only", "--rm", "--cap-drop=ALL", "--user=990:990", "--pull=never"} <= set(command)
    assert "--device=nvidia.com/gpu=1" in command
    assert "source=/srv/models,target=/srv/models,readonly" in told
    assert not any(
        word in told for word in ("/etc/vllm", "/opt/vllm", "/var/cache", "secret", "--publish", "gpufleet.instance")
    )
    assert command[-4:] == ["played@sha256:0", "-c", vllm_judge.IN_IMAGE, vllm_judge.PROGRAM]


@pytest.mark.parametrize(
    ("status", "output", "error", "expected"),
    [
        (0, 'noise\n{"refusal": "no"}\n', "a log", {"refusal": "no"}),
        (1, "", "Traceback\nValueError: x\n", {"unjudged": "ValueError: x (exit status 1)"}),
        (137, "", "", {"unjudged": "it said nothing (exit status 137)"}),
        (0, "no json\n", "", {"unjudged": "no json (exit status 0)"}),
    ],
)
def test_what_is_no_answer_is_no_judgement(status: int, output: str, error: str, expected: dict[str, str]) -> None:
    assert vllm_judge.understood(status, output, error) == expected


class Asked:
    """A host whose vLLM gives one answer, and counts."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **answer: Any) -> None:
        self.requests: list[dict[str, Any]] = []
        self.directory = directory
        self.answer = answer
        monkeypatch.setattr(vllm_judge_host, "answered", self.answered)
        monkeypatch.setattr(vllm_judge_host, "RUNTIME", str(directory))
        monkeypatch.setattr(generations_host, "owner_of", lambda user: f"{os.getuid()}:{os.getgid()}")

    def answered(self, command: list[str], request: str) -> dict[str, Any]:
        assert Path(command[-1]).read_text() == "print()"
        self.requests.append(json.loads(request))
        return dict(self.answer)

    def judge(self, instance: dict[str, Any], remember: bool = True, **more: Any) -> dict[str, Any]:
        settings = {
            "program": "print()", "user": "vllm", "unit": "/nonexistent",
            "records_path": str(self.directory / "judged"), "gpus": [], **more,
        }  # fmt: skip
        return vllm_judge_host.Judge(settings, "/opt/r1", remember).judge([instance])


def model(directory: Path) -> Path:
    path = directory / "model"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    return path


def test_what_passed_is_not_asked_again_until_something_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance, vllm = wanted(model(tmp_path)), Asked(tmp_path, monkeypatch, refusal="")
    assert vllm.judge(instance, remember=False)["chat"]["refusal"] == ""
    assert not (tmp_path / "judged").exists(), "in check mode nothing is written"
    vllm.judge(instance)
    assert (vllm.judge(instance), len(vllm.requests)) == ({}, 2)
    (tmp_path / "model/config.json").write_text('{"a": 1}')
    vllm.judge(instance)
    vllm.judge({**instance, "config": {**instance["config"], "max-model-len": 512}})
    vllm.judge({**instance, "environment": {"A": "b"}})
    assert len(vllm.requests) == 5
    assert [path.name for path in tmp_path.glob("vllm-judge-*")] == []


def test_what_is_refused_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance, vllm = wanted(model(tmp_path)), Asked(tmp_path, monkeypatch, refusal="no")
    assert [vllm.judge(instance)["chat"]["refusal"] for _ in range(2)] == ["no", "no"]
    assert len(vllm.requests) == 2


def test_a_file_that_is_about_to_come_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance, template = wanted(model(tmp_path)), tmp_path / "t.jinja"
    instance["config"]["chat-template"] = str(template)
    vllm = Asked(tmp_path, monkeypatch, refusal=f"{template} doesn't exist")
    assert vllm.judge(instance)["chat"]["unjudged"] == f"{template} is not there"
    template.write_text("x")
    assert vllm.judge(instance)["chat"]["refusal"] == f"{template} doesn't exist"


def test_without_its_user_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = Asked(tmp_path, monkeypatch, refusal="")
    monkeypatch.setattr(generations_host, "owner_of", lambda user: user)
    assert vllm.judge(wanted(model(tmp_path)))["chat"] == {"unjudged": "there is no user vllm yet"}


def judged(judgement: str, answer: dict[str, str], require_models: bool = True) -> tuple[str, str]:
    """What the controller makes of an answer: problems and warnings."""
    entry = {"name": "chat", "differs": True, "wanted": True, "held": "", "gate": {}}
    findings = {
        "node": "gpu-1", "deployed": True, "instances": [entry], "models": {"chat": {"present": True, "weights": []}},
        "named": {"chat": []}, "files": [], "accepted_keys": "", "clock": 0,
        "release": {"complete": True, "options": {"max-model-len": "any", "enable-prefix-caching": "bool"}}, "engine": {}, "published": [],
        "images": [], "judgements": {"chat": answer},
    }  # fmt: skip
    settings = {
        "judgement": judgement,
        "device": "cpu",
        "memory_bytes": 64 * 10**9,
        "release_gb": 6,
        "require_models": require_models,
        "internal_key": "0" * 64,
        "former_key_seconds": 60,
    }
    instance = wanted(gate={})
    instance["config"]["port"] = 8000
    told = vllm_fit.judge(findings, [instance], settings, check_mode=False)
    return "; ".join(told["problems"]), "; ".join(told["warnings"])


def test_a_refusal_is_a_problem_or_a_warning() -> None:
    said = "vllm_instances (chat): vLLM itself refuses this: option x is nonsense"
    for judgement, expected in (("refuse", (said, "")), ("warn", ("", said)), ("off", ("", ""))):
        assert judged(judgement, {"refusal": "option x is nonsense"}) == expected


def test_what_could_not_be_asked_is_a_warning_when_it_should_have_been() -> None:
    problems, warnings = judged("refuse", {"unjudged": "it said nothing"})
    assert problems == ""
    assert "vLLM could not be asked whether it takes this: it said nothing" in warnings
    assert judged("refuse", {"unjudged": "there is no user vllm yet"}, require_models=False) == ("", "")
