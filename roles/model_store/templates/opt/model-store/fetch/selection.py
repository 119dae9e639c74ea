"""Which files of a repository are fetched, from where, and whether they are what the source says."""

from __future__ import annotations

import concurrent.futures
import fnmatch
import hashlib
from collections.abc import Mapping

import model_layout
from job import File, Job, RefusedError, Source, amount


def check(job: Job, source: Source, name: str, file: File) -> dict[str, int | str]:
    """Compare a file with what the source says that it is: by SHA-256, or by git's name for it."""
    path = job.staging / name
    size = path.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            sha256.update(block)
            if not file.sha256:
                blob.update(block)
    wanted, got = (file.sha256, sha256.hexdigest()) if file.sha256 else (file.blob, blob.hexdigest())
    if file.size not in (None, size) or wanted != got:
        path.unlink()
        raise source.damaged(name, file, size, got)
    if model_layout.is_pointer(path):
        raise RefusedError(
            f"{name} of {job.what} is a pointer of Git LFS and not the file itself: its source was made without git-lfs"
        )
    return {"size": size, "sha256": sha256.hexdigest()}


def by_patterns(job: Job, files: dict[str, File]) -> dict[str, File]:
    """The files that `include` and `exclude` name. A pattern that ends in a slash means what is below it."""

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, f"{entry}*" if entry.endswith("/") else entry) for entry in patterns)

    include, exclude = job.wanted["include"], job.wanted["exclude"] or []
    return {
        name: file
        for name, file in files.items()
        if (not include or matches(name, include)) and not matches(name, exclude)
    }


def read(job: Job, source: Source, name: str, file: File) -> str:
    """The text of a small file that decides about others: fetched and verified before them."""
    if not job.target(name).exists():
        source.fetch(name, file)
    check(job, source, name, file)
    return job.target(name).read_text(errors="replace")


def choose(job: Job, source: Source, files: dict[str, File]) -> dict[str, File]:
    """The files that are wanted, by name: what is said, or all but the same weights in another layout."""
    left: Mapping[str, str] = {}
    if job.wanted["peer"]:
        chosen = files  # of which it was said before, on the host that has them
    elif job.wanted["include"] or job.wanted["exclude"] is not None:
        chosen, reason = by_patterns(job, files), "include and exclude of the model"
        left = dict.fromkeys(files.keys() - chosen, reason)
    elif source.selects:
        index = model_layout.INDEX
        named: set[str] = set()
        if index in files:
            files[index] = source.complete(index, files[index])
            named = model_layout.shards(read(job, source, index, files[index]))
        if lacking := sorted(named - files.keys()):
            raise RefusedError(f"{job.what} lacks {lacking[0]}, which its {index} names")
        if models := model_layout.alternatives(files):
            raise RefusedError(
                f"{job.what} has several models in GGUF: name the one to fetch by `include`, such as {', '.join(models)}"
            )
        left = model_layout.duplicates(files, named)
        chosen = {name: file for name, file in files.items() if name not in left}
    else:
        chosen = files
    if not chosen:
        raise RefusedError(f"include and exclude leave no file of {job.what} over; it has {', '.join(sorted(files))}")
    with concurrent.futures.ThreadPoolExecutor(job.wanted["parallel"]) as pool:
        complete = dict(zip(chosen, pool.map(lambda name: source.complete(name, chosen[name]), chosen), strict=True))
    if left:
        sizes = [file.size or 0 for file in files.values()]
        told = f"{len(complete)} of {len(files)} files are fetched, {amount(sum(file.size or 0 for file in complete.values()))} of "
        job.say(selection=f"{told}{amount(sum(sizes))}; left out: {model_layout.told(left)}")
        print(job.state["selection"], flush=True)
    return complete


def code(job: Job, source: Source, chosen: dict[str, File]) -> dict[str, tuple[Source, File]]:
    """The files of the repositories whose code `auto_map` names, at their pinned revisions; refused when one has none."""
    texts = {name: read(job, source, name, chosen[name]) for name in model_layout.CONFIGURED if name in chosen}
    pinned = {entry["repository"]: entry["revision"] for entry in job.wanted["code"] or []}
    found: dict[str, tuple[Source, File]] = {}
    for repository, where in model_layout.foreign_code(texts).items():
        if repository == job.wanted["repository"] or (job.wanted["code"] == [] and repository not in pinned):
            continue
        if repository not in pinned:
            pin = f"Read that code and pin it: `code: [{{repository: {repository}, revision: <commit>}}]`"
            beside = "Put its .py files beside that file and take what ends in `--` out of auto_map"
            raise RefusedError(
                f"auto_map in {where} of {job.what} takes code from {repository}, which vLLM would ask the hub for. "
                f"{pin if source.selects else beside}; or say `code: []` when vLLM does not need it"
            )
        other = source.other(repository, pinned[repository])
        _commit, files = other.look()
        for name, file in files.items():
            if name.endswith(".py") and name in chosen and chosen[name] != file:
                raise RefusedError(f"{repository} and {job.what} both have a file {name}, and they differ")
            if name.endswith(".py") and name not in chosen:
                found[name] = (other, other.complete(name, file))
    return found


def localize(job: Job, chosen: dict[str, File], found: dict[str, dict[str, int | str]]) -> None:
    """Have `auto_map` lead to the code that was fetched: beside it, where vLLM needs no hub."""
    here = {job.wanted["repository"], *(entry["repository"] for entry in job.wanted["code"] or [])}
    for name in model_layout.CONFIGURED:
        if name not in chosen:
            continue
        path = job.target(name)
        text = path.read_text(errors="replace")
        if (changed := model_layout.localized(text, here)) != text:
            path.write_text(changed)
            content = path.read_bytes()
            found[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
