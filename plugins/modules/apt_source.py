#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The key of a repository, and the holds on its packages: this is the part that runs on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: apt_source
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Trusts one repository of apt by the fingerprint of its key
description:
  - Fetches the key file of a repository when the one on the host is not the expected one, and refuses it when it holds any other key. No gpg is
    needed on the host.
  - Finds other files of sources that name the same repository. Two entries with different keys make every call of apt fail.
  - The file of the sources itself and preferences are for M(gpufleet.llm.tree).
options:
  state:
    description:
      - V(looked) says what is there and changes nothing.
      - V(trusted) puts the key in place and disables the other files that name the repository and nothing else, by renaming them to C(*.disabled).
      - V(held) puts O(packages) on hold, so that nothing upgrades them on the way, and V(unheld) lets them change again. Both wait for another apt.
    type: str
    choices: [looked, trusted, held, unheld]
    default: looked
  key_path:
    description: Where the key is on the host, empty when there is none.
    type: str
    default: ""
  key_fingerprints:
    description: Fingerprints of the keys that the file may hold.
    type: list
    elements: str
    default: []
  key_url:
    description: Where the key is fetched from, by the host.
    type: str
    default: ""
  key:
    description: The key itself, in ASCII armour. Nothing is fetched then.
    type: str
    default: ""
  key_sha256:
    description: SHA-256 of what is at O(key_path), where that is a package that brings the key. It counts in place of O(key_fingerprints).
    type: str
    default: ""
  repositories:
    description: Parts of the addresses of the repository, by which other files that name it are found.
    type: list
    elements: str
    default: []
  own_files:
    description: Files of sources that are as they should be.
    type: list
    elements: str
    default: []
  packages:
    description: Packages that are looked at. For O(available) a name that ends in C(*) stands for all that begin so.
    type: list
    elements: str
    default: []
  available:
    description: Whether to say which versions of O(packages) apt could install.
    type: bool
    default: false
  environment:
    description: Environment of the download of the key, such as C(https_proxy).
    type: dict
    default: {}
attributes:
  check_mode:
    description: Says what would change.
    support: full
"""

EXAMPLES = r"""
- name: Docker's repository is trusted
  gpufleet.llm.apt_source:
    state: trusted
    key_path: /etc/apt/keyrings/docker.asc
    key_url: https://download.docker.com/linux/debian/gpg
    key_fingerprints: [9DC858229FC7DD38854AE2D88D81803C0EBFCD88]
    repositories: [download.docker.com/]
    own_files: [/etc/apt/sources.list.d/docker.sources]
"""

RETURN = r"""
key_problem:
  description: What is wrong with the key file, empty when nothing is.
  returned: always
  type: str
  sample: it is not there
foreign:
  description: Other files of sources that name the repository and nothing else.
  returned: always
  type: list
  elements: str
mixed:
  description: Other files of sources that name it among others.
  returned: always
  type: list
  elements: str
held:
  description: Those of the packages that are held.
  returned: always
  type: list
  elements: str
available:
  description: For each package that apt knows, the C(candidate) that it would install and all C(versions) that it could.
  returned: always
  type: dict
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.apt_host import Apt, AptError
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands

ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["looked", "trusted", "held", "unheld"], "default": "looked"},
    "key_path": {"type": "str", "default": "", "no_log": False},
    # not secrets, whatever their names look like
    "key_fingerprints": {"type": "list", "elements": "str", "default": [], "no_log": False},
    "key_url": {"type": "str", "default": "", "no_log": False},
    "key": {"type": "str", "default": "", "no_log": False},
    "key_sha256": {"type": "str", "default": "", "no_log": False},
    "repositories": {"type": "list", "elements": "str", "default": []},
    "own_files": {"type": "list", "elements": "str", "default": []},
    "packages": {"type": "list", "elements": "str", "default": []},
    "available": {"type": "bool", "default": False},
    "environment": {"type": "dict", "default": {}, "no_log": True},
}


def main() -> None:
    """Do what is asked for."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    given = module.params
    os.environ.update({name: str(value) for name, value in given["environment"].items()})
    apt = Apt(commands(module))
    look = apt.look(given)
    changes = False
    try:
        if given["state"] == "trusted":
            changes = bool(look["key_problem"] or look["foreign"])
            if look["key_problem"] and not module.check_mode:
                apt.place_key(given)
            if not module.check_mode:
                apt.disable(look["foreign"])
        elif given["state"] in ("held", "unheld"):
            hold = given["state"] == "held"
            waiting = [name for name in given["packages"] if (name in look["held"]) != hold]
            changes = bool(waiting)
            if waiting and not module.check_mode:
                apt.mark("hold" if hold else "unhold", waiting)
    except (AptError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changes, **look)


if __name__ == "__main__":
    main()
