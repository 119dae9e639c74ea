"""Makes the wheel of the stand-in. By hand: a build backend would have to be installed for a folder of ten files."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "vllm"
# Which vLLM it stands in for: the one that the tests run on a CPU.
VERSION = "0.32.0+cpu"
# What vLLM accepts and measures, from the files that say so for the role and for monitoring.
DATA = {
    "vllm/stand_in/options.json": ROOT / "roles/vllm/files/options/0.32.0-cpu.json",
    "vllm/stand_in/metrics.prom": Path(__file__).parent / "vllm-0.32.0-cpu.prom",
}
EPOCH = (1980, 1, 1, 0, 0, 0)


def contents(version: str, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the wheel, without its RECORD."""
    info = f"vllm-{version}.dist-info"
    found = {f"vllm/{file.relative_to(SOURCES)}": file.read_bytes() for file in sorted(SOURCES.rglob("*.py"))}
    found |= {name: file.read_bytes() for name, file in DATA.items()}
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Stands in for vLLM in tests\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests.stand_in\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n",
    }
    if settings:
        found["vllm/stand_in/settings.json"] = json.dumps(settings).encode()
    return found | {f"{info}/{name}": text.encode() for name, text in texts.items()}


def write(
    directory: Path, version: str = VERSION, settings: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Path, Path]:
    """Write the wheel and its lock; returns both. The same sources give the same bytes. With settings, this version behaves by them."""
    directory.mkdir(parents=True, exist_ok=True)
    files = contents(version, settings)
    record = f"vllm-{version}.dist-info/RECORD"
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        for name, data in files.items()
    }
    rows = [f"{name},sha256={digest},{len(files[name])}" for name, digest in digests.items()]
    files[record] = ("\n".join([*rows, f"{record},,"]) + "\n").encode()
    wheel, lock = directory / f"vllm-{version}-py3-none-any.whl", directory / "vllm.txt"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    # Scenarios that run side by side write the same: each file is there as a whole at any time.
    for file, data in ((wheel, buffer.getvalue()), (lock, f"vllm=={version} --hash=sha256:{digest}\n".encode())):
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.rename(file)
    return wheel, lock
