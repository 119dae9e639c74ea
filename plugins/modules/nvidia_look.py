#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""What a host has of NVIDIA: this is the part that runs there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_look
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Looks at the NVIDIA devices and the driver of a host
description:
  - Says in one call what devices are on the PCI bus, which kernel modules are loaded and on disk, which packages there are and where they came
    from, what holds the devices, and what C(nvidia-smi) says. Changes nothing.
  - With O(settings) it also decides what is to be done, on the controller. The host is asked again only when something is to be installed, for what its
    package lists have.
  - For a short form that other roles go by see M(gpufleet.llm.host_facts).
  - A source that is missing or broken gives an empty value, never a failure. A C(nvidia-smi) that hangs is not waited for.
options:
  root:
    description: Where the files of packages are. Another directory is for tests.
    type: str
    default: /
  hardware:
    description: Where C(/sys), C(/proc) and C(/dev) are. Another directory is for tests, which have no such devices.
    type: str
    default: /
  repositories:
    description: Parts of the address of NVIDIA's repository, by which files of apt that name it are found.
    type: list
    elements: str
    default: [compute/cuda/repos/]
  settings:
    description:
      - What is wanted, to decide by. The variables of the role P(gpufleet.llm.nvidia_driver#role) without their prefix, and its table of sources.
      - Without it nothing is decided.
    type: dict
attributes:
  check_mode:
    description: Changes nothing.
    support: full
notes:
  - Run it as root. Another user does not see which processes hold the devices.
"""

EXAMPLES = r"""
- name: Look at the driver
  gpufleet.llm.nvidia_look:
  register: look

- name: All GPUs are there
  ansible.builtin.assert:
    that: look.findings.smi.gpus | length == 8
"""

RETURN = r"""
plan:
  description: What is to be done.
  returned: when O(settings) is given
  type: dict
  contains:
    action:
      description: V(none) (there is no GPU), V(leave), V(install), V(upgrade), V(remove) or V(refuse).
      type: str
    reason:
      description: Why.
      type: str
    advice:
      description: What a person can do when it is refused.
      type: str
    told:
      description: All of it in lines.
      type: list
      elements: str
    activate:
      description: How the driver gets into use, V(load), V(reload) or V(reboot); empty when it is in use.
      type: str
    blocked:
      description: Why that may not be done.
      type: str
    disturbs:
      description: Whether a driver that is there is changed or replaced in the kernel, which ends what uses it.
      type: bool
    outdated:
      description: Whether it is refused for what the package lists of the host have. Fresh ones may have something newer.
      type: bool
    unproved:
      description: Why the host cannot serve with all of its GPUs.
      type: list
      elements: str
    warnings:
      description: What should not be forgotten.
      type: list
      elements: str
pending:
  description: Whether the host is going to have another driver in use than it has now.
  returned: when O(settings) is given
  type: bool
findings:
  description: What was found.
  returned: always
  type: dict
  contains:
    devices:
      description: GPUs and NVSwitches on the PCI bus, each with C(address), C(device) (its id), C(kind) and C(driver), GPUs with C(generation).
      type: list
      elements: dict
      sample: [{address: "0000:17:00.0", device: "0x2330", kind: gpu, driver: nvidia}]
    fabric_bridges:
      description: ConnectX-7 devices behind which NVSwitches are that are not on the PCI bus themselves (HGX B200).
      type: list
      elements: str
    kernel:
      description: The running kernel, and the newest one that is installed, which the next boot takes.
      type: dict
      sample: {running: 6.8.0-88-generic, newest: 6.8.0-88-generic}
    loaded:
      description: Version and flavour (V(open) or V(proprietary)) of the module in use, empty without one.
      type: dict
      sample: {version: 580.159.03, flavour: open}
    modules:
      description: The module on disk, by kernel, with C(version), C(flavour), C(signer) and C(kind) (V(prebuilt), V(dkms) or V(other)).
      type: dict
    packages:
      description: Versions of the installed packages that have to do with the driver.
      type: dict
    unfinished:
      description: Packages that are unpacked or half configured.
      type: list
      elements: str
    holds:
      description: Packages that apt keeps at their version.
      type: list
      elements: str
    userspace:
      description: Version of the libraries.
      type: str
      sample: 580.159.03
    added_archives:
      description: Addresses of Debian's archive that the role P(gpufleet.llm.nvidia_driver#role) added.
      type: list
      elements: str
    available:
      description: For each package that would be installed the C(candidate) and all C(versions) that apt could install. Empty when nothing would be.
      type: dict
    origin:
      description:
        - Where the driver came from. V(ubuntu), V(nvidia) and V(debian) are packages, V(mixed) packages of more than one of them, V(runfile) NVIDIA's
          installer, V(outside) a container's machine or an image, and empty means that there is none.
      type: str
    image:
      description: The vendor's image that this is, such as DGX OS.
      type: str
    ours:
      description: Whether the role P(gpufleet.llm.nvidia_driver#role) looks after the driver.
      type: bool
    repositories:
      description: Files of apt that name NVIDIA's repository.
      type: list
      elements: str
    signed_by:
      description: For each repository that apt knows its key, as C(Signed-By) names it, empty where no key is named.
      type: dict
    mixed_repositories:
      description: Those of them that name others, too.
      type: list
      elements: str
    secure_boot:
      description: Whether the kernel takes signed modules only.
      type: bool
    nouveau:
      description: Whether nouveau is loaded.
      type: bool
    nodes:
      description: Whether C(/dev/nvidia-uvm) and C(/dev/nvidiactl) are there.
      type: dict
    users:
      description: Processes that hold the devices, each with C(pid), C(program) and C(unit).
      type: list
      elements: dict
    units:
      description: Services of the driver, with C(active) and C(enabled).
      type: dict
    smi:
      description:
        - What C(nvidia-smi) says. C(gpus) has for each GPU what M(gpufleet.llm.host_facts) has, and C(address), C(uuid), C(persistence), C(mig_devices),
          C(ecc), C(ecc_uncorrected) (since the module was loaded), C(ecc_uncorrected_ever), C(remapped_rows), C(fabric) and C(recovery_action).
      type: dict
      contains:
        present:
          description: Whether it is there.
          type: bool
        error:
          description: What it complains of.
          type: str
        gpus:
          description: The GPUs.
          type: list
          elements: dict
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.nvidia_host import REPOSITORIES, Look
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Program

ARGUMENTS: dict[str, Any] = {
    "root": {"type": "str", "default": "/"},
    "hardware": {"type": "str", "default": "/"},
    "repositories": {"type": "list", "elements": "str", "default": list(REPOSITORIES)},
    "settings": {"type": "dict"},  # the action keeps it
}


def look(root: Path, hardware: Path, repositories: Sequence[str] = REPOSITORIES) -> dict[str, Any]:
    """The findings."""
    return Look(Program, root=root, hardware=hardware, named=repositories).findings()


def main() -> None:
    """Look, and tell."""
    os.umask(0o022)
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    places = Path(module.params["root"]), Path(module.params["hardware"])
    module.exit_json(changed=False, findings=look(*places, module.params["repositories"]))


if __name__ == "__main__":
    main()
