"""A stand-in that runs here, as a process of its own, for tests that need no host for it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.stand_in import contract, wheel

ROOT = Path(__file__).resolve().parents[2]
KEY = "k" * 32
MIDDLEWARE = ROOT / "roles/vllm/files"


@dataclass
class Running:
    """A stand-in that runs."""

    process: subprocess.Popen[bytes]
    port: int
    output: Path
    home: Path
    model: str = "small"
    max_model_len: int = 1024
    # What it is asked with where it speaks TLS.
    tls: ssl.SSLContext | None = None

    def ask(self, path: str, body: object = None, *, key: str | None = "", raw: str | None = None) -> contract.Answer:
        if self.tls:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=20, context=self.tls
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {} if key is None else {"Authorization": f"Bearer {key or KEY}"}
        data = raw if raw is not None else (None if body is None else json.dumps(body))
        try:
            connection.request("GET" if data is None else "POST", path, data, headers)
            response = connection.getresponse()
            return contract.Answer(response.status, response.read().decode())
        finally:
            connection.close()

    def log(self) -> str:
        return self.output.read_text()

    def command(self, **settings: object) -> None:
        """Command how it behaves from now on."""
        (self.home / "stand_in.json").write_text(json.dumps(settings))


def unpack(directory: Path) -> Path:
    """The wheel, unpacked."""
    made, _lock = wheel.write(directory)
    zipfile.ZipFile(made).extractall(directory / "site")
    return directory / "site"


def start(site: Path, home: Path, key: str = KEY, /, **options: object) -> tuple[subprocess.Popen[bytes], int, Path]:
    """Start one with a configuration as the role writes it."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(str(options.get("port", 0)))))
        port = int(listener.getsockname()[1])
    if not (home / "config.json").exists():
        (home / "config.json").write_text('{"max_position_embeddings": 8192}')
    told: dict[str, object] = {
        "model": str(home), "served-model-name": ["small"], "host": "127.0.0.1", "port": port, "max-model-len": 1024,
        "shutdown-timeout": 20, "enforce-eager": True, "enable-prefix-caching": False, **options,
    }  # fmt: skip
    configuration = home / "config.yaml"
    configuration.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in told.items()))
    output = home / "log"
    (home / "accepted").write_text(f"{hashlib.sha256(key.encode()).hexdigest()}\n")
    environment = {"PYTHONPATH": f"{site}:{MIDDLEWARE}", "HOME": str(home), "FLEET_INTERNAL_KEYS": str(home / "accepted")}  # fmt: skip
    program = "import sys; from vllm.entrypoints.cli.main import main; sys.exit(main())"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", "--config", str(configuration), "--middleware", "fleet_internal_key.InternalKey"],
            env={**os.environ, **environment},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return process, port, output


def up(site: Path, home: Path, key: str = KEY, /, **options: object) -> Running:
    """Start one and wait until it listens."""
    process, port, output = start(site, home, key, **options)
    end = time.monotonic() + 20
    while "startup complete" not in output.read_text():
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.02)
    return Running(process, port, output, home)
