# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the files of a model say about it: which hold the same weights again, which are not here, and whose code they name.

The role model_store also puts this file beside the downloader, which has no Ansible. It knows the layouts that vLLM reads:
safetensors as model.safetensors.index.json lists them, else .bin; all else is the same weights once more.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
# Files that may name code by `auto_map`.
CONFIGURED = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# How git-lfs begins what it leaves in place of a file that was not fetched.
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_SIZE = 1024
# Folders and names of other formats, beside weights that vLLM reads.
FOLDERS = ("original", "metal", "onnx", "openvino", "coreml", "gguf", "tflite", "flax", "tf")
FORMATS = {
    "GGUF": ("*.gguf",),
    "ONNX": ("*.onnx", "*.onnx_data", "*.onnx.data"),
    "OpenVINO": ("openvino_*", "*/openvino_*"),
    "TensorFlow": ("tf_model*.h5", "*.tflite", "saved_model.pb"),
    "Flax": ("flax_model*.msgpack",),
    "Rust": ("rust_model.ot",),
    "PyTorch": ("consolidated*.pt", "consolidated*.pth", "model*.pt", "model*.pth", "pytorch_model*.pt", "*.ckpt"),
}
PICKLED = ("*pytorch_model*.bin", "pytorch_model*.bin.index.json")


def shards(index: str) -> set[str]:
    """The files that an index of weights names."""
    try:
        return {str(name) for name in json.loads(index)["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def duplicates(names: Collection[str], indexed: Collection[str] = ()) -> dict[str, str]:
    """The files that hold the same weights again, and why each of them is one. `indexed` are those that the index names."""
    safetensors = {name for name in names if "/" not in name and name.endswith(".safetensors")}
    primary = safetensors & set(indexed) or {name for name in safetensors if not _any(name, ("consolidated*",))}
    primary = primary or safetensors
    pickled = {name for name in names if "/" not in name and _any(name, PICKLED)}
    if not primary and not pickled:
        return {}
    found = {}
    for name in names:
        folder = name.partition("/")[0] if "/" in name else ""
        kind = next((kind for kind, patterns in FORMATS.items() if _any(name, patterns)), "")
        if folder in FOLDERS:
            found[name] = f"{folder}/ has them in another format"
        elif kind:
            found[name] = f"{kind} beside {'safetensors' if primary else '.bin'}"
        elif name in safetensors - primary and not name.startswith("adapter_"):
            found[name] = f"{INDEX} does not name it" if indexed else "beside safetensors of the usual names"
        elif _beside(name, names):
            found[name] = ".bin beside safetensors"
    return found


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _beside(name: str, names: Collection[str]) -> bool:
    """Whether pickled weights lie in the same folder as safetensors."""
    folder, _slash, last = name.rpartition("/")
    if last == "adapter_model.bin":
        return f"{name.removesuffix('bin')}safetensors" in names
    return _any(last, PICKLED) and any(
        other.endswith(".safetensors") and other.rpartition("/")[0] == folder and "adapter_" not in other
        for other in names
    )


def alternatives(names: Collection[str]) -> list[str]:
    """When there is nothing but GGUF, the models among which somebody has to choose, without the numbers of their parts."""
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return []
    stems = {re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "-*", name) for name in names if name.endswith(".gguf")}
    return sorted(stems) if len(stems) > 1 else []


def told(left: Mapping[str, str]) -> str:
    """What is left out and why: one phrase for each reason, with the file or how many they are."""
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted(left.items()):
        reasons.setdefault(reason, []).append(name)
    return "; ".join(
        f"{names[0] if len(names) == 1 else f'{names[0]} and {len(names) - 1} more'} ({reason})"
        for reason, names in reasons.items()
    )


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-lfs left in its place."""
    try:
        if path.stat().st_size > POINTER_SIZE:
            return False
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def pointers(directory: Path) -> list[str]:
    """The files directly in a model's directory that are pointers."""
    try:
        return sorted(path.name for path in directory.iterdir() if path.is_file() and is_pointer(path))
    except OSError:
        return []


def pointer_problem(name: str, directory: Path) -> str:
    """Why a directory with pointers is no model, or nothing."""
    found = pointers(directory)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{name}: {found[0]}{more} in {directory} is a pointer of Git LFS and not the file itself, as a clone without "
        "git-lfs leaves it; run `git lfs pull` there"
        if found
        else ""
    )


def foreign_code(texts: Mapping[str, str]) -> dict[str, str]:
    """The repositories whose code `auto_map` names (`owner/name--module.Class`), each with the file that does."""
    found: dict[str, str] = {}
    for file, text in texts.items():
        for reference in _references(text):
            if "--" in reference:
                found.setdefault(reference.partition("--")[0], file)
    return found


def code_problem(name: str, directory: Path) -> str:
    """Why a directory leads to code that is not in it, or nothing."""
    texts = {}
    for file in CONFIGURED:
        try:
            texts[file] = (directory / file).read_text()
        except (OSError, ValueError):
            continue
    named = foreign_code(texts)
    return (
        f"{name}: auto_map in {directory}/{next(iter(named.values()))} takes code from {' and '.join(sorted(named))}, which "
        "vLLM would ask the hub for. Put its .py files beside the file and take what ends in `--` out of auto_map; or "
        "say `code: []` when vLLM does not need it"
        if named
        else ""
    )


def _references(text: str) -> list[str]:
    """The classes that `auto_map` names; a tokenizer has two in a list, of which one may be null."""
    try:
        known = json.loads(text).get("auto_map") or {}
        values = known.values() if isinstance(known, dict) else [known]
    except (ValueError, AttributeError):
        return []
    return [
        entry for value in values for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)
    ]


def localized(text: str, repositories: Collection[str]) -> str:
    """The same with the classes of these repositories looked for in the model's own directory; unchanged when none is named."""
    if not repositories & foreign_code({"": text}).keys():
        return text
    content = json.loads(text)

    def here(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: here(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [here(entry) for entry in value]
        if isinstance(value, str) and value.partition("--")[0] in repositories:
            return value.partition("--")[2] or value
        return value

    content["auto_map"] = here(content["auto_map"])
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
