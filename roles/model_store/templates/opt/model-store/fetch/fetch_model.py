"""Downloads one model into a staging directory and verifies it.

Runs on the host as an unprivileged user in a transient systemd unit, started by the module model_download. What to do
is in the credential `job`, tokens and the like in the credential `secrets`; neither is in argv or in the unit. How it
goes is in the job's status file. It ends with a manifest in the staging directory; the module model_store puts it under
its name. What is special to a source is in from_<source>.py.
"""

from __future__ import annotations

import concurrent.futures
import errno
import importlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from job import File, Job, RefusedError, Source, amount
from selection import check, choose, code, localize

MANIFEST = ".model.json"
ATTEMPTS = 5
PATIENCE = 3600.0  # seconds that a server may ask to wait before the next byte comes
FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
SOURCES = {"huggingface": "HuggingFace", "modelscope": "ModelScope", "url": "Url", "peer": "Peer"}


def environment(job: Job) -> dict[str, str]:
    """What the client libraries read when they are imported: no token that lies around, nothing outside of the job."""
    home, endpoint = str(job.staging / ".cache/home"), job.wanted["endpoint"]
    return {
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": home,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "MODELSCOPE_ENDPOINT": endpoint,
        "MODELSCOPE_HOME": home,
        "MODELSCOPE_CACHE": home,
        # An hour for a file, its default, is too little for a shard of 50 GB.
        "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(7 * 24 * 3600),
    }


def room(job: Job, total: int) -> None:
    """Refuse before the download what the disk cannot hold."""
    free = shutil.disk_usage(job.staging).free
    missing = max(total - job.on_disk(), 0)
    if missing + job.wanted["reserve"] > free:
        raise RefusedError(
            f"{job.what} needs {amount(missing)} more, but {job.staging.parent.parent} has {amount(free)} free and "
            f"{amount(job.wanted['reserve'])} shall stay free (model_store_minimum_free_gb)"
        )


def disk(job: Job, error: BaseException | None) -> str:
    """What the disk says, if this error comes from it: a client may have wrapped it in one of its own."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in FULL:
            missing, free = max(job.state["total"] - job.on_disk(), 0), shutil.disk_usage(job.staging).free
            return (
                f"{job.staging.parent.parent} is full ({os.strerror(number)}): {job.what} needs {amount(missing)} more, and "
                f"{amount(free)} are free. What has arrived stays: make room, and the next run goes on there"
            )
        if number in CLOSED:
            return f"{job.staging} cannot be written: {os.strerror(number)}"
        error = error.__cause__ or error.__context__
    return ""


def download(job: Job, source: Source, chosen: dict[str, File], elsewhere: dict[str, tuple[Source, File]]) -> None:
    """Fetch the files, several at the same time, the largest first."""
    chosen = chosen | {name: file for name, (_other, file) in elsewhere.items()}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1):
            job.say(done=job.on_disk())

    def fetch(name: str) -> None:
        target, size = job.target(name), chosen[name].size
        if target.exists() and size in (None, target.stat().st_size):
            return  # its content is verified with the others
        elsewhere.get(name, (source, None))[0].fetch(name, chosen[name])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    pool = concurrent.futures.ThreadPoolExecutor(job.wanted["parallel"])
    try:
        running = [pool.submit(fetch, name) for name in sorted(chosen, key=lambda name: -(chosen[name].size or 0))]
        for one in concurrent.futures.as_completed(running):
            one.result()
    finally:
        pool.shutdown(cancel_futures=True)
        stop.set()
        watcher.join()


def verify(job: Job, source: Source, chosen: dict[str, File]) -> dict[str, dict[str, int | str]]:
    """Compare every file, and remove what an earlier, interrupted run wanted and nobody wants now."""
    found = {name: check(job, source, name, file) for name, file in sorted(chosen.items())}
    for path in job.staging.rglob("*"):
        inside = path.relative_to(job.staging)
        if path.is_file() and inside.parts[0] != ".cache" and str(inside) not in chosen:
            path.unlink()
    return found


def work(job: Job, source: Source) -> None:
    """Do all of it."""
    job.staging.mkdir(parents=True, exist_ok=True)
    commit, files = source.look()
    chosen = choose(job, source, files)
    total = sum(file.size or 0 for file in chosen.values())
    room(job, total)
    elsewhere = {} if job.wanted["peer"] else code(job, source, chosen)
    everything = chosen | {name: file for name, (_other, file) in elsewhere.items()}
    job.say(state="downloading", total=total, done=job.on_disk(), message="")
    download(job, source, chosen, elsewhere)
    job.say(state="verifying", done=total)
    found = verify(job, source, everything)
    if not job.wanted["peer"]:
        localize(job, chosen, found)
    told = ("name", "source", "repository", "revision", "include", "exclude", "code")
    manifest = {**{key: job.wanted[key] for key in told}, "path": "", "commit": commit, "files": found}
    aside = job.staging / f"{MANIFEST}.new"
    aside.write_text(json.dumps(manifest, indent=2) + "\n")
    aside.replace(job.staging / MANIFEST)
    job.say(state="done", done=total)


def pause(job: Job, source: Source, error: Exception, waited: float) -> float | None:
    """Wait as long as the source asks for, and say so. Nothing when it asks for nothing, or for more than there is patience."""
    seconds = source.wait(error)
    if seconds is None or waited + seconds > PATIENCE:
        return None
    where = job.wanted["endpoint"] or "the server"
    job.say(state="waiting", message=f"{where} has too much to do and asks to wait {seconds:.0f} s")
    print(job.state["message"], flush=True)
    time.sleep(seconds + 0.1)
    job.say(state="checking", message="")
    return seconds


def main() -> int:
    """Try a few times what a network can break, and say how it ended."""
    credentials = Path(os.environ["CREDENTIALS_DIRECTORY"])
    job = Job(*(json.loads((credentials / name).read_text()) for name in ("job", "secrets")))
    # Files come by HTTP where Xet cannot be reached for a minute; it would try for four.
    os.environ.update({"HF_XET_CLIENT_RETRY_MAX_DURATION": "60s"} | job.wanted["environment"])
    os.environ.update(environment(job))
    job.say()
    kind = "peer" if job.wanted["peer"] else job.wanted["source"]
    source: Source = getattr(importlib.import_module(f"from_{kind}"), SOURCES[kind])(job)
    said, failed, most, waited = "", 0, 0, 0.0
    while failed < ATTEMPTS:
        try:
            work(job, source)
            return 0
        except RefusedError as error:
            job.say(state="failed", message=str(error))
            return 1
        except source.network as error:
            # What a network can break. Anything else is a fault of this program and ends it: the journal shows where.
            said = f"{type(error).__name__}: {error}"
            # An attempt that brought something does not count: a line that breaks every hour gets there too.
            there = job.on_disk()
            failed, waited, most = (1, 0.0, there) if there > most else (failed + 1, waited, most)
            print(f"attempt {failed} of {ATTEMPTS}: {said}", flush=True)
            if refusal := disk(job, error):
                job.say(state="failed", message=refusal)
                return 1
            if (seconds := pause(job, source, error, waited)) is not None:
                # Being told when to come back is no failure.
                failed, waited = 0, waited + seconds
                continue
        if failed < ATTEMPTS:
            time.sleep(job.wanted["pause"] * failed)
    where = job.wanted["endpoint"] or "its source"
    job.say(state="failed", message=f"{where} cannot be used after {ATTEMPTS} attempts: {said}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
