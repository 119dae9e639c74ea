"""A program that tries what the sandbox of a vLLM unit has to refuse, run by the very unit as an instance of its own with another command."""

from __future__ import annotations

import uuid
from collections.abc import Callable

PROBE = r"""
import ctypes, os, socket, sys
def refused(what, attempt):
    try:
        attempt()
    except OSError as error:
        print(what, "refused", error.errno)
    else:
        print(what, "ALLOWED")
write = lambda path: open(path, "w").close()
for path in ("/etc/probe", "/usr/probe", "/opt/vllm/probe", "/srv/models/probe", "/var/lib/probe", "/var/cache/vllm/chat/probe",
             "/home/probe", "/root/probe", "/proc/sys/kernel/hostname", "/sys/probe"):
    refused("write " + path, lambda: write(path))
for name, family, kind in (("packet", socket.AF_PACKET, socket.SOCK_RAW), ("raw", socket.AF_INET, socket.SOCK_RAW),
                           ("vsock", socket.AF_VSOCK, socket.SOCK_STREAM), ("bluetooth", 31, socket.SOCK_RAW)):
    refused("socket " + name, lambda: socket.socket(family, kind))
refused("read key", lambda: open("/etc/vllm/internal_key").read())
refused("read shadow", lambda: open("/etc/shadow").read())
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
refused("mount", lambda: call(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)))
refused("unshare", lambda: call(libc.unshare(0x10000000)))
refused("setuid", lambda: os.setuid(0) if False else call(libc.setuid(0)))
refused("chmod suid", lambda: (write("/tmp/s"), os.chmod("/tmp/s", 0o4755)))
refused("kill", lambda: os.kill(1, 0))
refused("reboot", lambda: call(libc.reboot(0)))
print("processes", sorted(int(p) for p in os.listdir("/proc") if p.isdigit() and os.stat("/proc/" + p).st_uid not in (os.getuid(), 65534)))
write(os.environ["HOME"] + "/probe"); write("/tmp/probe")
print("uid", os.getuid(), "home", oct(os.stat(os.environ["HOME"]).st_mode & 0o777))
"""
ATTEMPTS = 22
# Devices: those of the GPUs open, all others that root could open do not.
DEVICES = r"""
import glob
for path in {devices}:
    refused("open " + path, lambda: os.close(os.open(path, os.O_RDWR)))
for path in glob.glob("/dev/nvidia[0-9]*") + ["/dev/nvidiactl", "/dev/nvidia-uvm"]:
    if os.path.exists(path):
        os.close(os.open(path, os.O_RDWR))
        print("open", path, "works")
"""


def probe(sh: Callable[[str], str], program: str) -> tuple[bool, str]:
    """Run a program in the sandbox by a function that runs shell commands on the host; whether the unit ended well, and what it printed."""
    name = f"probe-{uuid.uuid4().hex[:8]}"
    drop_in = f"/run/systemd/system/vllm@{name}.service.d"
    file = f"/opt/{name}.py"
    override = (
        "[Service]\nType=oneshot\nRestart=no\nEnvironmentFile=\nEnvironment=HOME=/var/cache/vllm/%i\nBindReadOnlyPaths=\n"
        f"ExecStart=\nExecStart=/usr/bin/python3 {file}\n"
    )
    sh(f"mkdir -p {drop_in} && cat >{drop_in}/probe.conf <<'EOF'\n{override}EOF")
    sh(f"cat >{file} <<'EOF'\n{program}EOF")
    sh("systemctl daemon-reload")
    good = "well" in sh(f"systemctl start vllm@{name} >/dev/null 2>&1 && echo well || true")
    told = sh(f"journalctl --unit vllm@{name} --output cat --no-pager --quiet")
    sh(f"rm -r {drop_in} {file}; systemctl daemon-reload; rm -rf /var/cache/vllm/{name}")
    return good, told
