# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters of the role turn about what is proved before and after traffic. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import instance_proof, soak, turn_hooks


def turn_question_problems(variables: Mapping[str, Any], instances: Sequence[str] = ()) -> list[str]:
    """What is wrong with turn_warm_up and turn_questions."""
    return [
        problem
        for name, entries in variables.items()
        for problem in instance_proof.problems(name, entries, instances, judged=name == "turn_questions")
    ]


def turn_hook_problems(hooks: Mapping[str, Any]) -> list[str]:
    """What is wrong with turn_hooks."""
    return turn_hooks.problems(hooks)


def turn_proof_lines(proofs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What instances have shown before traffic, for people."""
    lines = []
    for proof in proofs:
        warmed, asked = proof["warm_up"], proof["questions"]
        parts = []
        if warmed.get("asked"):
            took = f"the first took {warmed['first_seconds']} s, the last {warmed['last_seconds']} s"
            parts.append(f"warmed up by {warmed['asked']} requests in {warmed['seconds']} s ({took})")
        if asked:
            right = [one for one in asked if one["passed"]]
            parts.append(f"{len(right)} of {len(asked)} questions answered right")
        parts += proof["notes"]
        lines += [f"{proof['name']}: {'; '.join(parts)}"] if parts else []
    return lines


def turn_soak(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    backends: Sequence[str],
    new: Sequence[str],
    rules: Mapping[str, Any],
) -> dict[str, Any]:
    """What gateways counted after instances came back, judged."""
    given = soak.Rules(int(rules["min_requests"]), float(rules["error_share"]), float(rules["first_token_factor"]))
    return soak.summary(first, second, backends, new, given)


def turn_soak_idle(first: Sequence[Mapping[str, Any]], backends: Sequence[str]) -> list[str]:
    """Why there is nothing to watch."""
    return soak.idle(first, backends)


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function
            for function in (turn_question_problems, turn_hook_problems, turn_proof_lines, turn_soak, turn_soak_idle)
        }
