"""What options and environment of an instance name: files, models, modules, and what becomes of the names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import (
    generations_host,
    model_store,
    vllm,
    vllm_container,
    vllm_files,
    vllm_fit,
    vllm_named_files,
    vllm_named_files_host,
)

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = "/opt/vllm/files"
SHIPPED = vllm_files.shipped(
    [{"name": "chat.jinja", "content": "{{ x }}"}, {"name": "limits.py", "content": "class Limits: ..."}],
    "/",
    DIRECTORY,
)
CHAT, LIMITS = SHIPPED["chat.jinja"]["path"], SHIPPED["limits.py"]["path"]


def problems(options: dict[str, Any], **environment: Any) -> str:
    return "; ".join(vllm_named_files.problems(options, environment, SHIPPED))


def resolved(options: dict[str, Any], **environment: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    found, variables, files = vllm_named_files.resolved(options, environment, "/srv/models", SHIPPED)
    return found, variables, [file["path"] for file in files]


@pytest.mark.parametrize("way", vllm_named_files.OPTIONS, ids=".".join)
def test_every_option_of_the_table_is_one_of_vllms(way: tuple[str, ...]) -> None:
    for table in (ROOT / "roles/vllm/files/options").glob("*.json"):
        assert way[0] in json.loads(table.read_text()), table.name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"chat-template": "chat.jinja"}, {"chat-template": CHAT}),
        ({"chat-template": "/opt/t.jinja"}, {"chat-template": "/opt/t.jinja"}),
        ({"chat-template": "qwen/tools.jinja"}, {"chat-template": "/srv/models/qwen/tools.jinja"}),
        ({"chat-template": "{{ messages }}"}, {"chat-template": "{{ messages }}"}),
        ({"chat-template": "template_chatml.jinja"}, {"chat-template": "template_chatml.jinja"}),
        ({"reasoning-parser-plugin": "nemo/parser.py"}, {"reasoning-parser-plugin": "/srv/models/nemo/parser.py"}),
        ({"tool-parser-plugin": "installed.module"}, {"tool-parser-plugin": "installed.module"}),
        ({"profiler-config": {"torch_profiler_dir": "/tmp/t"}}, {"profiler-config": {"torch_profiler_dir": "/tmp/t"}}),  # noqa: S108
        ({"tokenizer": "qwen"}, {"tokenizer": "/srv/models/qwen"}),
        ({"generation-config": "vllm"}, {"generation-config": "vllm"}),
        ({"allowed-local-media-path": "/mnt/media"}, {"allowed-local-media-path": "/mnt/media"}),
        (
            {"speculative-config": {"model": "draft", "num_speculative_tokens": 3}},
            {"speculative-config": {"model": "/srv/models/draft", "num_speculative_tokens": 3}},
        ),
        ({"speculative-config": '{"model": "draft"}'}, {"speculative-config": {"model": "/srv/models/draft"}}),
        ({"speculative-config": {"model": "ngram"}}, {"speculative-config": {"model": "ngram"}}),
        (
            {"speculative-config": {"method": "custom_class", "model": "a.B"}},
            {"speculative-config": {"method": "custom_class", "model": "a.B"}},
        ),
        ({"speculative-config": "{not json"}, {"speculative-config": "{not json"}),
        ({"default-mm-loras": {"audio": "ears"}}, {"default-mm-loras": {"audio": "/srv/models/ears"}}),
        ({"lora-modules": "poet=verse"}, {"lora-modules": [{"name": "poet", "path": "/srv/models/verse"}]}),
    ],
)
def test_a_name_becomes_a_path_where_it_is_one(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert problems(options) == ""
    assert resolved(options)[0] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"chat-template": "other.jinja"}, "option 'chat-template' is 'other.jinja'; it must be the name of a file of vllm_files"),
        ({"chat-template": "qwen/../../etc/passwd"}, "option 'chat-template' is 'qwen/../../etc/passwd'; it must be"),
        ({"tool-parser-plugin": "./parser.py"}, "option 'tool-parser-plugin' is './parser.py'; it must be"),
        ({"tokenizer": "Qwen/Qwen2.5"}, "option 'tokenizer' is 'Qwen/Qwen2.5'; it must be the name of a model in the model store"),
        ({"speculative-config": {"model": "acme/draft"}}, "option 'speculative-config'.model is 'acme/draft'; it must be"),
        ({"lora-modules": ["poet=acme/poet"]}, "option 'lora-modules'[0].path is 'acme/poet'; it must be the name of a model"),
        ({"lora-modules": ["poet=/home/me/poet"]}, "'/home/me/poet', which the unit of vLLM does not see"),
        ({"log-config-file": "/tmp/log.json"}, "'/tmp/log.json', which the unit of vLLM does not see"),  # noqa: S108
        ({"allowed-local-media-path": "/home"}, "'/home', which the unit of vLLM does not see; put it elsewhere"),
        ({"profiler-config": {"torch_profiler_dir": "/data/traces"}}, "torch_profiler_dir is '/data/traces', where vLLM may not write; it must be"),
        ({"allowed-local-media-path": "media"}, "option 'allowed-local-media-path' is 'media'; it must be an absolute path"),
    ],
)  # fmt: skip
def test_a_name_that_leads_nowhere_is_told_by_its_option(options: dict[str, Any], expected: str) -> None:
    assert expected in problems(options)


def test_the_environment_names_files_too() -> None:
    assert "environment variable VLLM_LOGGING_CONFIG_PATH is 'x/../y'; it must be" in problems(
        {}, VLLM_LOGGING_CONFIG_PATH="x/../y"
    )
    assert resolved({}, VLLM_TUNED_CONFIG_FOLDER="tuned", A="b")[1] == {
        "VLLM_TUNED_CONFIG_FOLDER": "/srv/models/tuned",
        "A": "b",
    }


def test_a_module_that_is_shipped_is_found_by_its_name() -> None:
    options, environment, files = resolved({"middleware": ["limits.Limits", "installed.Other"]})
    assert options == {"middleware": ["limits.Limits", "installed.Other"]}
    assert (environment, files) == ({"PYTHONPATH": LIMITS.rpartition("/")[0]}, [LIMITS])
    assert resolved({"middleware": "installed.Other"})[1:] == ({}, [])
    assert resolved({"logits-processors": ["limits:Limits"]})[2] == [LIMITS]


def test_models_that_options_name_are_looked_for_in_the_store() -> None:
    options = {"speculative-config": {"model": "draft"}, "tokenizer": "/mnt/t", "chat-template": "qwen/t.jinja"}
    instance = {"name": "chat", "model": "qwen", "port": 8000, "options": options}
    assert vllm.model_problems([instance], ["qwen", "draft"]) == []
    assert vllm.model_problems([instance], ["qwen", "drift"]) == [
        "vllm_instances[0]: option 'speculative-config'.model 'draft' is not in model_store_models; did you mean 'drift'?"
    ]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"name": "a/b", "content": ""}, "name is 'a/b'; it must be the name of a file"),
        ({"name": "my-module.py", "content": ""}, "must have no dash"),
        ({"name": "a"}, "it must have one of src"),
        ({"name": "a", "src": "x", "content": "y"}, "it must have one of src"),
        ({"name": "a", "src": "nothing"}, "nothing, which cannot be read on this controller: No such file"),
        ({"name": "a", "src": "binary"}, "which is no UTF-8 text"),
        ({"name": "a", "src": "large"}, "which is larger than 1 MiB"),
    ],
)
def test_a_file_that_cannot_be_shipped_is_told(tmp_path: Path, entry: dict[str, Any], expected: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large").write_bytes(b"x" * (vllm_files.LARGEST + 1))
    assert expected in "; ".join(vllm_files.problems([entry], str(tmp_path)))
    assert vllm_files.shipped([entry], str(tmp_path), DIRECTORY) == {}


def test_another_text_is_another_path(tmp_path: Path) -> None:
    def path() -> str:
        return vllm_files.shipped([{"name": "t.jinja", "src": "t"}], str(tmp_path), DIRECTORY)["t.jinja"]["path"]

    (tmp_path / "t").write_text("one\n")
    before = path()
    assert before == path()
    (tmp_path / "t").write_text("two\n")
    assert before != path()
    twice = [{"name": "a", "content": "x"}, {"name": "a", "content": "y"}]
    assert "name 'a' is used by 2 files" in vllm_files.problems(twice, "/")[0]


def rendered(path: Path, **options: Any) -> dict[str, Any]:
    """An instance as it is rendered, with a model that is there."""
    model = path / "models/qwen"
    model.mkdir(parents=True, exist_ok=True)
    (model / "params.json").write_text("{}")
    found, environment, files = vllm_named_files.resolved(options, {}, str(path / "models"), SHIPPED)
    return {
        "name": "chat", "runtime": "systemd", "config": {"model": str(model), "port": 8000, **found}, "environment": environment, "files": files,
        "gate": {"name": "chat"}, "gpus": [],
    }  # fmt: skip


def found(path: Path, user: str = "root", **options: Any) -> list[tuple[str, str, str]]:
    said = vllm_named_files_host.findings(rendered(path, **options), user, path / "release")
    return [(entry["label"], entry["what"], os.path.relpath(entry["path"], path)) for entry in said]


def test_what_is_missing_is_told_by_its_option(tmp_path: Path) -> None:
    assert found(tmp_path) == [], "a params.json makes a model, too"
    assert found(tmp_path, **{"chat-template": "chat.jinja"}) == [], "it is shipped"
    (tmp_path / "models/draft").mkdir()
    options: dict[str, Any] = {
        "chat-template": str(tmp_path / "t.jinja"),
        "speculative-config": {"model": "draft"},
        "tokenizer": "words",
        "lora-modules": [{"name": "poet", "path": "draft"}],
        "allowed-local-media-path": str(tmp_path / "media"),
    }
    said = found(tmp_path, **options)
    assert said == [
        ("option 'lora-modules'[0].path", "missing", "models/draft/adapter_config.json"),
        ("option 'speculative-config'.model", "missing", "models/draft/config.json"),
        ("option 'tokenizer'", "missing", "models/words/tokenizer.json"),
        ("option 'allowed-local-media-path'", "missing", "media"),
        ("option 'chat-template'", "missing", "t.jinja"),
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_the_services_user_cannot_read_is_told(tmp_path: Path) -> None:
    for directory in (tmp_path, *list(tmp_path.parents)[:-2]):
        directory.chmod(0o755)
    template = tmp_path / "t.jinja"
    template.write_text("x")
    template.chmod(0o600)
    option = {"chat-template": str(template)}
    assert found(tmp_path, "nobody", **option) == [("option 'chat-template'", "unreadable", "t.jinja")]
    template.chmod(0o644)
    assert found(tmp_path, "nobody", **option) == []
    (tmp_path / "models/qwen/params.json").chmod(0o600)
    assert found(tmp_path, "nobody") == [("the model", "unreadable", "models/qwen/params.json")]
    (tmp_path / "models/qwen").chmod(0o700)
    assert found(tmp_path, "nobody") == [("the model", "unreadable", "models/qwen")]


def test_a_module_that_nobody_has_is_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {"middleware": ["limits.Limits", "installed.Other", "nobody.Has"], "worker-cls": "auto"}
    assert found(tmp_path, **options) == [], "nothing can be said before the release is there"
    (tmp_path / "release/lib/python3.13/site-packages/installed").mkdir(parents=True)
    shipped = tmp_path / "files"
    shipped.mkdir()
    (shipped / "limits.py").touch()
    made = rendered(tmp_path, **options)
    made["environment"]["PYTHONPATH"] = str(shipped)
    said = vllm_named_files_host.findings({**made, "files": []}, "root", tmp_path / "release")
    assert said == [{"label": "option 'middleware'[2]", "path": "nobody", "what": "no module"}]
    problems = vllm_fit.named_problems({"chat": said}, [made], {"models_path": "/srv/models"}, store=True, host=True)
    assert (
        "option 'middleware'[2]: the release has no module nobody; ship it with vllm_files as nobody.py" in problems[0]
    )


@pytest.mark.parametrize(("store", "host", "expected"), [(True, True, 2), (False, True, 1), (True, False, 1)])
def test_the_store_is_judged_when_it_is_filled_and_the_host_before(store: bool, host: bool, expected: int) -> None:
    named = {
        "chat": [
            {"label": "the model", "path": "/srv/models/qwen/config.json", "what": "missing"},
            {"label": "option 'tokenizer'", "path": "/srv/models/w/tokenizer.json", "what": "missing"},
            {"label": "option 'chat-template'", "path": "/srv/t.jinja", "what": "unreadable"},
        ]
    }
    said = vllm_fit.named_problems(named, [{"name": "chat"}], {"models_path": "/srv/models"}, store, host)
    assert len(said) == expected
    assert all(text.startswith("vllm_instances (chat): option '") for text in said)


def test_a_file_of_the_host_that_changed_is_a_new_generation(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"

    def inputs(**options: Any) -> str:
        return generations_host.wanted_content(rendered(tmp_path, **options), {"systemd": "f"}, "/opt/r1")["inputs"]

    assert inputs() == "f\n", "instances that name no file stay as they are"
    option = {"chat-template": str(template)}
    template.write_text("one")
    before = inputs(**option)
    assert inputs(**option) == before != "f\n"
    template.write_text("two")
    assert inputs(**option) != before


def test_a_draft_model_keeps_its_revision(tmp_path: Path) -> None:
    """Going back goes back to it, and another revision is a new generation."""
    store = tmp_path / "models"
    for revision in ("r1", "r2"):
        (tmp_path / revision).mkdir()
    store.mkdir()
    texts = []
    for revision in ("r1", "r2"):
        (store / "draft").unlink(missing_ok=True)
        (store / "draft").symlink_to(tmp_path / revision)
        made = rendered(tmp_path, **{"speculative-config": {"model": "draft"}, "chat-template": "draft/t.jinja"})
        texts.append(generations_host.wanted_content(made, {}, "/opt/r1")["config.yaml"])
    assert [texts[0].count(str(tmp_path / "r1")), texts[1].count(str(tmp_path / "r2"))] == [2, 2]


def test_a_container_sees_what_is_named() -> None:
    options = {"chat-template": "/srv/t.jinja", "speculative-config": {"model": "/mnt/draft"}, "tokenizer": "words"}
    options |= {"middleware": "limits.Limits", "tool-parser-plugin": "chat.jinja"}
    config, environment, files = vllm_named_files.resolved(options, {}, "/srv/models", SHIPPED)
    config["model"] = "/srv/models/qwen"
    wanted = {"environment": environment}
    seen = vllm_container.seen(wanted, config, "/srv/models")
    assert seen == ["/srv/models", "/mnt/draft", "/srv/t.jinja", CHAT, LIMITS.rpartition("/")[0]]
    volumes = [vllm_container.mount(path) for path in seen]
    made = {"services": {"vllm": {"volumes": volumes}}}
    exported = vllm_container.exported(made, "x", [file["path"] for file in files])["services"]["vllm"]["volumes"]
    assert [entry["source"] for entry in exported] == [
        "/srv/models", "/mnt/draft", "/srv/t.jinja", f".{CHAT.removeprefix('/opt/vllm')}", f".{LIMITS.removeprefix('/opt/vllm').rpartition('/')[0]}",
    ]  # fmt: skip
    assert [entry["target"] for entry in exported] == seen


def test_a_run_brings_what_is_not_there_as_it_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "abc/t.jinja"
    entry = {"path": str(file), "sha256": SHIPPED["chat.jinja"]["sha256"]}
    wanted = [{"name": "chat", "files": [entry]}]

    def missing(held: str = "") -> list[str]:
        findings = {
            "instances": [{"name": "chat", "held": held}],
            "files": vllm_named_files_host.arrived([entry]),
        }
        return vllm_fit.missing_files(findings, wanted)

    assert missing() == [str(file)]
    assert missing(held="ann") == []
    file.parent.mkdir()
    file.write_text("half of i")
    assert missing() == [str(file)]
    file.write_text(SHIPPED["chat.jinja"]["content"])
    assert missing() == []


def test_a_tokenizer_and_a_model_of_mistrals_format_may_lie_in_the_store(tmp_path: Path) -> None:
    assert not model_store.is_model(tmp_path)
    for name in ("params.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        assert model_store.is_model(tmp_path)
        (tmp_path / name).unlink()
