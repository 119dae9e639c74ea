# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the playbooks of an operator's verbs ask before they change anything, and what they say at their end."""

from __future__ import annotations

import base64
import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import instance_state

# Playbooks that act on gateways, whichever hosts were meant.
OF_GATEWAYS = ("test_api", "verify")
# What is shown instead of a secret.
MASK = "********"
# A shorter text would be found where nobody means it.
SECRET_LENGTH = 8


def names_of(variables: Mapping[str, Any]) -> list[str]:
    """The names of the instances of a host."""
    return [str(entry.get("name")) for entry in variables.get("vllm_instances") or [] if isinstance(entry, Mapping)]


def asked_problems(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], asked: Mapping[str, Any]
) -> list[str]:
    """What is wrong with what was asked for on the command line.

    `hosts` are those of the run; `asked` has the `instance` (empty for all), the `limit`, the group `vllm_group`, the hosts that `serve`, the `gateways`,
    whether gateways alone are `enough`, and whether `whole` hosts are meant.
    """
    limit = f" (--limit {asked['limit']})" if asked.get("limit") else ""
    if asked.get("instance") and asked.get("whole"):
        return [
            f"fleet_instance is {asked['instance']!r}, but this acts on whole hosts, with all of their instances; leave it out"
        ]
    here = [host for host in hosts if host in asked["serve"]]
    if not here:
        if asked.get("enough") and any(host in asked["gateways"] for host in hosts):
            return (
                [f"fleet_instance is {asked['instance']!r}, but no host of this run{limit} runs instances"]
                if asked.get("instance")
                else []
            )
        return [
            f"no host of the group {asked['vllm_group']} is left in this run{limit}; it has {', '.join(asked['serve']) or 'none'}. "
            "Hosts are named by --limit, such as --limit gpu-1"
        ]
    if asked.get("whole"):
        return []
    known = list(dict.fromkeys(name for host in here for name in names_of(hostvars[host])))
    if not known:
        return [f"vllm_instances of {', '.join(here)} is empty: there is no instance"]
    name = str(asked.get("instance") or "")
    if not name or name in known:
        return []
    elsewhere = [host for host in asked["serve"] if host not in here and name in names_of(hostvars[host])]
    close = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"; {', '.join(elsewhere)} {'has' if len(elsewhere) == 1 else 'have'} it"
        if elsewhere
        else f"; did you mean {close[0]}?"
        if close
        else ""
    )
    return [f"fleet_instance is {name!r}, which is no instance of {', '.join(here)}: there is {', '.join(known)}{hint}"]


def minimum_problems(gateways: Mapping[str, Mapping[str, Any]], leaving: Iterable[str], at_least: int = 0) -> list[str]:
    """The routes that would fall below min_available when these backends leave, or below `at_least`, as each gateway sees it now.

    A gateway is told by its `fleet` (fleet.json) and its `state` (state.json).
    """
    leaves = set(leaving)
    found: dict[str, list[str]] = {}
    for gateway, told in sorted(gateways.items()):
        uses = told["state"].get("backends") or {}
        for route in told["fleet"].get("routes") or []:
            used = [name for name in route["backends"] if uses.get(name, {}).get("use")]
            going = [name for name in used if name in leaves]
            left, least = len(used) - len(going), max(int(route["min_available"]), at_least)
            if going and left < least:
                found.setdefault(shortfall(route, going, used, uses, least), []).append(gateway)
    return [
        f"{problem} (as {', '.join(seen)} {'sees' if len(seen) == 1 else 'see'} it)" for problem, seen in found.items()
    ]


def shortfall(
    route: Mapping[str, Any],
    going: Sequence[str],
    used: Sequence[str],
    uses: Mapping[str, Mapping[str, Any]],
    least: int,
) -> str:
    """What is wrong, in a sentence."""
    out = [
        f"{name} ({uses.get(name, {}).get('why') or 'not asked yet'})" for name in route["backends"] if name not in used
    ]
    also = f"; out of use already: {', '.join(out)}" if out else ""
    left = len(used) - len(going)
    if left >= int(route["min_available"]):
        return f"route {route['model']} would be left without a backend in use, without {', '.join(going)}{also}"
    return (
        f"route {route['model']} needs {least} of its {len(route['backends'])} backends (min_available) and would have {left} in use "
        f"without {', '.join(going)}{also}"
    )


