#!/usr/bin/env python3
"""Builds test-host images and starts and stops test hosts: systemd in a container, reached like a server.

This is the only place that knows Docker as a test tool. A *fleet* is a group of hosts on a network of its own; every
container, network and image made here carries the label below, and only such are ever removed.

    hosts.py up FLEET NAME[=OS] ... [--publish NAME:HOST_PORT:PORT] [--ssh DIRECTORY] [--ipv6]
    hosts.py down FLEET
    hosts.py engine-stop            stops the Docker engine if this program started it

OS is debian12, debian13 (images built here from the distribution's archive), ubuntu2204 or ubuntu2404 (need an image
registry); with `-vllm` behind it, the host has the release of the real vLLM from the start, which the roles build once for all such
hosts (prepare.yml; needs the clone's .venv). The environment variable TEST_OS overrides every OS. Runs on the system's Python, needs
nothing else installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
LABEL = "gpufleet.fleet"
CLONE = "gpufleet.clone"  # a label, too: where the program is that started a host
TEST_FLEET = re.compile(r"molecule-|e2e(-|$)")  # the fleets of which nobody misses a host that is down
ENGINE_PID = CACHE / "dockerd.pid"
PACKAGES = [
    "systemd", "systemd-sysv", "dbus", "python3", "python3-apt", "openssh-server", "sudo", "iproute2", "ca-certificates", "curl",
]  # fmt: skip
# What costs time and shows nothing in a container goes: disks and boots that systemd's generators look for at every daemon-reload (some
# 8 % of all processor time of the tests), translated package descriptions, and waiting for the disk after each file of a package. Package lists
# stay, as on a machine that was installed; where there are none, or they are too old, roles fetch them (molecule/host_support).
TRIM = """
set -e
mkdir -p /etc/systemd/system-generators /etc/dpkg/dpkg.cfg.d /etc/apt/apt.conf.d
for name in cryptsetup debug getty gpt-auto hibernate-resume integritysetup rc-local run system-update tpm2 veritysetup; do
    ln -s /dev/null /etc/systemd/system-generators/systemd-$name-generator
done
echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/test-host
echo 'Acquire::Languages "none";' >/etc/apt/apt.conf.d/99test-host
apt-get clean
apt-cache gencaches
"""
DEBIAN_SUITES = {"debian12": "bookworm", "debian13": "trixie"}
UBUNTU_IMAGES = {"ubuntu2204": "ubuntu:22.04", "ubuntu2404": "ubuntu:24.04"}
# What decides what a prepared image has: when one of these changes, it is made anew.
PREPARED = "-vllm"
PREPARED_FROM = (
    "tests/hosts/prepare.yml", "plugins/modules/uv_release.py", "plugins/modules/vllm_release.py", "roles/uv", "roles/vllm/defaults",
    "roles/vllm/files/locks", "roles/vllm/files/dump_options.py", "roles/vllm/files/compile_kernel.py", "roles/vllm/tasks/release.yml",
    "roles/vllm/tasks/user.yml", "inventories/demo/group_vars",
)  # fmt: skip
# What a container needs to boot systemd without being privileged.
RUN_OPTIONS = [
    "--cap-add=SYS_ADMIN", "--cap-add=NET_ADMIN", "--cap-add=SYS_PTRACE",
    "--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined", "--security-opt=systempaths=unconfined",
    "--cgroupns=private", "--tmpfs=/run", "--tmpfs=/run/lock", "--tmpfs=/tmp:exec",
    "--shm-size=1g",  # vLLM's processes share memory; an engine gives 64 MB
]  # fmt: skip
# systemd hands credentials to a unit through a mount that must propagate; an engine makes the mounts of a container private.
BOOT = ["/bin/sh", "-c", "mount --make-rshared / && exec /lib/systemd/systemd"]
# A machine behind a proxy with a certificate authority of its own trusts it here; its test hosts must as well.
CA_DIRECTORY = Path("/usr/local/share/ca-certificates")


class HostsError(Exception):
    """Something that the person at the terminal can act on."""


def run(*command: str, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command, capture its output, and raise HostsError with that output when it fails."""
    done = subprocess.run(command, text=True, capture_output=True, check=False, **options)  # type: ignore[call-overload]
    if check and done.returncode:
        raise HostsError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
    return done  # type: ignore[no-any-return]


