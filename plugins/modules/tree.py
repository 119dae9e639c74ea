#!/usr/bin/python
# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The files of a role, put in place in one call: this is the part that runs on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: tree
version_added: 0.1.0
author: The vLLM Fleet authors (@gpufleet)
short_description: Puts all files of a role in place in one call
description:
  - A directory of templates mirrors the file system of the host. C(templates/etc/uv/uv.toml.j2) becomes C(/etc/uv/uv.toml). Files that
    exist once per item, or whose path is computed, are stated in O(files).
  - Everything is rendered on the controller and put in place by one call, as a whole. Each file is replaced by rename. When a command of
    O(validate) refuses the new files, or the disk is full, every file is as it was. A run that was killed on the way is undone, or
    finished, by the next one.
  - What a former run put there and is wanted no more is removed, and so are directories that it made and that are empty then.
  - Handlers of the files that changed are notified, of no others. A run that dies before its handlers have run is remembered, and the
    next one notifies them again, until a task with O(state=settled) says that they have run.
  - On a host where everything is in place, it makes one call and writes nothing. Where the role P(gpufleet.llm.host_support#role) looked at
    the host earlier in the run, and everything was as the last call left it and is still wanted so, it makes none.
options:
  name:
    description: Whose files these are. Lower case letters, digits, V(_) and V(-). Each name has its own memory on the host.
    type: str
    required: true
  state:
    description:
      - V(present) puts the files in place, and removes those of former runs that are not among them.
      - V(settled) says that the handlers have run. Use it after C(meta=flush_handlers), when the task with V(present) changed something.
      - V(absent) removes every file that was put in place under this name.
    type: str
    choices: [present, settled, absent]
    default: present
  source:
    description:
      - Directory of the role's C(templates/) that mirrors the host, by default that directory itself. An empty string means that no
        files are mirrored.
      - A file whose name ends in C(.j2) is a template, with the defaults of M(ansible.builtin.template). Others are copied byte for byte.
      - Not put in place are files whose name begins with C(_), which are for C(include) and C(import), those that lie directly in
        O(source), where they would go to C(/), templates that an entry of O(files) names, O(exclude), and what editors, git and
        Python leave (C(*~), C(.*.sw?), C(.gitkeep), C(*.pyc)).
      - Outside of a role it has to be stated, as an absolute directory or one beside the playbook.
    type: str
  files:
    description: Files beside the mirrored ones. Each has exactly one of C(template), C(content) and C(source).
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where it is on the host.
        type: str
        required: true
      template:
        description: A template, relative to the role's C(templates/).
        type: str
      content:
        description: The content itself.
        type: str
      source:
        description: A file, relative to the role's C(files/), that is copied byte for byte.
        type: str
      vars:
        description: Variables that C(template) has in addition.
        type: dict
        default: {}
      mode:
        description: As a quoted octal string.
        type: raw
        default: "0644"
      owner:
        description: Name of the user that owns it. The default is the O(owner) of the task.
        type: str
      group:
        description: Name of its group. The default is the O(group) of the task.
        type: str
      secret:
        description: Its content is never shown.
        type: bool
        default: false
      when:
        description: V(false) leaves it out.
        type: bool
        default: true
  modes:
    description: Modes of mirrored files that are not V("0644"). Path on the host to mode. Unlike in other
      modules, variables in the keys are rendered.
    type: dict
    default: {}
  when:
    description: Which mirrored files are wanted under a condition. Path on the host to V(true) or V(false), which leaves it out. Variables in
      the keys are rendered, as those of O(modes).
    type: dict
    default: {}
  secrets:
    description: Paths on the host of mirrored files whose content is never shown.
    type: list
    elements: str
    default: []
  exclude:
    description: Files below O(source) that are not put in place, as patterns (V(*) matches slashes too).
    type: list
    elements: str
    default: []
  directories:
    description: Directories with a mode or an owner of their own. Others that are missing are made, with mode V("0755").
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where it is on the host.
        type: str
        required: true
      mode:
        description: As a quoted octal string.
        type: raw
        default: "0755"
      owner:
        description: Name of the user that owns it. The default is the O(owner) of the task.
        type: str
      group:
        description: Name of its group. The default is the O(group) of the task.
        type: str
  links:
    description: Symbolic links.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where the link is on the host.
        type: str
        required: true
      target:
        description: What it points to. It does not have to exist.
        type: str
        required: true
  owner:
    description: Name of the user that owns files and directories that do not say it themselves.
    type: str
    default: root
  group:
    description: Name of the group of files and directories that do not say it themselves.
    type: str
    default: root
  requires:
    description:
      - What has to be on the host already because the new files name it, for example a certificate. It is looked for before anything is
        written, when something is to change.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where it is on the host.
        type: str
        required: true
      fail_msg:
        description: What the task says when it is not there.
        type: str
        required: true
  validate:
    description:
      - Commands that have to accept the new files. They run with the files in place, without a shell, when something changed. When one
        does not end with 0, every file is restored and the task fails with what the command printed.
    type: list
    elements: str
    default: []
  notify:
    description:
      - Which handlers are notified when a path that matches a pattern changed. V(*) matches slashes too. The value is the name of a
        handler, or a list of names.
      - Unlike in other modules, variables in the keys are rendered.
      - The keyword C(notify) of the task works as for any task, with every path.
    type: dict
    default: {}
  state_path:
    description: Directory on the host in which each name has a directory that remembers its files.
    type: path
    default: /var/lib/vllm-fleet/tree
attributes:
  check_mode:
    description: Says what would change and writes nothing. O(requires) is not looked for and O(validate) is not run. What a killed run
      left is reported and left alone.
    support: full
  diff_mode:
    description: Shows mode, owner and content. Secret and binary content is not shown, only that it changed.
    support: full
notes:
  - Directories on the way that are links are followed. A link in the place of a wanted file is replaced itself.
  - ACLs and extended attributes of a file that is replaced are not kept.
  - A task that states the content of a secret file in O(files) should have it from a variable, as any task with a secret.
"""

EXAMPLES = r"""
- name: The files are in place  # those of templates/, which has etc/nginx/nginx.conf.j2, etc/systemd/system/nginx.service.d/50-fleet.conf
  gpufleet.llm.tree:
    name: gateway
    exclude: [etc/nginx/keys/keys.conf.j2]
    files:
      - path: /etc/nginx/keys/{{ client }}.conf
        template: etc/nginx/keys/keys.conf.j2
        mode: "0600"
        secret: true
    directories:
      - {path: /etc/nginx/keys, mode: "0700"}
    validate: [nginx -t -q]
    notify:
      /etc/nginx/*: Reload Nginx
      /etc/systemd/system/*: [Let systemd read its units again, Restart Nginx]
  register: __gateway_tree

- name: What changed is in use
  ansible.builtin.meta: flush_handlers

- name: The handlers have run
  gpufleet.llm.tree:
    name: gateway
    state: settled
  when: __gateway_tree is changed

- name: Links, and nothing that is mirrored
  gpufleet.llm.tree:
    name: uv
    source: ""
    links:
      - {path: /usr/local/bin/tool, target: /opt/tool/1.2.3/tool}

- name: Nothing of it is left
  gpufleet.llm.tree:
    name: gateway
    state: absent
"""

RETURN = r"""
paths:
  description: Paths that changed in this call, in the order in which that happened; removed ones too.
  returned: when state is present or absent
  type: list
  elements: str
unsettled:
  description: Paths whose handlers are due, because of this call or of a former run that did not come to its handlers.
  returned: when state is present or absent
  type: list
  elements: str
handlers:
  description: The handlers that are notified.
  returned: when state is present or absent
  type: list
  elements: str
interrupted:
  description: What was done about a former call that was killed, V(undone) or V(finished), V(left) in check mode, else empty.
  returned: always
  type: str
"""

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.llm.plugins.module_utils.tree import NAME, REQUIREMENT, TreeError, unpack
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_host import Tree
from ansible_collections.gpufleet.llm.plugins.module_utils.tree_seen import STATE_PATH

ARGUMENTS: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "settled", "absent"], "default": "present"},
    "state_path": {"type": "path", "default": STATE_PATH},
    "payload": {"type": "str", "no_log": True},
    "requires": {"type": "list", "elements": "dict", "options": REQUIREMENT, "default": []},
    "validate": {"type": "list", "elements": "str", "default": []},
    "notify": {"type": "dict", "default": {}},
}
RULES: dict[str, Any] = {"required_if": [("state", "present", ["payload"])]}


def main() -> None:
    """Do what the state asks for. The action plugin has made one `payload` of everything that says which files are wanted."""
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        **RULES,
        supports_check_mode=True,
    )
    parameters = module.params
    if not NAME.fullmatch(parameters["name"]):
        module.fail_json(msg=f"name: {parameters['name']!r} must be of lower case letters, digits, '_' and '-'")
    tree = Tree(Path(parameters["state_path"]) / parameters["name"])
    try:
        if parameters["state"] == "settled":
            result = tree.settle(module.check_mode)
        else:
            wanted = unpack(parameters["payload"]) if parameters["state"] == "present" else []
            result = tree.present(
                wanted,
                parameters["notify"],
                parameters["validate"],
                module.check_mode,
                bool(module._diff),
                parameters["requires"],
            )
    except (TreeError, OSError) as error:
        module.fail_json(msg=f"{parameters['name']}: {error}")
    if result["interrupted"] == "left":
        module.warn(f"{parameters['name']}: a former run was killed; the next one without --check sees to what it left")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
