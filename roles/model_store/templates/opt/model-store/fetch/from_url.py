"""Models from a list of addresses, each with the SHA-256 of its file. Needs nothing but Python."""

from __future__ import annotations

import email.message
import http.client
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Any

from job import File, Job, RefusedError, Source, asked_to_wait

AGAIN = (408, 425, 429)  # answers below 500 that another attempt may get around


def headers_for(url: str, rules: dict[str, dict[str, str]]) -> dict[str, str]:
    """The headers whose address this one begins with: a secret goes nowhere else."""
    found: dict[str, str] = {}
    asked = urllib.parse.urlsplit(url)
    for address, headers in rules.items():
        rule = urllib.parse.urlsplit(address)
        same = (rule.scheme, rule.netloc.lower()) == (asked.scheme, asked.netloc.lower())
        if same and (asked.path.rstrip("/") + "/").startswith(rule.path.rstrip("/") + "/"):
            found.update(headers)
    return found


class Redirect(urllib.request.HTTPRedirectHandler):
    """Follows a redirect with the headers of the address that it leads to."""

    def __init__(self, rules: dict[str, dict[str, str]]) -> None:
        self.rules = rules

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Unredirected headers are those that urllib leaves behind here."""
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request:
            for key, value in headers_for(request.full_url, self.rules).items():
                request.add_unredirected_header(key, value)
        return request


class Url(Source):
    """Files of one or several servers."""

    network = (OSError, http.client.HTTPException)
    timeout = 60
    selects = False

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.rules = job.secrets["headers"]
        self.opener = urllib.request.build_opener(Redirect(self.rules))
        self.files = {entry["path"]: entry for entry in job.wanted["files"]}

    def ask(self, name: str, first: int, last: str = "") -> Any:
        """Ask for a file from a byte on."""
        url = self.files[name]["url"]
        query = self.job.secrets["queries"].get(name, "")
        request = urllib.request.Request(url + (f"?{query}" if query else ""), headers={"User-Agent": "model_store"})  # noqa: S310
        if first or last:
            request.add_header("Range", f"bytes={first}-{last}")
        for key, value in headers_for(url, self.rules).items():
            request.add_unredirected_header(key, value)
        return self.opener.open(request, timeout=self.timeout)

    def look(self) -> tuple[str, dict[str, File]]:
        """Ask every server for one byte: whether it has the file, gives it to us, and how large it is.

        Not by HEAD: a presigned address is for one method only.
        """
        return "", {name: File(self.size(name), self.files[name]["sha256"]) for name in self.files}

    def size(self, name: str) -> int | None:
        """Bytes of a file, if the server tells."""
        url = self.files[name]["url"]
        try:
            with self.ask(name, 0, "0") as answer:
                return total(answer.headers)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # an empty file has no first byte
                return total(error.headers)
            if error.code in (401, 403):
                raise RefusedError(
                    f"{url} is refused ({error.code}): model_store_url_headers has "
                    f"{'a wrong header' if headers_for(url, self.rules) else 'no header'} for it, or the signature in "
                    "the address is wrong or has expired"
                ) from None
            if error.code < 500 and error.code not in AGAIN:
                raise RefusedError(f"{url} cannot be had: {error.code} {error.reason}") from None
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, FileNotFoundError | PermissionError | str):
                raise RefusedError(f"{url} cannot be had: {error.reason}") from None
            raise

    def fetch(self, name: str, file: File) -> None:
        """Fetch one file."""
        part = self.job.part(name)
        there = part.stat().st_size if part.exists() else 0
        if file.size is not None and there > file.size:
            part.unlink()
            there = 0
        if file.size is None or there < file.size:
            try:
                answer = self.ask(name, there)
            except urllib.error.HTTPError as error:
                if error.code != 416:
                    raise
                if total(error.headers) != there:  # or all of it was here already
                    part.unlink()  # not the beginning of this file: the next attempt starts anew
                    raise
                self.job.arrived(name)
                return
            with answer, part.open("ab") as content:
                if there and not begins(answer.headers, there):
                    content.truncate(0)  # the whole file again, as some servers do
                shutil.copyfileobj(answer, content, 1 << 20)
                content.flush()
                length = total(answer.headers)
                if length is not None and os.fstat(content.fileno()).st_size < length:
                    raise ConnectionError(f"{self.files[name]['url']} was cut off")
        part.touch()  # an empty file
        self.job.arrived(name)

    def wait(self, error: Exception) -> float | None:
        """What the answer's header says."""
        if not isinstance(error, urllib.error.HTTPError):
            return None
        return asked_to_wait(error.code, error.headers, 12 * self.job.wanted["pause"])

    def damaged(self, name: str, file: File, size: int, got: str) -> RefusedError:
        """The hash is the operator's own."""
        return RefusedError(
            f"{name} is not what model_store_models says: sha256 is {file.sha256} there, but {got} of the {size} bytes "
            "that came. They were removed. Either sha256 is wrong, or the address gives another file than it did, "
            "or a proxy damages it"
        )


def total(headers: email.message.Message) -> int | None:
    """Bytes of the whole file, from an answer to a question for a part of it."""
    if found := re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", headers.get("Content-Range", "")):
        return int(found[1])
    length = headers.get("Content-Length")
    return int(length) if length and "Content-Range" not in headers else None


def begins(headers: email.message.Message, first: int) -> bool:
    """Whether an answer goes on at this byte."""
    return headers.get("Content-Range", "").startswith(f"bytes {first}-")
