"""Models from a Hugging Face hub, by huggingface_hub."""

from __future__ import annotations

import urllib.parse

from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from job import File, Job, RefusedError, Source


class HuggingFace(Source):
    """A repository of a hub at one commit."""

    network = (OSError, errors.HTTPError, errors.HfHubHTTPError, errors.XetDownloadError)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.endpoint, self.repository = job.wanted["endpoint"], job.wanted["repository"]
        self.token = job.secrets["token"] or False
        self.hub = HfApi(endpoint=self.endpoint, token=self.token)
        self.commit = ""
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # what a cut costs at most, and how fine the progress is

    def look(self) -> tuple[str, dict[str, File]]:
        """Ask the hub what there is, and tell apart why it may not be had."""
        repository, revision, endpoint = self.repository, self.job.wanted["revision"], self.endpoint
        try:
            if self.token:
                self.hub.whoami()
        except errors.HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == 401:
                raise RefusedError(
                    f"{endpoint} refuses the token. model_store_hf_token is wrong, expired or revoked: make a new one "
                    f"with read access at {endpoint}/settings/tokens"
                ) from None
            raise
        try:
            info = self.hub.model_info(repository, revision=revision, files_metadata=True)
            # The description of a gated repository is public; only asking for a file tells whether it may be had.
            if info.siblings:
                name = info.siblings[0].rfilename
                url = hf_hub_url(repository, name, revision=info.sha, endpoint=endpoint)
                get_hf_file_metadata(url, token=self.token)
        except errors.GatedRepoError:
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
            hint = "this token may not see it" if self.token else "private: set model_store_hf_token"
            raise RefusedError(f"{endpoint} has no repository {repository}: it is misspelt, or {hint}") from None
        self.commit = info.sha or ""
        return self.commit, {
            file.rfilename: File(file.size or 0, file.lfs.sha256 if file.lfs else "", file.blob_id or "")
            for file in info.siblings or []
        }

    def fetch(self, name: str, file: File) -> None:
        """Fetch one file.

        snapshot_download and hf_hub_download of this huggingface_hub begin a file anew in each process, which is hours
        for the shards of a large model; http_get, which they use, can go on. The price: no Xet, plain HTTP with ranges.
        """
        size, part = file.size or 0, self.job.part(name)
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        url = hf_hub_url(self.repository, name, revision=self.commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token)
        location = get_hf_file_metadata(url, token=self.token).location
        if urllib.parse.urlsplit(location).netloc != urllib.parse.urlsplit(url).netloc:
            headers.pop("authorization", None)  # the token is for the hub, not for the storage that it sends us to
        with part.open("ab") as content:
            there = content.tell()
            if there < size:
                http_get(location, content, resume_size=there, headers=headers, expected_size=size)
        self.job.arrived(name)
