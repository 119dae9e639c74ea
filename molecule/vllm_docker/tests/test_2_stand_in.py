"""Containers with small images that have the stand-in for vLLM (tests/stand_in): everything in which vLLM itself plays no part.

The tests change the host and build on each other's end state: each leaves `small` answering.
"""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from tests.contained import ROLE, Instances
from tests.playbooks import playbook
from tests.roles import ROOT, applied, changed, environment, host_name, refused, until
from tests.served import KEY, MODEL, play_gpus

SMALL: dict[str, Any] = {"name": "small", "model": MODEL, "port": 8010, "environment": {"VLLM_CPU_KVCACHE_SPACE": 1}}
UNIT = "vllm@small"
FILES = [{"name": "tools.jinja", "content": "tools"}]
# For the runtime without containers; molecule/shared/prepare_stand_in.yml brings its wheel to the host.
LOCK = str(ROOT / ".cache/stand-in/vllm.txt")
VARIABLES = yaml.safe_load((ROOT / f"molecule/shared/inventory/group_vars/{ROLE}.yml").read_text())


def run(host: Host, image: str, *options: str, **more: Any) -> str:
    """Apply the role with this image."""
    return applied(
        host, ROLE, *options, vllm_image=image, vllm_instances=[{**SMALL, **more.pop("instance", {})}], **more
    )


def fails(host: Host, image: str, **more: Any) -> str:
    """Apply the role with this image and expect a refusal."""
    return refused(host, ROLE, vllm_image=image, vllm_instances=[{**SMALL, **more.pop("instance", {})}], **more)


def nothing_is_left_of_a_proof(host: Host) -> None:
    """The unit, the generation, the container and the caches of the instance that proved are gone."""
    for path in ("/etc/vllm", "/etc/systemd/system", "/run/systemd/system", "/var/cache/vllm"):
        assert host.run("ls %s | grep proof_", path).rc == 1, path
    assert host.check_output("docker ps --all --quiet --filter label=gpufleet.instance=proof_small") == ""
    assert "proof_" not in host.check_output("docker network ls --format '{{.Name}}'")


def there(host: Host, image: str) -> bool:
    """Whether the engine has an image."""
    return bool(host.run("docker image inspect %s", image).rc == 0)


# --- images


def test_an_image_is_pulled_by_its_digest(host: Host, instances: Instances, images: dict[str, str]) -> None:
    assert not there(host, images["good"])
    told = run(host, images["good"])
    assert "The images are there" in told
    assert instances.version() == "good"
    assert instances.inspected("small")["Image"] == images["good_id"]
    assert host.file("/etc/vllm/images").content_string == f"{images['good']}\n"
    for gone in ("chat", "plain"):
        assert not host.file(f"/etc/vllm/{gone}").exists
        assert host.run("docker ps --all --quiet --filter label=gpufleet.instance=%s", gone).stdout == ""
        assert host.run("systemctl is-active vllm@%s", gone).stdout.strip() == "inactive"
    assert not host.file("/etc/systemd/system/vllm@chat.service").exists


def test_a_second_run_changes_nothing(host: Host, images: dict[str, str]) -> None:
    told = run(host, images["good"])
    assert not changed(told)
    assert "fetched" not in told


def test_check_mode_shows_the_image_and_changes_nothing(
    host: Host, instances: Instances, images: dict[str, str]
) -> None:
    before = instances.pid("small")
    told = run(
        host,
        images["next"],
        "--check",
        "--diff",
        instance={"environment": {"TOKEN": "hunter2", "VLLM_CPU_KVCACHE_SPACE": 1}},
    )
    assert f'-      "image": "{images["good"]}",' in told
    assert f'+      "image": "{images["next"]}",' in told
    assert "hunter2" not in told
    assert instances.pid("small") == before
    assert not there(host, images["next"])


