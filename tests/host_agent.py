"""Peers of the agent of a host, for the tests of the scenario host_agent: they ask as a gateway and as monitoring do."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testinfra.host import Host

from tests.certificates import Authority
from tests.network import address_of

PORT = 9440
Answers = Callable[[dict[str, Any]], dict[str, Any]]


def connection(host: Host, directory: Path, authority: Authority, name: str | None) -> http.client.HTTPSConnection:
    """A connection of a peer of this name, or of one without a certificate."""
    context = ssl.create_default_context(cadata=authority.pem)
    if name is not None:
        for text, file in zip(authority.sign(name), ("peer.pem", "peer.key"), strict=True):
            (directory / file).write_text(text)
        context.load_cert_chain(directory / "peer.pem", directory / "peer.key")
    return http.client.HTTPSConnection(address_of(host), PORT, context=context, timeout=15)


class Gateway(threading.Thread):
    """A gateway that asks as the real one does, and says what the test wants it to."""

    def __init__(self, peer: http.client.HTTPSConnection, name: str) -> None:
        super().__init__(daemon=True)
        self.peer, self.name_of_it = peer, name
        self.says: Answers = lambda _instances: {}
        self.told: dict[str, Any] = {}
        self.ends = threading.Event()

    def run(self) -> None:
        while not self.ends.wait(0.2):
            self.peer.request("POST", "/state", json.dumps({"gateway": self.name_of_it, **self.says(self.told)}))
            self.told = json.loads(self.peer.getresponse().read())["instances"]

    def end(self) -> None:
        self.ends.set()
        self.join(5)
        self.peer.close()


def obeys(running: int = 0) -> Answers:
    """Takes out what wants out, and has so many requests running there."""

    def says(instances: dict[str, Any]) -> dict[str, Any]:
        out = [name for name, state in instances.items() if state["leaving"] or state["operator"] != "up"]
        return {"out": out, "in_flight": dict.fromkeys(instances, running)}

    return says
