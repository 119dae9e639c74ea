"""How often systemd starts an instance that cannot start, and in which order engines start. Begins and ends with the instance `chat` alone."""

from __future__ import annotations

import json
from typing import Any

import yaml
from testinfra.host import Host

from tests.roles import ROOT, applied, until
from tests.served import ask, main_pid, play_gpus

testinfra_hosts = ["docker://vllm-debian13"]

CHAT, _OTHER = yaml.safe_load((ROOT / "molecule/shared/inventory/group_vars/vllm_stand_in.yml").read_text())[
    "vllm_instances"
]
START_SECONDS = 4


def interval(host: Host) -> str:
    """The time over which systemd counts starts, as it knows it."""
    return str(host.check_output("systemctl show --property=StartLimitIntervalUSec --value vllm@chat"))


def test_five_starts_count_however_long_each_of_them_takes(host: Host) -> None:
    assert interval(host) == "2h 6min 25s", "five times vllm_start_timeout (1500) and the pauses between"
    before = main_pid(host, "chat")
    applied(host, "vllm", vllm_instances=[CHAT], vllm_start_timeout=300)
    assert interval(host) == "26min 25s"
    assert main_pid(host, "chat") == before, "it restarts nobody"


def one_after_the_other(host: Host) -> bool:
    """Whether the engine of one began after the other one was up; both were told to start at the same time."""
    times = []
    for name, port in (("left", 8003), ("right", 8004)):
        until(lambda name=name, port=port: ask(host, port, name)[0] == 200, 60, f"{name} does not answer")  # type: ignore[misc]
        log = host.check_output(
            "journalctl --unit vllm@%s --output short-unix --no-pager --lines 200", name
        ).splitlines()
        up = max(float(line.split()[0]) for line in log if "startup complete" in line)
        times.append((up, name))
    (first, _), (second, _) = sorted(times)
    return second - first >= START_SECONDS


def test_engines_on_one_gpu_start_one_after_the_other(host: Host) -> None:
    """When both change, and when systemd starts both at once, as at a boot."""
    pair: list[dict[str, Any]] = [
        {
            "name": name, "model": "tiny", "port": port, "gpus": [0], "options": {"gpu-memory-utilization": 0.4, "served-model-name": [name]},
            "environment": {"STAND_IN": json.dumps({"start_seconds": START_SECONDS})},
        }
        for name, port in (("left", 8003), ("right", 8004))
    ]  # fmt: skip
    play_gpus(host)
    try:
        gpus = {"vllm_device": "cuda", "vllm_version": "0.32.0", "vllm_packages": [], "vllm_start_proof": "off"}
        applied(host, "vllm", vllm_instances=pair, vllm_allow_shared_gpus=True, **gpus)
        assert one_after_the_other(host)
        host.check_output("systemctl stop vllm@left vllm@right && systemctl start vllm@left vllm@right")
        assert one_after_the_other(host)
    finally:
        host.check_output("rm /usr/bin/nvidia-smi")
    applied(host, "vllm", vllm_instances=[CHAT])
