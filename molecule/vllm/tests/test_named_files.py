"""Files that options name, with the stand-in for vLLM, which does not start without its template. Begins and ends with the instance `chat` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from tests.roles import ROOT, applied, refused
from tests.served import generation, main_pid

testinfra_hosts = ["docker://vllm-debian13"]

CHAT, _OTHER = yaml.safe_load((ROOT / "molecule/shared/inventory/group_vars/vllm_stand_in.yml").read_text())[
    "vllm_instances"
]
NAMED: dict[str, Any] = {**CHAT, "name": "named", "port": 8005}


def instances(**options: Any) -> list[dict[str, Any]]:
    return [CHAT, {**NAMED, "options": {**NAMED["options"], **options}}]


def template(host: Host) -> str:
    """The template of the running service, read as the service sees its file system and with its user's rights."""
    pid = main_pid(host, "named")
    file = host.check_output("sed -n 's/^chat-template: \"\\(.*\\)\"$/\\1/p' /etc/vllm/named/current/config.yaml")
    return str(
        host.check_output("nsenter --target %s --mount setpriv --reuid=vllm --clear-groups cat %s", str(pid), file)
    )


def test_a_template_is_shipped_and_an_earlier_generation_keeps_its_own(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "tools.jinja"
    variables = {
        "vllm_instances": instances(**{"chat-template": "tools.jinja"}),
        "vllm_files": [{"name": "tools.jinja", "src": str(file)}],
    }
    file.write_text("{{ messages }} one")
    applied(host, "vllm", **variables)
    assert template(host) == "{{ messages }} one"
    assert "changed=0" in applied(host, "vllm", **variables)

    before = main_pid(host, "chat")
    file.write_text("{{ messages }} two")
    applied(host, "vllm", **variables)
    assert (generation(host, "named"), template(host)) == ("2", "{{ messages }} two")
    applied(host, "vllm", entry_point="revert", vllm_revert_instances=["named"])
    assert (generation(host, "named"), template(host)) == ("1", "{{ messages }} one")
    assert main_pid(host, "chat") == before, "it names none"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (
            "rm -f /opt/tools.jinja",
            "option 'chat-template': there is no /opt/tools.jinja; put it there, or let vllm_files ship it",
        ),
        (
            "install -m 0600 /dev/null /opt/tools.jinja",
            "option 'chat-template': vLLM's user cannot read /opt/tools.jinja",
        ),
    ],
)
def test_a_file_that_the_service_cannot_read_is_refused_before_anything_stops(
    host: Host, made: str, expected: str
) -> None:
    host.check_output("rm -f /etc/vllm/named/held")
    host.check_output(made)
    before = main_pid(host, "named")
    assert expected in refused(host, "vllm", vllm_instances=instances(**{"chat-template": "/opt/tools.jinja"}))
    assert (main_pid(host, "named"), generation(host, "named")) == (before, "1")


def test_files_go_with_the_last_generation_that_names_them(host: Host) -> None:
    assert len(host.check_output("ls /opt/vllm/files").split()) == 2
    applied(host, "vllm", vllm_instances=[CHAT])
    assert host.check_output("ls /opt/vllm/files") == ""
