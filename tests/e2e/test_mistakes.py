"""Inventories with a mistake in them: each is refused before anything changes, by a message that says what would be right.

All of them are hosts of one run of playbooks/site.yml --tags preflight: every host of that inventory is the same test host
under a name of its own, with right variables except for a mistake of each role at most. So the test also shows that a run
tells the mistakes of all hosts and all roles, not the first one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import make_pair
from tests.e2e.conftest import ROOT, Done, on, program
from tests.hosts import hosts

HOST = "e2e-mistakes-host"
KEY, OTHER_KEY, SECRET = "a" * 40, "b" * 40, "Secret-That-Must-Not-Be-Told-0123456789"
INSTANCE: dict[str, Any] = {"name": "chat", "model": "tiny", "port": 8000, "options": {"max-model-len": 128}}
MODEL = {"name": "tiny", "source": "huggingface", "repository": "acme/tiny", "revision": "a" * 40}
CLIENT = {"name": "team-a", "key": KEY, "requests_per_minute": 60, "concurrent_requests": 4}
RIGHT: dict[str, Any] = {
    "ansible_connection": "community.docker.docker",
    "ansible_host": HOST,
    "fleet_address": "10.0.0.1",
    "vllm_device": "cpu",
    "vllm_internal_key": "c" * 40,
    "vllm_instances": [INSTANCE],
    "model_store_models": [MODEL],
    "gateway_server_names": ["llm.test"],
    "gateway_routes": [{"model": "tiny", "instance": "chat"}],
    "gateway_clients": [CLIENT],
    # Ansible comes by the container engine here, so it is not known whose login by SSH has to be kept.
    "ssh_hardening_login_users": ["root"],
    # each of the hosts is a fleet of its own
    "gateway_vllm_group": "{{ inventory_hostname }}_fleet",
}


def instance(**changes: object) -> dict[str, Any]:
    """The right instance, changed. A value of ... takes the key away."""
    return {"vllm_instances": [{key: value for key, value in {**INSTANCE, **changes}.items() if value is not ...}]}


def options(**changes: object) -> dict[str, Any]:
    """The right instance with other options of vLLM."""
    return instance(options={key.replace("_", "-"): value for key, value in changes.items()})


def model(**changes: object) -> dict[str, Any]:
    """The right model, changed."""
    return {"model_store_models": [{key: value for key, value in {**MODEL, **changes}.items() if value is not ...}]}


def client(**changes: object) -> dict[str, Any]:
    """The right client, changed."""
    return {"gateway_clients": [{key: value for key, value in {**CLIENT, **changes}.items() if value is not ...}]}


def route(**changes: object) -> dict[str, Any]:
    """The right route, changed."""
    return {"gateway_routes": [{**RIGHT["gateway_routes"][0], **changes}]}


def files(certificate: str, key: str) -> dict[str, Any]:
    """A certificate that is given."""
    return {"tls_certificate_source": "files", "tls_certificate_certificate": certificate, "tls_certificate_key": key}


GOOD, EXPIRED, FOREIGN = make_pair(name="llm.test"), make_pair(-1, "llm.test"), make_pair(name="other.test")
# What is wrong -> the variables, and what must be said.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": (
        instance(model="tinny"),
        "vllm_instances[0]: model 'tinny' is not in model_store_models; did you mean 'tiny'?",
    ),
    "duplicate port": (
        {"vllm_instances": [INSTANCE, {**INSTANCE, "name": "b"}]},
        "vllm_instances: port 8000 is used by 2 instances",
    ),
    "duplicate instance": (
        {"vllm_instances": [INSTANCE, {**INSTANCE, "port": 8001}]},
        "vllm_instances: name 'chat' is used by 2 instances",
    ),
    "typo in a key of an instance": (
        instance(prot=1),
        "vllm_instances[0] (chat): key 'prot' is unknown; did you mean port?",
    ),
    "typo in a key of a model": (model(revison="x"), "key 'revison' is unknown; did you mean revision?"),
    "typo in a key of a route": (
        {"gateway_routes": [{"model": "tiny", "instance": "chat", "instanse": 1}]},
        "gateway_routes[0]: key 'instanse' is unknown; did you mean instance?",
    ),
    "typo in a key of a client": (
        client(request_per_minute=1),
        "gateway_clients[0] (team-a): key 'request_per_minute' is unknown; did you mean requests_per_minute?",
    ),
    "typo in a variable": (
        {"gateway_server_name": ["x"]},
        "gateway_server_name is not a variable of the role gateway; did you mean gateway_server_names?",
    ),
    "misspelt option": (
        options(max_modellen=1),
        "option 'max-modellen' is not one of vllm serve's; did you mean 'max-model-len'?",
    ),
    "removed option": (
        options(rope_scaling="x"),
        "option 'rope-scaling' is not one of vllm serve's any more; write hf-overrides",
    ),
    "option of the wrong type": (
        options(enforce_eager="yes"),
        "option 'enforce-eager' is 'yes'; it must be true or false",
    ),
    "option that the role sets": (
        options(api_key=SECRET),
        "option 'api-key' cannot be set here: it comes from vllm_internal_key",
    ),
    "unsafe environment": (
        instance(environment={"VLLM_SERVER_DEV_MODE": 1}),
        "environment variable VLLM_SERVER_DEV_MODE is refused: it opens endpoints",
    ),
    "injection into a unit file": (
        instance(environment={"A": f"x\nExecStart={SECRET}"}),
        "environment variable A holds a line break or another control character",
    ),
    "injection into a path": (
        instance(model="../../etc"),
        "'model' must be the name of a model in the model store, not a path or a repository",
    ),
    "injection by an instance's name": (
        instance(name="a b;c"),
        "'name' must consist of lower-case letters, digits and dashes",
    ),
    "injection into Nginx by a name": (
        {"gateway_server_names": ["a;return 200"]},
        "gateway_server_names has 'a;return 200', which is neither a DNS name in lower case nor an IP address",
    ),
    "injection into Nginx by a client": (
        client(name='a" 1; #'),
        "gateway_clients[0]: name is 'a\" 1; #'; it must be 1 to 63 of a-z, 0-9 and -",
    ),
    "empty key": (
        client(key=""),
        "the key of team-a is not at least 16 printable characters of ASCII without spaces; `openssl rand -hex 32` makes one",
    ),
    "short key": (client(key="abc-123"), "the key of team-a is not at least 16 printable characters"),
    "a key of two words": (client(key=f"{SECRET} x"), "the key of team-a is not at least 16 printable characters"),
    "key and keys": (client(keys=[{"key": SECRET}]), "team-a has both `key` and `keys`; put the key into `keys`"),
    "a key and its hash": (
        client(key=..., keys=[{"key": SECRET, "sha256": "0" * 64}]),
        "keys[0] of team-a has both `key` and `sha256`; it must have one of them",
    ),
    "a date that is none": (
        client(key=..., keys=[{"key": SECRET, "expires": "next year"}]),
        "expires of keys[0] of team-a is 'next year'; it must be a date such as 2027-01-31",
    ),
    "only an old key": (
        client(key=..., keys=[{"key": SECRET, "expires": "2020-01-31"}]),
        "gateway_clients: every key of team-a has expired; give it one that has not, or leave the client out",
    ),
    "nobody to ask as": (
        client(key=..., keys=[{"sha256": "0" * 64}]),
        "no client in gateway_clients has a key that can be shown: only SHA-256, or keys that have expired.",
    ),
    "the key between gateway and vLLM": (client(key="c" * 40), "the key of team-a is the internal key"),
    "a model that no route has": (
        client(models=["tinny"]),
        "gateway_clients: tinny in models of team-a is no model of gateway_routes; there are tiny",
    ),
    "duplicate key": (
        {"gateway_clients": [CLIENT, {**CLIENT, "name": "team-b"}]},
        "gateway_clients: team-a and team-b have the same key; give each client its own",
    ),
    "client twice": (
        {"gateway_clients": [CLIENT, {**CLIENT, "key": OTHER_KEY}]},
        "gateway_clients: the name team-a is used twice",
    ),
    "no client": ({"gateway_clients": []}, "gateway_clients must list who may use the gateway, with name, key"),
    "limit of zero": (
        client(concurrent_requests=0),
        "gateway_clients: concurrent_requests of team-a is 0; it must be at least 1",
    ),
    "limit in words": (
        client(requests_per_minute="many"),
        "gateway_clients[0] (team-a): requests_per_minute is 'many', but must be a whole number",
    ),
    "limit missing": (
        client(requests_per_minute=...),
        "gateway_clients[0] (team-a): requests_per_minute is missing; it is: Sustained rate",
    ),
    "number below its least": ({"gateway_max_body_mib": 0}, "gateway_max_body_mib is 0; it must be at least 1"),
    "negative GPU": (
        {**instance(gpus=[-1]), "vllm_device": "cuda"},
        "vllm_instances[0] (chat): 'gpus' must be a list of numbers from 0",
    ),
    "GPU in words": (instance(gpus=["all"]), "vllm_instances[0] (chat): gpus[0] is 'all', but must be a whole number"),
    "GPU on a CPU host": (instance(gpus=[0]), "'gpus' must be empty: vllm_device is cpu"),
    "fewer GPUs than the parallel sizes": (
        {**instance(gpus=[0], options={"tensor-parallel-size": 2}), "vllm_device": "cuda"},
        "'gpus' names 1 GPU(s), but its parallel sizes (tensor-parallel-size) use 2",
    ),
    "port out of range": (instance(port=80000), "port is 80000; it must be a number from 1024 to 65535"),
    "port in words": (instance(port="http"), "vllm_instances[0] (chat): port is 'http', but must be a whole number"),
    "same port twice on the gateway": (
        {"gateway_http_port": 443},
        "they must be two different numbers between 1 and 65535",
    ),
    "branch instead of a revision": (
        model(revision="main"),
        "revision is `main`; it takes the 40 hexadecimal digits of a commit",
    ),
    "a PROXY protocol that nobody is believed in": (
        {"gateway_proxy_protocol": True},
        "gateway_proxy_protocol is true and gateway_trusted_proxies is empty",
    ),
    "plain HTTP for nobody": (
        {"gateway_plain_http": True},
        "gateway_plain_http is true and gateway_trusted_proxies is empty",
    ),
    "everybody as a trusted proxy": (
        {"gateway_trusted_proxies": ["0.0.0.0/0"]},
        "gateway_trusted_proxies: 0.0.0.0/0 is everybody",
    ),
    "every origin": ({"gateway_cors_origins": ["*"]}, "gateway_cors_origins: * is no exact origin"),
    "certificates of clients without TLS": (
        {"gateway_client_ca_file": "/etc/ca.pem", "gateway_plain_http": True, "gateway_trusted_proxies": ["10.0.0.5"]},
        "without TLS no client can show a certificate",
    ),
    "idle connections that close at once": (
        {"gateway_keepalive_seconds": 0},
        "gateway_keepalive_seconds is 0; it must be at least 1",
    ),
    "certificate without a key": (
        files(GOOD[0], ""),
        "a certificate and its key, PEM and not encrypted, must be given: by tls_certificate_certificate_file and tls_certificate_key_file",
    ),
    "key of another certificate": (files(GOOD[0], FOREIGN[1]), "does not belong to the certificate of"),
    "expired certificate": (files(*EXPIRED), "is valid from"),
    "host name that is not covered": (
        files(*FOREIGN),
        "The certificate does not cover llm.test of tls_certificate_names; it covers DNS:other.test",
    ),
    "route to nowhere": (
        {"gateway_routes": [{"model": "tiny", "instance": "chatt"}]},
        "gateway_routes[0] (tiny) names the instance chatt, but no host of the group <host>_fleet has it in vllm_instances; there are chat",
    ),
    "route by a name that the instance does not have": (
        {"gateway_routes": [{"model": "Tiny", "instance": "chat"}]},
        "gateway_routes[0] (Tiny): model must be the name by which the instance chat of <host> serves its model, tiny;",
    ),
    "route twice": (
        {"gateway_routes": [{"model": "tiny", "instance": "chat"}] * 2},
        "gateway_routes[1] (tiny) has the model and the instance of gateway_routes[0] (tiny)",
    ),
    "alias that is the model": (
        route(aliases=["tiny"]),
        "gateway_routes[0] (tiny): the alias tiny is the model itself",
    ),
    "path that does not exist": (
        route(paths=["/v1/chats"]),
        "gateway_routes[0]: paths[0] is '/v1/chats', but must be one of /v1/completions, /v1/chat/completions,",
    ),
    "path of another kind": (
        {**route(paths=["/v1/chat/completions"]), **options(runner="pooling")},
        "gateway_routes[0] (tiny): /v1/chat/completions in paths is none that the instance chat can have, whose options say runner: pooling;",
    ),
    "route for a stranger": (
        route(clients=["team-b"]),
        "gateway_routes[0] (tiny): team-b in clients is none of gateway_clients; did you mean team-a?",
    ),
    "share of nothing": (route(weight=0), "gateway_routes[0] (tiny): weight is 0; it must be at least 1"),
    "more backends than there are": (
        route(min_available=2),
        "gateway_routes[0] (tiny): min_available is 2; it must be from 0 to 1, since the instance chat has 1 backend",
    ),
    "balance that does not exist": (
        route(balance="random"),
        "gateway_routes[0]: balance is 'random', but must be one of least, prefix, session",
    ),
    "no address for the fleet": (
        {"fleet_address": ""},
        "which is no IP address, and fleet_address is not set; set fleet_address to the IP address",
    ),
    "wrong address for the fleet": (
        {"fleet_address": "10.0.0.256"},
        "fleet_address is '10.0.0.256'; it must be an IP address",
    ),
    "all addresses": (
        {"vllm_bind_address": "0.0.0.0"},
        "vllm_bind_address is 0.0.0.0; it must be one IP address of this host, or empty",
    ),
    "port taken by another program": (
        instance(port=9999),
        "vllm_instances (chat): port 9999 is taken by python3; choose another or stop it",
    ),
    "not enough memory": (
        instance(environment={"VLLM_CPU_KVCACHE_SPACE": 5000}),
        "GB of memory, but the host has",
    ),
    "no space for a release": (
        {"vllm_releases_path": "/mnt/small/releases"},
        "/mnt/small has 0.1 GB free, but building a release takes 6 GB; make room or set vllm_releases_path",
    ),
    "no GPU": (
        {**instance(gpus=[0]), "vllm_device": "cuda"},
        "vllm_device is cuda, but nvidia-smi is not there: install the NVIDIA driver first, or set vllm_device: cpu",
    ),
    "version below the floor": (
        {"vllm_version": "0.26.0"},
        "vllm_version is 0.26.0, but versions below 0.32.0 have known holes",
    ),
    "version without a lock": ({"vllm_version": "0.99.0"}, "There is no lock for vLLM 0.99.0 on cpu"),
    "unknown device": ({"vllm_device": "tpu"}, "vllm_device is 'tpu', but must be one of cuda, cpu"),
    "no internal key": (
        {"vllm_internal_key": ""},
        "vllm_internal_key is not set. Make one of at least 32 characters with `openssl rand -hex 32`",
    ),
    "secret missing from the vault": (
        client(key="{{ vault_team_a_key }}"),
        "gateway_clients cannot be read: 'vault_team_a_key' is undefined; a secret of that name may be missing from the vault",
    ),
    "Python too old": (
        {"uv_python": "system", "uv_python_minimum": "3.99"},
        "uv_python is `system`, but the Python of <host> is 3.",
    ),
    "a role that cannot be left out": (
        {"fleet_skip_roles": ["vllm"]},
        "fleet_skip_roles[0] is 'vllm', but must be one of base, firewall, ssh_hardening, nvidia_driver",
    ),
    "branch of the driver": (
        {**instance(gpus=[0]), "vllm_device": "cuda", "nvidia_driver_branch": "5800"},
        'nvidia_driver_branch is 5800; it is auto or three digits in quotes, such as "580"',
    ),
    "GPUs that are not there": (
        {**instance(gpus=[0]), "vllm_device": "cuda", "nvidia_driver_expected_gpus": 8},
        "The NVIDIA driver of <host>:",
    ),
    "size of logs without a unit": (
        {"fleet_docker": True, "docker_log_max_size": "100"},
        "docker_log_max_size is 100; Docker takes sizes such as 100m",
    ),
    "containers where there is no GPU": (
        {**instance(gpus=[0]), "vllm_device": "cuda", "fleet_docker": True},
        "nvidia_container_toolkit_without_gpu",
    ),
    "SSH from nowhere": (
        {"firewall_admin_networks": []},
        "firewall_admin_networks is empty, so nobody could log in any more; say who may",
    ),
    "a network that is none": (
        {"firewall_admin_networks": ["10.0.0.0/33"]},
        "firewall_admin_networks has '10.0.0.0/33', which is no network; it takes networks and addresses such as 10.0.0.0/8",
    ),
    "typo in a key of what is open": (
        {"firewall_allow": [{"name": "storage", "port": [2049], "networks": ["10.0.0.0/8"]}]},
        "firewall_allow[0] (storage): key 'port' is unknown; did you mean ports?",
    ),
    "nobody's login to keep": (
        {"ssh_hardening_login_users": []},
        "name at least one user in ssh_hardening_login_users",
    ),
    "SSH without a port": ({"ssh_hardening_ports": []}, "ssh_hardening_ports is empty; name at least one port"),
    "injection into sshd_config": (
        {"ssh_hardening_allow_users": ["alice\nPermitRootLogin yes"]},
        "it takes one name or pattern for each entry, without blanks",
    ),
    "a public key that is none": (
        {"ssh_hardening_authorized_keys": [{"user": "alice", "keys": ["ssh-rsa"], "exclusive": False}]},
        "ssh_hardening_authorized_keys[0] (alice): keys[0] is no public key; it is one line such as `ssh-ed25519 AAAA... alice@laptop`",
    ),
    "a private key in the place of a public one": (
        {"ssh_hardening_authorized_keys": [{"user": "alice", "keys": [GOOD[1]], "exclusive": False}]},
        "keys[0] is a private key; it belongs to nobody but its owner",
    ),
    "root in words": (
        {"ssh_hardening_permit_root_login": "maybe"},
        "ssh_hardening_permit_root_login is 'maybe', but must be one of",
    ),
    "a kernel setting that is none": (
        {"base_sysctl": {"vm swappiness": 10}},
        "base_sysctl has 'vm swappiness'; a setting is written with dots",
    ),
    "more open files than the kernel has": (
        {"base_limit_nofile": 99999999},
        "base_limit_nofile is 99999999, more than the kernel allows a process",
    ),
    "administrators without a group": (
        {"base_admin_users": ["alice"]},
        "base_admin_users has alice, but base_admin_group names",
    ),
    "a pattern that is none": (
        {"base_unattended_upgrades_exclude": ["^lib("]},
        "base_unattended_upgrades_exclude has '^lib(', which is no regular expression",
    ),
    "journal without a size": (
        {"base_journal_max_size": "much"},
        "base_journal_max_size is much; journald takes sizes such as 2G",
    ),
}


# The prefix of a variable -> the role whose mistake it is. The names of the certificate are those of the gateway.
ROLES = {
    "base_": "base", "docker_": "docker", "firewall_": "firewall", "gateway_": "gateway", "model_store_": "model_store",
    "ssh_hardening_": "ssh_hardening", "tls_certificate_": "gateway", "vllm_": "vllm",
}  # fmt: skip


def together() -> list[list[str]]:
    """The mistakes that share a host: of each role one, because a role that finds one may not get to the next. Others have their own."""
    groups: list[dict[str, str]] = []
    for mistake, (changes, _) in MISTAKES.items():
        roles = {next((role for prefix, role in ROLES.items() if name.startswith(prefix)), mistake) for name in changes}
        role = roles.pop() if len(roles) == 1 else mistake
        known = set(ROLES.values())
        place = next((group for group in groups if role in known and set(group) <= known - {role}), None)
        if place is None:
            groups.append(place := {})
        place[role] = mistake
    return [list(group.values()) for group in groups]


HOSTS = {f"host{number}": mistakes for number, mistakes in enumerate(together())}


def alias(mistake: str) -> str:
    """The name of a mistake's host."""
    return next(name for name, mistakes in HOSTS.items() if mistake in mistakes)