def test_a_private_registry_asks_for_a_password(host: Host, instances: Instances, images: dict[str, str]) -> None:
    """Nothing of this image is on the host yet: Docker asks no registry for what it has."""
    private, password, wrong = images["next_private"], VARIABLES["test_registry_password"], "wrong-0123456789"
    user = {"vllm_registry_username": VARIABLES["test_registry_username"]}
    assert "could not be fetched" in fails(host, private)
    told = fails(host, private, **user, vllm_registry_password=wrong)
    assert "could not be fetched" in told
    assert wrong not in told
    told = run(host, private, **user, vllm_registry_password=password, vllm_start_proof="refuse")
    assert password not in told
    assert "The proofs answer a completion" in told, "it never ran here, so it was proved beside what runs"
    nothing_is_left_of_a_proof(host)
    assert len(host.check_output("ls /opt/vllm/proofs/*.json").split()) == 1
    assert instances.version() == "next"
    encoded = base64.b64encode(f"{VARIABLES['test_registry_username']}:{password}".encode()).decode()
    for place in ("/root/.docker", "/etc/vllm", "/run/vllm", "/opt/vllm/bin", "/etc/systemd/system", "/tmp"):  # noqa: S108
        assert host.run("grep -rqs -e %s -e %s %s", password, encoded, place).rc in (1, 2), place


def test_the_old_container_answers_until_the_new_one_is_made(
    host: Host, instances: Instances, images: dict[str, str]
) -> None:
    """Pulled and created before anything stops; a request that runs is answered to its end, by the old one."""
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(instances.ask(8010, tokens=150)))
    client.start()
    run(host, images["good"])
    client.join()
    status, answer = answers[0]
    assert (status, answer["system_fingerprint"]) == (200, "vllm-next")
    assert answer["usage"]["completion_tokens"] == 150
    assert instances.version() == "good"
    assert instances.generation("small") == "3"
    old, new = (json.loads(instances.sh("docker inspect vllm-small-%s", number))[0] for number in "23")
    assert new["Created"] < old["State"]["FinishedAt"]
    assert old["State"]["ExitCode"] == 0
    assert there(host, images["next_private"]), "the one before stays"


def test_an_image_that_does_not_start_is_refused_before_anything_stops(
    host: Host, instances: Instances, images: dict[str, str]
) -> None:
    before = instances.pid("small")
    told = fails(host, images["broken"], vllm_start_proof="refuse")
    assert "does not start, not even with a tiny model" in told
    assert "RuntimeError: this image is broken" in told
    assert "Nothing was stopped" in told
    assert instances.pid("small") == before
    assert (instances.version(), instances.generation("small")) == ("good", "3")
    nothing_is_left_of_a_proof(host)
    assert len(host.check_output("ls /opt/vllm/proofs/*.json").split()) == 1, "what failed is not recorded"


def test_an_image_that_does_not_start_goes_back(host: Host, instances: Instances, images: dict[str, str]) -> None:
    told = fails(host, images["broken"])
    assert "vLLM instance small" in told
    assert "RuntimeError: this image is broken" in told
    assert "The previous generation is back and answers" in told
    assert instances.version() == "good"
    assert instances.generation("small") == "3"
    assert host.run("docker inspect vllm-small-4").rc != 0
    assert not host.file("/etc/vllm/small/4").exists


def test_a_pull_that_fails_touches_nothing(host: Host, instances: Instances, images: dict[str, str]) -> None:
    before = instances.pid("small")
    missing = images["good"].split("@")[0] + "@sha256:" + "1" * 64
    told = fails(host, missing)
    assert f"The image {missing} could not be fetched" in told
    assert "What runs was not touched" in told
    host.check_output("systemctl stop registry@5000")
    told = fails(host, images["good"].replace("played@", "played2@"))
    host.check_output("systemctl start registry@5000")
    assert "connection refused" in told
    assert instances.pid("small") == before
    assert instances.generation("small") == "3"


