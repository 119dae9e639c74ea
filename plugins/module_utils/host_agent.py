# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the agent of a host answers, and when an instance may stop. Decided here; agent.py, leave and vllm-fleet listen, read and write.

The role host_agent puts this file beside them, so it needs nothing but the standard library of the host's Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

UP, DRAINED, STOPPED = WORDS = ("up", "drained", "stopped")
# What the operator's word is made of. `turn` names the act of a playbook whose word it is; without it, it is a person's. `force` is "yes" where
# gateways let the instance go although a route falls below its minimum. `share` is the percentage of a route's requests that one which is up gets at
# most; empty, as many as the others.
FIELDS = ("operator", "by", "since", "reason", "turn", "force", "share")
# A gateway asks every second; one that was not heard for so long is gone, and nothing waits for it.
HEARD_SECONDS = 10.0

# What one request may have. The largest that a gateway sends names the instances of one host.
HEAD_BYTES = 8 * 1024
BODY_BYTES = 64 * 1024
# What an instance may answer to GET /metrics: a real engine says 100 KiB.
METRICS_BYTES = 16 * 1024 * 1024

REQUEST = re.compile(rb"(GET|POST|HEAD|PUT|DELETE|OPTIONS|PATCH) (/[!-~]{0,200}) HTTP/1\.([01])")
FIELD = re.compile(rb"([!#-'*+.^-z|~0-9A-Z-]+):[ \t]*([ -~\t]*?)[ \t]*")
SERIES = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(\{)?(.*)", re.DOTALL)
# What belongs to a histogram or summary is called after it.
MEMBER = re.compile(r"_(bucket|sum|count|total|created)$")


class RefusedError(Exception):
    """Why a request is refused, in words for whoever reads the gateway's log."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


# --- requests


@dataclass(frozen=True)
class Request:
    """What a peer asks."""

    method: str
    path: str
    length: int
    keep_alive: bool


def request(head: bytes) -> Request:
    """Read the head of a request. What this listener has no use for is refused and not guessed."""
    first, *lines = head.rstrip(b"\r\n").split(b"\r\n")
    asked = REQUEST.fullmatch(first)
    if not asked:
        raise RefusedError(400, "this is no request of HTTP/1.1")
    fields: dict[bytes, bytes] = {}
    for line in lines:
        found = FIELD.fullmatch(line)
        if not found or (name := found[1].lower()) in fields:
            raise RefusedError(400, "a header is broken, or comes twice")
        fields[name] = found[2]
    if b"transfer-encoding" in fields:
        raise RefusedError(501, "the body has to have a Content-Length")
    length = fields.get(b"content-length", b"0")
    if not re.fullmatch(rb"[0-9]{1,9}", length):
        raise RefusedError(400, "Content-Length is no number")
    if int(length) > BODY_BYTES:
        raise RefusedError(413, f"the body may have {BODY_BYTES} bytes")
    keep_alive = asked[3] == b"1" and fields.get(b"connection", b"").lower() != b"close"
    return Request(asked[1].decode(), asked[2].decode(), int(length), keep_alive)


def check_allowed(asked: Request, peer: str, gateways: Iterable[str], monitoring: Iterable[str]) -> None:
    """Refuse what this peer, known by its certificate, may not ask: the state is the gateways', metrics are for both."""
    if peer not in {*gateways, *monitoring}:
        raise RefusedError(403, f"{peer} is neither a gateway nor a monitoring host of this host")
    if asked.path == "/state":
        wanted = "POST"
    elif asked.path == "/metrics" or asked.path.startswith("/metrics/"):
        wanted = "GET"
    else:
        raise RefusedError(404, "there are POST /state, GET /metrics and GET /metrics/<instance>")
    if asked.method != wanted:
        raise RefusedError(405, f"{asked.path} takes {wanted}")
    if wanted == "POST" and peer not in set(gateways):
        raise RefusedError(403, f"{peer} is no gateway of this host")


# --- what gateways say, and what they are told


def statement(body: bytes, peer: str, instances: Iterable[str]) -> dict[str, Any]:
    """What a gateway says in POST /state of the instances that are here. What it says of others is nobody's business."""
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise RefusedError(400, "the body is no JSON object")
    if said.get("gateway") != peer:
        raise RefusedError(403, f"the certificate is that of {peer}, the body that of {said.get('gateway')!r}")
    out, kept, running = said.get("out", []), said.get("kept", {}), said.get("in_flight", {})
    unrouted = said.get("unrouted", [])  # a gateway of an earlier release does not say it
    if not all(
        isinstance(value, kind) for value, kind in ((out, list), (kept, dict), (running, dict), (unrouted, list))
    ):
        raise RefusedError(400, "out and unrouted are lists, kept and in_flight are objects")
    here = list(instances)
    counts = {name: running[name] for name in here if name in running}
    if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts.values()):
        raise RefusedError(400, "in_flight has numbers")
    return {
        "out": [name for name in here if name in out],
        "kept": {name: str(kept[name])[:200] for name in here if name in kept},
        "in_flight": counts,
        "unrouted": [name for name in here if name in unrouted],
        "tls": said.get("tls") is True,
    }


