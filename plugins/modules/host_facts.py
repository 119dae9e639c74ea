#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Says once what is on a host, so that tasks that would change nothing are skipped."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: host_facts
short_description: Look at a host once, for all roles
description:
  - Says in one call what is on a host (packages, units, users, listening ports, disks, GPUs, files), so that the tasks that would
    change nothing can be skipped.
  - Reads the files that the host's own programs read. Only C(systemctl list-units) and, where it is there, C(nvidia-smi) are called,
    both while the rest is read. Costs about 50 ms of CPU on the host beside what every module costs.
  - A source that is missing or broken gives an empty section, never a failure. A Debian or Ubuntu host with systemd gives all of them.
  - The facts say what was when the module looked. What changes the host should look again, and what proves a result should not use them.
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
options:
  gather:
    description:
      - The sections to look at; V(system), V(users), V(packages) and V(settings) each bring more than one key, see the return values.
      - The facts of a call B(replace) those of the call before as a whole. To look again at one section only, register the result and
        read it from there.
    type: list
    elements: str
    choices: [system, packages, units, users, ports, mounts, gpus, paths, trees, settings]
    default: [system, packages, units, users, ports, mounts, gpus, paths, trees, settings]
  paths:
    description: Files, directories and links to look at.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    description: Changes nothing.
    support: full
  facts:
    description: Sets C(ansible_facts['gpufleet']).
    support: full
notes:
  - Run it as root. Another user sees the ports of other users without a program and a unit, and not every path.
seealso:
  - module: ansible.builtin.setup
  - module: ansible.builtin.service_facts
  - module: ansible.builtin.package_facts
"""

EXAMPLES = r"""
- name: Look at the host
  gpufleet.llm.host_facts:
    paths: [/etc/nginx/nginx.conf, /var/log/journal]

- name: Packages are installed
  ansible.builtin.apt:
    name: "{{ wanted }}"
  when: wanted | difference(ansible_facts['gpufleet'].packages) | length > 0
  vars:
    wanted: [nginx, openssl]

- name: Nginx runs
  ansible.builtin.systemd_service:
    name: nginx.service
    state: started
    enabled: true
  when: ansible_facts['gpufleet'].units['nginx.service'] | default({}) != dict(active='active', enabled='enabled')

- name: Look at the ports again, after a restart
  gpufleet.llm.host_facts:
    gather: [ports]
  register: looked

- name: Nginx listens
  ansible.builtin.assert:
    that: "'nginx.service' in looked.ansible_facts.gpufleet.ports | selectattr('port', 'eq', 443) | map(attribute='unit')"