def docker(*arguments: str, check: bool = True) -> str:
    """Run a docker command and return what it prints."""
    return run("docker", *arguments, check=check).stdout.strip()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time do what is slow and shared (scenarios run side by side)."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(program: str, *packages: str, start: bool = True) -> None:
    """Install Debian packages when the program that they bring is missing. Without `start`, the services that they bring do not start."""
    if shutil.which(program):
        return
    names = " ".join(packages)
    if os.geteuid() != 0:
        raise HostsError(f"{program} is missing and only root can install it: sudo apt-get install {names}")
    print(f"installing {names} ...", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", **({} if start else {"RUNLEVEL": "1"})}
    if run("apt-get", "install", "-y", "-q", *packages, check=False, env=environment).returncode:
        run("apt-get", "update", "-q")
        run("apt-get", "install", "-y", "-q", *packages, env=environment)


def engine_start() -> None:
    """Make a Docker engine answer: the running one, the installed service, or one started here in the background."""
    with locked("engine"):
        if run("docker", "info", check=False).returncode == 0 if shutil.which("docker") else False:
            return
        install("dockerd", "docker.io")
        if run("docker", "info", check=False).returncode == 0:  # installing the package started the service
            return
        if os.geteuid() != 0:
            raise HostsError("no Docker engine answers; start it, or run this as root")
        if Path("/run/systemd/system").is_dir():
            run("systemctl", "start", "docker")
        else:
            print("starting the Docker engine ...", flush=True)
            with (CACHE / "dockerd.log").open("w") as log:
                engine = subprocess.Popen(
                    ["dockerd"], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
                )
            ENGINE_PID.write_text(str(engine.pid))
        for _ in range(60):
            if run("docker", "info", check=False).returncode == 0:
                return
            time.sleep(1)
        raise HostsError(f"the Docker engine does not answer after 60 s; its log is {CACHE / 'dockerd.log'}")


def engine_stop() -> None:
    """Stop the Docker engine if engine_start started it and nothing runs in it any more."""
    if not ENGINE_PID.exists():
        return
    pid = int(ENGINE_PID.read_text())
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd":
            if docker("ps", "-q"):
                print("containers are still running: the Docker engine stays up")
                return
            os.kill(pid, signal.SIGTERM)
            for _ in range(30):
                if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
                    break
                time.sleep(1)
    ENGINE_PID.unlink()


def prepared_image(os_name: str) -> str:
    """Return the name of the image for an OS that has the release of vLLM, made by the roles on a host of its own when it is missing."""
    bare = os_name.removesuffix(PREPARED)
    recipe = hashlib.sha256(image(bare).encode())
    for place in PREPARED_FROM:
        for file in sorted(path for path in [ROOT / place, *(ROOT / place).rglob("*")] if path.is_file()):
            recipe.update(file.read_bytes())
    name = f"gpufleet-test/{os_name}:{recipe.hexdigest()[:8]}"
    with locked(f"image-{os_name}"):
        if run("docker", "image", "inspect", name, check=False).returncode == 0:
            return name
        print(f"building the {os_name} image ...", flush=True)
        host = f"molecule-image-{os_name}"
        down(host)  # what a run left that was killed here
        try:
            up(host, {host: bare})
            run(
                f"{ROOT}/.venv/bin/ansible-playbook", "tests/hosts/prepare.yml", "-i", "inventories/demo", "-e", f"prepared_host={host}",
                cwd=ROOT, stdin=subprocess.DEVNULL,
                env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "LC_ALL": "C.UTF-8", "DEMO_DIR": str(CACHE)},
            )  # fmt: skip
            docker("exec", host, "apt-get", "clean")
            docker("stop", "--time", "2", host)
            docker("commit", "--change", f"LABEL {LABEL}=image", host, name)
        finally:
            down(host)
    return name


def image(os_name: str) -> str:
    """Return the name of the image for an OS, built when it is missing or its recipe changed."""
    if os_name.endswith(PREPARED):
        return prepared_image(os_name)
    recipe = hashlib.sha256(json.dumps([PACKAGES, TRIM, DEBIAN_SUITES, UBUNTU_IMAGES]).encode()).hexdigest()[:8]
    name = f"gpufleet-test/{os_name}:{recipe}"
    with locked(f"image-{os_name}"):
        if run("docker", "image", "inspect", name, check=False).returncode == 0:
            return name
        if os_name in DEBIAN_SUITES:
            install("mmdebstrap", "mmdebstrap")
            print(f"building the {os_name} image ...", flush=True)
            tar = CACHE / f"{os_name}.tar"
            run(
                "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", "--dpkgopt=force-unsafe-io", "--skip=cleanup/apt",
                f'--customize-hook=chroot "$1" sh -c {shlex.quote(TRIM)}',
                DEBIAN_SUITES[os_name], str(tar),
            )  # fmt: skip
            docker(
                "import", "--change", 'CMD ["/lib/systemd/systemd"]', "--change", f"LABEL {LABEL}=image", str(tar), name
            )
            tar.unlink()
        elif os_name in UBUNTU_IMAGES:
            print(f"building the {os_name} image ...", flush=True)
            dockerfile = (
                f"FROM {UBUNTU_IMAGES[os_name]}\n"
                "RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "
                f'{" ".join(PACKAGES)}\nRUN ["/bin/sh", "-c", {json.dumps(TRIM)}]\nCMD ["/lib/systemd/systemd"]\nLABEL {LABEL}=image\n'
            )
            run("docker", "build", "--tag", name, "-", input=dockerfile)
        else:
            raise HostsError(f"unknown OS {os_name!r}; known: {', '.join([*DEBIAN_SUITES, *UBUNTU_IMAGES])}")
    return name


