"""Models from ModelScope, by modelscope_hub: the hub client that the `modelscope` package itself is built on.

`modelscope` would add 31 MB of code for training and inference and nothing for a download.
"""

from __future__ import annotations

from pathlib import Path

from job import File, Job, RefusedError, Source, asked_to_wait
from modelscope_hub import HubApi, HubConfig, errors


class ModelScope(Source):
    """A repository of ModelScope at one commit."""

    network = (OSError, errors.HubError)

    def __init__(self, job: Job, repository: str = "", revision: str = "") -> None:
        super().__init__(job)
        self.endpoint, self.repository = job.wanted["endpoint"], repository or job.wanted["repository"]
        self.revision, self.token = revision or job.wanted["revision"], job.secrets["token"]
        cache = job.staging / ".cache"
        # An empty token means none, not the one that lies around.
        self.hub = HubApi(
            HubConfig(endpoint=self.endpoint, token=self.token, cache_dir=cache / "hub", config_dir=cache / "home")
        )

    def look(self) -> tuple[str, dict[str, File]]:
        """Ask the hub what there is, and tell apart why it may not be had."""
        page = f"{self.endpoint}/models/{self.repository}"
        try:
            self.hub.get_repo(self.repository, "model")
        except (errors.NotExistError, errors.AuthenticationError, errors.PermissionDeniedError):
            self.judge_token()
            hint = "this token may not see it" if self.token else "private: set model_store_modelscope_token"
            raise RefusedError(
                f"{self.endpoint} has no repository {self.repository}: it is misspelt, or {hint}"
            ) from None
        try:
            listed = self.hub.list_repo_files(self.repository, "model", revision=self.revision)
        except (errors.NotExistError, errors.InvalidParameter):
            listed = []
        except (errors.AuthenticationError, errors.PermissionDeniedError):
            self.judge_token()
            raise self.closed(page) from None
        files = {file.path: File(file.size, file.sha256 or "") for file in listed if file.type != "tree"}
        if not files:  # ModelScope lists nothing for a commit that it does not have
            raise RefusedError(
                f"{self.repository} has no revision {self.revision}; its commits are at {page}/files, in the history"
            )
        for name, file in files.items():
            if not file.sha256:
                raise RefusedError(f"{self.endpoint} tells no SHA-256 of {name}, so it could not be verified")
        # The list of a restricted repository is public; only asking for a file tells whether it may be had.
        smallest = min(files, key=lambda name: files[name].size or 0)
        try:
            self.hub.legacy.download_stream(
                self.repository, "model", smallest, self.revision, headers={"Range": "bytes=0-0"}
            ).close()
        except (errors.AuthenticationError, errors.PermissionDeniedError):
            raise self.closed(page) from None
        return self.revision, files

    def judge_token(self) -> None:
        """After a refusal: whether the token is to blame. A mirror may know nobody, and need not."""
        try:
            if self.token:
                self.hub.whoami()
        except errors.AuthenticationError:
            raise RefusedError(
                f"{self.endpoint} refuses the token. model_store_modelscope_token is wrong, expired or revoked: make a "
                f"new one at {self.endpoint}/my/myaccesstoken"
            ) from None
        except self.network:
            return

    def other(self, repository: str, revision: str) -> Source:
        """On the same hub."""
        return ModelScope(self.job, repository, revision)

    def wait(self, error: Exception) -> float | None:
        """The client has read the header."""
        if not isinstance(error, errors.RateLimitError):
            return None
        after = {} if error.retry_after is None else {"retry-after": str(int(error.retry_after))}
        return asked_to_wait(429, after, 12 * self.job.wanted["pause"])

    def closed(self, page: str) -> RefusedError:
        """The files may not be had."""
        return RefusedError(
            f"{self.repository} is restricted and {'this token has no' if self.token else 'without a token there is no'} "
            f"access. Ask for access at {page} with the account of the token, and give its token in "
            "model_store_modelscope_token"
        )

    def fetch(self, name: str, file: File) -> None:
        """Fetch one file. Its beginning lies beside it as <name>.incomplete, where the next run goes on.

        The client is not told the SHA-256: it would fetch a damaged file three times, and all files are verified later.
        """
        self.job.target(name)
        try:
            self.hub.download_file(
                self.repository,
                "model",
                name,
                revision=self.revision,
                local_dir=Path(self.job.staging),
                file_size=file.size,
            )
        except errors.FileIntegrityError as error:
            raise RefusedError(
                f"{name} is not what the hub says: {error.message.rstrip('.')}. It was removed and is fetched anew in the next run; if "
                "that fails too, the mirror or a proxy damages it"
            ) from None
