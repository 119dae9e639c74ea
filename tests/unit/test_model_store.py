"""The store's rules and its moves on disk, and the line of progress."""

from __future__ import annotations

import grp
import importlib
import json
import os
import pwd
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.gpufleet.llm.plugins.module_utils import model_layout, model_progress
from ansible_collections.gpufleet.llm.plugins.module_utils import model_store as rules
from ansible_collections.gpufleet.llm.plugins.modules import model_download
from ansible_collections.gpufleet.llm.plugins.modules import model_store as module

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(**more: Any) -> dict[str, Any]:
    return {"name": "tiny", "source": "huggingface", "repository": "acme/tiny", "revision": COMMIT, **more}


def url(**more: Any) -> dict[str, Any]:
    """A model of two files, one of them by a presigned address."""
    files = [
        {"url": "https://mirror.example/tiny/config.json", "sha256": "a" * 64},
        {"url": "https://s3.example/tiny/m%201.bin?X-Amz-Signature=secret", "sha256": "B" * 64, "path": "sub/m.bin"},
    ]
    return {"name": "tiny", "source": "url", "files": files, **more}


def one(**file: Any) -> dict[str, Any]:
    """A model of one file, which is right but for what is given."""
    return url(files=[{"url": "https://mirror.example/config.json", "sha256": "a" * 64, **file}])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model on the controller."""
    path = tmp_path / "source"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "sub/weights.bin").write_bytes(b"weights")
    return path


def copied(source: Path, **more: Any) -> dict[str, Any]:
    return {"name": "tiny", "source": "path", "path": str(source), "copy": True, **more}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (hub(name="Tiny"), "`Tiny` is no name for a model"),
        (hub(name="../etc"), "is no name for a model"),
        (hub(source="ftp"), "source is `ftp`; known are huggingface, modelscope, url and path"),
        (hub(repository="tiny"), "repository is `tiny`; it looks like"),
        (hub(repository=None), "repository is `None`"),
        (hub(revision="main"), "revision is `main`; it takes the 40 hexadecimal digits"),
        (hub(revision=COMMIT[:12]), "it takes the 40 hexadecimal digits"),
        (hub(revision=""), "it takes the 40 hexadecimal digits"),
        (hub(source="modelscope", revision="master"), "revision is `master`; it takes the 40 hexadecimal digits"),
        (
            hub(files=[]),
            "tiny: `files` means nothing for source huggingface; it takes repository, revision, include, exclude and code",
        ),
        (url(revision=COMMIT), "tiny: `revision` means nothing for source url; it takes files"),
        (url(files=[]), "tiny: files is `[]`; it takes a list of entries with url and sha256"),
        (url(files="https://mirror.example/x"), "it takes a list of entries with url and sha256"),
        (url(files=["https://mirror.example/x"]), "files[1] is `https://mirror.example/x`; it takes url, sha256 and"),
        (one(sha256="A" * 63), f"tiny: config.json: sha256 is `{'A' * 63}`; it takes the 64 hexadecimal digits"),
        (one(sha256=None), "config.json: sha256 is ``; it takes the 64"),
        (one(url="mirror.example/config.json"), "url is `mirror.example/config.json`; it looks like https://"),
        (
            one(url="ftp://mirror.example/config.json"),
            "url is `ftp://mirror.example/config.json`; it looks like https://",
        ),
        (
            one(url="https://me:pw@mirror.example/config.json"),
            "put an Authorization header into model_store_url_headers",
        ),
        (one(path="../config.json"), "path is `../config.json`; it takes the file's name below the model"),
        (one(path="/etc/passwd"), "path is `/etc/passwd`; it takes"),
        (one(path=".model.json"), "path is `.model.json`; it takes"),
        (url(files=2 * one()["files"]), "config.json is given 2 times in files; `path` gives a file another name"),
        ({"name": "tiny", "source": "path"}, "path is ``; it takes an absolute path"),
        ({"name": "tiny", "source": "path", "path": "models/x"}, "it takes an absolute path"),
        ({"name": "tiny", "source": "path", "path": "/none", "copy": True}, "there is no /none/config.json on the con"),
        ({"name": "tiny", "source": "path", "path": "/none", "revision": "a/b"}, "revision is `a/b`"),
    ],
)
def test_what_is_wrong_is_named(model: dict[str, Any], message: str) -> None:
    found = rules.problems([model])
    assert len(found) == 1
    assert found[0].startswith("model_store_models: ")
    assert message in found[0]


def test_what_is_right_passes(source: Path) -> None:
    linked = {"name": "other", "source": "path", "path": "/mnt/model"}
    assert rules.problems([hub(), copied(source, name="copied"), linked, url(name="files")]) == []
    assert rules.problems([hub(source="modelscope")]) == []
    assert rules.problems([hub(revision="main")], allow_moving=True) == []


def test_a_name_is_given_once() -> None:
    assert rules.problems([hub(), hub()]) == [
        "model_store_models: the name `tiny` is given 2 times; each model needs a name of its own"
    ]


def test_the_plan_names_directories(source: Path) -> None:
    assert rules.plan([hub()])[0]["directory"] == "tiny-0123456789ab"
    assert rules.plan([hub(revision="refs/pr/1")])[0]["directory"] == "tiny-refs-pr-1"
    assert rules.plan([{"name": "x", "source": "path", "path": "/mnt/x"}])[0]["directory"] == ""
    planned = rules.plan([copied(source)])[0]
    assert planned["size"] == 9
    assert planned["directory"] == f"tiny-{rules.fingerprint(source)[:12]}"
    assert rules.plan([copied(source, revision="r1")])[0]["directory"] == "tiny-r1"


def test_a_model_from_addresses_is_named_by_its_hashes_and_hides_signatures() -> None:
    planned = rules.plan([url()])[0]
    assert "secret" not in json.dumps(planned)
    assert planned["files"][1] == {"path": "sub/m.bin", "url": "https://s3.example/tiny/m%201.bin", "sha256": "b" * 64}
    assert rules.queries([hub(name="other"), url()], "tiny")["sub/m.bin"] == "X-Amz-Signature=secret"
    assert rules.queries([hub()], "tiny") == {}
    moved = url(files=[{**file, "path": rules.path_of(file), "url": "https://b.example/x"} for file in url()["files"]])
    assert rules.plan([moved])[0]["directory"] == planned["directory"]
    assert rules.plan([one()])[0]["directory"] != planned["directory"]
    # patterns are for hubs; whoever lists files wants all of them
    assert "exclude" not in planned


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Authorization": "Bearer secret"}, "`Authorization` is no address; it looks like https://mirror.example/"),
        ({"https://a.example/": "Bearer secret"}, "https://a.example/ takes headers with their values"),
        ({"https://a.example/": {"Authorization": "two\nlines secret"}}, "each on one line"),
    ],
)
def test_what_is_wrong_with_headers_is_named_without_their_values(headers: dict[str, Any], message: str) -> None:
    found = " ".join(rules.header_problems(headers))
    assert message in found
    assert "secret" not in found
    assert rules.header_problems({"https://a.example/x": {"Authorization": "Bearer secret"}}) == []


def test_headers_go_only_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host, without Ansible: the address of every request and of every redirect is looked up."""
    monkeypatch.syspath_prepend(str(ROOT / "roles/model_store/templates/opt/model-store/fetch"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    downloader = importlib.import_module("from_url")
    rules_of = {"https://a.example/models": {"Authorization": "Bearer secret"}}
    asked = {
        "https://a.example/models/x": True, "https://a.example/models": True, "https://A.example/models/x": True,
        "https://a.example/models2/x": False, "https://a.example/x": False, "https://a.example.evil/models/x": False,
        "http://a.example/models/x": False, "https://a.example:8443/models/x": False,
    }  # fmt: skip
    assert {address: bool(downloader.headers_for(address, rules_of)) for address in asked} == asked


def test_an_adapter_is_a_model_too(tmp_path: Path, source: Path) -> None:
    (source / "config.json").rename(source / "adapter_config.json")
    assert rules.problems([copied(source)]) == []
    keeper = Keeper(tmp_path)
    keeper.run({"name": "tiny", "source": "path", "path": str(source)})
    assert (keeper.path / "tiny").readlink() == source


def test_the_fingerprint_follows_the_content(source: Path) -> None:
    before = rules.fingerprint(source)
    assert rules.fingerprint(source) == before
    os.utime(source / "config.json", ns=(1, 1))
    assert rules.fingerprint(source) != before


def test_what_is_not_said_differs_from_an_empty_list() -> None:
    specs = yaml.safe_load((ROOT / "roles/model_store/meta/argument_specs.yml").read_text())
    options = specs["argument_specs"]["main"]["options"]["model_store_models"]["options"]
    assert options["source"]["choices"] == list(rules.KEYS)
    for key in ("exclude", "code"):
        assert "default" not in options[key]
        assert (rules.asks_for(hub())[key], rules.asks_for(hub(**{key: []}))[key]) == (None, [])


def test_another_pin_of_code_is_another_revision() -> None:
    pins: list[Any] = [None, [], *([{"repository": "a/b", "revision": digit * 40}] for digit in "ab")]
    directories = [rules.plan([hub(code=pin)])[0]["directory"] for pin in pins]
    assert directories[0] == directories[1] == f"tiny-{COMMIT[:12]}"
    assert len(set(directories)) == 3


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


def test_a_clone_without_git_lfs_is_no_model(tmp_path: Path, source: Path) -> None:
    """From the controller: in the preflight. On the host: before the name is given. Small weights are none."""
    (source / "model-1.safetensors").write_bytes(b"small")
    assert rules.problems([copied(source)]) == []
    (source / "model-1.safetensors").write_text(POINTER)
    (source / "model-2.safetensors").write_text(POINTER)
    wanted = f"tiny: model-1.safetensors and 1 more in {source} is a pointer of Git LFS and not the file itself"
    (said,) = rules.problems([copied(source)])
    assert said.startswith(f"model_store_models: {wanted}")
    assert said.endswith("run `git lfs pull` there")
    with pytest.raises(rules.ModelError, match="is a pointer of Git LFS"):
        Keeper(tmp_path).run({"name": "tiny", "source": "path", "path": str(source)})


def test_a_directory_that_leads_to_code_elsewhere_is_named(tmp_path: Path, source: Path) -> None:
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["acme/code--t.Slow", null]}}')
    (said,) = rules.problems([copied(source)])
    assert "tokenizer_config.json takes code from acme/code, which vLLM would ask the hub for" in said
    assert rules.problems([copied(source, code=[])]) == []
    linked = {"name": "tiny", "source": "path", "path": str(source)}
    with pytest.raises(rules.ModelError, match="takes code from acme/code"):
        Keeper(tmp_path).run(linked)
    assert Keeper(tmp_path).run({**linked, "code": []}).changed