@pytest.mark.parametrize(
    ("image", "more", "expected"),
    [
        ("127.0.0.1:5000/played:good", {}, "may mean another image tomorrow"),
        ("", {}, "name one in vllm_image, by its digest"),
        ("sha256:12", {}, "may mean another image tomorrow"),
        ("sha256:" + "2" * 64, {}, "an id says nothing of a registry"),
        ("x@sha256:" + "2" * 64, {"vllm_bind_address": "::1"}, "networks of containers have IPv4 only"),
        ("x@sha256:" + "2" * 64, {"vllm_container_memory": "much"}, "vllm_container_memory is 'much'"),
        ("x@sha256:" + "2" * 64, {"vllm_image_archive": "/nowhere.tar"}, "which is no file on this controller"),
        ("x@sha256:" + "2" * 64, {"vllm_registry_username": "me"}, "a registry takes both or none"),
        ("x@sha256:" + "2" * 64, {"vllm_runtime": "podman"}, "podman"),
    ],
)
def test_a_mistake_is_refused_before_anything_changes(
    host: Host, instances: Instances, image: str, more: dict[str, Any], expected: str
) -> None:
    before = instances.pid("small")
    assert expected in fails(host, image, **more)
    assert instances.pid("small") == before


def test_what_vllm_of_the_image_refuses_stops_nothing(host: Host, instances: Instances, images: dict[str, str]) -> None:
    before, containers = instances.pid("small"), host.check_output("docker ps --all --quiet")
    told = fails(host, images["good"], instance={"options": {"quantization": "nonsense"}})
    assert "vllm_instances (small): vLLM itself refuses this: Unknown quantization method: nonsense." in told
    assert instances.pid("small") == before
    assert host.check_output("docker ps --all --quiet") == containers


def test_a_tag_is_taken_when_it_is_allowed(host: Host, instances: Instances) -> None:
    run(host, "127.0.0.1:5000/played:next", vllm_image_allow_tags=True)
    assert instances.version() == "next"


def test_an_image_comes_from_an_archive(
    host: Host, instances: Instances, images: dict[str, str], tmp_path: Path
) -> None:
    """For hosts that reach no registry: the archive is on the controller."""
    archive = tmp_path / "archived.tar"
    subprocess.run(
        ["docker", "cp", f"{host_name(host)}:/srv/archived.tar", str(archive)], check=True, capture_output=True
    )
    run(host, images["archived_id"], vllm_image_archive=str(archive))
    assert instances.version() == "archived"
    assert not host.file("/opt/vllm/images.tar").exists
    other = "sha256:" + "3" * 64
    told = fails(host, other, vllm_image_archive=str(archive))
    assert f"The image {other} could not be fetched" in told
    assert not host.file("/opt/vllm/images.tar").exists


def test_images_that_no_generation_needs_are_gone_and_the_one_before_is_there(
    host: Host, instances: Instances, images: dict[str, str]
) -> None:
    for length in (100, 200):
        run(host, images["archived_id"], instance={"options": {"max-model-len": length}})
    left = host.file("/etc/vllm/images").content_string.split()
    numbers = sorted(int(path.rsplit("/", 1)[1]) for path in host.check_output("ls -d /etc/vllm/small/[0-9]*").split())
    assert len(numbers) == 3
    assert left == [images["archived_id"]]
    assert not there(host, images["next_private"])
    assert not there(host, images["broken"]), "one that failed goes, too"
    assert there(host, images["real"]), "it was there before, so it is nobody's to remove"
    names = set(
        host.check_output("docker ps --all --format '{{.Names}}' --filter label=gpufleet.instance=small").split()
    )
    assert names == {f"vllm-small-{number}" for number in numbers}
    networks = host.check_output("docker network ls --format '{{.Name}}'").split()
    assert {name for name in networks if name.startswith("vllm-")} == {f"{name}_default" for name in names}
    run(host, images["good"])


# --- one instance, and how it is run


