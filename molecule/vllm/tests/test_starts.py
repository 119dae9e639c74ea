"""How often systemd starts an instance that cannot start. Begins and ends with the instance `chat` alone."""

from __future__ import annotations

import yaml
from testinfra.host import Host

from tests.roles import ROOT, applied
from tests.served import main_pid

testinfra_hosts = ["docker://vllm-debian13"]

CHAT, _OTHER = yaml.safe_load((ROOT / "molecule/shared/inventory/group_vars/vllm_stand_in.yml").read_text())[
    "vllm_instances"
]


def interval(host: Host) -> str:
    """The time over which systemd counts starts, as it knows it."""
    return str(host.check_output("systemctl show --property=StartLimitIntervalUSec --value vllm@chat"))


def test_five_starts_count_however_long_each_of_them_takes(host: Host) -> None:
    assert interval(host) == "2h 6min 25s", "five times vllm_start_timeout (1500) and the pauses between"
    before = main_pid(host, "chat")
    applied(host, "vllm", vllm_instances=[CHAT], vllm_start_timeout=300)
    assert interval(host) == "26min 25s"
    assert main_pid(host, "chat") == before, "it restarts nobody"
