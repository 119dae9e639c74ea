#!/usr/bin/python
# Copyright: The vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Proves an OpenAI-compatible endpoint from the outside, as a client sees it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: endpoint_verify
short_description: Proves an OpenAI-compatible HTTPS endpoint from the outside, as a client
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
description:
  - Asks an endpoint what a client would ask it and says for each check whether the answer was the right one.
  - Checks the certificate (chain, name, days left), that a request without a key or with a wrong one is refused, that
    the models are listed, that each of them completes a prompt and streams an answer piece by piece (or returns an embedding,
    when it is a model for that), and that paths which must not be public are not.
  - Never fails because of an answer; look at RV(verified) or RV(failures). Changes nothing.
options:
  url:
    description:
      - Scheme, host name and port of the endpoint, such as V(https://llm.example.com:8443).
      - The name has to be in the certificate.
    type: str
    required: true
  connect_address:
    description: Address to connect to instead of the one that the name in O(url) resolves to, like C(curl --resolve).
    type: str
  ca_file:
    description: File with the certificate authorities to trust. Without this and O(ca_pem), those of the system.
    type: path
  ca_pem:
    description: The certificate authorities to trust, in PEM form.
    type: str
  api_key:
    description: The key of a client.
    type: str
    required: true
  models:
    description: The models that have to be listed and have to answer.
    type: list
    elements: str
    required: true
  forbidden_paths:
    description: Paths that have to be answered with 404, key or not.
    type: list
    elements: str
    default: [/metrics, /invocations]
  paths:
    description:
      - Paths that the gateway lets through. What a model is for says it itself; it is asked by the first of these paths that it answers, for a completion,
        a transcription, an embedding, a rank, a class or a pooled output. A model that completes is asked for a stream, too.
      - Without any that can be asked, models are only listed. What is left out are those that gateways let through unless they are told otherwise.
    type: list
    elements: str
  minimum_days:
    description: The certificate has to be valid for at least this many days more.
    type: int
    default: 7
  timeout:
    description: Seconds that one answer may take.
    type: int
    default: 120
attributes:
  check_mode:
    description: Can run in check_mode and return changed status prediction without modifying target.
    support: full
    details: Asks nothing in check mode.
"""

EXAMPLES = r"""
- name: The endpoint answers as it should
  gpufleet.llm.endpoint_verify:
    url: https://llm.example.com
    api_key: "{{ vault_team_a_key }}"
    models: [qwen2.5-7b]
  delegate_to: localhost
  register: endpoint
  failed_when: not endpoint.verified
"""

RETURN = r"""
rows:
  description: One entry for each check that was made, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{check: certificate, result: ok, detail: "TLSv1.3, valid for 89 more days"}]
failures:
  description: The rows whose result is not V(ok).
  returned: always
  type: list
  elements: dict
verified:
  description: Whether every check passed.
  returned: always
  type: bool
