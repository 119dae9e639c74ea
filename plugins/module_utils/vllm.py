"""What is known about `vllm serve` that an inventory is checked against and a generation is rendered from."""

from __future__ import annotations

import difflib
import math
import re
import ssl
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet, vllm_kernels, vllm_named_files
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_tls import CERTIFICATES, HTTP, HTTPS
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_named_files import MODEL_NAME, adapters

INSTANCE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
VARIABLE_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")
# Where an instance keeps what it compiles: kernels survive releases. They are code: private, and written by nobody else.
CACHE_PATH = "/var/cache/vllm"
CACHES = {
    "HOME": "",
    "XDG_CACHE_HOME": "",
    "HF_HOME": "/huggingface",
    "VLLM_CACHE_ROOT": "/vllm",
    "TRITON_CACHE_DIR": "/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/inductor",
    "FLASHINFER_WORKSPACE_BASE": "",
    "CUDA_CACHE_PATH": "/cuda",
}

# Options that older guides name -> what to write today. Read from the sources of vLLM 0.26, 0.32 and 0.33.
RENAMED_OPTIONS = {
    "disable-log-requests": "nothing: requests are not logged unless enable-log-requests is true",
    "rope-scaling": "hf-overrides",
    "rope-theta": "hf-overrides",
    "enable-metrics": "nothing: metrics are always on",
    "metrics-port": "nothing: metrics are on the instance's own port",
    "swap-space": "nothing: it has no successor",
    "use-v2-block-manager": "nothing: it is always on",
    "num-scheduler-steps": "nothing: it has no successor",
    "multi-step-stream-outputs": "nothing: it has no successor",
    "worker-use-ray": "distributed-executor-backend: ray",
    "engine-use-ray": "distributed-executor-backend: ray",
    "guided-decoding-backend": "structured-outputs-config",
    "enable-reasoning": "reasoning-parser",
    "speculative-model": "speculative-config",
    "num-speculative-tokens": "speculative-config",
    "num-lookahead-slots": "speculative-config",
    "preemption-mode": "nothing: it has no successor",
    "max-seq-len-to-capture": "max-cudagraph-capture-size",
    "disable-frontend-multiprocessing": "nothing: it has no successor",
    "disable-async-output-proc": "nothing: it has no successor",
    "enable-prompt-adapter": "nothing: prompt adapters were removed, LoRA stays (enable-lora)",
    "qlora-adapter-name-or-path": "lora-modules",
    "task": "runner and convert",
    "device": "vllm_device of the role",
    "max-num-partial-prefills": "nothing: it was removed in 0.32",
    "max-long-partial-prefills": "nothing: it was removed in 0.32",
}

# With fleet_backend_tls: vLLM shows the certificate of its host, and asks for one of the fleet. It watches these very files and takes up what is
# written into them, without a restart.
TLS_OPTIONS: dict[str, Any] = {
    "ssl-certfile": str(CERTIFICATES / "cert.pem"),
    "ssl-keyfile": str(CERTIFICATES / "key.pem"),
    "ssl-ca-certs": str(CERTIFICATES / "ca.pem"),
    "ssl-cert-reqs": int(ssl.CERT_REQUIRED),
    "enable-ssl-refresh": True,
}

# Options that the role itself sets, and where their value comes from.
OWNED_OPTIONS = {
    "config": "the role renders the configuration file",
    "model": "it comes from `model` of the instance",
    "host": "it comes from vllm_bind_address",
    "port": "it comes from `port` of the instance",
    "api-key": "it comes from vllm_internal_key, which never stands in a file of the configuration",
    **dict.fromkeys(
        ("grpc", "grpc-port"), "the gate and the gateway ask vLLM by HTTP, and so does what asks for vllm_internal_key"
    ),
    "shutdown-timeout": "it comes from vllm_shutdown_timeout, which the unit's stop time belongs to",
    "uds": "the gateway reaches vLLM by address and port",
    "headless": "an instance without an endpoint can be neither gated nor reached",
    "data-parallel-multi-port-external-lb": "the gateway reaches an instance at one port",
    **dict.fromkeys(
        (*TLS_OPTIONS, "ssl-ciphers"),
        "it comes from fleet_backend_tls, by which all instances of the fleet speak TLS with its certificates",
    ),
}

# Options of whose GPUs each has a part of the model, and the one that makes copies of it.
SHARDS = ("tensor-parallel-size", "pipeline-parallel-size", "prefill-context-parallel-size")
COPIES = "data-parallel-size"

# What stands in every configuration and comes from the role: no table of options is asked about it.
ROLE_OPTIONS = ("model", "host", "port", "shutdown-timeout", *TLS_OPTIONS)

# What media are fetched from unless the inventory lists domains. To vLLM an empty list is every domain; this one nobody can have (RFC 6761).
NO_DOMAIN = "none.invalid"