def start(fleet: str, name: str, os_name: str, publish: Sequence[str], authorized_key: Path | None) -> None:
    """Start one host and wait until its systemd says it is up. A host that already runs is left as it is."""
    told = docker("ps", "--all", "--filter", f"name=^{name}$", "--format", f'{{{{.State}}}} {{{{.Label "{CLONE}"}}}}')
    state, _, clone = told.partition(" ")
    if clone not in ("", str(ROOT)) and state != "running" and TEST_FLEET.match(fleet):
        print(f"removing {name}, which a test run in {clone} left behind", flush=True)
        docker("rm", "--force", "--volumes", name)
        state = ""
    elif clone not in ("", str(ROOT)):
        raise HostsError(
            f"{name} belongs to the clone in {clone}: remove it there (make demo-down), or by: docker rm --force --volumes {name}"
        )
    if state == "running":
        return
    if state:
        docker("start", name)
    else:
        options = [
            *RUN_OPTIONS,
            f"--name={name}",
            f"--hostname={name}",
            f"--network=gpufleet-{fleet}",
            f"--label={LABEL}={fleet}",
            f"--label={CLONE}={ROOT}",
            # The file system of a container cannot be a layer of one inside it: an engine there has overlay2 on a volume only.
            "--volume=/var/lib/docker",
        ]
        options += [f"--publish=127.0.0.1:{ports}" for ports in publish]
        # Wheels that were downloaded once are not downloaded again by the next host or run.
        options += ["--volume=gpufleet-uv-cache:/var/cache/uv"]
        find_links = os.environ.get("PIP_FIND_LINKS", "")
        if Path(find_links).is_dir() and find_links:
            options += [f"--volume={find_links}:/srv/wheels:ro"]
        docker("run", "--detach", *options, image(os_name), *BOOT)
    for _ in range(60):
        answer = docker("exec", name, "systemctl", "is-system-running", check=False)
        if answer in ("running", "degraded"):
            break
        time.sleep(0.5)
    else:
        raise HostsError(
            f"{name}: systemd did not come up in 30 s: {answer or docker('logs', '--tail', '20', name, check=False)}"
        )
    if state:
        return
    if CA_DIRECTORY.is_dir() and any(CA_DIRECTORY.glob("*.crt")):
        docker("cp", f"{CA_DIRECTORY}/.", f"{name}:{CA_DIRECTORY}")
        docker("exec", name, "update-ca-certificates")
    if authorized_key:
        script = (
            "useradd --create-home --shell /bin/bash fleet"
            " && install -d -m 0700 -o fleet -g fleet /home/fleet/.ssh"
            " && install -m 0600 -o fleet -g fleet /dev/stdin /home/fleet/.ssh/authorized_keys"
            " && echo 'fleet ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/fleet && chmod 0440 /etc/sudoers.d/fleet"
        )
        run("docker", "exec", "--interactive", name, "sh", "-c", script, input=authorized_key.read_text())


def address(name: str) -> str:
    """The address of a host on its fleet's network."""
    return next(iter(addresses(name)), "")


def controller(fleet: str) -> str:
    """The address from which this machine reaches the hosts of a fleet."""
    return docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", f"gpufleet-{fleet}")


def addresses(name: str) -> list[str]:
    """The IPv4 and, where its fleet has such, the IPv6 address of a host."""
    both = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}"
    return docker("inspect", "--format", both, name).split()


def host_key(name: str) -> str:
    """The public SSH host key, read through the engine and not over the network: it can be trusted."""
    return " ".join(docker("exec", name, "cat", "/etc/ssh/ssh_host_ed25519_key.pub").split()[:2])


