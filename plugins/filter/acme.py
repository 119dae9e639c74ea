"""Filters about certificates by ACME. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import acme


def acme_problems(settings: Mapping[str, Any], names: Sequence[str], known: Sequence[str]) -> list[str]:
    """What is wrong with the variables tls_certificate_acme_*."""
    return acme.problems(settings, names, known)


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"acme_problems": acme_problems}
