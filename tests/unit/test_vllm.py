"""What an inventory says of vLLM: checked, explained, rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import gpu, vllm, vllm_fit, vllm_kernels

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "roles/vllm/files/options/0.33.0-cuda.json").read_text())
GOOD: dict[str, Any] = {
    "name": "chat",
    "model": "qwen",
    "port": 8000,
    "gpus": [0, 1],
    "options": {"tensor-parallel-size": 2},
}


def lora(*entries: Any) -> dict[str, Any]:
    """Options with these adapters."""
    return {"tensor-parallel-size": 2, "enable-lora": True, "lora-modules": list(entries)}


def problems(*changes: dict[str, Any], device: str = "cuda") -> str:
    return "; ".join(vllm.instance_problems([{**GOOD, **change} for change in changes], device, TABLE))


def test_a_good_instance_has_no_problem() -> None:
    assert problems({}) == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "Chat"}, "'name' must consist of lower-case"),
        ({"name": "a/../b"}, "'name' must consist of lower-case"),
        ({"name": "chat\nExecStart=x"}, "'name' must consist of lower-case"),
        ({"model": "../etc"}, "'model' must be the name of a model"),
        ({"model": "Qwen/Qwen2.5"}, "'model' must be the name of a model"),
        ({"port": 80}, "port is 80; it must be a number from 1024 to 65535"),
        ({"port": "8000"}, "port is '8000'"),
        ({"port": 70000}, "port is 70000"),
        ({"gpus": []}, "'gpus' is empty"),
        ({"gpus": [-1]}, "'gpus' must be a list of numbers from 0"),
        ({"gpus": "0,1"}, "'gpus' must be a list of numbers from 0"),
        (
            {"gpus": [0]},
            "'gpus' names 1 GPU(s), but its parallel sizes (tensor-parallel-size) use 2; set 'tensor-parallel-size' so that their product is 1, "
            "or name 2 GPU(s)",
        ),
        ({"gpus": [0, 1, 2, 3]}, "'gpus' names 4 GPU(s), but its parallel sizes (tensor-parallel-size) use 2;"),
        (
            {"gpus": [0, 1, 2, 3], "options": {}},
            "'gpus' names 4 GPU(s), but its parallel sizes, which are all 1, use 1; set 'tensor-parallel-size' so that their product is 4",
        ),
        (
            {"options": {"tensor-parallel-size": 2, "prefill-context-parallel-size": 2}},
            "parallel sizes (tensor-parallel-size, prefill-context-parallel-size) use 4",
        ),
        ({"options": {"data-parallel-size": 2, "data-parallel-rank": 0}}, "parallel sizes (data-parallel-size) use 1"),
        ({"gpus": [1, 1]}, "'gpus' names a GPU twice"),
        (
            {"options": {"max-model-length": 1}},
            "option 'max-model-length' is not one of vllm serve's; did you mean 'max-model-len'?",
        ),
        ({"options": {"max_model_len": 1}}, "write 'max-model-len'"),
        ({"options": {"--dtype": "auto"}}, "write 'dtype'"),
        ({"options": {"no-enable-prefix-caching": True}}, "write 'enable-prefix-caching: false'"),
        ({"options": {"swap-space": 4}}, "any more; write nothing"),
        ({"options": {"guided-decoding-backend": "x"}}, "any more; write structured-outputs-config"),
        ({"options": {"enforce-eager": "yes"}}, "'enforce-eager' is 'yes'; it must be true or false"),
        ({"options": {"tensor-parallel-size": "two"}}, "'tensor-parallel-size' is 'two'; it must be a whole number"),
        ({"options": {"gpu-memory-utilization": "90%"}}, "it must be a number"),
        ({"options": {"dtype": "bf17"}}, "it must be one of auto, bfloat16"),
        ({"options": {"max-model-len": None}}, "'max-model-len' has no value"),
        ({"options": {"host": "10.0.0.1"}}, "option 'host' cannot be set here: it comes from vllm_bind_address"),
        ({"options": {"api-key": "x"}}, "it comes from vllm_internal_key"),
        (
            {"options": {"ssl-certfile": "/etc/ssl/a.pem"}},
            "option 'ssl-certfile' cannot be set here: it comes from fleet_backend_tls",
        ),
        ({"options": {"grpc": True}}, "option 'grpc' cannot be set here: the gate and the gateway ask vLLM by HTTP"),
        ({"options": {"api-server-count": 0}}, "'api-server-count' is 0, with which no endpoint starts"),
        ({"options": {"disable-log-stats": "no"}}, "'disable-log-stats' is 'no'; it must be true or false"),
        ({"options": lora("poet")}, "option 'lora-modules'[0] is 'poet'; it must be {name: ..., path: ...}"),
        ({"options": lora({"name": "poet"})}, "it must be {name: ..., path: ...}"),
        ({"options": lora({"name": "poet", "path": 5})}, "it must be {name: ..., path: ...}"),
        ({"options": lora("qwen=poet")}, "option 'lora-modules'[0] has the name 'qwen', which is taken"),
        ({"options": lora("a=x", "a=y")}, "option 'lora-modules'[1] has the name 'a', which is taken"),
        ({"options": {"lora-modules": ["a=x"]}}, "option 'lora-modules' needs 'enable-lora: true'"),
        ({"environment": {"VLLM_SERVER_DEV_MODE": 1}}, "VLLM_SERVER_DEV_MODE is refused"),
        ({"environment": {"PYTHONOPTIMIZE": 1}}, "CVE-2026-41523"),
        ({"environment": {"a b": 1}}, "must consist of upper-case letters"),
        ({"environment": {"A": "x\ny"}}, "A holds a line break"),
        ({"environment": {"A": {}}}, "A must be a string or a number"),
    ],
)
def test_a_mistake_is_answered_with_what_would_be_right(change: dict[str, Any], expected: str) -> None:
    assert expected in problems(change)


def test_a_mistake_in_the_environment_does_not_tell_its_value() -> None:
    assert "hunter2" not in problems({"environment": {"TOKEN": "hunter2\n", "VLLM_API_KEY": "hunter2"}})


def test_what_two_instances_may_not_share_is_named() -> None:
    assert "name 'chat' is used by 2 instances" in problems({}, {"port": 8001, "gpus": [2, 3]})
    assert "port 8000 is used by 2 instances" in problems({}, {"name": "b", "gpus": [2, 3]})
    assert "gpus 1 is used by 2 instances; set vllm_allow_shared_gpus" in problems(
        {}, {"name": "b", "port": 8001, "gpus": [1, 2]}
    )


def test_all_problems_are_told_at_once() -> None:
    told = problems({"name": "X", "port": 1, "options": {"tensor-parallel-size": 2, "nonsense": 1}})
    assert told.count("vllm_instances[0]") == 3


def test_a_cpu_takes_no_gpus() -> None:
    assert "'gpus' must be empty" in problems({}, device="cpu")


def test_an_adapter_is_a_model_of_the_store_or_lies_elsewhere() -> None:
    good = lora({"name": "poet", "path": "poet-adapter"}, "clerk=/mnt/adapters/clerk")
    assert problems({"options": good}) == ""
    assert vllm.model_problems([{**GOOD, "options": good}], ["qwen", "poet-adapter"]) == []
    assert vllm.model_problems([{**GOOD, "options": good}], ["qwen", "poet-adaptor"]) == [
        "vllm_instances[0]: option 'lora-modules'[0].path 'poet-adapter' is not in model_store_models; did you mean 'poet-adaptor'?"
    ]
    made = vllm.wanted({**GOOD, "options": good}, settings())["config"]["lora-modules"]
    assert made == [
        {"name": "poet", "path": "/srv/models/poet-adapter"},
        {"name": "clerk", "path": "/mnt/adapters/clerk"},
    ]


def test_an_adapter_that_is_none_is_told_and_breaks_nothing() -> None:
    """All checks run together, also those that look at what is made of a wrong entry."""
    wrong = {**GOOD, "options": lora("poet", 5, {"path": None})}
    assert vllm.wanted(wrong, settings())["config"]["lora-modules"] == ["poet", 5, {"path": None}]
    assert vllm.model_problems([wrong], ["qwen"]) == []


@pytest.mark.parametrize("name", vllm.RENAMED_OPTIONS)
def test_no_option_that_exists_is_called_removed(name: str) -> None:
    for table in (ROOT / "roles/vllm/files/options").glob("*.json"):
        assert name not in json.loads(table.read_text()), table.name


@pytest.mark.parametrize("name", vllm.OWNED_OPTIONS)
def test_every_option_that_the_role_owns_exists(name: str) -> None:
    assert name in TABLE


def settings(**change: Any) -> dict[str, Any]:
    return {
        "address": "10.0.0.5",
        "device": "cuda",
        "models_path": "/srv/models",
        "shutdown_timeout": 60,
        "environment": {"A": 1},
        "cuda_home": "",
        "release_mount": "/opt/vllm/release",
        "gpus": [{"index": index, "compute_capability": 9.0} for index in range(4)],
        "runtime": "systemd",
        "image": "registry.test/vllm@sha256:" + "0" * 64,
        "container": {"models_path": "/srv/models", "memory": "4g", "shm_size": "1g", "stop_seconds": 90},
        **change,
    }


def environment(made: dict[str, Any]) -> dict[str, str]:
    """The environment of an instance but for the places of its caches, and what keeps it from compiling kernels."""
    known = {*vllm.CACHES, *vllm_kernels.WITHOUT_COMPILER}
    return {key: value for key, value in made["environment"].items() if key not in known}


def test_a_generation_says_how_to_serve_and_how_to_ask() -> None:
    made = vllm.wanted(GOOD, settings())
    assert made["config"]["model"] == "/srv/models/qwen"
    assert made["config"]["host"] == "10.0.0.5"
    assert made["config"]["tensor-parallel-size"] == 2
    assert environment(made) == {"A": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert made["environment"]["HOME"] == "/var/cache/vllm/chat"
    assert all(made["environment"][name].startswith("/var/cache/vllm/chat") for name in vllm.CACHES)
    assert made["gate"] == {
        "name": "chat",
        "unit": "vllm@chat.service",
        "url": "http://10.0.0.5:8000",
        "model": "qwen",
    }


def test_an_instance_that_speaks_tls_asks_for_a_certificate_and_watches_its_own() -> None:
    made = vllm.wanted(GOOD, settings(tls=True))
    assert {name: value for name, value in made["config"].items() if "ssl" in name} == {
        "ssl-certfile": "/etc/ssl/vllm-fleet/fleet/cert.pem",
        "ssl-keyfile": "/etc/ssl/vllm-fleet/fleet/key.pem",
        "ssl-ca-certs": "/etc/ssl/vllm-fleet/fleet/ca.pem",
        "ssl-cert-reqs": 2,
        "enable-ssl-refresh": True,
    }
    assert made["gate"]["url"] == "https://10.0.0.5:8000"
    assert not any("ssl" in name for name in vllm.checked_options(made["config"])), "the role's own: no table is asked"
    assert not any("ssl" in name for name in vllm.wanted(GOOD, settings())["config"])


@pytest.mark.parametrize(
    ("listed", "expected"), [(None, ["none.invalid"]), ([], ["none.invalid"]), (["img.example"], ["img.example"])]
)
def test_media_are_fetched_from_listed_domains_only(listed: Any, expected: list[str]) -> None:
    """To vLLM an empty list is every domain."""
    options = {} if listed is None else {"allowed-media-domains": listed}
    made = vllm.wanted({**GOOD, "options": options}, settings())
    assert made["config"]["allowed-media-domains"] == expected


def test_without_a_compiler_nothing_asks_for_one_and_the_users_word_counts() -> None:
    made = vllm.wanted(GOOD, settings())["environment"]
    assert vllm_kernels.WITHOUT_COMPILER.items() <= made.items()
    assert set(vllm_kernels.WITHOUT_COMPILER.values()) <= {"0", "trtllm"}, "1 is an error where it is not supported"
    assert "CUDA_HOME" not in made
    mine = {"VLLM_USE_FLASHINFER_SAMPLER": 1}
    assert vllm.wanted({**GOOD, "environment": mine}, settings())["environment"]["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
    assert vllm.wanted(GOOD, settings(environment=mine))["environment"]["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
    for other in (settings(device="cpu"), settings(runtime="docker")):
        assert not vllm_kernels.WITHOUT_COMPILER.keys() & vllm.wanted(GOOD, other)["environment"].keys()


def test_with_a_compiler_an_instance_finds_it_and_its_releases_own_ninja() -> None:
    made = vllm.wanted(GOOD, settings(cuda_home="/usr/local/cuda-13.0"))["environment"]
    assert not vllm_kernels.WITHOUT_COMPILER.keys() & made.keys()
    assert made["CUDA_HOME"] == "/usr/local/cuda-13.0"
    assert made["PATH"].startswith("/opt/vllm/release/bin:/usr/local/cuda-13.0/bin:/usr/local/sbin:")


@pytest.mark.parametrize(
    ("capability", "options", "closed"),
    [
        (9.0, {}, False),
        (9.0, {"kv-cache-dtype": "fp8"}, False),
        (8.9, {}, False),
        (8.9, {"kv-cache-dtype": "fp8_e4m3"}, True),
        (12.0, {"kv-cache-dtype": "fp8"}, True),
        (10.0, {}, True),
        (10.3, {"kv-cache-dtype": "auto"}, True),
        (10.0, {"attention-backend": "FLASH_ATTN"}, False),
        (10.0, {"attention-config": {"backend": "FLASH_ATTN"}}, False),
    ],
)
def test_attention_that_would_be_compiled_is_another_one(
    capability: float, options: dict[str, Any], closed: bool
) -> None:
    gpus = [{"index": index, "compute_capability": capability} for index in range(2)]
    instance = {**GOOD, "options": {"tensor-parallel-size": 2, **options}}
    made = vllm.wanted(instance, settings(gpus=[*gpus, {"index": 7, "compute_capability": 10.0}]))
    assert (made["config"].get("attention-config") == vllm_kernels.ATTENTION_WITHOUT_COMPILER) == closed
    with_compiler = vllm.wanted(instance, settings(gpus=gpus, cuda_home="/usr/local/cuda"))
    assert with_compiler["config"].get("attention-config") == options.get("attention-config")


def test_an_instance_in_a_container_is_published_where_the_other_one_listens() -> None:
    made = vllm.wanted({**GOOD, "runtime": "docker"}, settings())
    assert made["config"]["host"] == "0.0.0.0"
    assert made["container"]["publish"] == "10.0.0.5:8000:8000"
    assert made["container"]["image"] == settings()["image"]
    assert made["gate"] == vllm.wanted(GOOD, settings())["gate"]
    assert environment(made) == {"A": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, "it has no GPUs but its own"
    assert vllm.wanted({**GOOD, "image": "other"}, settings(runtime="docker"))["container"]["image"] == "other"
    assert "container" not in vllm.wanted({**GOOD, "runtime": "systemd"}, settings(runtime="docker"))


@pytest.mark.parametrize(
    ("instances", "runtime", "wanted", "expected"),
    [
        ([{}], "systemd", "docker", False),
        ([{}], "docker", "docker", True),
        ([{"runtime": "systemd"}], "docker", "docker", False),
        ([{}, {"runtime": "docker"}], "systemd", "docker", True),
        ([{}, {"runtime": "docker"}], "systemd", "systemd", True),
        ([], "docker", "docker", False),
    ],
)
def test_what_a_host_runs(instances: list[dict[str, str]], runtime: str, wanted: str, expected: bool) -> None:
    assert vllm.runs_in(instances, runtime, wanted) is expected


@pytest.mark.parametrize(
    ("present", "wanted", "cannot", "refused"),
    [
        ("http://10.0.0.5:8000", "https://10.0.0.5:8000", ["gw-1"], True),
        ("http://10.0.0.5:8000", "https://10.0.0.5:8000", [], False),
        ("https://10.0.0.5:8000", "https://10.0.0.5:8000", ["gw-1"], False),
        ("http://10.0.0.5:8000", "http://10.0.0.5:8000", ["gw-1"], False),
        ("", "https://10.0.0.5:8000", ["gw-1"], False),
    ],
)
def test_nobody_goes_over_to_tls_before_every_gateway_can_ask_by_it(
    present: str, wanted: str, cannot: list[str], refused: bool
) -> None:
    findings = {
        "instances": [{"name": "chat", "gate": {"url": present} if present else {}}],
        "gateways_without_tls": cannot,
    }
    told = vllm_fit.tls_problems(findings, [{"name": "chat", "gate": {"url": wanted}}])
    assert told == (
        [
            "chat would speak TLS (fleet_backend_tls), which gw-1 cannot ask by yet: run site.yml once without it, so that every gateway and host has "
            "this version of the collection"
        ]
        if refused
        else []
    )


def test_a_generation_asks_for_the_name_that_is_served() -> None:
    instance = {**GOOD, "options": {"served-model-name": ["first", "second"], "runner": "pooling"}}
    gate = vllm.wanted(instance, settings(address="fd00::5"))["gate"]
    assert (gate["model"], gate["url"]) == ("first", "http://[fd00::5]:8000")


def test_cores_are_bound_on_a_cpu_only() -> None:
    made = vllm.wanted({**GOOD, "gpus": [], "cpus": [0, 2]}, settings(device="cpu"))
    assert environment(made) == {"A": "1", "VLLM_CPU_OMP_THREADS_BIND": "0,2"}


def test_what_is_eager_on_a_cpu_compiles_nothing_at_all() -> None:
    eager = {**GOOD, "gpus": [], "options": {"enforce-eager": True}}
    assert environment(vllm.wanted(eager, settings(device="cpu"))) == {"A": "1", "TORCHDYNAMO_DISABLE": "1"}
    set_by_hand = {**eager, "environment": {"TORCHDYNAMO_DISABLE": 0}}
    assert vllm.wanted(set_by_hand, settings(device="cpu"))["environment"]["TORCHDYNAMO_DISABLE"] == "0"
    assert "TORCHDYNAMO_DISABLE" not in vllm.wanted({**eager, "gpus": [0]}, settings())["environment"]


def test_the_environment_file_is_escaped_as_systemd_reads_it() -> None:
    assert vllm.render_environment({"B": 'x "y" $z `u` \\', "A": 1}) == 'A="1"\nB="x \\"y\\" \\$z \\`u\\` \\\\"\n'  # type: ignore[dict-item]


# Written in the format of NVIDIA_SMI_QUERY (not recordings: those come with the driver role).
NVIDIA_SMI = {
    "H200": ("0, NVIDIA H200, 143771, 9.0, 580.159.04\n", [(0, 143771, 9.0)]),
    "T4 and V100": (
        "0, Tesla T4, 15360, 7.5, 580.95.05\n1, Tesla V100-SXM2-16GB, 16384, 7.0, 580.95.05\n",
        [(0, 15360, 7.5), (1, 16384, 7.0)],
    ),
    "GB10 (memory is not told)": ("0, NVIDIA GB10, [N/A], 12.1, 580.95.05\n", [(0, 0, 12.1)]),
    "none": ("No devices were found\n", []),
}


@pytest.mark.parametrize("machine", NVIDIA_SMI)
def test_nvidia_smi_is_understood(machine: str) -> None:
    output, expected = NVIDIA_SMI[machine]
    assert [(g["index"], g["memory_mib"], g["compute_capability"]) for g in gpu.parse_nvidia_smi(output)] == expected
