# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""An HTTPS endpoint as a client sees it, and checks of it as rows: what was looked at, whether it is right, and what came."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# What a module takes to know which endpoint it asks, and how; `timeout` is its own.
ARGUMENTS: dict[str, Any] = {
    "url": {"type": "str", "required": True},
    "connect_address": {"type": "str"},
    "ca_file": {"type": "path"},
    "ca_pem": {"type": "str"},
    "certificate_file": {"type": "path"},
}
RULES: dict[str, Any] = {"mutually_exclusive": [("ca_file", "ca_pem")]}


class CheckError(Exception):
    """The endpoint answered, and the answer is not the right one."""


class StatusError(CheckError):
    """Its answer has another status than 200."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status}: {answer.text()}")
        self.answer = answer


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    body: bytes
    # How long the endpoint wants to be left alone, in seconds.
    retry_after: float = 0

    def json(self) -> Any:
        """The body as data."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise CheckError(f"not JSON: {self.text()}") from None

    def text(self) -> str:
        """The beginning of the body, for a person."""
        return " ".join(self.body.decode(errors="replace").split())[:200]


class Connection(http.client.HTTPSConnection):
    """An HTTPS connection to an address of one's own choice. The name in the URL is still the one that is verified."""

    def __init__(self, host: str, port: int, address: str | None, context: ssl.SSLContext, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._target = (address or host, port)
        self._tls = context

    def connect(self) -> None:
        """Connect to the address and speak TLS with the name."""
        plain = socket.create_connection(self._target, self.timeout)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


class Endpoint:
    """The endpoint as a client sees it."""

    def __init__(
        self,
        url: str,
        key: str,
        address: str | None = None,
        ca_file: str | None = None,
        ca_pem: str | None = None,
        timeout: float = 120,
        certificate_file: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"url has to be https://NAME or https://NAME:PORT, not {url!r}")
        self.host, self.port = parts.hostname, parts.port or 443
        self.key = key
        self.address = address
        self.timeout = timeout
        self.context = ssl.create_default_context(cafile=ca_file, cadata=ca_pem)
        if certificate_file:
            self.context.load_cert_chain(certificate_file)

    @classmethod
    def of(cls, given: Mapping[str, Any], key: str) -> Endpoint:
        """From the parameters of a module. Raises ValueError and OSError."""
        return cls(
            given["url"],
            key,
            given["connect_address"],
            given["ca_file"],
            given["ca_pem"],
            given["timeout"],
            given["certificate_file"],
        )

    def open(self) -> Connection:
        """A connection, not yet made."""
        return Connection(self.host, self.port, self.address, self.context, self.timeout)

    def headers(self, key: str | None) -> dict[str, str]:
        """The headers of a request; without a key, those of a stranger."""
        headers = {"Accept": "application/json", "User-Agent": "gpufleet-endpoint-verify"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def ask(
        self, method: str, path: str, body: bytes | None = None, key: str | None = None, kind: str = "application/json"
    ) -> Answer:
        """Send one request and read the whole answer."""
        connection = self.open()
        try:
            headers = self.headers(key) | ({} if body is None else {"Content-Type": kind})
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            pause = response.headers.get("Retry-After") or ""
            return Answer(response.status, response.read(), float(pause) if pause.isdecimal() else 0)
        finally:
            connection.close()

    def events(self, path: str, body: bytes) -> Iterator[tuple[float, str]]:
        """Send one request and yield the data of each server-sent event with the time at which it came. Raises StatusError."""
        connection = self.open()
        try:
            headers = {**self.headers(self.key), "Content-Type": "application/json", "Accept": "text/event-stream"}
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise StatusError(Answer(response.status, response.read()))
            for line in response:
                if line.startswith(b"data:"):
                    yield time.monotonic(), line[5:].decode(errors="replace").strip()
        finally:
            connection.close()


def row(check: str, function: Callable[[], str]) -> dict[str, str]:
    """Make one check and describe how it went."""
    try:
        return {"check": check, "result": "ok", "detail": function()}
    except CheckError as error:
        detail = str(error)
    except ssl.SSLCertVerificationError as error:
        detail = f"the certificate does not verify: {error.verify_message}"
    except TimeoutError:
        detail = "no answer in time: it is busy, or it hangs"
    except (OSError, http.client.HTTPException) as error:
        detail = f"{type(error).__name__}: {error}"
    return {"check": check, "result": "FAILED", "detail": detail}
