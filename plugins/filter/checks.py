"""Filters that say what is wrong with a value of the inventory, for every role. Each is described in the file that has its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import fleet
from ansible_collections.gpufleet.llm.plugins.module_utils.inputs import as_int


def host_name_problems(names: Sequence[str], variable: str) -> list[str]:
    """What is wrong with a list of names that clients use for a server; `variable` is where they stand."""
    problems = [
        f"{variable} has {name!r}, which is neither a DNS name in lower case nor an IP address"
        for name in names
        if not fleet.is_dns_name(name) and not fleet.is_address(name)
    ]
    return problems + [
        f"{variable} lists {name} twice; name it once"
        for name in sorted({name for name in names if list(names).count(name) > 1})
    ]


def number_problems(numbers: Mapping[str, Any], least: int) -> list[str]:
    """Variables whose number is below the least."""
    return [
        f"{name} is {value}; it must be at least {least}"
        for name, value in numbers.items()
        if (number := as_int(value)) is not None and number < least
    ]


def subject_alt_names(names: Sequence[str]) -> list[str]:
    """Names as a certificate request wants them."""
    return [f"IP:{name}" if fleet.is_address(name) else f"DNS:{name}" for name in names]


def uncovered_names(names: Sequence[str], alternatives: Sequence[str]) -> list[str]:
    """Those of the names that a certificate with these subject alternative names does not cover."""
    covered = {
        entry.partition(":")[2].lower() for entry in alternatives if entry.startswith(("DNS:", "IP:", "IP Address:"))
    }
    return [
        name
        for name in names
        if name not in covered and (fleet.is_address(name) or f"*.{name.partition('.')[2]}" not in covered)
    ]


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {
            function.__name__: function
            for function in (
                host_name_problems,
                number_problems,
                subject_alt_names,
                uncovered_names,
            )
        }