"""

import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "Count to twenty: one, two,"
STREAM_TOKENS = 8
# A streamed answer takes time between its first and its last piece: 8 tokens take more than this on any hardware. One
# that a proxy held back arrives all at once.
STREAM_SPREAD = 0.005


class CheckError(Exception):
    """The endpoint answered, and the answer is not the right one."""


class NotServedError(Exception):
    """The model is not of the kind that it was asked as."""


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    body: bytes

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
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"url has to be https://NAME or https://NAME:PORT, not {url!r}")
        self.host, self.port = parts.hostname, parts.port or 443
        self.key = key
        self.address = address
        self.timeout = timeout
        self.context = ssl.create_default_context(cafile=ca_file, cadata=ca_pem)

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
            return Answer(response.status, response.read())
        finally:
            connection.close()

    def events(self, path: str, body: bytes) -> Iterator[tuple[float, str]]:
        """Send one request and yield the data of each server-sent event with the time at which it came."""
        connection = self.open()
        try:
            headers = {**self.headers(self.key), "Content-Type": "application/json", "Accept": "text/event-stream"}
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise CheckError(f"{response.status}: {Answer(response.status, response.read()).text()}")
            for line in response:
                if line.startswith(b"data:"):
                    yield time.monotonic(), line[5:].decode(errors="replace").strip()
        finally:
            connection.close()


def check_certificate(endpoint: Endpoint, minimum_days: int) -> str:
    """The chain and the name are verified by connecting; the days left are read."""
    connection = endpoint.open()
    try:
        connection.connect()
        tls = connection.sock
        if not isinstance(tls, ssl.SSLSocket):
            raise CheckError("no TLS")
        certificate = tls.getpeercert() or {}
        version = tls.version()
    finally:
        connection.close()
    days = int((ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) // 86400)
    if days < minimum_days:
        raise CheckError(f"valid for {days} more days only")
    return f"{version}, valid for {days} more days"


def check_refusal(endpoint: Endpoint) -> str:
    """A stranger and somebody with a wrong key get 401."""
    for who, key in (("no key", None), ("a wrong key", "wrong-" + "0" * 32)):
        answer = endpoint.ask("GET", "/v1/models", key=key)
        if answer.status != 401:
            raise CheckError(f"{who}: {answer.status} instead of 401")
    return "401 without a key and with a wrong one"


def check_models(endpoint: Endpoint, models: list[str]) -> str:
    """Every model is listed."""
    answer = endpoint.ask("GET", "/v1/models", key=endpoint.key)
    if answer.status != 200:
        raise CheckError(f"{answer.status}: {answer.text()}")
    try:
        listed = [str(entry["id"]) for entry in answer.json()["data"]]
    except (KeyError, TypeError):
        raise CheckError(f"not a list of models: {answer.text()}") from None
    if missing := [model for model in models if model not in listed]:
        raise CheckError(f"not listed: {', '.join(missing)} (listed: {', '.join(listed) or 'none'})")
    return ", ".join(listed)


def prompt(path: model_kinds.Path) -> dict[str, Any]:
    """What a completion or a chat is asked for here, instead of the one token that the table says."""
    text = {"messages": [{"role": "user", "content": PROMPT}]} if path.path == CHAT else {"prompt": PROMPT}
    return {**text, "max_tokens": STREAM_TOKENS}


def check_answer(endpoint: Endpoint, kind: model_kinds.Kind, path: model_kinds.Path, model: str) -> str:
    """The model answers a question of its kind. Raises NotServedError when it is not of that kind."""
    began = time.monotonic()
    more = prompt(path) if kind.streams else {}
    body, content_type = path.body(model, **more)
    answer = endpoint.ask("POST", path.path, body, endpoint.key, content_type)
    if model_kinds.lacks(answer.status, answer.body):
        raise NotServedError
    if answer.status != 200:
        raise CheckError(f"{path.path}: {answer.status}: {answer.text()}")
    try:
        content = path.content(answer.json())
    except model_kinds.AnswerError as error:
        raise CheckError(f"{path.path}: no {kind.noun} ({error}): {answer.text()}") from None
    return f"{content} in {time.monotonic() - began:.2f} s"


def check_streaming(endpoint: Endpoint, path: model_kinds.Path, model: str) -> str:
    """The answer comes in pieces, while it is made."""
    began = time.monotonic()
    times: list[float] = []
    done = False
    # ignore_eos is vLLM's own: the answer is as long as asked for, whatever the model wants to say.
    body, _type = path.body(model, **prompt(path), ignore_eos=True, stream=True)
    for moment, data in endpoint.events(path.path, body):
        if data == "[DONE]":
            done = True
            break
        times.append(moment - began)
    if not done:
        raise CheckError(f"the stream ended after {len(times)} pieces without [DONE]")
    if len(times) < 3:
        raise CheckError(f"{len(times)} pieces only")
    if times[-1] - times[0] < STREAM_SPREAD:
        raise CheckError(
            f"{len(times)} pieces came all at once after {times[0]:.2f} s: something holds the stream back"
        )
    return f"{len(times)} pieces, first after {times[0]:.2f} s, last after {times[-1]:.2f} s"


def check_forbidden(endpoint: Endpoint, path: str) -> str:
    """The path does not exist for a client, whatever the verb."""
    for method, body in (("GET", None), ("POST", b"{}")):
        answer = endpoint.ask(method, path, body, endpoint.key)
        if answer.status != 404:
            raise CheckError(f"{method} is answered by {answer.status} instead of 404")
    return "404"


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


def model_rows(endpoint: Endpoint, paths: list[str] | None, model: str) -> list[dict[str, str]]:
    """Ask one model by the first kind that it is of."""
    asked = model_kinds.askable(model_kinds.open_paths() if paths is None else paths)
    for kind, path in asked:
        with suppress(NotServedError):
            return kind_rows(endpoint, kind, path, model)
    if not asked:
        return []
    kinds = "; ".join(f"{kind.noun} {' '.join(path.path for path in kind.paths)}" for kind in model_kinds.KINDS)
    detail = f"it answers none of {', '.join(path.path for _kind, path in asked)}; gateway_paths has to name those of what it is for: {kinds}"
    return [{"check": f"model {model}", "result": "FAILED", "detail": detail}]


def kind_rows(endpoint: Endpoint, kind: model_kinds.Kind, path: model_kinds.Path, model: str) -> list[dict[str, str]]:
    """Ask a model for an answer, and for a stream at the same time where there is one: it is the model that takes its time."""
    with ThreadPoolExecutor(1) as pool:
        streaming = (
            pool.submit(row, f"streaming {model}", partial(check_streaming, endpoint, path, model))
            if kind.streams
            else None
        )
        rows = [row(f"{kind.noun} {model}", partial(check_answer, endpoint, kind, path, model))]
    return rows + ([streaming.result()] if streaming else [])


def verify(
    endpoint: Endpoint,
    models: list[str],
    forbidden_paths: list[str],
    minimum_days: int,
    paths: list[str] | None = None,
) -> list[dict[str, str]]:
    """Make all checks. When there is no trusted connection, the rest would only say the same again."""
    rows = [row("certificate", partial(check_certificate, endpoint, minimum_days))]
    if rows[0]["result"] != "ok" and "more days only" not in rows[0]["detail"]:
        return rows
    rows.append(row("key needed", partial(check_refusal, endpoint)))
    rows.append(row("models", partial(check_models, endpoint, models)))
    for model in models:
        rows += model_rows(endpoint, paths, model)
    for path in forbidden_paths:
        rows.append(row(f"closed {path}", partial(check_forbidden, endpoint, path)))
    return rows


ARGUMENTS: dict[str, Any] = {
    "url": {"type": "str", "required": True},
    "connect_address": {"type": "str"},
    "ca_file": {"type": "path"},
    "ca_pem": {"type": "str"},
    "api_key": {"type": "str", "required": True, "no_log": True},
    "models": {"type": "list", "elements": "str", "required": True},
    "forbidden_paths": {"type": "list", "elements": "str", "default": ["/metrics", "/invocations"]},
    "paths": {"type": "list", "elements": "str"},
    "minimum_days": {"type": "int", "default": 7},
    "timeout": {"type": "int", "default": 120},
}

RULES: dict[str, Any] = {"mutually_exclusive": [("ca_file", "ca_pem")]}


def main() -> None:
    """Run as an Ansible module."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        **RULES,
        supports_check_mode=True,
    )
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, rows=[], failures=[], verified=False)
    try:
        endpoint = Endpoint(
            given["url"],
            given["api_key"],
            given["connect_address"],
            given["ca_file"],
            given["ca_pem"],
            given["timeout"],
        )
    except (ValueError, OSError) as error:
        module.fail_json(msg=str(error))
    rows = verify(endpoint, given["models"], given["forbidden_paths"], given["minimum_days"], given["paths"])
    failures = [entry for entry in rows if entry["result"] != "ok"]
    module.exit_json(changed=False, rows=rows, failures=failures, verified=not failures)


if __name__ == "__main__":
    main()