def inventory(directory: Path, variables: dict[str, dict[str, Any]]) -> Path:
    """An inventory of hosts with the right variables except for these."""
    names = {name: {} for name in variables}  # type: dict[str, dict[str, Any]]
    tree: dict[str, Any] = {
        "all": {
            "vars": RIGHT,
            "hosts": variables,
            "children": {
                "vllm": {"hosts": names},
                "gateway": {"hosts": names},
                **{f"{name}_fleet": {"hosts": {name: {}}} for name in variables},
            },
        }
    }
    file = directory / "hosts.json"
    file.write_text(json.dumps(tree))
    return file


def preflight(hosts_file: Path, *arguments: str) -> Done:
    """Run the preflight alone."""
    return program(
        "ansible-playbook",
        "site.yml",
        "--tags",
        "preflight",
        "--forks",
        "6",
        "-i",
        str(hosts_file),
        *arguments,
        check=False,
    )


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """A bare host."""
    hosts.down("e2e-mistakes")
    hosts.up("e2e-mistakes", {HOST: "debian12"})
    on(HOST, "mkdir /mnt/small && mount -t tmpfs -o size=100m tmpfs /mnt/small")
    on(HOST, "systemd-run --quiet /usr/bin/python3 -m http.server 9999 --bind 127.0.0.1")
    yield HOST
    hosts.down("e2e-mistakes")


