#!/usr/bin/python3 -I
"""Lets the engines of one GPU start one after the other: each measures the free memory of its GPU while it starts, which nobody may take or give then.

`vllm-gpu-turn GENERATION PID` returns when no other engine is starting on the GPUs of that generation. From then on it is the turn of process PID, until
it answers on /health or ends. A turn is a socket with an abstract name, of a process that waits in the background: the kernel ends it with the process,
whatever happened, and it leaves no file.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

NAME = "\0gpufleet.vllm.gpu."
# Who neither answers nor ends by then keeps the others waiting no longer.
LONGEST_SECONDS = 1800
PAUSE_SECONDS = 1.0


def gpus(generation: Path) -> list[int]:
    """The GPUs of a generation, in an order that is the same for all."""
    compose = generation / "compose.json"
    if compose.exists():
        named = re.findall(r'"nvidia\.com/gpu=(\d+)"', compose.read_text())
    else:
        named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.isdigit()]
    return sorted({int(gpu) for gpu in named})


def address(generation: Path) -> tuple[str, int]:
    """Where the instance of a generation answers. Only root can read how it is asked, and only root needs to: a container is published elsewhere."""
    with suppress(OSError):
        url = urlsplit(json.loads((generation / "gate.json").read_text())["url"])
        return url.hostname or "", url.port or 0
    options = options_of(generation)
    return options["host"], int(options["port"])


def options_of(generation: Path) -> dict[str, str]:
    """The options of a generation, each with its text."""
    lines = (generation / "config.yaml").read_text().splitlines()
    pairs = (line.split(": ", 1) for line in lines if ": " in line)
    return {name: text.strip("\"'") for name, text in pairs}


def connection(host: str, port: int, options: dict[str, str]) -> http.client.HTTPConnection:
    """A connection to the instance, not yet made. One that speaks TLS shows the certificate of this host, and asks for it, too."""
    if "ssl-certfile" not in options:
        return http.client.HTTPConnection(host, port, timeout=5)
    context = ssl.create_default_context(cafile=options["ssl-ca-certs"])
    context.load_cert_chain(options["ssl-certfile"], options["ssl-keyfile"])
    return http.client.HTTPSConnection(host, port, timeout=5, context=context)


def others(name: str) -> bool:
    """Wait for the end of another's turn. Returns whether it was one of ours: a stranger's socket of this name keeps nobody waiting."""
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(name)
            _pid, uid, _gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (0, os.getuid()):
                return False
            peer.settimeout(LONGEST_SECONDS)
            peer.recv(1)  # nobody sends anything: it ends with the other
        except OSError:
            time.sleep(0.1)
    return True


def take(gpu: int) -> socket.socket | None:
    """Wait until it is our turn on a GPU."""
    name, told = f"{NAME}{gpu}", False
    while True:
        turn = socket.socket(socket.AF_UNIX)
        try:
            turn.bind(name)
            turn.listen(128)
        except OSError:
            turn.close()
        else:
            return turn
        if not told:
            print(f"another engine is starting on GPU {gpu}: waiting for it", flush=True)
            told = True
        if not others(name):
            return None


def answers(host: str, port: int, options: dict[str, str]) -> bool:
    """Whether an instance is up."""
    try:
        opened = connection(host, port, options)
    except OSError:
        return False
    try:
        opened.request("GET", "/health")
        return opened.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        opened.close()


def hold(pid: int, generation: Path) -> None:
    """Keep the turn until the process answers or ends."""
    end, where, options = time.monotonic() + LONGEST_SECONDS, address(generation), options_of(generation)
    while time.monotonic() < end and Path(f"/proc/{pid}").exists() and not answers(*where, options):
        time.sleep(PAUSE_SECONDS)


def main() -> int:
    """Wait, and leave behind who keeps the turn."""
    generation, pid = Path(sys.argv[1]), int(sys.argv[2])
    turns = [take(gpu) for gpu in gpus(generation)]
    # Twice, so that it is nobody's child: the process that becomes vLLM does not know it.
    if turns and not os.fork():
        if not os.fork():
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(silence, stream)
            hold(pid, generation)
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
