"""What `systemctl show` prints, read."""

from __future__ import annotations


def shown(text: str) -> list[dict[str, str]]:
    """The properties of each unit that it speaks of, in its order; one that comes several times has a line for each."""
    units = []
    for block in text.strip().split("\n\n"):
        properties: dict[str, str] = {}
        for line in block.splitlines():
            name, equals, value = line.partition("=")
            if equals:
                properties[name] = f"{properties[name]}\n{value}" if name in properties else value
        units.append(properties)
    return units


def by_unit(text: str) -> dict[str, dict[str, str]]:
    """The same by the names of the units (Id, which has to be asked for); those that are not there are left out where LoadState is asked for, too."""
    return {unit["Id"]: unit for unit in shown(text) if unit.get("Id") and unit.get("LoadState") != "not-found"}