"""

RETURN = r"""
ansible_facts:
  description: The facts. Each key is there when its section was asked for.
  returned: always
  type: dict
  contains:
    gpufleet:
      description: What is on the host.
      returned: always
      type: dict
      contains:
        distribution:
          description: V(Debian) or V(Ubuntu), else the name in os-release. Section V(system).
          type: str
          sample: Ubuntu
        release:
          description: Version of the distribution. Section V(system).
          type: str
          sample: "24.04"
        codename:
          description: Its name. Section V(system).
          type: str
          sample: noble
        architecture:
          description: The CPU, as C(uname -m) says it. Section V(system).
          type: str
          sample: x86_64
        kernel:
          description: Release of the running kernel. Section V(system).
          type: str
          sample: 6.8.0-88-generic
        python:
          description: Version of the distribution's Python, empty when there is none. Section V(system).
          type: str
          sample: 3.12.3
        python_path:
          description: The program, C(/usr/bin/python3) or, where that may be another one, by its version. Section V(system).
          type: str
          sample: /usr/bin/python3.12
        python_replaced:
          description: What C(/usr/bin/python3) is where it is another Python, and the modules have no bindings for apt; else empty. Section V(system).
          type: str
          sample: /usr/local/bin/python3.14
        container:
          description: V(docker), V(podman), V(lxc), V(systemd-nspawn) and so on, empty outside of containers. Section V(system).
          type: str
        service_manager:
          description: V(systemd) when the host was booted with it, else empty. Section V(system).
          type: str
          sample: systemd
        memory_bytes:
          description: Memory of the host. Section V(system).
          type: int
        cpus:
          description: Logical CPUs that may be used. Section V(system).
          type: int
        packages:
          description:
            - Versions of the installed packages, by name. One that is only unpacked or half configured is not among them. One of a foreign
              architecture has it in its name (C(libc6:i386)). Section V(packages).
          type: dict
          sample: {nginx: 1.24.0-2ubuntu7.5}
        uv:
          description:
            - The requirements that M(gpufleet.llm.uv_release) installed uv from. Empty when uv is not there, or was touched since. Section
              V(packages).
          type: str
          sample: uv==0.13.8 --hash=sha256:0d5ffd3b
        lists_age_seconds:
          description: Seconds since the package lists were fetched, null when there are none. Section V(packages).
          type: int
        held_updates:
          description:
            - Security updates that wait, because unattended upgrades may not install them, each with C(version) and C(since) (seconds of
              the epoch), as the role P(gpufleet.llm.base#role) has them noted. Section V(packages).
          type: dict
          sample: {linux-image-generic: {version: 6.8.0.90.92, since: 1795272090}}
        units:
          description:
            - Services, timers, sockets and mounts that are loaded or have a file, instances of templates among them, each with C(active)
              (V(active), V(inactive), V(failed), V(activating) and so on) and C(enabled) (what C(systemctl is-enabled) says, empty for a unit
              without a file). Section V(units).
          type: dict
          sample: {nginx.service: {active: active, enabled: enabled}}
        users:
          description: Numbers of the local users, by name. Section V(users).
          type: dict
          sample: {root: 0}
        groups:
          description: Numbers of the local groups, by name. Section V(users).
          type: dict
          sample: {root: 0}
        group_members:
          description: The users that the local groups name, by the name of the group. Section V(users).
          type: dict
          sample: {sudo: [alice]}
        ports:
          description: TCP sockets that listen. Section V(ports).
          type: list
          elements: dict
          contains:
            port:
              description: The port.
              type: int
            address:
              description: The IP address, V(0.0.0.0) or V(::) for all.
              type: str
            protocol:
              description: V(tcp).
              type: str
            program:
              description: Name of a process that holds the socket, empty when it cannot be seen.
              type: str
            unit:
              description: The systemd unit of that process, or empty.
              type: str
          sample: [{port: 443, address: 0.0.0.0, protocol: tcp, program: nginx, unit: nginx.service}]
        mounts:
          description: Real file systems, those of the network among them. Section V(mounts).
          type: list
          elements: dict
          contains:
            path:
              description: Where it is mounted.
              type: str
            device:
              description: What is mounted.
              type: str
            fstype:
              description: Kind of file system.
              type: str
            network:
              description: Whether a server holds it. Such a one is not asked for its size, because a dead server never answers.
              type: bool
            size_bytes:
              description: Its size, null when it was not asked for.
              type: int
            free_bytes:
              description: What users may still fill, null when it was not asked for.
              type: int
        gpus:
          description:
            - GPUs as C(nvidia-smi) sees them, empty where it is not there. Section V(gpus).
            - This is what roles go by. M(gpufleet.llm.nvidia_look) says more of the same, for those who look after the driver.
          type: list
          elements: dict
          contains:
            index:
              description: Its number, as CUDA_VISIBLE_DEVICES takes it when the GPUs are ordered by their place on the PCI bus.
              type: int
            name:
              description: The model.
              type: str
            memory_mib:
              description: Its memory, 0 when it is not told.
              type: int
            compute_capability:
              description: What its instructions are, 0.0 when it is not told.
              type: float
            driver:
              description: Version of the driver.
              type: str
            mig:
              description: Whether it is divided into parts (MIG mode).
              type: bool
          sample: [{index: 0, name: NVIDIA H100 80GB HBM3, memory_mib: 81559, compute_capability: 9.0, driver: 580.159.03, mig: false}]
        gpu_error:
          description: What C(nvidia-smi) says when it is there and fails or shows no GPU, else empty. Section V(gpus).
          type: str
        overruled:
          description:
            - Settings in files of these roles (C(vllm-fleet) is in their names) that a file which is read later sets otherwise, as the next boot or start
              would show, of sysctl, limits, journald, apt, modprobe and units. Section V(settings).
          type: list
          elements: dict
          contains:
            setting:
              description: The setting.
              type: str
            file:
              description: The file of ours.
              type: str
            by:
              description: The file that wins.
              type: str
            value:
              description: What it says.
              type: str
          sample: [{setting: net.core.somaxconn, file: /etc/sysctl.d/60-vllm-fleet.conf, by: /etc/sysctl.conf, value: "1024"}]
        time_servers:
          description:
            - Time servers that somebody chose for this host, in the files of timesyncd and ntpd, or by DHCP. Those of the distribution are not among them.
              Section V(settings).
          type: list
          elements: str
          sample: [ntp.example.com]
        clock_synchronised:
          description: Whether the kernel believes that something keeps its clock right. Section V(settings).
          type: bool
        trees:
          description:
            - For each name of M(gpufleet.llm.tree) whose files are all as its last call left them, with no handler due, a hash of what was
              wanted. Section V(trees).
          type: dict
        paths:
          description: What is at each of O(paths). All keys are always there. Section V(paths).
          type: dict
          contains:
            exists:
              description: Whether something is there. Links are not followed.
              type: bool
            type:
              description: V(file), V(directory), V(link) or V(other), empty when nothing is there.
              type: str
            target:
              description: Where a link leads, as it is written.
              type: str
            size:
              description: Size of a file in bytes.
              type: int
            mode:
              description: Its mode.
              type: str
              sample: "0644"
            uid:
              description: Number of its owner, null when nothing is there.
              type: int
            gid:
              description: Number of its group, null when nothing is there.
              type: int
            sha256:
              description: SHA-256 of a file of at most 1 MiB, else empty.
              type: str
"""

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils import (
    host,
    host_clock,
    host_mounts,
    host_settings,
    host_sockets,
    host_units,
    tree_seen,
    uv_host,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu import NVIDIA_SMI_QUERY, parse_nvidia_smi
from ansible_collections.gpufleet.llm.plugins.module_utils.program import Program

SECTIONS = ["system", "packages", "units", "users", "ports", "mounts", "gpus", "paths", "trees", "settings"]
# Seconds. nvidia-smi without persistence mode wakes every GPU, some seconds each.
SYSTEMCTL_TIMEOUT = 20
NVIDIA_SMI_TIMEOUT = 60


def python_version(program: str) -> str:
    """Version of the distribution's Python, which is mostly the one that runs this."""
    if not Path(program).exists():
        return ""
    if os.path.realpath(program) == os.path.realpath(sys.executable):
        return platform.python_version()
    good, output = Program([program, "-V"]).output(SYSTEMCTL_TIMEOUT)
    return output.strip().removeprefix("Python ") if good else ""


def gpu_facts(program: Program | None) -> dict[str, Any]:
    """The GPUs, and what is wrong with them."""
    if program is None:
        return {"gpus": [], "gpu_error": ""}
    good, output = program.output(NVIDIA_SMI_TIMEOUT)
    gpus = parse_nvidia_smi(output) if good else []
    return {"gpus": gpus, "gpu_error": "" if gpus else output.strip() or "nvidia-smi shows no GPU"}


ARGUMENTS: dict[str, Any] = {
    "gather": {"type": "list", "elements": "str", "choices": SECTIONS, "default": SECTIONS},
    "paths": {"type": "list", "elements": "path", "default": []},
}


def main() -> None:
    """Look, and tell."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        supports_check_mode=True,
    )
    gather = set(module.params["gather"])
    nvidia_smi = Program(NVIDIA_SMI_QUERY) if "gpus" in gather and shutil.which("nvidia-smi") else None
    booted = Path("/run/systemd/system").is_dir()
    list_units = Program(host_units.LIST_UNITS) if "units" in gather and booted else None

    facts: dict[str, Any] = {}
    if "system" in gather:
        facts.update(host.system(), **host.python())
        facts["python"] = python_version(facts["python_path"])
    if "packages" in gather:
        facts.update(packages=host.packages(), lists_age_seconds=host.lists_age(), uv=uv_host.installed())
        facts["held_updates"] = host.held_updates()
    if "users" in gather:
        group_file = read(Path("/etc/group"))
        facts.update(users=host.ids(read(Path("/etc/passwd"))), groups=host.ids(group_file))
        facts["group_members"] = host.members(group_file)
    if "ports" in gather:
        facts["ports"] = host_sockets.ports()
    if "mounts" in gather:
        facts["mounts"] = host_mounts.mounts()
    if "paths" in gather:
        facts["paths"] = {path: host.path_state(Path(path)) for path in module.params["paths"]}
    if "settings" in gather:
        facts.update(overruled=host_settings.overruled(), time_servers=host_clock.time_servers())
        facts["clock_synchronised"] = host_clock.synchronised()
    if "trees" in gather:
        facts["trees"] = tree_seen.unchanged()
    if "units" in gather:
        good, loaded = list_units.output(SYSTEMCTL_TIMEOUT) if list_units else (False, "")
        # Without systemd's word on what runs, every unit would look as if it had stopped.
        facts["units"] = host_units.units(loaded) if good else {}
    if "gpus" in gather:
        facts.update(gpu_facts(nvidia_smi))
    module.exit_json(changed=False, ansible_facts={"gpufleet": facts})


if __name__ == "__main__":
    main()