def test_files_that_options_name_are_seen_inside(host: Host, images: dict[str, str], instances: Instances) -> None:
    """The stand-in does not start without its template."""
    host.check_output("printf '{}' >/opt/log.json && chmod 0644 /opt/log.json")
    named = {"options": {"chat-template": "tools.jinja", "log-config-file": "/opt/log.json"}}
    run(host, images["good"], instance=named, vllm_files=FILES)
    template = instances.sh("sed -n 's/^chat-template: //p' /etc/vllm/small/current/config.yaml").strip('"')
    assert instances.inside("small", f"cat {template}") == "tools"
    assert instances.inside("small", "cat /opt/log.json") == "{}"
    assert not changed(run(host, images["good"], instance=named, vllm_files=FILES))
    host.check_output("chmod 0600 /opt/log.json")
    before = instances.pid("small")
    told = fails(host, images["good"], instance=named, vllm_files=FILES)
    assert "option 'log-config-file': vLLM's user cannot read /opt/log.json" in told
    assert instances.pid("small") == before
    host.check_output("rm /opt/log.json")
    run(host, images["good"])


def test_an_instance_changes_its_runtime_under_requests_and_back(
    host: Host, instances: Instances, images: dict[str, str]
) -> None:
    """Those in between are refused at once, those after it answered. That what runs is answered to its end is shown above and below.

    On one host. No test changes the runtime of one host of two behind a gateway.
    """
    for runtime in ("systemd", "docker"):
        answers: list[tuple[int, Any]] = []
        done = threading.Event()

        def load(answers: list[tuple[int, Any]] = answers, done: threading.Event = done) -> None:
            while not done.is_set():
                answers.append(instances.ask(8010, tokens=30))
                time.sleep(1)

        clients = [threading.Thread(target=load) for _ in range(2)]
        for client in clients:
            client.start()
        time.sleep(1)
        run(host, images["good"], instance={"runtime": runtime}, vllm_lock_file=LOCK, vllm_torch_backend="")
        until(lambda answers=answers: answers[-1][0] == 200, 180, "it does not answer")  # type: ignore[misc]
        done.set()
        for client in clients:
            client.join()
        statuses = [status for status, _answer in answers]
        assert (
            host.run("journalctl --unit vllm@small --output cat --no-pager --since -15min").stdout.count("timed out")
            == 0
        )
        # 500 is what vLLM says to who asks while it drains; the gateway asks another host then
        assert set(statuses) <= {200, 0, 500}, statuses
        assert statuses[0] == 200
        assert statuses[-1] == 200
        assert host.file("/etc/systemd/system/vllm@small.service").exists == (runtime == "docker")
        assert host.run("docker ps --quiet --filter label=gpufleet.instance=small").stdout.count("\n") == (
            1 if runtime == "docker" else 0
        )
        assert host.run("systemctl is-enabled vllm@small").stdout.strip() == "enabled"
    assert not changed(run(host, images["good"], instance={"runtime": "docker"}))


