"""A disk that is full while a release is built: a real file system that is too small, and the wheel of the stand-in for vLLM."""

from __future__ import annotations

import json
import subprocess

from testinfra.host import Host

from tests.roles import ROOT, environment, host_name, refused

testinfra_hosts = ["docker://vllm-debian13"]

PLACE = "/mnt/small"
STATE = "readlink /etc/vllm/*/current; systemctl show 'vllm@*' --property=Id,MainPID,NRestarts,ActiveState; ls /opt/vllm/releases"


def test_a_full_disk_ends_the_build_and_touches_nothing(host: Host) -> None:
    before = host.check_output(STATE)
    host.check_output(f"mkdir -p {PLACE} && mount -t tmpfs -o size=128k tmpfs {PLACE}")
    try:
        # The role would refuse such a small place at once; the case is that something else fills it meanwhile.
        told = refused(host, "vllm", vllm_releases_path=f"{PLACE}/releases", __vllm_release_gb=0)
        assert f"The release {PLACE}/releases/" in told
        assert "No space left on device" in told
        assert "GB free" in told
        assert host.check_output(STATE) == before
        assert host.check_output(f"ls -A {PLACE}/releases") == "", (
            "what was built of it would fill the disk for others too"
        )

        # With room, the same build comes to its end, from the wheel that is there.
        host.check_output(f"mount -o remount,size=64m {PLACE}")
        lock = host.check_output(f"ls {PLACE}/locks/*.txt")
        release = lock.replace("/locks/", "/releases/").removesuffix(".txt")
        arguments = {
            "path": release,
            "version": "0.32.0",
            "lock": lock,
            "options_script": f"{PLACE}/bin/dump_options.py",
        }
        done = subprocess.run(
            ["ansible", host_name(host), f"--inventory={ROOT}/molecule/shared/inventory/", "--module-name=gpufleet.llm.vllm_release",
             f"--args={json.dumps(arguments)}"],
            cwd=ROOT, text=True, capture_output=True, check=False, env=environment("vllm"),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert host.check_output(f"ls {release}/.complete")
    finally:
        host.check_output(f"umount {PLACE}")
