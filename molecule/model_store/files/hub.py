"""A stand-in for the Hugging Face hub: the part of its protocol that huggingface_hub uses to download a model.

Standard library only; runs on the test host. /srv/hub/mode (a word per line) changes how it behaves, /srv/hub/log says
what it was asked.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import time
from pathlib import Path
from typing import Any

HOME = Path("/srv/hub")
GOOD = "hf_goodgoodgood"
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
REPOSITORIES = {"acme/tiny", "acme/gated", "acme/secret", "acme/huge"}


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
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != GOOD:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
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
        if parts[0] == "api":
            return self.answer(self.information(repository, commit))
        if repository == "acme/gated":
            return self.refuse(403 if token else 401, "GatedRepo", "Access to model acme/gated is restricted")
        name = "/".join(parts[4:])
        if name not in FILES[commit]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.send(commit, name)

    def information(self, repository: str, commit: str) -> dict[str, Any]:
        siblings = []
        for name, data in FILES[commit].items():
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

    def send(self, commit: str, name: str) -> None:
        data, modes = FILES[commit][name], self.modes()
        large = name.endswith(".safetensors")
        etag = hashlib.sha256(data).hexdigest() if large else blob_id(data)
        if "corrupt" in modes and large:
            data = b"X" + data[1:]
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = len(data)
        if "cut" in modes and large:
            # once: the connection ends in the middle of the file
            (HOME / "mode").write_text(" ".join(modes - {"cut"}))
            stop = len(data) // 2
        for position in range(start, stop, 200_000):
            self.wfile.write(data[position : min(position + 200_000, stop)])
            if large and "slow" in self.modes():  # asked each time: a test ends it
                time.sleep(1)
        if stop < len(data):
            self.wfile.flush()
            self.close_connection = True


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", 8199), Handler).serve_forever()
