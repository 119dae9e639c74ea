"""Versions of packages are compared as dpkg itself does it."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import dpkg
from hypothesis import given, settings
from hypothesis import strategies as st

POLICY = """\
docker-ce:
  Installed: 5:28.3.3-1~debian.13~trixie
  Candidate: 5:29.1.3-1~debian.13~trixie
  Version table:
     5:29.1.3-1~debian.13~trixie 600
        500 https://download.docker.com/linux/debian trixie/stable amd64 Packages
 *** 5:28.3.3-1~debian.13~trixie 600
        500 https://download.docker.com/linux/debian trixie/stable amd64 Packages
        100 /var/lib/dpkg/status
docker.io:
  Installed: (none)
  Candidate: (none)
  Version table:
     26.1.5+dfsg1-9+b4 -1
        500 http://mirror.example/debian trixie/main amd64 Packages
        500 http://mirror.example/debian-security trixie-security/main amd64 Packages
local:
  Installed: 2.0
  Candidate: 2.0
  Version table:
 *** 2.0 100
        100 /var/lib/dpkg/status
"""


@pytest.mark.parametrize(
    ("one", "order", "other"),
    [
        # the floors of this repository against what distributions and vendors call their packages
        ("5:28.3.3-1~debian.13~trixie", ">", "5:28.3.3"),
        ("5:28.3.3-1~ubuntu.24.04~noble", ">", "5:28.3.2-1~ubuntu.24.04~noble"),
        ("5:28.3.2-1~ubuntu.24.04~noble", "<", "5:28.3.3"),
        ("26.1.5+dfsg1-9+b4", ">", "26.1.5"),
        ("20.10.24+dfsg1-1+deb12u1+b6", "<", "26.1.5"),
        ("28.2.2-0ubuntu1~24.04.1", ">", "26.1.5"),
        # a vendor's epoch outweighs everything: Docker's oldest counts as newer than a distribution's newest
        ("5:20.10.24~3-0~debian-bookworm", ">", "29.1.3-0ubuntu1"),
        ("1.20.0-1", ">", "1.19.1-1"),
        ("1.19.1-1", ">", "1.19.1"),
        ("1.19.1~rc.2-1", "<", "1.19.1"),
        ("1.9.0-1", "<", "1.19.1-1"),
        ("1.0", "=", "1.0-0"),
        ("0:1.0", "=", "1.0"),
        ("1.0", "=", "1.00"),
        ("1.0a", ">", "1.0"),
        ("1.0+b1", ">", "1.0a"),
    ],
)
def test_versions_as_they_are_met(one: str, order: str, other: str) -> None:
    assert dpkg.compare(one, other) == {"<": -1, "=": 0, ">": 1}[order]
    assert dpkg.compare(other, one) == {"<": 1, "=": 0, ">": -1}[order]


pieces = st.lists(
    st.sampled_from(["0", "1", "9", "10", "007", ".", "~", "~~", "+", "-", "a", "b", "Z", "rc", "dfsg"]), max_size=7
)
versions = st.builds(
    lambda epoch, start, rest: f"{epoch}{start}{''.join(rest)}",
    st.sampled_from(["", "0:", "1:", "5:"]),
    st.integers(0, 30),
    pieces,
).filter(lambda version: not version.endswith("-"))


@pytest.mark.skipif(not shutil.which("dpkg"), reason="dpkg is the judge")
@settings(max_examples=150, deadline=None)
@given(versions, versions)
def test_dpkg_says_the_same(one: str, other: str) -> None:
    said = 0
    for relation, number in (("lt", -1), ("gt", 1)):
        if subprocess.run(["dpkg", "--compare-versions", one, relation, other], check=False).returncode == 0:
            said = number
    assert dpkg.compare(one, other) == said


def test_the_newest_and_those_that_are_too_old() -> None:
    assert dpkg.newest(["1.9-1", "1.10-1", "1.10~rc1-1"]) == "1.10-1"
    assert dpkg.newest([]) == ""
    floors = {"docker-ce": "5:28.3.3", "containerd.io": "1.7.27", "absent": "1"}
    assert dpkg.below(floors, {"docker-ce": "5:28.3.2-1~x", "containerd.io": "1.7.27-1"}) == {"docker-ce": "5:28.3.3"}


def test_a_version_is_asked_for_as_the_program_or_as_the_package_has_it() -> None:
    version = "5:28.5.2-1~debian.13~trixie"
    assert [dpkg.means(wanted, version) for wanted in ("28.5.2", version, "28.5", "5:28.5.2", "28.5.20")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert dpkg.means("26.1.5", "26.1.5+dfsg1-9+deb13u1")
    assert [dpkg.is_version(text) for text in ("5:28.5.2-1~x", "1.20.0", "", "latest", "28 5", "28.*")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_what_apt_could_install() -> None:
    assert dpkg.parse_policy(POLICY) == {
        "docker-ce": {
            "candidate": "5:29.1.3-1~debian.13~trixie",
            "versions": ["5:29.1.3-1~debian.13~trixie", "5:28.3.3-1~debian.13~trixie"],
        },
        # forbidden by a pin
        "docker.io": {"candidate": "", "versions": []},
        # there, and to be had from nowhere
        "local": {"candidate": "2.0", "versions": []},
    }
    assert dpkg.parse_policy("") == {}