def ssh_key(directory: Path) -> Path:
    """The key of the SSH user `fleet` in this directory, made when it is not there. Returns its public half."""
    install("ssh", "openssh-client")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = directory / "id_ed25519"
    if not key.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", directory.name, "-f", str(key))
    return key.with_suffix(".pub")


def ssh_files(directory: Path, names: Sequence[str]) -> None:
    """What one has to know of hosts that run: `known_hosts`, `config`, so that `ssh -F config NAME` logs in, and `addresses.json`."""
    known = []
    config = [
        "User fleet",
        "IdentitiesOnly yes",
        f"IdentityFile {directory}/id_ed25519",
        f"UserKnownHostsFile {directory}/known_hosts",
    ]
    found = {name: addresses(name) for name in names}
    for name, each in found.items():
        key = host_key(name)
        config += [f"Host {name}", f"  HostName {each[0]}"]
        known += [f"{address} {key}" for address in each]
    (directory / "addresses.json").write_text(json.dumps(found) + "\n")
    (directory / "known_hosts").write_text("\n".join([*known, ""]))
    (directory / "config").write_text("\n".join([*config, ""]))


def local_network(fleet: str) -> str:
    """An IPv6 network of its own for a fleet: a unique local one (RFC 4193), whose number is made from the fleet's name."""
    number = hashlib.sha256(fleet.encode()).hexdigest()
    return f"fd{number[:2]}:{number[2:6]}:{number[6:10]}::/64"


def up(
    fleet: str,
    wanted: dict[str, str],
    publish: Sequence[str] = (),
    ssh: Path | None = None,
    ipv6: bool = False,
) -> None:
    """Start the hosts of a fleet (name -> OS). `publish` holds NAME:HOST_PORT:PORT, bound to loopback. `ssh` is a directory, see ssh_files()."""
    engine_start()
    authorized_key = ssh_key(ssh) if ssh else None
    with locked("network"):
        if run("docker", "network", "inspect", f"gpufleet-{fleet}", check=False).returncode:
            options = ["--ipv6", f"--subnet={local_network(fleet)}"] if ipv6 else []
            docker("network", "create", f"--label={LABEL}={fleet}", *options, f"gpufleet-{fleet}")
    for name, os_name in wanted.items():
        ports = [entry.split(":", 1)[1] for entry in publish if entry.startswith(f"{name}:")]
        if test_os := os.environ.get("TEST_OS"):
            os_name = test_os + (PREPARED if os_name.endswith(PREPARED) else "")
        start(fleet, name, os_name, ports, authorized_key)
    if ssh:
        ssh_files(ssh, list(wanted))


def down(fleet: str) -> None:
    """Remove the hosts and the network of a fleet, and nothing else."""
    if not shutil.which("docker") or run("docker", "info", check=False).returncode:
        return
    if containers := docker("ps", "--all", "--quiet", "--filter", f"label={LABEL}={fleet}").split():
        docker("rm", "--force", "--volumes", *containers)
    if networks := docker("network", "ls", "--quiet", "--filter", f"label={LABEL}={fleet}").split():
        docker("network", "rm", *networks)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("up", help="start hosts")
    command.add_argument("fleet")
    command.add_argument("hosts", nargs="+", metavar="NAME[=OS]")
    command.add_argument("--publish", action="append", default=[], metavar="NAME:HOST_PORT:PORT")
    command.add_argument(
        "--ssh", type=Path, metavar="DIRECTORY", help="make a user `fleet` who may sudo, and write there how to log in"
    )
    command.add_argument("--ipv6", action="store_true", help="give them IPv6 addresses, too")
    command = commands.add_parser("down", help="remove the hosts of a fleet")
    command.add_argument("fleet")
    command = commands.add_parser("address", help="print the address of a host")
    command.add_argument("name")
    commands.add_parser("engine-start", help="make a Docker engine answer")
    commands.add_parser("engine-stop", help="stop the Docker engine if this program started it")
    command = commands.add_parser("image", help="build an image")
    command.add_argument("os")
    arguments = parser.parse_args()
    try:
        if arguments.command == "up":
            wanted = dict(entry.split("=", 1) if "=" in entry else (entry, "debian12") for entry in arguments.hosts)
            up(arguments.fleet, wanted, arguments.publish, arguments.ssh, arguments.ipv6)
        elif arguments.command == "down":
            down(arguments.fleet)
        elif arguments.command == "address":
            print(address(arguments.name))
        elif arguments.command == "engine-start":
            engine_start()
        elif arguments.command == "engine-stop":
            engine_stop()
        else:
            engine_start()
            print(image(arguments.os))
    except HostsError as error:
        print(f"tests/hosts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
