"""The whole deployment on a machine with a real GPU, and what it is worth there: run it on that machine, as root, in a clone.

    make gpu                            all steps, into docs/results/<card>-vllm-<version>.md; half an hour
    make gpu STEPS=deploy,unit          some of them, each of which adds to that page; none takes more than ten minutes
    python -m tests.gpu --help          what else can be chosen

It runs site.yml on the machine itself with inventories of its own: vLLM and the gateway are installed and stay (uninstall them as any). The
roles base, firewall and ssh_hardening only take part with --harden. The model has the shape of one with 8 billion parameters and random
weights, so nothing large is downloaded. Each step adds to results.json in the directory, from which the report is written.

    deploy      bare machine to a completion through the gateway, by site.yml; and a second run, which changes nothing
    unit        systemd-analyze security, and a program that tries what the sandbox has to refuse
    recover     kill -9 of the engine: GPU memory is free again, and systemd brings it back
    throughput  vllm bench serve, in turns: a bare process, the hardened unit, the unit through the gateway
    proof       what the role does when a start would fail: FlashInfer's sampler on a host without a compiler is refused, and the instance serves on
    judgement   an option that vLLM refuses, without a second of service; what its judgement takes; a new internal key without a restart
    rate        requests that arrive at the rate at which 128 run at a time, against the targets that people bring
    starts      cold (no caches), warm, and a new release that inherits the caches
    parallel    tensor-parallel-size 2, where there are two GPUs
    shared      two instances on one GPU, whose engines start one after the other
    toolkit     with a CUDA toolkit, where --cuda-home names one: a kernel is compiled, and the instance restarted with it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.gpu import host, report
from tests.gpu.host import GpuTestError, run, until
from tests.sandbox import ATTEMPTS, DEVICES, PROBE, probe

ROOT = Path(__file__).resolve().parents[2]
STARTED = time.monotonic()
# The shape of Llama 3.1 8B (its config.json), and one that a CPU serves, for trying the steps.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
VOCABULARY = 128256
# Streams at a time, and requests for each run: at least four for each stream, and some seconds long.
POINTS = {1: 8, 64: 256, 256: 1024}
RATE_SECONDS = 60
# How often vLLM is asked once more, with a release that has answered before.
JUDGEMENTS = 3
INPUT, OUTPUT = 512, 128


def say(text: str) -> None:
    """Print one line of progress."""
    seconds = int(time.monotonic() - STARTED)
    print(f"[{seconds // 60:3}:{seconds % 60:02}] {text}", flush=True)


class Steps:
    """The steps, with what they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.directory: Path = options.directory
        self.file = self.directory / "results.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.key, self.internal_key = self.secret("api_key"), self.secret("internal_key")

    def secret(self, name: str) -> str:
        """A secret of this machine, made once."""
        file = self.directory / name
        if not file.exists():
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32))
        return file.read_text()

    def keep(self, step: str, result: object) -> None:
        """Write down what a step found."""
        self.results[step] = result
        self.file.write_text(json.dumps(self.results, indent=1) + "\n")

    def variables(
        self,
        gpus: int = 1,
        environment: dict[str, str] | None = None,
        options: dict[str, Any] | None = None,
        neighbour: bool = False,
    ) -> dict[str, Any]:
        """What the inventory takes from here: an instance on so many GPUs, more environment variables and options of it, and one beside it."""
        on_cpu = self.options.device == "cpu"
        chat = {
            "name": "chat",
            "model": host.MODEL,
            "port": 8000,
            "gpus": [] if on_cpu else list(range(gpus)),
            "options": {
                "load-format": "dummy",
                "max-model-len": 1024 if self.options.shape == "tiny" else 8192,
                **({"enforce-eager": True} if on_cpu else {"gpu-memory-utilization": 0.42}),
                **({"tensor-parallel-size": gpus} if gpus > 1 else {}),
                **(options or {}),
            },
            "environment": {**({"VLLM_CPU_KVCACHE_SPACE": 1} if on_cpu else {}), **(environment or {})},
        }
        return {
            "gpu_directory": str(self.directory),
            "vllm_instances": [chat, *([{**chat, "name": "neighbour", "port": 8001}] if neighbour else [])],
            "vllm_allow_shared_gpus": neighbour,
            "vllm_device": self.options.device,
            "vllm_start_proof": "refuse",
            "fleet_skip_roles": [] if self.options.harden else ["base", "firewall", "ssh_hardening"],
        }

    def playbook(
        self, *arguments: str, variables: dict[str, Any] | None = None, refused: bool = False
    ) -> tuple[str, float]:
        """Run site.yml; return its output and how long it took. It has to succeed, or to be refused."""
        variables = variables or self.variables()
        command = ["ansible-playbook", "site.yml", "-i", "tests/gpu/inventory", "-e", json.dumps(variables)]
        command += ["-e", f"@{self.options.vars}"] if self.options.vars else []
        begun = time.monotonic()
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        output = run(*command, *arguments, check=not refused, cwd=ROOT, env=environment)
        if refused and not re.search(r"failed=[1-9]", output):
            raise GpuTestError(f"this should have been refused:\n{output[-4000:]}")
        with (self.directory / "site.log").open("a") as log:
            log.write(output)
        return output, time.monotonic() - begun

    # --- the steps

    def deploy(self) -> None:
        """Bare machine to a completion."""
        self.make_model()
        driver = host.smi("--query-gpu=index,name,memory.total,driver_version")
        output, seconds = self.playbook()
        again, seconds_again = self.playbook()
        recap = re.findall(r"changed=(\d+)", again)
        if set(recap) != {"0"}:
            raise GpuTestError(f"the second run changed something:\n{again[-4000:]}")
        if host.smi("--query-gpu=index,name,memory.total,driver_version") != driver:
            raise GpuTestError(f"the driver is not the one that was there: {driver}")
        until("a completion through the gateway", lambda: host.complete(host.GATEWAY, self.key, 8), 60)
        release = Path("/etc/vllm/chat/current/release").resolve()
        self.keep(
            "deploy",
            {
                "gpus": driver,
                "seconds": seconds,
                "seconds_again": seconds_again,
                "vllm": release.name.rpartition("-")[0],
                "decision": re.findall(r"decision: (.+?)(?= - [a-z]+:|[\"']|TASK|$)", " ".join(output.split()))[:1],
                "startup": host.startup_seconds(),
                "judged": host.judged(),
                "kv_cache_tokens": host.kv_cache_tokens(),
                "compilers": host.compilers(),
                "os": re.findall(r'PRETTY_NAME="(.*)"', Path("/etc/os-release").read_text())[0],
                "systemd": run("systemctl", "--version").split()[1],
                "nginx": run("nginx", "-v").strip(),
                "torch": run(
                    f"{release}/bin/python", "-c", "import torch; print(torch.__version__)", check=False
                ).strip(),
                "processors": os.cpu_count(),
            },
        )

    def make_model(self) -> None:
        """A model directory without weights: the shape, and the tokenizer of the demo's model."""
        tokenizer: Path = self.options.tokenizer
        if tokenizer is None:
            from demo.__main__ import build_model

            tokenizer = build_model()
        target = self.directory / "shape"
        if target.exists():
            return
        partial = target.with_name("shape.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.json",
            "merges.txt",
            "chat_template.jinja",
        ):
            if (tokenizer / name).exists():
                shutil.copy(tokenizer / name, partial / name)
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": VOCABULARY,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "hidden_act": "silu",
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, **SHAPES[self.options.shape],
        }  # fmt: skip
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        partial.rename(target)

    def unit(self) -> None:
        """How hardened the unit is, by systemd's own judgement and by trying."""
        told = run("systemd-analyze", "security", "--no-pager", host.UNIT)
        score = float(re.findall(r"exposure level for \S+: ([0-9.]+)", told)[0])
        nodes = ["/dev/kmsg", "/dev/mem", "/dev/port", "/dev/fuse", "/dev/loop-control", "/dev/net/tun", "/dev/vda"]
        nodes = [node for node in nodes if Path(node).exists()]
        # Everybody may open a node of our own: if the sandbox did not refuse it, nothing would.
        open_node = Path("/dev/gpu-test-kmsg")
        if not open_node.exists():
            run("mknod", "-m", "666", str(open_node), "c", "1", "11")
        try:
            good, said = probe(
                lambda command: run("sh", "-c", command),
                PROBE + DEVICES.format(devices=[*nodes, str(open_node)]),
            )
        finally:
            open_node.unlink()
        devices = re.findall(r"^open (\S+) (refused|works|ALLOWED)", said, re.MULTILINE)
        cgroup = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
        allowed = [
            line
            for line in said.splitlines()
            if "ALLOWED" in line and (cgroup == 2 or not line.startswith(f"open {open_node}"))
        ]
        refused = len(re.findall(r" refused ", said))
        if not good or allowed or refused < ATTEMPTS + len(nodes):
            raise GpuTestError(f"the sandbox: {allowed or 'the probe failed'}\n{said}")
        if score > 2.0:
            raise GpuTestError(f"systemd-analyze security says {score}")
        self.keep("unit", {"score": score, "refused": refused, "devices": devices, "cgroup": cgroup})

    def recover(self) -> None:
        """Kill -9 of the engine."""
        until("the unit answers", lambda: host.complete(host.STRAIGHT, self.internal_key), 600)
        before, old = host.memory_used_mib(), host.processes()
        engines = [pid for pid, name in old.items() if "Engine" in name]
        if not engines:
            raise GpuTestError(f"no engine among {old}")
        os.kill(engines[0], signal.SIGKILL)
        begun = time.monotonic()
        gone = until(
            "the processes of the killed engine are gone",
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in old),
            120,
        )
        lowest = host.memory_used_mib()
        until("the unit answers again", lambda: host.complete(host.STRAIGHT, self.internal_key), 900)
        if host.smi("--query-gpu=index") and lowest > before / 2:
            raise GpuTestError(f"{lowest} MiB of {before} are still in use after all processes were gone")
        until("the gateway asks it again", lambda: host.complete(host.GATEWAY, self.key), 60)
        self.keep(
            "recover",
            {
                "gone": gone,
                "mib_before": before,
                "mib_after_kill": lowest,
                "served_again": time.monotonic() - begun,
                "startup": host.startup_seconds(),
                "mib_again": host.memory_used_mib(),
                "restarts": host.show("NRestarts")["NRestarts"],
            },
        )

    def change(self, *arguments: str, variables: dict[str, Any]) -> dict[str, float]:
        """Change the instance by the role, and say what that took: the proof of the start, the start, and the whole run."""
        before = set(host.PROOFS.glob("*.json"))
        _output, seconds = self.playbook("--tags", "preflight,uv,vllm", *arguments, variables=variables)
        until("the unit answers", lambda: host.complete(host.STRAIGHT, self.internal_key), 60)
        new = {
            file.stem.partition("-")[0]: json.loads(file.read_text())
            for file in set(host.PROOFS.glob("*.json")) - before
        }
        compiled = new.pop("compiler", {})
        return {
            "seconds": seconds,
            "startup": host.startup_seconds(),
            "kv_cache_tokens": host.kv_cache_tokens(),
            **({"compiled": compiled["seconds"]} if compiled else {}),
            **({"proof": max(entry["seconds"] for entry in new.values())} if new else {}),
        }

    @contextlib.contextmanager
    def asking(self, base: str, key: str) -> Iterator[list[int]]:
        """Ask all the time; how many requests there were, and how many were answered, is told at the end."""
        counts, done = [0, 0], threading.Event()

        def client() -> None:
            while not done.wait(0.2):
                counts[0] += 1
                counts[1] += host.complete(base, key)

        thread = threading.Thread(target=client, daemon=True)
        thread.start()
        try:
            yield counts
        finally:
            done.set()
            thread.join()

    def judgement(self) -> None:
        """What vLLM itself refuses costs no second of service, and a new internal key no restart."""
        until("the unit answers", lambda: host.complete(host.STRAIGHT, self.internal_key), 600)
        before, judged = host.show("MainPID"), len(host.judged())
        wrong = self.variables(options={"quantization": "nonsense"})
        with self.asking(host.GATEWAY, self.key) as refusal, host.watching_memory() as memory:
            output, seconds = self.playbook("--tags", "preflight,uv,vllm", variables=wrong, refused=True)
            # What passes is remembered: options that nobody has asked about yet.
            for number in range(JUDGEMENTS):
                right = self.variables(options={"max-num-seqs": 200 + number})
                self.playbook("--tags", "preflight", variables=right)
        said = re.findall(r"vLLM itself refuses this: ([^\n]*)", output)
        if not said or host.show("MainPID") != before or refusal[0] != refusal[1]:
            raise GpuTestError(
                f"{refusal[1]} of {refusal[0]} requests were answered during a refusal:\n{output[-4000:]}"
            )
        found = {
            "refused": seconds,
            "reason": said[0][:300],
            "requests": refusal,
            "judged": host.judged()[judged:],
            "mib": [memory[0], max(memory)],
        }
        former, self.internal_key = self.internal_key, secrets.token_hex(32)
        (self.directory / "internal_key").write_text(self.internal_key)
        with self.asking(host.GATEWAY, self.key) as rotation:
            _output, seconds = self.playbook(variables={**self.variables(), "vllm_former_key_seconds": 1})
        time.sleep(2)
        if host.show("MainPID") != before or rotation[0] != rotation[1]:
            raise GpuTestError(f"{rotation[1]} of {rotation[0]} requests were answered while the internal key changed")
        if not host.complete(host.STRAIGHT, self.internal_key) or host.complete(host.STRAIGHT, former):
            raise GpuTestError("the instance does not take the new internal key alone")
        self.keep("judgement", {**found, "rotated": seconds, "rotation": rotation})

    def proof(self) -> None:
        """A start that would fail is refused before anything stops, and one that does not is proved."""
        until("the unit answers", lambda: host.complete(host.STRAIGHT, self.internal_key), 600)
        before = host.show("MainPID")
        # On a GPU what killed every start of the release before the role kept it from compiling; a CPU has no such thing.
        deadly = (
            {"VLLM_USE_FLASHINFER_SAMPLER": "1"}
            if self.options.device == "cuda"
            else {"VLLM_LOGGING_LEVEL": "nonsense"}
        )
        with self.asking(host.STRAIGHT, self.internal_key) as requests:
            # vLLM's judgement sees some of this, too; here it is the proof's turn.
            output, seconds = self.playbook(
                "--tags",
                "preflight,uv,vllm",
                variables={**self.variables(environment=deadly), "vllm_judgement": "off"},
                refused=True,
            )
        asked, answered = requests
        reasons = re.findall(r"(?:FileNotFoundError|ValueError|RuntimeError)[^\n]*", output)
        if "Nothing was stopped" not in output or host.show("MainPID") != before or asked != answered:
            raise GpuTestError(f"{answered} of {asked} requests were answered during a refusal:\n{output[-4000:]}")
        self.keep(
            "proof", {"refused": seconds, "reason": reasons[0].replace("''", "'"), "asked": asked, "answered": answered}
        )
        # Harmless, and new: it is proved, and the instance restarted.
        passed = self.change(variables=self.variables(environment={"GPU_TEST": "proof"}))
        self.keep("proof", {**self.results["proof"], "passed": passed})

    def each_point(self, name: str, seed: int) -> list[dict[str, Any]]:
        """The throughput of the unit at each number of streams, once."""
        plan = [
            self.order("unit", seed + streams, requests, streams, "--max-concurrency", str(streams))
            | {"streams": streams}
            for streams, requests in POINTS.items()
        ]
        return [self.short(row) for row in self.bench(plan, name)]

    def parallel(self) -> None:
        """Two GPUs for one model."""
        if len(host.smi("--query-gpu=index")) < 2:
            say("  there are no two GPUs here")
            return
        found: dict[str, Any] = self.change(variables=self.variables(gpus=2))
        self.keep("parallel", found)
        self.keep("parallel", {**found, "throughput": self.each_point("parallel", 5000)})

    def shared(self) -> None:
        """Two engines on one GPU: whoever starts them, one waits until the other answers."""
        units = [host.UNIT, host.NEIGHBOUR]
        ports = [host.STRAIGHT, host.STRAIGHT_TO_NEIGHBOUR]
        found: dict[str, Any] = {}

        def both(how: str) -> None:
            for base in ports:
                until(f"{base} answers", lambda base=base: host.complete(base, self.internal_key), 900)  # type: ignore[misc]
            starts = sorted((host.start(unit) for unit in units), key=lambda start: start["complete"])
            found[how] = starts
            self.keep("shared", found)
            first, second = starts
            if self.options.device == "cuda" and not first["complete"] <= second.get("turn", 0) < second["complete"]:
                raise GpuTestError(f"the engines did not start one after the other: {starts}")

        _output, found["seconds"] = self.playbook(
            "--tags", "preflight,uv,vllm", variables=self.variables(neighbour=True)
        )
        both("role")
        # As at a boot.
        run("systemctl", "restart", *units)
        both("restart")
        found["kv_cache_tokens"] = [host.kv_cache_tokens(unit) for unit in units]
        found["mib"] = host.memory_used_mib()
        self.keep("shared", found)
        self.playbook("--tags", "preflight,uv,vllm")

    def toolkit(self) -> None:
        """An instance that compiles kernels by nvcc."""
        if not self.options.cuda_home:
            say("  no --cuda-home was given")
            return
        found: dict[str, Any] = self.change(
            "-e", f"vllm_cuda_home={self.options.cuda_home}", variables=self.variables()
        )
        told = host.journal()
        found["sampler"] = "Using FlashInfer for top-p & top-k sampling" in told
        self.keep("toolkit", found)
        self.keep("toolkit", {**found, "throughput": self.each_point("toolkit", 6000)})

    def starts(self) -> None:
        """Seconds of cold and warm starts, and of a new release."""
        found: dict[str, list[float]] = {"cold": [], "warm": [], "inherited": []}
        if "deploy" in self.results:
            found["cold"].append(self.results["deploy"]["startup"])
        if "recover" in self.results:
            found["warm"].append(self.results["recover"]["startup"])

        def started(kind: str) -> None:
            until("the unit answers", lambda: host.complete(host.STRAIGHT, self.internal_key), 900)
            found[kind].append(host.startup_seconds())
            say(f"  {kind}: {found[kind][-1]:.1f} s")
            self.keep("starts", found)

        def restart(kind: str, before: Callable[[], None] = lambda: None) -> None:
            run("systemctl", "stop", host.UNIT)
            before()
            run("systemctl", "start", host.UNIT)
            started(kind)

        def forget() -> None:
            for path in host.CACHE.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        for number in range(self.options.starts):
            restart("warm")
            lock = self.directory / f"lock-{number}.txt"
            lock.write_text(self.lock_file().read_text() + f"# a release of its own: {secrets.token_hex(4)}\n")
            made = self.change("-e", f"vllm_lock_file={lock}", variables=self.variables())
            found.setdefault("proof", []).append(made["proof"])
            started("inherited")
        for _ in range(self.options.starts - 1):
            restart("cold", forget)

    def lock_file(self) -> Path:
        """The lock that the release was built from, as the inventory has it."""
        given = yaml.safe_load(Path(self.options.vars).read_text()) if self.options.vars else {}
        if "vllm_lock_file" in given:
            return Path(given["vllm_lock_file"])
        version = self.results["deploy"]["vllm"]
        return ROOT / f"roles/vllm/files/locks/{version}-{self.options.device}.txt"

    # --- load

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """The same release and configuration as an ordinary process of root, on another port, with caches that are warm."""
        until("the unit answers", lambda: host.complete(host.STRAIGHT, self.internal_key), 900)
        current = Path("/etc/vllm/chat/current").resolve()
        config = yaml.safe_load((current / "config.yaml").read_text()) | {"port": host.BARE_PORT}
        (self.directory / "bare.yaml").write_text(yaml.safe_dump(config))
        cache = self.directory / "bare-cache"
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(host.CACHE, cache, symlinks=True)
        text = Path(f"/proc/{host.show('MainPID')['MainPID']}/environ").read_bytes().decode()
        environment = {
            name: value.replace(str(host.CACHE), str(cache))
            for name, _, value in (entry.partition("=") for entry in text.split("\0") if entry)
            if name not in ("CREDENTIALS_DIRECTORY", "INVOCATION_ID", "JOURNAL_STREAM", "NOTIFY_SOCKET")
        }
        # At the path where the unit sees it: caches are found by it. Nothing else of the sandbox.
        release, mount = (current / "release").resolve(), Path("/opt/vllm/release")
        serve = f"mount --bind {release} {mount} && exec {mount}/bin/python {mount}/bin/vllm serve --config {self.directory}/bare.yaml"
        with (self.directory / "bare.log").open("w") as log:
            process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", serve],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd=cache, start_new_session=True,
            )  # fmt: skip
        try:

            def answers() -> bool:
                if process.poll() is not None:
                    raise GpuTestError(f"the bare process ended:\n{(self.directory / 'bare.log').read_text()[-3000:]}")
                return host.complete(f"http://127.0.0.1:{host.BARE_PORT}", self.internal_key)

            until("the bare process answers", answers, 900)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def bench(self, plan: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
        """Carry out a plan of `vllm bench serve`; return what came of each run.

        It takes one key from its environment, that of the instance; runs through the gateway show the client's instead.
        """
        for order in plan:
            if order["way"] == "gateway":
                order["arguments"] += ["--header", f"Authorization=Bearer {self.key}"]
        plan_file, results = self.directory / f"{name}-plan.json", self.directory / f"{name}.jsonl"
        plan_file.write_text(json.dumps(plan))
        results.unlink(missing_ok=True)
        release = Path("/etc/vllm/chat/current/release").resolve()
        # Proxies are for what is outside; the authority of the gateway is known by its file.
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        environment |= {"OPENAI_API_KEY": self.internal_key, "SSL_CERT_FILE": str(host.CA), "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}  # fmt: skip
        output = run(
            f"{release}/bin/python", str(ROOT / "tests/gpu/bench.py"), str(plan_file), str(results), env=environment
        )
        (self.directory / f"{name}.log").write_text(output)
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        for row in rows:
            if row["result"]["failed"]:
                raise GpuTestError(f"{row['result']['failed']} requests failed in {row['name']}")
        return rows

    def order(self, way: str, seed: int, requests: int | str, warmups: int, *more: str) -> dict[str, Any]:
        """One run of `vllm bench serve`. A prompt is never asked twice: prefixes are cached. The warm-up opens the client's connections."""
        base = {
            "bare": f"http://127.0.0.1:{host.BARE_PORT}",
            "unit": host.STRAIGHT,
            "gateway": host.GATEWAY,
        }[way]
        name = f"{way}_{seed}"
        arguments = [
            "--backend", "openai", "--base-url", base, "--endpoint", "/v1/completions", "--model", host.MODEL,
            "--tokenizer", str(self.directory / "shape"), "--dataset-name", "random", "--random-input-len", str(INPUT),
            "--random-output-len", str(OUTPUT), "--random-range-ratio", "0", "--ignore-eos", "--seed", str(seed),
            "--num-prompts", str(requests), "--num-warmups", str(warmups), "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99",
            "--disable-tqdm",
            *more,
        ]  # fmt: skip
        return {"name": name, "way": way, "arguments": arguments}

    def points(self) -> dict[int, int]:
        """Streams -> requests; few on a CPU."""
        return {1: 2, 4: 8} if self.options.device == "cpu" else POINTS

    def throughput(self) -> None:
        """Bare process, hardened unit, and the unit through the gateway, in turns."""
        ways, plan, seed = self.options.ways.split(","), [], 1000
        for pair in range(self.options.pairs):
            for streams, requests in self.points().items():
                for turn in range(len(ways)):
                    seed += 1
                    way = ways[(turn + pair) % len(ways)]
                    plan.append(
                        self.order(way, seed, requests, streams, "--max-concurrency", str(streams))
                        | {"streams": streams}
                    )
        with self.bare():
            rows = self.bench(plan, "throughput")
        self.keep("throughput", [self.short(row) for row in rows])

    def rate(self) -> None:
        """A steady arrival rate that holds 128 running requests, through the gateway."""
        until("the unit answers", lambda: host.complete(host.STRAIGHT, self.internal_key), 900)
        streams = 128 if self.options.device != "cpu" else 4
        closed = self.order("gateway", 9000, streams * 5, streams, "--max-concurrency", str(streams))
        wanted = f"{{rate:{closed['name']}*{RATE_SECONDS if streams == 128 else 5}}}"
        steady = self.order("gateway", 9001, wanted, streams, "--request-rate", f"{{rate:{closed['name']}}}")
        samples: list[tuple[float, float, float]] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                busy = [float(row) for row in host.smi("--query-gpu=utilization.gpu")] or [0.0]
                running = host.metrics(self.internal_key).get("vllm:num_requests_running", 0.0)
                samples.append((time.monotonic(), running, max(busy)))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            rows = self.bench([closed, steady], "rate")
        finally:
            done.set()
            watcher.join()
        # The steady run is the last thing that happened. Its first fifth fills the engine, its last drains it.
        end = max((moment for moment, running, _ in samples if running), default=0.0)
        duration = rows[1]["result"]["duration"]
        middle = [sample for sample in samples if end - 0.8 * duration < sample[0] < end - 0.2 * duration]
        self.keep(
            "rate",
            {
                **self.short(rows[1]),
                "requests_per_second": float(
                    rows[1]["arguments"][rows[1]["arguments"].index("--request-rate") + 1]
                ),
                "running": statistics.mean(sample[1] for sample in middle) if middle else 0.0,
                "busy": statistics.mean(sample[2] for sample in middle) if middle else 0.0,
            },
        )  # fmt: skip

    @staticmethod
    def short(row: dict[str, Any]) -> dict[str, Any]:
        """What the report needs of a run."""
        result = row["result"]
        wanted = (
            "output_throughput", "request_throughput", "duration", "completed",
            "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
        )  # fmt: skip
        return {
            "way": row["way"],
            "streams": row.get("streams"),
            **{key: result[key] for key in wanted if key in result},
        }


STEPS = [
    "deploy",
    "unit",
    "recover",
    "throughput",
    "proof",
    "judgement",
    "rate",
    "starts",
    "parallel",
    "shared",
    "toolkit",
]


def report_file(results: dict[str, Any]) -> Path:
    """The page of these results: named by the card that gave them, and by the version of vLLM."""
    deploy = results.get("deploy", {})
    card = (deploy.get("gpus") or ["0, no GPU"])[0].split(",")[1].strip().removeprefix("NVIDIA ")
    name = re.sub(r"[^a-z0-9.]+", "-", f"{card}-vllm-{deploy.get('vllm', 'unknown')}".lower())
    return ROOT / f"docs/results/{name}.md"


def main() -> int:
    """Read the command line and take the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS), help="which, separated by commas (default: all)")
    parser.add_argument("--directory", type=Path, default=Path("/var/lib/vllm-fleet-gpu-test"))
    parser.add_argument("--vars", type=Path, help="a YAML file with more variables: mirrors, locks, versions")
    parser.add_argument("--harden", action="store_true", help="with the roles base, firewall and ssh_hardening")
    parser.add_argument("--tokenizer", type=Path, help="a directory with a tokenizer (default: the demo's model)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only to try the steps")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--ways", default="bare,unit,gateway", help="what `throughput` measures (default: %(default)s)")
    parser.add_argument("--cuda-home", default="", help="a CUDA toolkit, for the step `toolkit`")
    parser.add_argument("--pairs", type=int, default=3, help="how often each point of `throughput` is measured")
    parser.add_argument("--starts", type=int, default=2, help="how often `starts` goes round")
    parser.add_argument("--report", type=Path, help="where the page goes (default: docs/results, by card and version)")
    options = parser.parse_args()
    wanted = options.steps.split(",")
    if unknown := set(wanted) - {*STEPS, "report"}:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if os.geteuid() != 0:
        parser.error("run it as root: it deploys on this machine")
    steps = Steps(options)
    try:
        for name in [step for step in STEPS if step in wanted]:
            say(f"{name} ...")
            begun = time.monotonic()
            getattr(steps, name)()
            say(f"{name}: {time.monotonic() - begun:.0f} s")
    except GpuTestError as error:
        print(f"tests.gpu: {error}", file=sys.stderr)
        return 1
    page: Path = options.report or report_file(steps.results)
    page.write_text(report.render(steps.results))
    say(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
