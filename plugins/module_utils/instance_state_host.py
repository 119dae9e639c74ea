# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The files of the operator's word on a host, what its gateways said, and what its engines have to do."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import files, host_agent, instance_tls, model_kinds

LOOK_SECONDS = 5.0
# How often an engine is asked: its metrics are 100 KiB.
ENGINE_SECONDS = 1.0
# After a boot a gateway comes by within so many seconds, if it is there at all.
FIRST_SECONDS = 10.0


class InstanceHost:
    """A host with the role host_agent, or without it."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.words = root / "var/lib/vllm-fleet"
        self.said = root / "run/vllm-fleet/agent"
        try:
            found = json.loads((root / "etc/vllm-fleet/agent.json").read_text())
        except FileNotFoundError:
            found = None
        self.configuration: dict[str, Any] | None = found
        self.asked: dict[str, tuple[float, int | None]] = {}
        self.begin = self.now()

    @property
    def instances(self) -> dict[str, dict[str, Any]]:
        """Those that the agent tells gateways of, with address and port."""
        found: dict[str, dict[str, Any]] = (self.configuration or {}).get("instances", {})
        return found

    def word(self, instance: str) -> dict[str, str]:
        """The operator's word."""
        path = self.words / f"{instance}.json"
        try:
            return host_agent.word(path.read_text(errors="replace"))
        except FileNotFoundError:
            return host_agent.word(None)

    def say(self, instance: str, word: dict[str, str]) -> None:
        """Write the operator's word; what goes back to no word at all is no file."""
        path = self.words / f"{instance}.json"
        if word == host_agent.word(None):
            path.unlink(missing_ok=True)
        else:
            files.write(path, host_agent.spoken(**word), mode=0o644, durable=True)

    def heard(self) -> dict[str, dict[str, Any]]:
        """What each gateway said last."""
        found = {}
        for path in self.said.glob("[!.]*.json"):
            with contextlib.suppress(OSError, ValueError):
                found[path.stem] = json.loads(path.read_text())
        return found

    def awaited(self, instance: str, waited: float, kept_seconds: float) -> dict[str, str]:
        """The gateways that have not let an instance go, and why."""
        if instance not in self.instances:
            return {}  # no gateway hears of it
        return host_agent.awaited(instance, self.heard(), self.now(), waited, kept_seconds)

    def unused(self, instance: str) -> dict[str, str]:
        """The gateways that do not use an instance, and why. One that was never heard since the boot may come by in a moment."""
        if instance not in self.instances:
            return {}
        heard = self.heard()
        reasons = host_agent.unused(instance, heard, self.now())
        if self.now() - self.begin < FIRST_SECONDS:
            known = (self.configuration or {}).get("gateways", [])
            reasons |= {gateway: "has not asked this host yet" for gateway in known if gateway not in heard}
        return reasons

    def kept(self, instance: str) -> dict[str, str]:
        """The gateways that keep an instance, and why."""
        now, found = self.now(), {}
        for gateway, said in sorted(self.heard().items()):
            recent = now - said["time"] <= host_agent.HEARD_SECONDS
            if recent and instance in said["told"] and instance in said["kept"]:
                found[gateway] = said["kept"][instance] or "no reason given"
        return found

    def running(self, instance: str) -> int | None:
        """How many requests its engine has. One that takes no connection has none; None when it does not tell."""
        where, now = self.instances.get(instance), self.now()
        if where is None:
            return 0
        when, last = self.asked.get(instance, (-ENGINE_SECONDS, None))
        if now - when >= ENGINE_SECONDS:
            last = self.ask(where)
            self.asked[instance] = (self.now(), last)
        return last

    def ask(self, where: dict[str, Any]) -> int | None:
        """What an engine has to do, by its metrics."""
        try:
            # an agent of a former version of this collection knows of no configuration, nor its instances of TLS
            by = instance_tls.scheme(where.get("config", ""))
            connection = instance_tls.connection(by, where["address"], where["port"], LOOK_SECONDS)
        except OSError:
            return None  # the certificate of the host cannot be read
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            return int(model_kinds.work(text).load) if answer.status == http.client.OK else None
        except ConnectionRefusedError:
            return 0
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()

    @staticmethod
    def now() -> float:
        """The clock by which gateways are heard."""
        return time.monotonic()

    @staticmethod
    def sleep(seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)
