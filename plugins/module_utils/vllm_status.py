# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What the findings of M(gpufleet.llm.vllm_look) mean for a person: which instances are as the inventory wants them, and which can go back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("instance", "generation", "before", "runs", "unit", "port", "inventory")


def status(
    instances: Sequence[Mapping[str, Any]],
    wanted: Sequence[Mapping[str, Any]],
    changed: Sequence[str],
    inputs: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """The instances of a host, where one `differs` from the inventory also when a file does that it reads beside its generation.

    `changed` has the files that a run would change, `inputs` those that instances of each runtime read.
    """
    stale = {instance["name"] for instance in wanted if set(inputs[instance["runtime"]]) & set(changed)}
    return [{**entry, "differs": entry["differs"] or entry["name"] in stale} for entry in instances]


def inventory_says(instance: Mapping[str, Any]) -> str:
    """How an instance stands to the inventory."""
    if not instance["wanted"]:
        said = "is not in it"
    elif instance["current"] is None:
        said = "not there yet"
    else:
        said = "differs" if instance["differs"] else "as wanted"
    return f"{said}; held: {instance['held']}" if instance["held"] else said


def row(instance: Mapping[str, Any]) -> tuple[str, ...]:
    """An instance in words, a word or two for each column."""
    current, running = instance["current"], instance["running"]
    proved = "" if current is None or current in instance["confirmed"] else " (never answered)"
    other = f" (generation {running})" if running not in (None, current) else ""
    runs = instance["runs"] if instance["runtime"] == "docker" else instance["runs"].rpartition("/")[2]
    cells = [instance["name"], current, instance["previous"], runs, instance["active"], instance["port"]]
    name, number, before, runs, unit, port = ("-" if cell in (None, "") else str(cell) for cell in cells)
    return name, number + proved, before, runs, unit + other, port, inventory_says(instance)


def lines(instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """The instances as a table."""
    if not instances:
        return ["There is no vLLM instance, and none is wanted."]
    rows = [COLUMNS, *(row(instance) for instance in instances)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]


def revert_plan(instances: Sequence[Mapping[str, Any]], names: Sequence[str], generation: int = 0) -> dict[str, Any]:
    """Where instances go back to, the generation before their current one that answered or a named one, and why one cannot."""
    problems = [problem for name in names if (problem := revert_problem(instances, name, generation))]
    found = [instance for instance in instances if instance["name"] in names] if not problems else []
    return {
        "problems": problems,
        "go_to": {instance["name"]: generation or instance["previous"] for instance in found},
        "come_from": {instance["name"]: instance["current"] for instance in found},
        "idle": [instance["name"] for instance in found if instance["word"]["operator"] == "stopped"],
    }


def revert_problem(instances: Sequence[Mapping[str, Any]], name: str, generation: int = 0) -> str:
    """Why an instance cannot go back to a generation, the one before its current one without a number; nothing when it can."""
    found = [instance for instance in instances if instance["name"] == name]
    if not found:
        others = ", ".join(instance["name"] for instance in instances)
        return f"there is no vLLM instance {name!r} here; " + (
            f"there is {others}" if others else "there is none at all"
        )
    [instance] = found
    if instance["held"]:
        return f"vLLM instance {name} is held: {instance['held']}. playbooks/unhold.yml -e fleet_instance={name} lets it be changed"
    if instance["current"] is None:
        return f"vLLM instance {name} has no generation that runs, so there is none before it"
    if generation and generation == instance["current"]:
        return f"vLLM instance {name} runs generation {generation} already"
    if generation and generation not in instance["confirmed"]:
        answered = [number for number in instance["confirmed"] if number != instance["current"]]
        return (
            f"vLLM instance {name} has no generation {generation} that ever answered; there {'are' if len(answered) != 1 else 'is'} "
            + (", ".join(map(str, answered)) or "none")
        )
    if not generation and instance["previous"] is None:
        return f"vLLM instance {name} has no generation before {instance['current']} that ever answered"
    return ""