def test_what_is_exported_runs_by_compose_alone(
    host: Host, instances: Instances, images: dict[str, str], tmp_path: Path
) -> None:
    """The files of playbooks/compose.yml on a machine that has the model, with a key of its own."""
    variables = {
        "vllm_group": ROLE,
        "compose_path": str(tmp_path),
        "vllm_image": images["good"],
        "vllm_instances": [{**SMALL, "options": {"chat-template": "tools.jinja"}}],
        "vllm_files": FILES,
    }
    done = playbook(
        "playbooks/compose.yml", f"--inventory={ROOT}/molecule/shared/inventory/", f"--limit={host_name(host)}",
        "-e", json.dumps(variables), environment=environment(ROLE),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / host_name(host) / "small"
    assert sorted(file.name for file in made.iterdir()) == [
        "compose.yaml",
        "config.yaml",
        "environment",
        "files",
        "lib",
        "serve",
    ]
    assert (made / "environment").stat().st_mode & 0o777 == 0o600
    text = (made / "compose.yaml").read_text()
    assert KEY not in "".join(file.read_text() for file in made.rglob("*") if file.is_file())
    # by the words at the beginning of the file
    user = instances.sh("echo $(id -u vllm):$(id -g vllm)")
    assert f"chown {user} keys/accepted environment" in text
    subprocess.run(["docker", "cp", str(made), f"{host_name(host)}:/srv/moved"], check=True, capture_output=True)
    key = "f" * 64
    instances.sh("cd /srv/moved && mkdir keys && printf %s >internal_key", key)
    instances.sh("cd /srv/moved && sha256sum internal_key | cut -c 1-64 >keys/accepted")
    instances.sh("cd /srv/moved && chown %s keys/accepted environment && chmod 0400 keys/accepted environment", user)
    instances.sh("systemctl stop %s", UNIT)
    try:
        instances.sh("cd /srv/moved && docker compose up --detach --quiet-pull 2>&1")
        until(lambda: instances.ask(8010, key=key, timeout=10)[0] == 200, 60, "it does not answer")
        assert "Paris" in instances.ask(8010, tokens=4, key=key)[1]["choices"][0]["text"]
        assert instances.ask(8010)[0] == 401
    finally:
        instances.sh("cd /srv/moved && docker compose down 2>&1; rm -r /srv/moved")
    instances.sh("systemctl start %s", UNIT)
    instances.until_it_answers(8010)


# --- the internal key


def test_a_new_key_is_taken_without_another_container(host: Host, instances: Instances, images: dict[str, str]) -> None:
    """The file with the keys is replaced by rename, which a container sees that has its directory. Then the first key comes back."""
    before, other = instances.pid("small"), "f" * 64
    for key, former in ((other, KEY), (KEY, other)):
        run(host, images["good"], vllm_internal_key=key)
        assert [instances.ask(8010, key=each)[0] for each in (key, former)] == [200, 200]
        run(host, images["good"], entry_point="end_former_keys", vllm_internal_key=key, vllm_former_key_seconds=0)
        assert [instances.ask(8010, key=each)[0] for each in (key, former)] == [200, 401]
    assert instances.pid("small") == before


def test_a_generation_from_before_has_its_key_until_it_is_gone(
    host: Host, instances: Instances, images: dict[str, str]
) -> None:
    """It read the key itself, at another place. A crash starts it still, with what starts all of them now, and going back leads to it."""
    compose, number = "/etc/vllm/small/current/compose.json", instances.generation("small")
    made = json.loads(instances.sh("cat %s", compose))
    volumes = made["services"]["vllm"]["volumes"]
    now = [entry for entry in volumes if entry["target"] in ("/run/vllm/lib", "/run/vllm/keys")]
    assert len(now) == 2
    made["services"]["vllm"]["volumes"] = [
        *(entry for entry in volumes if entry not in now),
        {**now[0], "source": "/etc/vllm/container_key", "target": "/run/secrets/internal_key"},
    ]
    instances.sh("printf %s >%s", json.dumps(made, indent=2), compose)
    instances.sh("printf %s >/etc/vllm/container_key && chgrp vllm /etc/vllm/container_key", KEY)
    instances.sh("systemctl stop %s && docker rm vllm-small-%s && systemctl start %s", UNIT, number, UNIT)
    instances.until_it_answers(8010)
    assert instances.ask(8010, key="wrong")[0] == 401
    run(host, images["good"])
    assert instances.generation("small") != number
    assert instances.ask(8010, key="wrong")[1]["error"]["code"] == "invalid_api_key"
    key = host.file("/etc/vllm/container_key")
    assert (key.mode, key.content_string) == (0o640, KEY), "its generation is there still"


# --- what dies, and what comes back


def restarts(instances: Instances) -> int:
    return int(instances.show("small", "NRestarts"))


def test_a_killed_process_is_started_again(instances: Instances) -> None:
    pid, before = instances.pid("small"), restarts(instances)
    instances.sh("kill -9 %s", pid)
    until(lambda: restarts(instances) == before + 1, 120, "the unit was not started again")
    instances.until_it_answers(8010)
    assert instances.pid("small") != pid


def test_a_killed_shim_is_no_end(instances: Instances) -> None:
    """containerd's process beside each container: with it the container goes, and both are started again."""
    pid = instances.pid("small")
    instances.sh("kill -9 $(ps -o ppid= -p %s)", pid)
    until(lambda: instances.pid("small") not in ("0", pid), 180, "the container was not started again")
    instances.until_it_answers(8010)
    assert instances.host.run("kill -0 %s", pid).rc != 0, "no process of the old one is left"


@pytest.mark.parametrize("how", ["systemctl restart docker", "pkill -9 -x dockerd", "systemctl daemon-reload"])
def test_the_container_outlives_its_engine(instances: Instances, how: str) -> None:
    """live-restore. An answer that is on its way arrives."""
    pid, before = instances.pid("small"), restarts(instances)
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(instances.ask(8010, tokens=80)))
    client.start()
    time.sleep(1)
    instances.sh(how)
    client.join()
    assert answers[0][0] == 200
    assert answers[0][1]["usage"]["completion_tokens"] == 80
    until(lambda: instances.host.run("docker info").rc == 0, 180, "the engine does not answer")
    assert (instances.pid("small"), restarts(instances)) == (pid, before)
    assert instances.show("small", "ActiveState") == "active"


