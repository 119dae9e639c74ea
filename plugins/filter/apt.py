# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Filters about repositories of apt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any


def vendor_source(vendor: Mapping[str, Any]) -> dict[str, Any]:
    """The options by which the module apt_source looks at a vendor's repository, as the role host_support puts it in place."""
    name, repository = vendor["name"], vendor["repository"]
    address = [re.sub("^[a-z]+:/*", "", repository["url"])] if repository else []
    return {
        "key_path": f"/etc/apt/keyrings/{name}.asc" if repository else "",
        "key_fingerprints": list(vendor["key"]["fingerprints"]),
        "repositories": list(dict.fromkeys([*vendor["known_as"], *address])) if repository else [],
        "own_files": [f"/etc/apt/sources.list.d/{name}.sources"],
        "packages": list(vendor["packages"]),
        "available": False,
    }


class FilterModule:
    """Makes the filters known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"vendor_source": vendor_source}
