#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Images of containers, fetched before anything that runs is touched."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_image
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Has images on a host, from a registry or from an archive
description:
  - Fetches the images that are not there. One that is named by its digest is what that digest means, whatever the registry says.
  - The password of a registry is in a file of root's while an image is fetched, never on a command line, and nowhere afterwards.
  - Writes down what it fetched, so that M(gpufleet.llm.vllm_generation) removes it when no generation needs it any more. Images that were there
    before are never removed.
options:
  images:
    description: C(name@sha256:...), C(sha256:...) (the id of an image, from an archive), or C(name:tag).
    type: list
    elements: str
    required: true
  archive:
    description: A file on the host, made by C(docker save), that has the images. Empty to ask their registries.
    type: path
  username:
    description: Name for the registries.
    type: str
    default: ""
  password:
    description: Password or token for the registries.
    type: str
    default: ""
  record:
    description: File that has the names of images that were fetched, a line each.
    type: path
    default: /etc/vllm/images
attributes:
  check_mode:
    description: Says what would be fetched.
    support: full
"""

EXAMPLES = r"""
- name: The image is there
  gpufleet.llm.container_image:
    images: [docker.io/vllm/vllm-openai@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef]
"""

RETURN = r"""
fetched:
  description: Images that were not there.
  returned: always
  type: list
  elements: str
"""

import base64
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.program import commands
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container import IMAGE_ID
from ansible_collections.gpufleet.llm.plugins.module_utils.vllm_container_host import Engine

# Where Docker looks for the credentials of a name without a registry.
DOCKER_HUB = "https://index.docker.io/v1/"


def registry(image: str) -> str:
    """The registry of an image, as Docker's configuration names it."""
    first, slash, _rest = image.partition("/")
    named = slash and ("." in first or ":" in first or first == "localhost")
    return DOCKER_HUB if not named or first in ("docker.io", "index.docker.io") else first


def credentials(image: str, username: str, password: str) -> str:
    """A configuration of Docker's with a name and a password for the registry of an image."""
    if not username:
        return "{}"
    token = base64.b64encode(f"{username}:{password}".encode()).decode()
    return json.dumps({"auths": {registry(image): {"auth": token}}})


class Fetcher:
    """Fetches images for a module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.run = commands(module)
        self.engine = Engine(self.run)

    def pull(self, image: str) -> None:
        """Fetch one from its registry."""
        if IMAGE_ID.fullmatch(image):
            self.fail(
                image,
                "an id says nothing of a registry; load it from an archive (vllm_image_archive), or name it by its digest",
            )
        with tempfile.TemporaryDirectory(prefix="docker-config-") as directory:
            text = credentials(image, self.module.params["username"], self.module.params["password"])
            write(Path(directory) / "config.json", text)
            status, output, error = self.run(["docker", "--config", directory, "pull", "--quiet", image])
        if status:
            self.fail(image, (error or output).strip()[-600:])

    def load(self, archive: str) -> None:
        """Load what an archive has."""
        status, output, error = self.run(["docker", "load", "--quiet", "--input", archive])
        if status:
            self.module.fail_json(msg=f"{archive} cannot be loaded: {(error or output).strip()[-600:]}")
        self.loaded = output.strip()

    def fail(self, image: str, reason: str) -> None:
        """End, in words for the operator."""
        self.module.fail_json(msg=f"The image {image} could not be fetched: {reason}. What runs was not touched.")

    def fetch(self, missing: list[str]) -> None:
        """Fetch what is missing. Each is noted first: a run that dies leaves nothing that nobody would remove."""
        record = Path(self.module.params["record"])
        noted = read(record).split()
        write(record, "".join(f"{image}\n" for image in dict.fromkeys([*noted, *missing])))
        if self.module.params["archive"]:
            self.load(self.module.params["archive"])
        for image in missing:
            if not self.module.params["archive"]:
                self.pull(image)
            if not self.engine.has(image):
                self.fail(
                    image,
                    f"{self.module.params['archive'] or registry(image)} has another one ({self.loaded or 'nothing of that name'})",
                )

    loaded = ""


ARGUMENTS: dict[str, Any] = {
    "images": {"type": "list", "elements": "str", "required": True},
    "archive": {"type": "path"},
    "username": {"type": "str", "default": ""},
    "password": {"type": "str", "default": "", "no_log": True},
    "record": {"type": "path", "default": "/etc/vllm/images"},
}


def main() -> None:
    """Fetch what is not there."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        supports_check_mode=True,
    )
    fetcher = Fetcher(module)
    missing = [image for image in dict.fromkeys(module.params["images"]) if not fetcher.engine.has(image)]
    if missing and not module.check_mode:
        fetcher.fetch(missing)
    module.exit_json(changed=bool(missing), fetched=missing)


if __name__ == "__main__":
    main()