def test_restarts_of_the_engine_are_not_counted_as_starts(instances: Instances) -> None:
    """More of them than the unit may be started in ten minutes; then the process dies, and is started again."""
    pid = instances.pid("small")
    for _ in range(6):
        instances.sh("systemctl reset-failed docker; systemctl restart docker")
    assert instances.pid("small") == pid
    assert instances.show("small", "ActiveState") == "active"
    until(
        lambda: instances.host.run("pgrep -f 'docker container start --attach'").rc == 0,
        120,
        "it is not attached again",
    )
    instances.sh("kill -9 %s", pid)
    until(lambda: instances.pid("small") not in ("0", pid), 180, "it was not started again")
    instances.until_it_answers(8010)


def test_a_stop_while_the_engine_is_away_is_a_stop(host: Host, instances: Instances, images: dict[str, str]) -> None:
    """systemd starts the engine only when the unit has stopped, so nothing may wait for it. A request that runs is answered to its end."""
    pid = instances.pid("small")
    instances.sh("systemctl stop docker.socket docker.service")
    assert host.run("kill -0 %s", pid).rc == 0, "live-restore"
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(instances.ask(8010, tokens=60)))
    client.start()
    time.sleep(1)
    instances.sh("systemctl stop %s", UNIT)
    assert host.run("kill -0 %s", pid).rc != 0
    client.join()
    assert answers[0][0] == 200
    assert answers[0][1]["usage"]["completion_tokens"] == 60
    instances.sh("systemctl reset-failed docker; systemctl start docker.socket docker.service")
    run(host, images["good"])
    assert instances.version() == "good"


def test_a_container_that_somebody_removed_is_made_again(instances: Instances) -> None:
    instances.sh("systemctl stop %s", UNIT)
    instances.sh("docker system prune --force")
    instances.sh("systemctl reset-failed %s; systemctl start %s", UNIT, UNIT)
    instances.until_it_answers(8010)


def test_what_another_generation_left_running_is_ended(instances: Instances) -> None:
    """As after a stop that the engine did not answer."""
    instances.sh("systemctl stop %s", UNIT)
    [current] = instances.sh("readlink /etc/vllm/small/current").split()
    contained = instances.sh("ls /etc/vllm/small/[0-9]*/compose.json").split()
    other = next(number for number in (path.split("/")[4] for path in contained) if number != current)
    instances.sh(
        "docker compose --project-name vllm-small-%s --file /etc/vllm/small/%s/compose.json up --detach --pull never 2>&1",
        other,
        other,
    )
    instances.sh("systemctl reset-failed %s; systemctl start %s", UNIT, UNIT)
    running = "docker ps --format '{{.Names}}' --filter label=gpufleet.instance=small"
    until(lambda: instances.sh(running).split() == [f"vllm-small-{current}"], 180, "the other one runs on")
    instances.until_it_answers(8010)


def test_a_reboot_brings_it_back_without_anybody(instances: Instances) -> None:
    instances.reboot()
    instances.until_it_answers(8010)
    assert instances.show("small", "ActiveState") == "active"


