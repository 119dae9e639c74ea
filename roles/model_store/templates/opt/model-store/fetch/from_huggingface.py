"""Models from a Hugging Face hub, by huggingface_hub."""

from __future__ import annotations

import re
import sys
import urllib.parse
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import HfFileMetadata, http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils._runtime import is_xet_available
from huggingface_hub.utils._xet import (
    XetFileData,
    get_xet_session,
    refresh_xet_connection_info,
    xet_headers_without_auth,
)
from job import File, Job, RefusedError, Source, asked_to_wait


class HuggingFace(Source):
    """A repository of a hub at one commit."""

    network = (OSError, errors.HTTPError, errors.HfHubHTTPError, errors.XetDownloadError)

    def __init__(self, job: Job, repository: str = "", revision: str = "") -> None:
        super().__init__(job)
        self.endpoint, self.repository = job.wanted["endpoint"], repository or job.wanted["repository"]
        self.revision = revision or job.wanted["revision"]
        self.token = job.secrets["token"] or False
        self.hub = HfApi(endpoint=self.endpoint, token=self.token)
        self.commit = ""
        self.xet = True
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # what a cut costs at most, and how fine the progress is
        # 50 GB are what the hub gives without Xet. A mirror that has no Xet may give more, and each server says so itself.
        constants.MAX_HTTP_DOWNLOAD_SIZE = sys.maxsize

    def look(self) -> tuple[str, dict[str, File]]:
        """Ask the hub what there is, and tell apart why it may not be had."""
        repository, revision, endpoint = self.repository, self.revision, self.endpoint
        self.xet = True  # each attempt tries it again: the hub gives files of more than 50 GB in no other way
        try:
            info = self.hub.model_info(repository, revision=revision, files_metadata=True)
            # The description of a gated repository is public; only asking for a file tells whether it may be had.
            if info.siblings:
                name = info.siblings[0].rfilename
                url = hf_hub_url(repository, name, revision=info.sha, endpoint=endpoint)
                get_hf_file_metadata(url, token=self.token)
        except errors.GatedRepoError:
            self.judge_token()
            raise RefusedError(
                f"{repository} is gated and {'this token has no' if self.token else 'without a token there is no'} "
                f"access. Ask for access at {endpoint}/{repository} with the account of the token, and give its token "
                "in model_store_hf_token"
            ) from None
        except errors.RevisionNotFoundError:
            raise RefusedError(
                f"{repository} has no revision {revision}; its commits are at {endpoint}/{repository}/commits/main"
            ) from None
        except errors.RepositoryNotFoundError:
            self.judge_token()
            hint = "this token may not see it" if self.token else "private: set model_store_hf_token"
            raise RefusedError(f"{endpoint} has no repository {repository}: it is misspelt, or {hint}") from None
        except errors.HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403):
                self.judge_token()
            raise
        self.commit = info.sha or revision
        return self.commit, {
            file.rfilename: File(file.size, file.lfs.sha256 if file.lfs else "", file.blob_id or "")
            for file in info.siblings or []
        }

    def judge_token(self) -> None:
        """After a refusal: whether the token is to blame. A mirror may know nobody, and need not."""
        try:
            if self.token:
                self.hub.whoami()
        except self.network as error:
            answer = getattr(error, "response", None)
            if answer is not None and answer.status_code == 401:
                raise RefusedError(
                    f"{self.endpoint} refuses the token. model_store_hf_token is wrong, expired or revoked: make a new "
                    f"one with read access at {self.endpoint}/settings/tokens"
                ) from None

    def other(self, repository: str, revision: str) -> Source:
        """On the same hub."""
        return HuggingFace(self.job, repository, revision)

    def wait(self, error: Exception) -> float | None:
        """What the answer's header says."""
        answer = getattr(error, "response", None)
        if answer is None:
            return None
        return asked_to_wait(answer.status_code, answer.headers, 12 * self.job.wanted["pause"])

    def known(self, name: str) -> tuple[str, HfFileMetadata]:
        """The address of a file, and what the hub says of it."""
        url = hf_hub_url(self.repository, name, revision=self.commit, endpoint=self.endpoint)
        return url, get_hf_file_metadata(url, token=self.token, endpoint=self.endpoint, retry_on_errors=True)

    def complete(self, name: str, file: File) -> File:
        """Mirrors list names only. The answer for the file has its size and, as its tag, its SHA-256 or git's name for it."""
        if file.size is not None and (file.sha256 or file.blob):
            return file
        _url, known = self.known(name)
        tag = known.etag or ""
        if known.size is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", tag):
            raise RefusedError(
                f"{self.endpoint} tells no size or no hash of {name}, so it could not be verified. Source url takes files "
                "with hashes of your own"
            )
        return File(known.size, tag if len(tag) == 64 else "", tag if len(tag) == 40 else "")

    def fetch(self, name: str, file: File) -> None:
        """Fetch one file.

        As hf_hub_download does: by Xet where the hub offers it, else by HTTP. Not by hf_hub_download itself, which begins a
        file anew in each process: hours for the shards of a large model. Both ways go on where the file ends.
        """
        size, part = file.size or 0, self.job.part(name)
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        url, known = self.known(name)
        if known.xet_file_data and self.xet and is_xet_available():
            self.by_xet(part, size, known.xet_file_data)
        headers = build_hf_headers(token=self.token)
        if urllib.parse.urlsplit(known.location).netloc != urllib.parse.urlsplit(url).netloc:
            headers.pop("authorization", None)  # the token is for the hub, not for the storage that it sends us to
        with part.open("ab") as content:
            there = content.tell()
            if there < size:
                http_get(known.location, content, resume_size=there, headers=headers, expected_size=size)
        self.job.arrived(name)

    def by_xet(self, part: Path, size: int, data: XetFileData) -> None:
        """Fetch what is missing of a file by Xet. Where its servers cannot be reached, the rest comes by HTTP."""
        from hf_xet import XetFileInfo  # only here: there are machines for which it is not made

        headers = build_hf_headers(token=self.token)
        with part.open("ab") as content:
            there = content.tell()
            if there >= size:
                return
            try:
                access = refresh_xet_connection_info(file_data=data, headers=headers)
                with get_xet_session().new_download_stream_group(
                    endpoint=access.endpoint,
                    token=access.access_token,
                    token_expiry_unix_secs=access.expiration_unix_epoch,
                    token_refresh_url=data.refresh_route,
                    token_refresh_headers=headers,
                    custom_headers=xet_headers_without_auth(headers),
                ) as group:
                    for piece in group.download_stream(XetFileInfo(data.file_hash, size), start=there):
                        content.write(piece)
                if content.tell() < size:  # the client may end so when it reaches nobody
                    raise ConnectionError(f"it ended after {content.tell()} of {size} bytes")
            except (OSError, RuntimeError, ValueError) as error:
                if getattr(error, "errno", None) is not None:
                    raise  # of the disk
                self.xet = False
                print(f"Xet cannot be used, so files come by HTTP: {error}", flush=True)