def readable(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What gateways told, from the results of ansible.builtin.slurp: gateway -> file -> content. Who did not tell both files is left out."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        gateway, path = result["item"]
        with contextlib.suppress(KeyError, ValueError):
            content = json.loads(base64.b64decode(result["content"]))
            found.setdefault(str(gateway), {})[Path(path).stem] = content
    return {gateway: files for gateway, files in found.items() if {"fleet", "state"} <= files.keys()}


# --- at the end


def command(playbook: str, asked: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """A playbook for the same instance on these hosts, to be copied."""
    sources = [os.path.relpath(source) if Path(source).exists() else source for source in asked.get("inventory") or []]
    words = ["ansible-playbook", f"playbooks/{playbook}.yml", *(f"-i {source}" for source in sources)]
    if playbook not in OF_GATEWAYS:
        words += [f"--limit {','.join(hosts)}"] if hosts else []
        words += [f"-e fleet_instance={asked['instance']}"] if asked.get("instance") else []
    return " ".join(words)


def became(verb: str, host: str, name: str, told: Mapping[str, Any], check: bool = False) -> str:
    """What became of an instance."""
    word, before, seconds, who = told["word"], told["before"], told.get("seconds") or 0, f"{name}@{host}"
    since = f" since {before['since']}" if before.get("since") else ""
    was, is_up = f"{instance_state.in_words(before)}{since}", word["operator"] == instance_state.UP
    if check and word != before:
        return f"{who}: would be {word['operator']} (--check)"
    if check and verb in ("start", "restart"):
        return (
            f"{who}: left as it is, {was}"
            if verb == "restart" and before["operator"] == instance_state.STOPPED
            else f"{who}: would be {verb}ed (--check)"
        )
    if verb == "drain" and is_up:
        return f"{who}: not drained: {told.get('skipped_reason') or 'its word is up'}"
    if verb in ("start", "restart"):
        done = "runs" if verb == "start" else "restarted"
        if verb == "restart" and word["operator"] == instance_state.STOPPED:
            return f"{who}: left as it is, {was}"
        if not is_up:
            return f"{who}: {done} and answers; stays {instance_state.in_words(word)}"
        return f"{who}: {done}, answers and is in use"
    if is_up:
        return (
            f"{who}: nobody had taken it out"
            if word == before
            else f"{who}: in use again after {seconds:.0f} s; it was {was}"
        )
    if told.get("untouched"):
        return f"{who}: left as it is, {was}"
    if word == before:
        return f"{who}: was {was} before, and still is"
    ended = (
        told.get("skipped_reason") or f"every gateway has let it go and its requests have ended, after {seconds:.0f} s"
    )
    return f"{who}: {word['operator']}; {ended}"


def report(
    verb: str, hosts: Mapping[str, Mapping[str, Any] | None], asked: Mapping[str, Any], notes: Mapping[str, Any]
) -> list[str]:
    """What a verb did, what it left, and the next command.

    `hosts` has the result of M(gpufleet.llm.instance_state) of each host, nothing where it did not come to that; `notes` has for the verb what it `left`
    and what comes `next`: a name of a playbook with what it does.
    """
    lines, done, failed = [], [], []
    for host, result in hosts.items():
        if not result or result.get("failed") or "instances" not in result:
            failed.append(host)
            continue
        done.append(host)
        skipped = {"skipped_reason": result["skipped_reason"]} if "skipped_reason" in result else {}
        check = bool(asked.get("check"))
        lines += [became(verb, host, name, {**told, **skipped}, check) for name, told in result["instances"].items()]
    lines += [str(line) for line in notes.get("did") or []]
    if failed:
        lines.append(f"{', '.join(failed)}: not done, see above. Once that is settled: {command(verb, asked, failed)}")
    if done and notes.get("left"):
        lines.append(str(notes["left"]))
    lines += [
        f"{what}: {command(playbook, asked, done)}" for playbook, what in (notes.get("next") or {}).items() if done
    ]
    return lines


def reboot_report(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], asked: Mapping[str, Any]
) -> list[str]:
    """What became of the hosts that reboot.yml was for."""
    lines, left = [], []
    for host in hosts:
        seen, facts = (
            hostvars[host].get("reboot_seen") or {},
            (hostvars[host].get("ansible_facts") or {}).get("gpufleet") or {},
        )
        if not hostvars[host].get("reboot_done"):
            left.append(host)
            continue
        before, now = seen.get("kernel"), facts.get("kernel")
        kernel = f"kernel {now} as before" if before == now else f"kernel {now} after {before}"
        gpus = f", {len(facts.get('gpus') or [])} GPUs" if facts.get("gpus") else ""
        lines.append(f"{host}: {'would be rebooted' if asked.get('check') else 'rebooted'}, {kernel}{gpus}")
    if left:
        lines.append(
            f"{', '.join(left)}: not rebooted, or not back; see above. Once that is settled: {command('reboot', asked, left)}"
        )
    return [*lines, f"To ask as a client: {command('test_api', asked, [])}"]


# --- what is stopped on purpose


def excused(rows: Sequence[Mapping[str, str]], told: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of M(gpufleet.llm.endpoint_verify), where those are no failures that come of operators who stopped every backend of a route.

    `told` has the `fleet` and the `state` of the gateway.
    """
    uses = told.get("state", {}).get("backends") or {}
    stopped: dict[str, str] = {}
    for route in told.get("fleet", {}).get("routes") or []:
        found = [uses.get(name, {}) for name in route["backends"]]
        if found and all(use.get("operator") == instance_state.STOPPED and not use.get("use") for use in found):
            why = "; ".join(dict.fromkeys(str(use.get("why")) for use in found))
            stopped |= dict.fromkeys([route["model"], *route.get("aliases", [])], why)
    result = []
    for row in rows:
        name = row["check"].partition(" ")[2]
        if row["result"] != "ok" and name in stopped and re.search(r"\b503\b", row["detail"]):
            row = {**row, "result": "stopped", "detail": f"on purpose: every backend is {stopped[name]}"}
        result.append(dict(row))
    return result


# --- logs


def secrets(value: Any, spec: Mapping[str, Any], known: bool = False) -> list[str]:
    """The texts in the value of a variable that its description, an entry of an argument spec, calls secret."""
    known = known or bool(spec.get("no_log"))
    options = spec.get("options") or {}
    if isinstance(value, Mapping):
        return [text for key, entry in value.items() for text in secrets(entry, options.get(key) or {}, known)]
    if isinstance(value, list | tuple):
        return [text for entry in value for text in secrets(entry, spec, known)]
    return [str(value)] if known and value is not None else []


def masked(text: str, secrets: Iterable[Any]) -> str:
    """A text without these secrets."""
    for secret in sorted(
        {str(secret) for secret in secrets if len(str(secret or "")) >= SECRET_LENGTH}, key=len, reverse=True
    ):
        text = text.replace(secret, MASK)
    return text
