"""The units of instances in both runtimes: they leave the gateways before they stop, and have the time for it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml

ROLE = Path(__file__).resolve().parents[2] / "roles/vllm"
UNITS = ["etc/systemd/system/vllm@.service.j2", "container.service.j2"]
LEAVES = "-+/bin/sh -c 'if [ -x /usr/local/lib/vllm-fleet/leave ]; then exec /usr/local/lib/vllm-fleet/leave %i; fi'"


def rendered(template: str, **variables: object) -> str:
    """A unit, with the variables of the role."""
    loader = jinja2.FileSystemLoader(ROLE / "templates")
    environment = jinja2.Environment(  # noqa: S701 -- no HTML
        loader=loader, trim_blocks=True, undefined=jinja2.ChainableUndefined
    )
    given = {
        **yaml.safe_load((ROLE / "defaults/main.yml").read_text()),
        **yaml.safe_load((ROLE / "vars/main.yml").read_text()),
        **variables,
    }
    # from the variables that others are made of
    for name in ("__vllm_stop_seconds", "__vllm_leave_seconds"):
        given[name] = int(environment.from_string(given[name]).render(given))
    for name in ("__vllm_bin_path", "__vllm_launcher", "__vllm_container_program"):
        given[name] = "/opt/vllm/bin/program"
    given["__vllm_release_mount"] = "/opt/vllm/release"
    return environment.get_template(template).render(given)


def values(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)


@pytest.mark.parametrize("template", UNITS)
@pytest.mark.parametrize(("drain", "leave"), [(60, None), (60, 600), (600, 0)])
def test_an_instance_leaves_before_it_stops(template: str, drain: int, leave: int | None) -> None:
    variables = {"vllm_shutdown_timeout": drain, **({} if leave is None else {"host_agent_leave_seconds": leave})}
    unit = rendered(template, **variables)
    assert values(unit, "ExecStop")[0] == LEAVES
    assert values(unit, "ExecStartPre") == ["-+/bin/rm -f /run/vllm-fleet/leaving/%i"]
    # systemd gives each of these so long: to leave, with a question to the engine, and to end
    (timeout,) = values(unit, "TimeoutStopSec")
    assert int(timeout) >= (drain if leave is None else leave) + 15
    assert int(timeout) >= drain + 30
    # so that the agent still answers while the host goes down
    assert "vllm-fleet-agent.service" in values(unit, "After")[-1].split()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("template", UNITS)
def test_the_unit_is_one_that_systemd_understands(tmp_path: Path, template: str) -> None:
    unit = tmp_path / "vllm@chat.service"
    unit.write_text(rendered(template).replace("/opt/vllm/bin/program", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "vllm@chat" not in done.stderr, done.stderr


@pytest.mark.parametrize("speaks", [True, False])
def test_only_an_instance_that_speaks_tls_may_read_the_key_of_its_host(tmp_path: Path, speaks: bool) -> None:
    unit = rendered(UNITS[0], __vllm_speaks_tls=speaks)
    assert values(unit, "SupplementaryGroups") == (["vllm-fleet"] if speaks else [])
