"""Downloads one model with huggingface_hub into a staging directory and verifies it.

Runs on the host as an unprivileged user in a transient systemd unit, started by the module model_download. What to do
is in the credential `job`, the token in the credential `hf_token`; neither is in argv or in the unit. How it goes is in
the job's status file. It ends with a manifest in the staging directory; the module model_store puts it under its name.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

MANIFEST = ".model.json"
ATTEMPTS = 5


class RefusedError(Exception):
    """A reason that trying again would not change, in words for the operator."""


class Job:
    """What is to be done, and how far it is."""

    def __init__(self, wanted: dict[str, Any], token: str) -> None:
        self.wanted, self.token = wanted, token or False
        self.staging = Path(wanted["staging"])
        self.state: dict[str, Any] = {
            "state": "checking",
            "done": 0,
            "total": 0,
            "message": "",
            "directory": self.staging.name,
        }
        self.lock = threading.Lock()

    def say(self, **news: Any) -> None:
        """Write the status file."""
        with self.lock:
            self.state.update(news, time=time.time())
            path = Path(self.wanted["status"])
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(self.state) + "\n")
            aside.replace(path)


def on_disk(directory: Path) -> int:
    """Bytes below a directory, with the files that are still on their way."""
    total = 0
    for folder, _folders, names in os.walk(directory):
        for name in names:
            try:
                status = (Path(folder) / name).stat()
            except OSError:
                continue  # renamed meanwhile
            total += min(status.st_size, status.st_blocks * 512)
    return total


def question(job: Job) -> Any:
    """Ask the hub what there is, and tell apart why it may not be had."""
    from huggingface_hub import HfApi, errors, get_hf_file_metadata, hf_hub_url

    repository, revision, endpoint = job.wanted["repository"], job.wanted["revision"], job.wanted["endpoint"]
    hub = HfApi(endpoint=endpoint, token=job.token)
    try:
        if job.token:
            hub.whoami()
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise RefusedError(
                f"{endpoint} refuses the token. model_store_hf_token is wrong, expired or revoked: make a new one with "
                f"read access at {endpoint}/settings/tokens"
            ) from None
        raise
    try:
        info = hub.model_info(repository, revision=revision, files_metadata=True)
        # The description of a gated repository is public; only asking for a file tells whether it may be had.
        if info.siblings:
            name = info.siblings[0].rfilename
            url = hf_hub_url(repository, name, revision=info.sha, endpoint=endpoint)
            get_hf_file_metadata(url, token=job.token)
    except errors.GatedRepoError:
        raise RefusedError(
            f"{repository} is gated and {'this token has no' if job.token else 'without a token there is no'} access. "
            f"Ask for access at {endpoint}/{repository} with the account of the token, and give its token in model_store_hf_token"
        ) from None
    except errors.RevisionNotFoundError:
        raise RefusedError(
            f"{repository} has no revision {revision}; its commits are at {endpoint}/{repository}/commits/main"
        ) from None
    except errors.RepositoryNotFoundError:
        hint = "this token may not see it" if job.token else "private: set model_store_hf_token"
        raise RefusedError(f"{endpoint} has no repository {repository}: it is misspelt, or {hint}") from None
    return info


def choose(job: Job, info: Any) -> dict[str, Any]:
    """The files that are wanted, by name."""
    from huggingface_hub.utils import filter_repo_objects

    files = {file.rfilename: file for file in info.siblings or []}
    names = filter_repo_objects(
        files, allow_patterns=job.wanted["include"] or None, ignore_patterns=job.wanted["exclude"] or None
    )
    chosen = {name: files[name] for name in names}
    if not chosen:
        raise RefusedError(
            f"include and exclude leave no file of {job.wanted['repository']} over; it has {', '.join(sorted(files))}"
        )
    return chosen


def room(job: Job, total: int) -> None:
    """Refuse before the download what the disk cannot hold."""
    free = shutil.disk_usage(job.staging).free
    missing = max(total - on_disk(job.staging), 0)
    if missing + job.wanted["reserve"] > free:
        raise RefusedError(
            f"{job.wanted['repository']} needs {missing / 1e9:.1f} GB more, but {job.staging.parent.parent} has "
            f"{free / 1e9:.1f} GB free and {job.wanted['reserve'] / 1e9:.1f} GB shall stay free (model_store_minimum_free_gb)"
        )


def fetch(job: Job, commit: str, name: str, size: int) -> None:
    """Fetch one file, going on where an earlier run stopped.

    snapshot_download and hf_hub_download of this huggingface_hub begin a file anew in each process, which is hours for
    the shards of a large model; http_get, which they use, can go on. The price: no Xet, plain HTTP with ranges.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    target = (job.staging / name).resolve()
    if not target.is_relative_to(job.staging.resolve()):
        raise RefusedError(f"{job.wanted['repository']} has a file that would lie outside of the model: {name}")
    if target.exists() and target.stat().st_size == size:
        return  # its content is verified with the others
    part = job.staging / ".cache/parts" / hashlib.sha256(name.encode()).hexdigest()
    part.parent.mkdir(parents=True, exist_ok=True)
    if part.exists() and part.stat().st_size > size:
        part.unlink()
    url = hf_hub_url(job.wanted["repository"], name, revision=commit, endpoint=job.wanted["endpoint"])
    headers = build_hf_headers(token=job.token)
    location = get_hf_file_metadata(url, token=job.token).location
    if urllib.parse.urlsplit(location).netloc != urllib.parse.urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for the storage that it sends us to
    with part.open("ab") as file:
        there = file.tell()
        if there < size:
            http_get(location, file, resume_size=there, headers=headers, expected_size=size)
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