def test_code_is_pinned_as_models_are() -> None:
    said = rules.problems([hub(code=[{"repository": "acme/code", "revision": "main"}])])
    assert any(
        "tiny: code: revision is `main`; it takes the 40 hexadecimal digits of a commit" in text for text in said
    )
    assert any("code takes [] for source url" in text for text in rules.problems([url(code=[{"repository": "a/b"}])]))


WEIGHTS = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("names", "indexed", "left"),
    [
        ((WEIGHTS, "consolidated.safetensors", "params.json"), (), ("consolidated.safetensors",)),
        (("consolidated.safetensors", "params.json", "tekken.json"), (), ()),
        ((*SHARDS, WEIGHTS, "adapter_model.safetensors"), SHARDS, (WEIGHTS,)),
        ((WEIGHTS, "pytorch_model-1.bin", "training_args.bin", "1_Dense/pytorch_model.bin"), (), ("pytorch_model-1.bin",)),
        ((WEIGHTS, "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"), (), ("2_Dense/pytorch_model.bin",)),
        (("pytorch_model.bin", "onnx/model.onnx", "m.gguf", "sparse_linear.pt"), (), ("onnx/model.onnx", "m.gguf")),
        ((WEIGHTS, "metal/model.bin", "original/model.safetensors"), (), ("metal/model.bin", "original/model.safetensors")),
        ((WEIGHTS, "openvino_model.bin", "openvino_model.xml"), (), ("openvino_model.bin", "openvino_model.xml")),
        ((WEIGHTS, "tf_model.h5", "flax_model.msgpack", "rust_model.ot"), (), ("tf_model.h5", "flax_model.msgpack", "rust_model.ot")),
        (("adapter_model.safetensors", "adapter_model.bin"), (), ("adapter_model.bin",)),
        (("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"), (), ()),
        (("m-Q4.gguf", "config.json"), (), ()),
    ],
)  # fmt: skip
def test_the_same_weights_in_another_layout(
    names: tuple[str, ...], indexed: tuple[str, ...], left: tuple[str, ...]
) -> None:
    assert set(model_layout.duplicates(names, indexed)) == set(left)