def word(text: str | None) -> dict[str, str]:
    """The operator's word from its file. Without a file an instance is up; one that cannot be read was about to keep it out."""
    nothing = dict.fromkeys(FIELDS, "")
    if text is None:
        return {**nothing, "operator": UP}
    try:
        said = json.loads(text)
        found = {name: str(said.get(name) or "") for name in FIELDS}
    except (ValueError, AttributeError):
        found = {}
    if found.get("operator") in WORDS:
        return found
    return {**nothing, "operator": DRAINED, "reason": "the file of the operator's word cannot be read"}


def spoken(operator: str, by: str, since: str, reason: str, turn: str = "", force: str = "", share: str = "") -> str:
    """The file of the operator's word."""
    said = {"operator": operator, "by": by, "since": since, "reason": reason}
    rare = {"turn": turn, "force": force, "share": share}
    return json.dumps(said | {name: value for name, value in rare.items() if value}) + "\n"


def wants_out(instance: Mapping[str, Any]) -> bool:
    """Whether gateways are asked to send nothing more to an instance, by what the answer to POST /state says of it."""
    return bool(instance["leaving"]) or instance["operator"] != UP or bool(instance.get("sick"))


# --- leaving


def awaited(
    instance: str, heard: Mapping[str, Mapping[str, Any]], now: float, waited: float, kept_seconds: float
) -> dict[str, str]:
    """The gateways for which an instance that stops still waits, and why; with none of them it may stop.

    What a gateway says counts once it was told, in an earlier answer, that the instance wants out: before that it may be about to choose it.
    """
    reasons = {}
    for gateway, said in sorted(heard.items()):
        if now - said["time"] > HEARD_SECONDS:
            continue
        running = said["in_flight"].get(instance, 0)
        if instance not in said["told"]:
            reasons[gateway] = "has not heard of it yet"
        elif instance in said["out"]:
            if running:
                reasons[gateway] = f"has {running} running request{'s' if running > 1 else ''}"
        elif instance in said["kept"]:
            if waited < kept_seconds:
                reasons[gateway] = f"keeps it: {said['kept'][instance] or 'no reason given'}"
        else:
            reasons[gateway] = "still uses it"
    return reasons


def unused(instance: str, heard: Mapping[str, Mapping[str, Any]], now: float) -> dict[str, str]:
    """The gateways that do not use an instance that nobody wants out any more, and why; those that have no route for it do not count."""
    reasons = {}
    for gateway, said in sorted(heard.items()):
        if now - said["time"] > HEARD_SECONDS or instance in said.get("unrouted", []):
            continue
        if instance in said["told"]:
            reasons[gateway] = "was told last that its host wants it out"
        elif instance in said["out"]:
            reasons[gateway] = "does not use it yet: its check has not passed"
    return reasons


def without_tls(heard: Mapping[str, Mapping[str, Any]], now: float) -> list[str]:
    """The gateways that could not ask an instance that speaks TLS: they are of a former version of this collection."""
    return sorted(
        gateway for gateway, said in heard.items() if now - said["time"] <= HEARD_SECONDS and not said.get("tls")
    )


