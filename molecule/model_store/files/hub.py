"""A stand-in for Hugging Face, ModelScope and a plain file server.

It speaks the part of their protocols that huggingface_hub and modelscope_hub use to download a model. Like the real ones,
ModelScope and the file server send their clients to a storage server for large files, which must not see a secret.
Standard library only; runs on the test host. /srv/hub/mode (a word per line) changes how it behaves, /srv/hub/log says
what it was asked, and as many requests as /srv/hub/busy says are answered with 429 first. In the mode `xet` the weights are
offered by Xet, too, whose storage this is as well (one block of chunks that are not compressed).
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("HUB_HOME", "/srv/hub"))
PORT = int(os.environ.get("HUB_PORT", "8199"))
COUNTING = threading.Lock()
CHUNK = 1 << 16  # of Xet
GOOD, XET = "hf_goodgoodgood", "hf_of_xet"
FIRST, SECOND = "a" * 40, "b" * 40


def weights(commit: str) -> bytes:
    """The same eight megabytes each time."""
    return hashlib.shake_256(commit.encode()).digest(8_000_000)


FILES: dict[str, dict[str, bytes]] = {
    commit: {
        "config.json": json.dumps({"model_type": "tiny", "commit": commit}).encode(),
        "README.md": b"# tiny\n",
        "model.safetensors": weights(commit),
        "original/consolidated.pth": b"left out by default",
    }
    for commit in (FIRST, SECOND)
}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
# What repositories have beside these.
MORE: dict[str, dict[str, bytes]] = {
    "acme/layouts": {
        "model.safetensors.index.json": INDEX,
        "model-00001-of-00001.safetensors": b"the weights",
        **dict.fromkeys(("consolidated.safetensors", "pytorch_model.bin", "metal/model.bin", "model.gguf"), b"again"),
        "onnx/model.onnx": b"again",
        "1_Dense/pytorch_model.bin": b"another part",
    },
    "acme/elsewhere": {"config.json": json.dumps({"auto_map": {"AutoModel": "acme/code--modeling.Tiny"}}).encode()},
    "acme/code": {"modeling.py": b"class Tiny: ...\n", "notes.txt": b"no code"},
}
REPOSITORIES = {"acme/tiny", "acme/gated", "acme/secret", "acme/huge", *MORE}


def files_of(repository: str, commit: str) -> dict[str, bytes]:
    """The files of a repository at a commit."""
    return {**FILES[commit], **MORE.get(repository, {})}


def large(name: str) -> bool:
    """Whether a file is in the storage for large ones."""
    return name.endswith(".safetensors")


def xet_hash(data: bytes) -> str:
    """What Xet calls a file, here: the real name is a tree of hashes, which clients take as it is."""
    return hashlib.sha256(b"xet" + data).hexdigest()


def block(data: bytes) -> bytes:
    """A file as one block of Xet: each chunk behind its version, size, way of compression (none) and size."""
    pieces = [data[first : first + CHUNK] for first in range(0, len(data), CHUNK)]
    sizes = [len(piece).to_bytes(3, "little") for piece in pieces]
    return b"".join(b"\0" + size + b"\0" + size + piece for size, piece in zip(sizes, pieces, strict=True))


def blob_id(data: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def modes(self) -> set[str]:
        path = HOME / "mode"
        return set(path.read_text().split()) if path.exists() else set()

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with (HOME / "log").open("a") as log:
            log.write(f"{self.command} {self.path} {self.headers.get('Range', '-')}\n")
        if self.busy():
            return self.refuse(429, "", "Too many requests")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/cas/"):
            return self.cas(path, token)
        if path.startswith("/storage/"):
            if token or self.headers.get("Cookie"):
                return self.refuse(400, "", "the storage server was shown a secret")
            _empty, _storage, commit, name = path.split("/", 3)
            return self.send(commit, name)
        if path.startswith("/files/"):
            return self.plain(path, token)
        if path.startswith(("/api/v1/", "/openapi/v1/")):
            return self.modelscope(path, token)
        return self.huggingface(path, token)

    def busy(self) -> bool:
        """Whether this is one of the requests that are too many."""
        path = HOME / "busy"
        with COUNTING:
            left = int(path.read_text()) if path.exists() else 0
            if left:
                path.write_text(str(left - 1))
        return left > 0

    def cas(self, path: str, token: str) -> None:
        """Of what a file consists, for who has the token of Xet; and what it consists of, for whoever has the address."""
        parts = path.split("/")
        if parts[2:4] == ["v1", "reconstructions"]:
            if token != XET:
                return self.refuse(401, "", "no token of Xet")
            data = next(
                files["model.safetensors"]
                for files in FILES.values()
                if xet_hash(files["model.safetensors"]) == parts[4]
            )
            first, _dash, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            begin, end = int(first) // CHUNK, min(int(last or len(data)), len(data) - 1) // CHUNK + 1
            held = {"start": begin, "end": end}
            return self.answer({
                "offset_into_first_range": int(first) - begin * CHUNK,
                "terms": [{"hash": "ab" * 32, "unpacked_length": min(end * CHUNK, len(data)) - begin * CHUNK, "range": held}],
                "fetch_info": {"ab" * 32: [{
                    "range": held, "url": f"http://127.0.0.1:{PORT}/cas/blocks/{parts[4]}",
                    "url_range": {"start": begin * (CHUNK + 8), "end": min(end * (CHUNK + 8), len(block(data))) - 1},
                }]},
            })  # fmt: skip
        if parts[2] != "blocks":  # such as version 2 of the protocol
            return self.refuse(404, "", "Not Found")
        if token:
            return self.refuse(400, "", "the storage server was shown a secret")
        data = next(
            files["model.safetensors"] for files in FILES.values() if xet_hash(files["model.safetensors"]) == parts[3]
        )
        first, _dash, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        body = block(data)[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(block(data))}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def offer_xet(self, data: bytes) -> None:
        """The headers by which a client learns of Xet."""
        self.send_header("X-Xet-Hash", xet_hash(data))
        self.send_header("Link", f'<http://127.0.0.1:{PORT}/api/xet-token>; rel="xet-auth"')

    def redirect(self, commit: str, name: str) -> None:
        """To the storage server: this one by another name."""
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{PORT}/storage/{commit}/{name}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def plain(self, path: str, token: str) -> None:
        """/files/open/<commit>/<name>, and /files/closed/ with the token."""
        _empty, _files, kind, commit, name = path.split("/", 4)
        if kind == "closed" and token != GOOD:
            return self.refuse(401, "", "no token")
        if name not in FILES.get(commit, {}):
            return self.refuse(404, "", "Not Found")
        return self.redirect(commit, name) if name.endswith(".safetensors") else self.send(commit, name)

    def modelscope(self, path: str, token: str) -> None:
        """The two APIs of ModelScope that its client uses."""
        if token and token != GOOD:
            return self.refuse(401, "", "user not logged in")
        if path == "/openapi/v1/users/me":
            return self.answer({"success": True, "data": {"username": "tester"}})
        parts = path.strip("/").split("/")
        repository = "/".join(parts[3:5])
        if (
            parts[:3] != ["api", "v1", "models"]
            or repository not in REPOSITORIES
            or (repository == "acme/secret" and not token)
        ):
            return self.refuse(404, "", "record not found")
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        commit = FIRST if query.get("Revision") == "master" else query.get("Revision", "")
        if parts[5:] == []:
            return self.answer({"Code": 200, "Data": {"Path": "acme", "Name": parts[4], "Visibility": 5}})
        if parts[5:] == ["repo", "files"]:  # a commit that is not there has no files
            listed = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Revision": commit, "IsLFS": large(name),
                 "Sha256": hashlib.sha256(data).hexdigest()}
                for name, data in (files_of(repository, commit) if commit in FILES else {}).items()
            ]  # fmt: skip
            if repository == "acme/huge":
                listed[0]["Size"] = 10**15
            return self.answer({"Code": 200, "Data": {"Files": listed}})
        if repository == "acme/gated":
            return self.refuse(403, "", "no permission")
        name = query["FilePath"]
        stored = large(name) and name in FILES[commit]
        return self.redirect(commit, name) if stored else self.send(commit, name, repository)

    def huggingface(self, path: str, token: str) -> None:
        if token and token != GOOD:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/xet-token":
            where = 9 if "unreachable" in self.modes() else PORT
            self.send_response(200)
            self.send_header("X-Xet-Cas-Url", f"http://127.0.0.1:{where}/cas")
            self.send_header("X-Xet-Access-Token", XET)
            self.send_header("X-Xet-Token-Expiration", str(int(time.time()) + 3600))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if path == "/api/whoami-v2" and "mirror" in self.modes():
            return self.refuse(404, "", "Not Found")
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "tester"}) if token else self.refuse(401, "", "no token")
        parts = path.strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository not in REPOSITORIES or (repository == "acme/secret" and not token):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        position = 5 if parts[0] == "api" else 3
        commit = FIRST if parts[position:] in ([], ["main"]) else parts[position]
        if commit not in FILES:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if parts[0] == "api" and parts[4:5] == ["tree"]:
            return self.answer(self.tree(commit))
        if parts[0] == "api" and "mirror" in self.modes():
            names = [{"rfilename": name} for name in files_of(repository, commit)]
            return self.answer({"id": repository, "sha": commit, "siblings": names})
        if parts[0] == "api":
            return self.answer(self.information(repository, commit))
        if repository == "acme/gated":
            return self.refuse(403 if token else 401, "GatedRepo", "Access to model acme/gated is restricted")
        name = "/".join(parts[4:])
        if name not in files_of(repository, commit):
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.send(commit, name, repository)

    def information(self, repository: str, commit: str) -> dict[str, Any]:
        siblings = []
        for name, data in files_of(repository, commit).items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
            if name.endswith((".safetensors", ".pth")):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                if repository == "acme/huge":
                    entry["size"] = entry["lfs"]["size"] = 10**15
            siblings.append(entry)
        gated: bool | str = "manual" if repository == "acme/gated" else False
        return {"_id": "1", "id": repository, "modelId": repository, "sha": commit, "private": False, "gated": gated,
                "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}  # fmt: skip

    def tree(self, commit: str) -> list[dict[str, Any]]:
        listed = []
        for name, data in FILES[commit].items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            if name.endswith((".safetensors", ".pth")):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            listed.append(entry)
        return listed

    def send(self, commit: str, name: str, repository: str = "acme/tiny") -> None:
        data, modes = files_of(repository, commit)[name], self.modes()
        etag = hashlib.sha256(data).hexdigest() if large(name) else blob_id(data)
        if "corrupt" in modes and large(name):
            data = data[:-1] + b"X"
        start, end = 0, len(data) - 1
        wanted = self.headers.get("Range")
        if wanted:
            first, _dash, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first or 0), min(int(last or end), end)
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        if large(name):
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        if "xet" in modes and name == "model.safetensors":
            self.offer_xet(FILES[commit][name])
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = end + 1
        if "cut" in modes and large(name) and not start and stop > 1:
            # once: the connection ends in the middle of the file
            (HOME / "mode").write_text(" ".join(modes - {"cut"}))
            stop = len(data) // 2
        for position in range(start, stop, 200_000):
            self.wfile.write(data[position : min(position + 200_000, stop)])
            if large(name) and (speeds := {"slow", "brisk"} & self.modes()):  # asked each time: a test ends it
                time.sleep(1 if "slow" in speeds else 0.25)
        if stop < end + 1:
            self.wfile.flush()
            self.close_connection = True


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