def test_a_run_that_died_half_way_is_finished_by_the_next(
    host: Host, instances: Instances, images: dict[str, str]
) -> None:
    """Switched, and never asked; and a container that was made for a generation that nobody switched to."""
    host.check_output("rm /etc/vllm/small/current/confirmed")
    numbers = [int(name) for name in host.check_output("ls /etc/vllm/small").split() if name.isdigit()]
    host.check_output("cp -a /etc/vllm/small/current/ /etc/vllm/small/%s", str(max(numbers) + 1))
    extra = f"vllm-small-{max(numbers) + 1}"
    host.check_output(
        "docker compose --project-name %s --file /etc/vllm/small/%s/compose.json create --pull never 2>&1",
        extra,
        str(max(numbers) + 1),
    )
    run(host, images["good"])
    assert host.file("/etc/vllm/small/current/confirmed").exists
    assert host.run("docker inspect %s", extra).rc != 0
    assert not changed(run(host, images["good"]))


# --- what it sees, and what others do


def test_from_inside_there_is_nothing_to_take(instances: Instances) -> None:
    uid = instances.sh("id -u vllm")
    assert instances.inside("small", "id -u") == uid
    status = dict(
        line.split(":\t", 1) for line in instances.inside("small", "cat /proc/1/status").splitlines() if ":\t" in line
    )
    assert {int(status[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert (
        instances.host.run("docker exec %s ls /run/docker.sock /var/run/docker.sock", instances.container("small")).rc
        != 0
    )
    told = instances.inside(
        "small",
        "for path in / /etc /usr /opt /srv/models /run /run/vllm /run/secrets /var /var/cache /var/cache/vllm /root /tmp /var/cache/vllm/small;"
        " do touch $path/probe 2>/dev/null && echo $path; done; true",
    )
    assert told.split() == ["/tmp", "/var/cache/vllm/small"]  # noqa: S108
    readable = instances.inside("small", "cat /etc/vllm/internal_key /run/secrets/* 2>/dev/null || true")
    assert readable == ""
    assert KEY not in instances.inside("small", "cat /run/vllm/keys/* /run/vllm/environment /proc/1/environ")
    assert KEY not in json.dumps(instances.inspected("small"))


def test_the_environment_arrives_as_it_was_written(host: Host, instances: Instances, images: dict[str, str]) -> None:
    hard = 'a "b" $c \\d `e` $(f) #g'
    run(host, images["good"], instance={"environment": {"VLLM_CPU_KVCACHE_SPACE": 1, "QUOTED": hard}})
    environment = instances.sh("tr '\\0' '\\n' </proc/%s/environ", instances.pid("small")).splitlines()
    assert f"QUOTED={hard}" in environment
    assert "HOME=/var/cache/vllm/small" in environment
    assert "hunter2" not in json.dumps(instances.inspected("small"))


GPUS = {"vllm_device": "cuda", "vllm_version": "0.33.0", "vllm_packages": []}
DEVICES = [{"name": str(n), "containerEdits": {"env": [f"PLAYED_GPU_{n}=here"]}} for n in range(2)]
SPECIFICATION = json.dumps({"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": DEVICES})


def test_gpus_come_by_their_specification(host: Host, instances: Instances, images: dict[str, str]) -> None:
    """A specification that names an environment variable in the place of devices, which a container in a container cannot be given."""
    gpus = GPUS
    play_gpus(host)
    try:
        told = fails(host, images["good"], instance={"gpus": [1]}, **gpus)
        assert "says what nvidia.com/gpu is" in told
        host.check_output("printf %s >/etc/cdi/nvidia.json", SPECIFICATION)
        told = fails(host, images["broken"], instance={"gpus": [1]}, **gpus)
        assert "The instance was stopped first: its GPUs had no memory left for both" in told
        assert "RuntimeError: this image is broken" in told
        assert "It was stopped for what was to follow, and is back and answers" in told
        assert instances.version() == "good"
        told = run(host, images["good"], instance={"gpus": [1]}, **gpus)
        assert "Instances without room for the proof are stopped" in told
        nothing_is_left_of_a_proof(host)
        environment = instances.sh("tr '\\0' '\\n' </proc/%s/environ", instances.pid("small")).splitlines()
        assert "PLAYED_GPU_1=here" in environment
        assert "NVIDIA_VISIBLE_DEVICES=void" in environment
        assert not [line for line in environment if line.startswith(("PLAYED_GPU_0", "CUDA_VISIBLE_DEVICES"))]
    finally:
        host.check_output("rm -rf /usr/bin/nvidia-smi /etc/cdi/nvidia.json")
    run(host, images["good"])


def test_engines_on_one_gpu_start_one_after_the_other(host: Host, instances: Instances, images: dict[str, str]) -> None:
    """When both change, and when systemd starts both at once, as at a boot."""
    pair = [
        {
            **SMALL, "name": name, "port": port, "gpus": [1], "options": {"gpu-memory-utilization": 0.4},
            "environment": {"STAND_IN": json.dumps({"start_seconds": 4})},
        }
        for name, port in (("small", 8010), ("twin", 8011))
    ]  # fmt: skip

    def one_after_the_other() -> bool:
        """Whether the container of one was started after the other one was up."""
        times = []
        for name in ("small", "twin"):
            until(lambda name=name: instances.ask(8010 + (name == "twin"))[0] == 200, 60, f"{name} does not answer")  # type: ignore[misc]
            began = instances.sh("date +%%s.%%N --date %s", instances.inspected(name)["State"]["StartedAt"])
            line = instances.sh(
                f"journalctl --unit vllm@{name} --output short-unix --grep 'startup complete' --lines 1"
            )
            times.append((float(began), float(line.split()[0])))
        (_first, up), (second, _up) = sorted(times)
        return second > up

    play_gpus(host)
    try:
        host.check_output("printf %s >/etc/cdi/nvidia.json", SPECIFICATION)
        shared = {"vllm_allow_shared_gpus": True, "vllm_start_proof": "off", **GPUS}
        applied(host, ROLE, vllm_image=images["good"], vllm_instances=pair, **shared)
        assert one_after_the_other()
        host.check_output("systemctl stop vllm@small vllm@twin && systemctl start vllm@small vllm@twin")
        assert one_after_the_other()
    finally:
        host.check_output("rm -rf /usr/bin/nvidia-smi /etc/cdi/nvidia.json")
    run(host, images["good"])


def test_a_port_that_a_strangers_container_publishes_is_refused(host: Host, images: dict[str, str]) -> None:
    host.check_output(
        "docker run --detach --name stranger --publish 127.0.0.1:8020:80 --entrypoint sleep %s 600", images["good"]
    )
    try:
        told = fails(host, images["good"], instance={"port": 8020})
    finally:
        host.check_output("docker rm --force stranger")
    assert "port 8020 is published by the container stranger" in told


def test_an_engine_that_does_not_answer_is_told(host: Host, instances: Instances, images: dict[str, str]) -> None:
    pid = instances.pid("small")
    host.check_output("systemctl stop docker.socket docker.service")
    try:
        told = fails(host, images["next"])
    finally:
        host.check_output("systemctl start docker.socket docker.service")
    assert "no Docker engine answers" in told
    assert instances.pid("small") == pid


def test_an_instance_that_nobody_wants_leaves_nothing(host: Host, images: dict[str, str]) -> None:
    applied(host, ROLE, vllm_image=images["good"], vllm_instances=[])
    assert host.run("docker ps --all --quiet --filter label=gpufleet.instance=small").stdout == ""
    assert "vllm-" not in host.check_output("docker network ls --format '{{.Name}}'")
    assert not host.file("/etc/systemd/system/vllm@small.service").exists
    assert not host.file("/etc/vllm/small").exists
    assert host.run("systemctl is-active %s", UNIT).stdout.strip() == "inactive"
    assert not there(host, images["good"])
    assert not changed(applied(host, ROLE, vllm_image=images["good"], vllm_instances=[]))