def test_several_models_in_one_repository_are_a_question() -> None:
    assert model_layout.alternatives(["q4.gguf", "q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf"]) == [
        "q4.gguf",
        "q8-*.gguf",
    ]
    assert model_layout.alternatives(["q4.gguf", "config.json"]) == []
    assert model_layout.alternatives(["q4.gguf", "q8.gguf", "model.safetensors"]) == []


def test_without_the_user_nothing_is_done(tmp_path: Path, source: Path) -> None:
    keeper = Keeper(tmp_path)
    keeper.user = "nobody-has-this-name"
    store = keeper.run(copied(source))
    assert (store.user_ready, store.changed, store.missing) == (False, False, ["tiny"])
    assert not keeper.path.exists()


class Keeper:
    """A store in a temporary directory and what the module does to it."""

    def __init__(self, path: Path) -> None:
        self.path = path / "store"
        self.user = pwd.getpwuid(os.getuid()).pw_name
        assert grp.getgrgid(pwd.getpwuid(os.getuid()).pw_gid)

    def run(self, *models: dict[str, Any], check: bool = False, **more: Any) -> module.Store:
        parameters = {
            "path": str(self.path), "user": self.user, "models": rules.plan(models), "arrived": {}, "arrived_name": "",
            "keep_revisions": 2, "reserve_bytes": 0, "share": False, **more,
        }  # fmt: skip
        store = module.Store(parameters, check)
        store.look()
        return store

    def arrive(self, source: Path, model: dict[str, Any]) -> module.Store:
        """What copy.yml does."""
        staged = self.path / ".partial" / rules.plan([model])[0]["directory"]
        for path in rules.files_of(source):
            target = staged / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        return self.run(model, arrived=rules.contents(source), arrived_name=model["name"])


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    return Keeper(tmp_path)