# Environment variables that open what must stay closed, or that the role itself sets.
REFUSED_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "it opens endpoints that run code and stop the engine, without a key",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "it lets clients load files of the host",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "systemd must see that the engine died, or nothing restarts it",
    "VLLM_API_KEY": "the key comes from vllm_internal_key",
    "VLLM_USE_RUST_FRONTEND": "it would answer without asking for vllm_internal_key",
    "PYTHONOPTIMIZE": "it removes the assertions that vLLM's safety depends on (CVE-2026-41523)",
    "PYTHONPATH": "it would run code from outside the release",
    "LD_PRELOAD": "it would run code from outside the release",
    "LD_LIBRARY_PATH": "it would run code from outside the release",
    "CUDA_VISIBLE_DEVICES": "it comes from `gpus` of the instance",
    "VLLM_CPU_OMP_THREADS_BIND": "it comes from `cpus` of the instance",
    "HOME": "it is the instance's cache directory",
    "NVIDIA_VISIBLE_DEVICES": "it comes from `gpus` of the instance",
}


def option_problems(options: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """Compare options with what `vllm serve` accepts.

    `table` maps an option's long name to its kind, of which roles/vllm/files/dump_options.py tells, or to its list of choices. An empty
    one says that nobody knows yet; the release itself is asked once it is built.
    Returns one sentence for each problem: the option, what is wrong, what would be right.
    """
    problems = []
    for name, value in options.items():
        if name in OWNED_OPTIONS:
            problems.append(f"option {name!r} cannot be set here: {OWNED_OPTIONS[name]}")
        elif name == "api-server-count" and value == 0:
            problems.append(f"option {name!r} is 0, with which no endpoint starts; it must be 1 or more")
        elif name in table:
            if wrong := value_problem(value, table[name]):
                problems.append(f"option {name!r} {wrong}")
        elif table or name in RENAMED_OPTIONS:
            problems.append(f"option {name!r} is not one of vllm serve's{right_name(str(name), table)}")
    return problems


def checked_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a configuration that a table of options is asked about."""
    return {name: value for name, value in config.items() if name not in ROLE_OPTIONS}


def right_name(name: str, table: Mapping[str, Any]) -> str:
    """Say what was probably meant by an option that does not exist."""
    dashed = name.lstrip("-").replace("_", "-")
    if dashed in RENAMED_OPTIONS:
        return f" any more; write {RENAMED_OPTIONS[dashed]}"
    if dashed in table:
        return f"; write {dashed!r}"
    if dashed.startswith("no-") and table.get(dashed.removeprefix("no-")) == "bool":
        return f"; write '{dashed.removeprefix('no-')}: false'"
    close = difflib.get_close_matches(dashed, table, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def value_problem(value: Any, kind: Any) -> str:
    """What is wrong with a value of an option, or nothing."""
    if value is None:
        return "has no value"
    if kind in ("bool", "flag"):
        return "" if isinstance(value, bool) else f"is {value!r}; it must be true or false"
    if isinstance(value, bool):
        return f"is {value!r}; it takes a value, not true or false" if kind != "any" else ""
    if kind == "int":
        return "" if isinstance(value, int) else f"is {value!r}; it must be a whole number"
    if kind == "float":
        return "" if isinstance(value, int | float) else f"is {value!r}; it must be a number"
    if isinstance(kind, list) and str(value) not in kind:
        return f"is {value!r}; it must be one of {', '.join(kind)}"
    return ""


def served_names(instance: Mapping[str, Any]) -> list[Any]:
    """The names that clients ask the model itself for, the one that the gate uses first."""
    names = (instance.get("options") or {}).get("served-model-name", instance.get("model"))
    return names if isinstance(names, list) else [names]


def adapter_problems(instance: Mapping[str, Any]) -> list[str]:
    """What is wrong with the LoRA adapters of an instance; where they lie is vllm_named_files' to judge."""
    options = instance.get("options") or {}
    problems, names = [], served_names(instance)
    for number, entry in enumerate(adapters(options)):
        where = f"option 'lora-modules'[{number}]"
        name, path = (entry.get("name"), entry.get("path")) if isinstance(entry, Mapping) else (None, None)
        if not (isinstance(name, str) and name and isinstance(path, str) and path):
            problems.append(f"{where} is {entry!r}; it must be {{name: ..., path: ...}}")
            continue
        if name in names:
            problems.append(f"{where} has the name {name!r}, which is taken; clients choose by the name")
        names = [*names, name]
    if options.get("lora-modules") and options.get("enable-lora") is not True:
        problems.append("option 'lora-modules' needs 'enable-lora: true'")
    return problems


def environment_problems(environment: Mapping[str, Any]) -> list[str]:
    """What is wrong with the environment of an instance. Values are never repeated: they may be secrets."""
    problems = []
    for name, value in environment.items():
        if name in REFUSED_ENVIRONMENT:
            problems.append(f"environment variable {name} is refused: {REFUSED_ENVIRONMENT[name]}")
        elif not VARIABLE_NAME.fullmatch(str(name)):
            problems.append(f"environment variable {name!r} must consist of upper-case letters, digits and _")
        elif isinstance(value, Mapping | list) or value is None:
            problems.append(f"environment variable {name} must be a string or a number")
        elif any(ord(character) < 32 for character in str(value)):
            problems.append(f"environment variable {name} holds a line break or another control character")
    return problems


def runtime_of(instance: Mapping[str, Any], runtime: str) -> str:
    """What runs an instance: its own word, or that of its host."""
    return str(instance.get("runtime") or runtime)


def runs_in(instances: Any, runtime: str, wanted: str) -> bool:
    """Whether any of the instances runs in the `wanted` runtime, `runtime` being that of the host.

    Plays ask it before the role has looked at them: what is no instance runs nowhere.
    """
    found = (
        [instance for instance in instances if isinstance(instance, Mapping)] if isinstance(instances, Sequence) else []
    )
    return any(runtime_of(instance, runtime) == wanted for instance in found)


def instance_problems(
    instances: Sequence[Mapping[str, Any]],
    device: str,
    table: Mapping[str, Any],
    allow_shared_gpus: bool = False,
) -> list[str]:
    """Everything that is wrong with `vllm_instances`, one sentence each."""
    problems = []
    for index, instance in enumerate(instances):
        name = instance.get("name")
        where = f"vllm_instances[{index}]" + (f" ({name})" if name else "")
        found: list[str] = []
        if name and not INSTANCE_NAME.fullmatch(str(name)):
            found.append("'name' must consist of lower-case letters, digits and dashes, at most 32")
        if instance.get("model") and not MODEL_NAME.fullmatch(str(instance["model"])):
            found.append("'model' must be the name of a model in the model store, not a path or a repository")
        port = instance.get("port")
        # what is missing or no number at all is told by the argument spec
        if str(port).lstrip("-").isdigit() and (problem := fleet.port_problem(port)):
            found.append(problem)
        found += gpu_problems(instance, device)
        found += option_problems(instance.get("options") or {}, table)
        found += adapter_problems(instance)
        found += environment_problems(instance.get("environment") or {})
        problems += [f"{where}: {problem}" for problem in found]
    problems += repeated("name", [instance.get("name") for instance in instances])
    problems += repeated("port", [instance.get("port") for instance in instances])
    if device == "cuda" and not allow_shared_gpus:
        shared = repeated("gpus", [gpu for instance in instances for gpu in set(instance.get("gpus") or [])])
        problems += [
            f"{problem}; set vllm_allow_shared_gpus if two instances really fit on one GPU" for problem in shared
        ]
    return problems


def model_problems(
    instances: Sequence[Mapping[str, Any]], models: Sequence[str], files: Sequence[str] = ()
) -> list[str]:
    """Instances whose model, or one that their options name, is not among those that the model store gets; `files` has the names of vllm_files."""
    problems = []
    for index, instance in enumerate(instances):
        wanted = [("model", str(instance.get("model", "")))]
        wanted += vllm_named_files.of_the_store(
            instance.get("options") or {}, instance.get("environment") or {}, dict.fromkeys(files)
        )
        for what, name in wanted:
            if name and name not in models:
                close = difflib.get_close_matches(name, models, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(models) or 'none'}"
                problems.append(f"vllm_instances[{index}]: {what} {name!r} is not in model_store_models; {hint}")
    return problems


def gpu_problems(instance: Mapping[str, Any], device: str) -> list[str]:
    """What is wrong with the GPUs or cores that an instance names."""
    problems = []
    for key in ("gpus", "cpus"):
        numbers = instance.get(key) or []
        if not isinstance(numbers, list) or any(
            not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers
        ):
            problems.append(f"{key!r} must be a list of numbers from 0")
            return problems
    gpus, options = instance.get("gpus") or [], instance.get("options") or {}
    if len(set(gpus)) < len(gpus):
        problems.append("'gpus' names a GPU twice")
    if device == "cpu" and gpus:
        problems.append("'gpus' must be empty: vllm_device is cpu")
    if device == "cuda" and not gpus:
        problems.append("'gpus' is empty: name the GPUs of this instance, or set vllm_device: cpu")
    used = gpus_used(options)
    if device == "cuda" and gpus and used and used != len(gpus) and "nnodes" not in options:
        names = ", ".join(name for name in (*SHARDS, COPIES) if name in options)
        sizes = f"parallel sizes ({names})" if names else "parallel sizes, which are all 1,"
        problems.append(
            f"'gpus' names {len(gpus)} GPU(s), but its {sizes} use {used}; "
            f"set 'tensor-parallel-size' so that their product is {len(gpus)}, or name {used} GPU(s)"
        )
    return problems


def gpus_used(options: Mapping[str, Any]) -> int:
    """How many GPUs of its host vLLM uses with these options; 0 when a size is no number, which is told elsewhere."""
    copies = options.get(COPIES, 1)
    if "data-parallel-rank" in options or options.get("data-parallel-external-lb"):
        copies = 1  # the others are other instances
    sizes = [options.get("data-parallel-size-local", copies), *(options.get(name, 1) for name in SHARDS)]
    return math.prod(sizes) if all(isinstance(size, int) and size > 0 for size in sizes) else 0


def repeated(key: str, values: Iterable[Any]) -> list[str]:
    """Name the values of a key that more than one instance has."""
    counted = Counter(value for value in values if isinstance(value, str | int))
    return [
        f"vllm_instances: {key} {value!r} is used by {count} instances" for value, count in counted.items() if count > 1
    ]


def render_environment(environment: Mapping[str, str]) -> str:
    """Render an EnvironmentFile= of systemd: every value in double quotes, with systemd's escapes."""
    lines = []
    for name, value in sorted(environment.items()):
        escaped = re.sub(r'(["\\$`])', r"\\\1", str(value))
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)