def download(job: Job, commit: str, chosen: dict[str, Any]) -> None:
    """Fetch the files, several at the same time, the largest first."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # what a cut costs at most, and how fine the progress is
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1):
            job.say(done=on_disk(job.staging))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    pool = concurrent.futures.ThreadPoolExecutor(job.wanted["parallel"])
    try:
        order = sorted(chosen, key=lambda name: -(chosen[name].size or 0))
        running = [pool.submit(fetch, job, commit, name, chosen[name].size or 0) for name in order]
        for one in concurrent.futures.as_completed(running):
            one.result()
    finally:
        pool.shutdown(cancel_futures=True)
        stop.set()
        watcher.join()


def verify(job: Job, chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare every file with what the hub says that it is: SHA-256 of large files, git's name of small ones."""
    found: dict[str, dict[str, Any]] = {}
    for name, file in sorted(chosen.items()):
        path = job.staging / name
        size = path.stat().st_size
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as content:
            while block := content.read(1 << 20):
                sha256.update(block)
                blob.update(block)
        wanted, got = (file.lfs.sha256, sha256.hexdigest()) if file.lfs else (file.blob_id, blob.hexdigest())
        if size != file.size or wanted != got:
            path.unlink()
            raise RefusedError(
                f"{name} is not what the hub says: expected {file.size} bytes, {wanted}, got {size} bytes, {got}. "
                "It was removed and is fetched anew in the next run; if that fails too, the mirror or a proxy damages it"
            )
        found[name] = {"size": size, "sha256": sha256.hexdigest()}
    return found


def work(job: Job) -> None:
    """Do all of it."""
    job.staging.mkdir(parents=True, exist_ok=True)
    info = question(job)
    chosen = choose(job, info)
    total = sum(file.size or 0 for file in chosen.values())
    room(job, total)
    job.say(state="downloading", total=total, done=on_disk(job.staging))
    download(job, info.sha, chosen)
    job.say(state="verifying", done=total)
    files = verify(job, chosen)
    aside = job.staging / f"{MANIFEST}.new"
    known = {key: job.wanted[key] for key in ("name", "repository", "revision")}
    aside.write_text(
        json.dumps({**known, "source": "huggingface", "path": "", "commit": info.sha, "files": files}, indent=2) + "\n"
    )
    aside.replace(job.staging / MANIFEST)
    job.say(state="done", done=total)


def main() -> int:
    """Try a few times what a network can break, and say how it ended."""
    credentials = Path(os.environ["CREDENTIALS_DIRECTORY"])
    wanted = json.loads((credentials / "job").read_text())
    job = Job(wanted, (credentials / "hf_token").read_text().strip())
    # huggingface_hub reads these when it is imported, hence the imports inside the functions.
    os.environ.update(wanted["environment"])
    # Only the token of the job counts, not one that lies around.
    os.environ |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    os.environ.update(
        HF_ENDPOINT=wanted["endpoint"],
        HF_HOME=str(job.staging / ".cache/home"),
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    from huggingface_hub import errors

    # What a network can break. Anything else is a fault of this program and ends it: the journal shows where.
    network = (OSError, errors.HTTPError, errors.HfHubHTTPError, errors.XetDownloadError)
    job.say()
    said = ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            work(job)
            return 0
        except RefusedError as error:
            job.say(state="failed", message=str(error))
            return 1
        except network as error:
            said = f"{type(error).__name__}: {error}"
            print(f"attempt {attempt} of {ATTEMPTS}: {said}", flush=True)
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                job.say(state="failed", message=f"{job.staging} cannot be written: {said}")
                return 1
        if attempt < ATTEMPTS:
            time.sleep(wanted["pause"] * attempt)
    job.say(state="failed", message=f"{wanted['endpoint']} cannot be used after {ATTEMPTS} attempts: {said}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
