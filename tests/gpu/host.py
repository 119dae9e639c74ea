"""What the steps ask of the machine: its unit, its GPUs, its endpoint."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

UNIT, NEIGHBOUR = "vllm@chat.service", "vllm@neighbour.service"
CACHE = Path("/var/cache/vllm/chat")
STRAIGHT, STRAIGHT_TO_NEIGHBOUR = "http://127.0.0.1:8000", "http://127.0.0.1:8001"
GATEWAY = "https://localhost:443"
BARE_PORT = 8100
CA = Path("/etc/ssl/vllm-fleet/ca.pem")
PROOFS = Path("/opt/vllm/proofs")
JUDGED = Path("/opt/vllm/judged")
MODEL = "shape"


class GpuTestError(Exception):
    """Something was not as it has to be."""


def run(*command: str, check: bool = True, **options: object) -> str:
    """Run a program and return what it printed; its whole output is told when it fails."""
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options  # type: ignore[call-overload]
    )  # fmt: skip
    if check and done.returncode:
        raise GpuTestError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return str(done.stdout)


def until(what: str, true: Callable[[], bool], seconds: float) -> float:
    """Wait until something is true; return how long that took."""
    begun = time.monotonic()
    while not true():
        if time.monotonic() - begun > seconds:
            raise GpuTestError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - begun


def complete(base: str, key: str, tokens: int = 1) -> bool:
    """Whether a completion of so many tokens comes back."""
    _scheme, _, address = base.partition("://")
    connection: http.client.HTTPConnection
    if base.startswith("https"):
        connection = http.client.HTTPSConnection(
            address, timeout=60, context=ssl.create_default_context(cafile=str(CA))
        )
    else:
        connection = http.client.HTTPConnection(address, timeout=60)
    body = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True})
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        answer = json.load(response)
        return response.status == 200 and answer["usage"]["completion_tokens"] == tokens
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return False
    finally:
        connection.close()


def show(*properties: str, unit: str = UNIT) -> dict[str, str]:
    """Properties of a unit."""
    lines = run("systemctl", "show", unit, f"--property={','.join(properties)}").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def start(unit: str = UNIT) -> dict[str, float]:
    """Moments of the last start of a unit, in seconds after the boot.

    `begun` is that of its process, `complete` that of the log line by which vLLM says that it serves; where it had to wait for another engine on
    its GPU, `turn` is that of the first line afterwards.
    """
    begun = int(show("ExecMainStartTimestampMonotonic", unit=unit)["ExecMainStartTimestampMonotonic"])
    boot = run("cat", "/proc/sys/kernel/random/boot_id").strip().replace("-", "")
    found, waited = {"begun": begun / 1e6}, False
    for line in run("journalctl", f"--unit={unit}", f"_BOOT_ID={boot}", "--output=json", "--no-pager").splitlines():
        entry = json.loads(line)
        moment = int(entry["__MONOTONIC_TIMESTAMP"])
        message = entry.get("MESSAGE") or ""
        text = message if isinstance(message, str) else bytes(message).decode(errors="replace")
        if moment < begun:
            continue
        if waited:
            found.setdefault("turn", moment / 1e6)
        waited = waited or "another engine is starting on GPU" in text
        if "Application startup complete" in text:
            return {**found, "complete": moment / 1e6}
    raise GpuTestError(f"vLLM has not said that its startup is complete: {unit}")


def startup_seconds() -> float:
    """From the start of the unit's process to the log line by which vLLM says that it serves."""
    moments = start()
    return moments["complete"] - moments["begun"]


def journal(unit: str = UNIT) -> str:
    """What a unit has logged since its process was started."""
    invocation = show("InvocationID", unit=unit)["InvocationID"]
    return run("journalctl", f"_SYSTEMD_INVOCATION_ID={invocation}", "--output=cat", "--no-pager")


def kv_cache_tokens(unit: str = UNIT) -> int:
    """How many tokens the KV cache holds, by vLLM's own word; 0 when it says nothing."""
    found = re.findall(r"GPU KV cache size: ([0-9,]+) tokens", journal(unit))
    return int(found[-1].replace(",", "")) if found else 0


def judged() -> list[float]:
    """Seconds of each judgement of vLLM that passed and is remembered, oldest first."""
    records = sorted(JUDGED.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text())["seconds"] for path in records]


def compilers() -> list[str]:
    """CUDA compilers and ninja that the host has: none, unless somebody installed them."""
    places = [
        *Path("/usr/local").glob("cuda*/bin/nvcc"),
        Path("/usr/bin/nvcc"),
        Path("/usr/bin/ninja"),
        Path("/usr/local/bin/ninja"),
    ]
    return [str(path) for path in places if path.exists()]


def processes() -> dict[int, str]:
    """The main process of the unit and everything that it started: pid -> name."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        parents[int(path.parent.name)] = int(rest.split()[1]), name
    found, todo = {}, [int(show("MainPID")["MainPID"])]
    while todo:
        pid = todo.pop()
        if pid in parents:
            found[pid] = parents[pid][1]
            todo += [child for child, (parent, _) in parents.items() if parent == pid]
    return found


def smi(query: str) -> list[str]:
    """Rows of nvidia-smi; none where there is no GPU."""
    try:
        return run("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    except FileNotFoundError:
        return []


def memory_used_mib() -> int:
    """Memory in use on all GPUs."""
    return sum(int(row) for row in smi("--query-gpu=memory.used"))


@contextlib.contextmanager
def watching_memory() -> Iterator[list[int]]:
    """Memory in use on all GPUs, in MiB: before, and whenever somebody looked meanwhile."""
    found, done = [memory_used_mib()], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            found.append(memory_used_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def metrics(key: str) -> dict[str, float]:
    """vLLM's metrics without their labels, summed up."""
    found: dict[str, float] = {}
    connection = http.client.HTTPConnection("127.0.0.1:8000", timeout=5)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
        for line in connection.getresponse().read().decode().splitlines():
            if line.startswith("vllm:"):
                name, _, value = line.rpartition(" ")
                found[name.split("{")[0]] = found.get(name.split("{")[0], 0.0) + float(value)
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()
    return found
