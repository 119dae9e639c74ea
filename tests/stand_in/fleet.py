"""A fleet of test hosts that have the stand-in for vLLM: gateways and inference hosts over SSH, an inventory that a test changes, its playbooks.

For what is about fleets and not about hosts: base, firewall and SSH stay as the hosts have them, so that five hosts come up in two minutes on two cores.
"""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.conftest import ENVIRONMENT, ROOT, Done, on, program, request
from tests.hosts import hosts
from tests.load import Gateway, Load
from tests.stand_in import wheel

KEY = "a" * 40
WHEELS = "/srv/stand-in"
MODEL = {"source": "path", "path": f"{ROOT}/molecule/model_store/files/tiny-model", "copy": True}
OS = "debian13"
# What it says (vllm/stand_in/api.py, which only the wheel can load): a load compares every answer with it.
WORDS = (" Paris", " is", " the", " capital", " of", " France", ".")


def variables(directory: Path, **more: Any) -> dict[str, Any]:
    """What the inventories of such fleets have in common."""
    return {
        "ansible_ssh_common_args": f"-F {directory}/ssh/config",
        "fleet_skip_roles": ["base", "firewall", "ssh_hardening"],
        "vllm_device": "cpu",
        "vllm_internal_key": "c" * 40,
        "vllm_torch_backend": "",
        "uv_find_links": [WHEELS],
        "model_store_models": [{"name": "tiny", **MODEL}],
        "gateway_routes": [{"model": "tiny", "instance": "chat"}],
        **more,
    }


def give_release(
    directory: Path, workers: Sequence[str], version: str = wheel.VERSION, **settings: Any
) -> dict[str, Any]:
    """Put a release of the stand-in on hosts, which behaves by its settings; returns the variables that name it."""
    kind = f"{version}-{'-'.join(settings) or 'good'}"
    made, lock = wheel.write(directory / kind, version, settings)
    for worker in workers:
        on(worker, f"mkdir -p {WHEELS}/{kind}")
        hosts.docker("cp", str(made), f"{worker}:{WHEELS}/{kind}/{made.name}")
    return {
        "vllm_version": version.partition("+")[0],
        "vllm_lock_file": str(lock),
        "uv_find_links": [f"{WHEELS}/{kind}"],
    }


@dataclass
class Fleet:
    """The fleet, and what its inventory says today."""

    directory: Path
    gateways: list[str]
    workers: list[str]
    variables: dict[str, Any]
    addresses: dict[str, str]
    host_variables: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write_inventory(self) -> Path:
        """The inventory as it is now."""
        each = {
            name: {"ansible_host": address, **self.host_variables.get(name, {})}
            for name, address in self.addresses.items()
        }
        groups = {"gateway": self.gateways, "vllm": self.workers}
        inventory = {
            "all": {"vars": self.variables, "hosts": {name: each[name] for names in groups.values() for name in names}},
            **{group: {"hosts": {name: {} for name in names}} for group, names in groups.items()},
        }
        file = self.directory / "hosts.json"
        file.write_text(json.dumps(inventory))
        return file

    def command(self, playbook: str, *arguments: str) -> list[str]:
        """The command that runs a playbook."""
        return ["ansible-playbook", playbook, "-i", str(self.write_inventory()), *arguments]

    def run(self, *arguments: str, playbook: str = "site.yml", check: bool = False, **variables: Any) -> Done:
        """Run a playbook; what is given on top of the inventory stays in it."""
        self.variables |= variables
        return program(*self.command(playbook, *arguments), check=check)

    def begin(self, playbook: str, *arguments: str) -> subprocess.Popen[str]:
        """Begin a playbook, for a test that does something while it runs."""
        return subprocess.Popen(
            self.command(playbook, *arguments),
            cwd=ROOT, env=ENVIRONMENT, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ask(self, gateway: str, method: str, path: str, body: object = None) -> tuple[int, Any, dict[str, str]]:
        """Ask a gateway: the status, the answer, and the headers."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        reply = request(f"https://{self.addresses[gateway]}", method, path, key=KEY, body=body, tls=context)
        return reply.status, reply.json(), reply.headers

    def state(self, gateway: str) -> dict[str, Any]:
        """What a gateway's checks say of the backends."""
        found: dict[str, Any] = json.loads(on(gateway, "cat /run/vllm-gateway/state.json"))["backends"]
        return found

    def used(self, gateway: str) -> set[str]:
        """The backends that a gateway sends requests to."""
        return {name for name, backend in self.state(gateway).items() if backend["use"]}

    def load(self, **more: Any) -> Load:
        """Clients of all gateways, who know their authorities."""
        gateways = []
        for name in self.gateways:
            authority = on(name, "cat /etc/ssl/vllm-fleet/ca.pem")
            gateways.append(Gateway(name, self.addresses[name], tls=ssl.create_default_context(cadata=authority)))
        models = [route["model"] for route in self.variables["gateway_routes"]]
        return Load(gateways, models, KEY, **{"says": says, **more})


def says(tokens: int) -> str:
    """What the stand-in answers."""
    return "".join(WORDS[number % len(WORDS)] for number in range(tokens))


def up(name: str, directory: Path, gateways: Sequence[str], workers: Sequence[str], **more: Any) -> Fleet:
    """Start the hosts of a fleet with nothing on them, and write down what its inventory is to say."""
    gateways, workers = ([f"{name}-{each}" for each in names] for names in (gateways, workers))
    hosts.down(name)
    shutil.rmtree(directory / "ssh", ignore_errors=True)
    hosts.up(name, dict.fromkeys((*gateways, *workers), OS), ssh=directory / "ssh")
    addresses = {host: hosts.address(host) for host in (*gateways, *workers)}
    told = {
        "gateway_server_names": ["llm.test", *(addresses[gateway] for gateway in gateways)],
        "gateway_clients": [{"name": "a", "key": KEY, "requests_per_minute": 100_000, "concurrent_requests": 1000}],
        "gateway_address_requests_per_minute": 100_000,
    }
    return Fleet(
        directory,
        gateways,
        workers,
        variables(directory, **{**told, **give_release(directory, workers), **more}),
        addresses,
    )
