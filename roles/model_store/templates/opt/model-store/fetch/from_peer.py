"""A model from another host of the fleet that has it: addresses whose files, sizes and hashes are known before."""

from __future__ import annotations

import urllib.request

from from_url import Redirect, Url
from job import File, Job, RefusedError


class Peer(Url):
    """A host that hands out what it has (the module model_share)."""

    timeout = 10  # it is near

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # Never by a proxy, which hosts may need for the hub.
        self.opener = urllib.request.build_opener(Redirect(self.rules), urllib.request.ProxyHandler({}))

    def look(self) -> tuple[str, dict[str, File]]:
        """What the other host's manifest says, which came by the controller: nobody between the two hosts can change it."""
        return self.job.wanted["commit"], {
            name: File(entry["size"], entry["sha256"]) for name, entry in self.files.items()
        }

    def damaged(self, name: str, file: File, size: int, got: str) -> RefusedError:
        """The disk of the other host, or somebody on the way."""
        return RefusedError(
            f"{name} from {self.job.wanted['endpoint']} is not what that host's manifest says: expected {file.size} bytes, "
            f"{file.sha256}, got {size} bytes, {got}. It was removed"
        )