@pytest.fixture(scope="module")
def told(host: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What a run says of all mistakes."""
    on(host, "touch /run/before")
    variables = {
        name: {key: value for mistake in mistakes for key, value in MISTAKES[mistake][0].items()}
        for name, mistakes in HOSTS.items()
    }
    return preflight(inventory(tmp_path_factory.mktemp("mistakes"), variables))


def of_host(output: str, name: str) -> str:
    """What a run said of one host, its line breaks undone."""
    part = re.search(rf"fatal: \[{name}\]: FAILED!(.*?)(?=\nfatal: |\n\[ERROR\]|\nTASK |\nPLAY |\Z)", output, re.DOTALL)
    return " ".join(part[1].split()) if part else ""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_refused_with_what_would_be_right(told: Done, mistake: str) -> None:
    said = of_host(told.output, alias(mistake))
    expected = MISTAKES[mistake][1].replace("<host>", alias(mistake))
    assert expected in said.replace("''", "'"), said or told.output[-3000:]


def test_nothing_was_changed_and_no_secret_told(told: Done, host: str) -> None:
    assert told.status != 0
    assert all(not counters["changed"] for counters in told.recap().values())
    assert set(told.recap()) >= {alias(mistake) for mistake in MISTAKES}
    assert SECRET not in told.output
    assert GOOD[1].splitlines()[1] not in told.output
    assert on(host, "find /etc /opt /srv /usr /var -xdev -newer /run/before -type f -not -path '/var/log/*'") == ""


def test_the_right_inventory_passes(host: str, tmp_path: Path) -> None:
    done = preflight(inventory(tmp_path, {"right": {}}))
    assert done.status == 0, done.output
    assert done.recap()["right"]["changed"] == 0


def test_several_mistakes_of_a_host_are_told_together(host: str, tmp_path: Path) -> None:
    names = ("misspelt option", "short key", "journal without a size")
    variables: dict[str, Any] = {}
    for mistake in names:
        variables.update(MISTAKES[mistake][0])
    said = of_host(preflight(inventory(tmp_path, {"several": variables})).output, "several")
    assert "3 problems with the variables of several" in said
    for mistake in names:
        assert MISTAKES[mistake][1] in said.replace("''", "'")


def test_groups_that_the_plays_do_not_know_are_told(host: str, tmp_path: Path) -> None:
    file = inventory(tmp_path, {"right": {"vllm_group": "inference"}})
    assert "Other group names are given on the command line: -e vllm_group=inference" in " ".join(
        preflight(file).output.split()
    )
    file.write_text(json.dumps({"vllm": {"hosts": {"right": RIGHT}}}))
    assert "The inventory has no host in the group gateway" in preflight(file).output
    file = inventory(tmp_path, {"right": {"fleet_batch": [1, "50%"]}})
    told = " ".join(preflight(file).output.split())
    assert """It is given on the command line: -e '{"fleet_batch": [1, "50%"]}\'""" in told.replace("''", "'")


def test_a_collection_that_is_too_old_or_missing_is_told(host: str, tmp_path: Path) -> None:
    """The real collections, and before them one that says of itself that it is old."""
    old = tmp_path / "ansible_collections/ansible/posix"
    old.mkdir(parents=True)
    (old / "MANIFEST.json").write_text(json.dumps({"collection_info": {"version": "1.5.4"}}))
    done = program(
        *("ansible-playbook", "site.yml", "--tags", "preflight", "-i", str(inventory(tmp_path, {"right": {}}))),
        environment={"ANSIBLE_COLLECTIONS_PATH": f"{tmp_path}:{ROOT / '.collections'}"},
        check=False,
    )
    assert done.status != 0
    assert (
        "The collection ansible.posix is 1.5.4, but must be 2.1.0 or newer: install what is needed with: ansible-galaxy collection"
        in " ".join(done.output.split())
    )