def standing(instance: str, heard: Mapping[str, Mapping[str, Any]], now: float) -> dict[str, str]:
    """Each gateway with what it does with an instance, in words for an operator."""
    told = {}
    for gateway, said in sorted(heard.items()):
        running = said["in_flight"].get(instance, 0)
        if instance in said["out"]:
            does = "out"
        elif instance in said["kept"]:
            does = f"kept ({said['kept'][instance] or 'no reason given'})"
        else:
            does = "in use"
        silent = now - said["time"]
        told[gateway] = f"{does}, {running} in flight" + (
            f", silent for {silent:.0f} s" if silent > HEARD_SECONDS else ""
        )
    return told


# --- metrics


def silenced(text: str | None) -> str:
    """The metric of the silence that a turn opened for this host; nothing where there is none. `until` is in seconds of the epoch, or as ISO 8601."""
    try:
        until = json.loads(text or "null")["until"]
        if isinstance(until, str):
            until = datetime.fromisoformat(until.replace("Z", "+00:00")).timestamp()
        seconds = float(until)
    except (ValueError, TypeError, KeyError):
        return ""
    name = "vllm_fleet_silenced_until_timestamp_seconds"
    about = "Until when a turn asks monitoring to be silent about this host."
    return f"# HELP {name} {about}\n# TYPE {name} gauge\n{name} {seconds:.0f}\n"


def content(answer: bytes) -> str:
    """The body of an instance's answer to GET /metrics, which came whole. ValueError when it is none."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator or not re.match(rb"HTTP/1\.[01] 200\b", head):
        raise ValueError(f"the instance answered {head.split(bytes([13]))[0][:60].decode(errors='replace')!r}")
    if re.search(rb"(?im)^transfer-encoding:[ \t]*chunked[ \t]*\r?$", head):
        body = unchunked(body)
    elif length := re.search(rb"(?im)^content-length:[ \t]*([0-9]+)", head):
        if len(body) < int(length[1]):
            raise ValueError("the answer was cut")
        body = body[: int(length[1])]
    return body.decode("utf-8", "replace")


def unchunked(body: bytes) -> bytes:
    """A body without its chunks. ValueError when it is not whole."""
    parts: list[bytes] = []
    while True:
        size, separator, rest = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16) if separator else -1
        if length < 0 or len(rest) < length:
            raise ValueError("the answer was cut")
        if length == 0:
            return b"".join(parts)
        parts.append(rest[:length])
        body = rest[length + 2 :]


def labelled(line: str, instance: str) -> str:
    """A series with the name of its instance as one more label."""
    found = SERIES.fullmatch(line)
    if not found:
        return ""
    name, brace, rest = found.groups()
    mine = f'{name}{{instance_name="{instance}"'
    if not brace:
        return f"{mine}}}{rest}"
    return f"{mine}{'' if rest.startswith('}') else ','}{rest}"


def merged(found: Mapping[str, str | None]) -> str:
    """The metrics of several instances as one text. The format has each name once, with all its series together."""
    families: dict[str, dict[str, list[str]]] = {}
    for instance, text in found.items():
        types: dict[str, str] = {}
        for line in (text or "").splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _hash, what, name, *_rest = [*line.split(" ", 3), ""]
                types[name] = name
                families.setdefault(name, {}).setdefault(what, [line])
            elif line and not line.startswith("#") and (series := labelled(line, instance)):
                name = series.partition("{")[0]
                family = types.get(name) or types.get(MEMBER.sub("", name)) or name
                families.setdefault(family, {}).setdefault("series", []).append(series)
    lines = ["# HELP vllm_fleet_instance_up Whether the instance told its metrics.", "# TYPE vllm_fleet_instance_up gauge"]  # fmt: skip
    lines += [
        f'vllm_fleet_instance_up{{instance_name="{name}"}} {int(text is not None)}' for name, text in found.items()
    ]
    for told in families.values():
        lines += [line for part in ("HELP", "TYPE", "series") for line in told.get(part, []) if told.get("series")]
    return "\n".join(lines) + "\n"