def test_a_model_is_missing_until_it_arrived(keeper: Keeper, source: Path) -> None:
    model = copied(source)
    assert keeper.run(model).missing == ["tiny"]
    assert not (keeper.path / "tiny").exists()
    assert keeper.arrive(source, model).changed
    assert (keeper.path / "tiny/sub/weights.bin").read_bytes() == b"weights"
    again = keeper.run(model)
    assert (again.changed, again.missing) == (False, [])


def test_check_mode_says_what_is_missing_and_writes_nothing(keeper: Keeper, source: Path) -> None:
    store = keeper.run(copied(source), check=True)
    assert store.missing == ["tiny"]
    assert not keeper.path.exists()


def test_what_arrived_damaged_gets_no_name(keeper: Keeper, source: Path) -> None:
    model = copied(source)
    keeper.run(model)
    wanted = rules.contents(source)
    wanted["config.json"]["sha256"] = "0" * 64
    staged = keeper.path / ".partial" / rules.plan([model])[0]["directory"]
    staged.mkdir()
    (staged / "config.json").write_text("{}")
    with pytest.raises(
        rules.ModelError, match=r"config.json is not what the source has: expected 2 bytes, sha256 0000"
    ):
        keeper.run(model, arrived=wanted, arrived_name="tiny")
    assert not (keeper.path / "tiny").exists()