def wanted(instance: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn an entry of `vllm_instances` into what the host needs: configuration, environment, and how to ask it (`gate`).

    `settings` holds address, device, models_path, files (see vllm_files), shutdown_timeout, environment (for all instances), cuda_home, release_mount
    and gpus (for those that run from a release, see vllm_kernels; the GPUs as host_facts tells them), runtime, image and container (the latter two for
    instances in containers, see compose() of vllm_container), and tls (optional): whether instances speak TLS.
    """
    name, model, address = instance["name"], instance["model"], settings["address"]
    runtime = runtime_of(instance, settings["runtime"])
    options = dict(instance.get("options") or {})
    options.pop("served-model-name", None)
    options["allowed-media-domains"] = options.get("allowed-media-domains") or [NO_DOMAIN]
    served = served_names(instance)
    options, named_environment, files = vllm_named_files.resolved(
        options,
        {**settings["environment"], **(instance.get("environment") or {})},
        settings["models_path"],
        settings.get("files") or {},
    )
    config = {
        "model": f"{settings['models_path']}/{model}",
        "served-model-name": served,
        # a container has a network of its own, and its port is published at the address
        "host": "0.0.0.0" if runtime == "docker" else address,  # noqa: S104
        "port": instance["port"],
        "shutdown-timeout": settings["shutdown_timeout"],
        "disable-access-log-for-endpoints": "/health,/metrics,/ping",
        **options,
        **(TLS_OPTIONS if settings.get("tls") else {}),
    }
    caches = {key: f"{CACHE_PATH}/{name}{path}" for key, path in CACHES.items()}
    kernels: dict[str, str] = {}
    if settings["device"] == "cuda" and runtime == "systemd":  # an image brings its own compiler or kernels
        kernels = vllm_kernels.environment(settings["cuda_home"], settings["release_mount"])
        if not settings["cuda_home"]:
            mine = [gpu for gpu in settings["gpus"] if gpu["index"] in (instance.get("gpus") or [])]
            config |= vllm_kernels.options(options, [gpu["compute_capability"] for gpu in mine])
    environment = {**caches, **kernels, **named_environment}
    if settings["device"] == "cuda":
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if settings["device"] == "cuda" and runtime == "systemd":  # a container has no others
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in instance.get("gpus") or [])
    elif instance.get("cpus"):
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(cpu) for cpu in instance["cpus"])
    if settings["device"] == "cpu" and options.get("enforce-eager") is True:
        # enforce-eager covers the model only: the first request with log-probabilities would still have something compiled, and
        # the engine dies of it where no C++ compiler is (seen with 0.32.0).
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
    host = f"[{address}]" if ":" in address else address
    found = {
        "name": name,
        "gpus": instance.get("gpus") or [],
        "runtime": runtime,
        "config": config,
        "environment": {key: str(value) for key, value in environment.items()},
        "files": files,
        "gate": {
            "name": name,
            "unit": f"vllm@{name}.service",
            "url": f"{HTTPS if settings.get('tls') else HTTP}://{host}:{instance['port']}",
            "model": served[0],
        },
    }
    if runtime == "docker":
        found["container"] = {
            **settings["container"],
            "image": instance.get("image") or settings["image"],
            "publish": f"{host}:{instance['port']}:{instance['port']}",
            "cache": f"{CACHE_PATH}/{name}",
        }
    return found