def test_a_file_that_lost_bytes_makes_a_model_missing(keeper: Keeper, source: Path) -> None:
    model = copied(source)
    keeper.run(model)
    keeper.arrive(source, model)
    (keeper.path / "tiny/sub/weights.bin").write_bytes(b"")
    assert keeper.run(model).missing == ["tiny"]


def test_old_revisions_go_but_the_previous_and_the_current_stay(keeper: Keeper, source: Path) -> None:
    for number, revision in enumerate(("r1", "r2", "r3")):
        keeper.run(copied(source, revision=revision))
        keeper.arrive(source, copied(source, revision=revision))
        manifest = keeper.path / f".revisions/tiny-{revision}/.model.json"
        os.utime(manifest, (number, number))
    assert sorted(path.name for path in (keeper.path / ".revisions").iterdir()) == ["tiny-r2", "tiny-r3"]
    assert str((keeper.path / "tiny").readlink()) == ".revisions/tiny-r3"
    assert keeper.run(copied(source, revision="r2")).changed
    assert str((keeper.path / "tiny").readlink()) == ".revisions/tiny-r2"


def test_models_whose_names_begin_alike_do_not_prune_each_other(keeper: Keeper, source: Path) -> None:
    for name in ("tiny", "tiny-b"):
        for revision in ("r1", "r2"):
            keeper.run(copied(source, name=name, revision=revision))
            keeper.arrive(source, copied(source, name=name, revision=revision))
    assert len(list((keeper.path / ".revisions").iterdir())) == 4


def test_something_else_under_the_name_is_not_removed(keeper: Keeper, source: Path) -> None:
    linked = {"name": "tiny", "source": "path", "path": str(source)}
    (keeper.path / "tiny").mkdir(parents=True)
    with pytest.raises(rules.ModelError, match="is not a link that this role made"):
        keeper.run(linked)


def test_a_linked_model_must_be_there(keeper: Keeper) -> None:
    with pytest.raises(rules.ModelError, match="is the disk mounted"):
        keeper.run({"name": "tiny", "source": "path", "path": "/none"})


def test_a_disk_that_is_too_small_is_refused(keeper: Keeper, source: Path) -> None:
    with pytest.raises(rules.ModelError, match=r"tiny take 0.0 kB, but .* and 1000000000.0 GB shall stay free"):
        keeper.run(copied(source), reserve_bytes=10**18)


DOWNLOAD: dict[str, Any] = {
    "path": "/srv/models", "user": "model-store", "python": "/p", "program": "/f", "endpoint": "https://hub/",
    "token": "hf_secret", "headers": {"https://a/": {"Authorization": "Bearer hf_secret"}}, "peer": {},
    "queries": {"x": "hf_secret"}, "parallel": 8, "reserve_bytes": 1, "environment": {"HTTPS_PROXY": "http://me:pw@p"},
    "pause": 5, "model": rules.plan([hub()])[0],
}  # fmt: skip


def test_secrets_are_in_no_command(tmp_path: Path) -> None:
    line = " ".join(model_download.unit_for(DOWNLOAD).start_command(tmp_path))
    assert "hf_secret" not in line
    assert "pw@p" not in line
    job = model_download.job_of(DOWNLOAD)
    assert "hf_secret" not in json.dumps(job)
    assert (job["endpoint"], job["staging"]) == ("https://hub", "/srv/models/.partial/tiny-0123456789ab")


def test_the_line_of_progress() -> None:
    progress = model_progress.Progress()
    assert progress.line("checking", 0, 0) == "asking what there is"
    assert progress.line("downloading", 0, 15_200_000_000) == "0.0 of 15.2 GB"
    progress.add(0, 0)
    progress.add(10, 4_100_000_000)
    assert progress.line("downloading", 4_100_000_000, 15_200_000_000) == "4.1 of 15.2 GB, 410 MB/s, about 27 s left"
    assert progress.line("verifying", 1, 1) == "verifying what arrived"


@pytest.mark.parametrize(("seconds", "text"), [(90, "90 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert model_progress.duration(seconds) == text
