"""Checks the documentation of the collection's plugins and roles as Ansible's own tools check it, without a network.

sanity.py          antsibull-docs, and those programs of `ansible-test sanity` that are about documentation

`ansible-test sanity` makes itself a virtual environment with a pip that it fetches from elsewhere. Its programs do not need that: they come with
ansible-core, and what they import is pinned in requirements.lock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ansible
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(ansible.__path__[0]).parent / "ansible_test/_util/controller/sanity"
COLLECTIONS = ROOT / ".collections"
# By the name of its directory, what the programs call it.
KINDS = {"modules": "module", "callback": "callback"}
# These hold for every file.
EVERYWHERE = {
    "missing-gplv3-license",  # the license is Apache's, in LICENSE
}
# The documentation of these is that of their action plugin, which hands the module something else; tests/unit/test_conventions.py compares.
OF_THE_ACTION = {"host_lease", "host_silence", "tree"}
ABOUT_ARGUMENTS = {
    "attributes-check-mode",
    "doc-default-does-not-match-spec",
    "doc-required-mismatch",
    "nonexistent-parameter-documented",
    "parameter-type-not-in-doc",
    "undocumented-parameter",
}
# What it skips are the pages that antsibull-docs itself writes, and the plugins of other collections: each takes as long as all the rest.
ANTSIBULL = [
    "antsibull-docs",
    "lint-collection-docs",
    "--plugin-docs",
    "--skip-rstcheck",
    "--validate-collection-refs=self",
    ".",
]


def files(directory: str) -> list[str]:
    """The Python files of a directory, by their path in the collection."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / directory).glob("*.py"))


def run(command: Sequence[str], given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program in the collection, which it finds by its name."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    places = {"ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS), "ANSIBLE_COLLECTIONS_SCAN_SYS_PATH": "false"}
    settings = {**places, "PYTHONPATH": str(COLLECTIONS), "PATH": path}
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, input=given, text=True, capture_output=True, check=False
    )


def validate_modules(directory: str) -> Iterator[str]:
    """What validate-modules finds in the plugins of a kind."""
    galaxy = yaml.safe_load((ROOT / "galaxy.yml").read_text())
    program = [sys.executable, str(PROGRAMS / "validate-modules/validate.py"), "--format=json", "--arg-spec"]
    # two words: by the first one alone it sees that it is in a collection, and finds fragments of documentation there
    collection = ["--collection", f"ansible_collections/{galaxy['namespace']}/{galaxy['name']}"]
    version = [f"--collection-version={galaxy['version']}", f"--plugin-type={KINDS[directory]}"]
    done = run([*program, *collection, *version, *files(f"plugins/{directory}")])
    if done.stderr or done.returncode not in (0, 3):
        yield f"validate-modules ended with {done.returncode}: {done.stderr}"
        return
    for file, found in json.loads(done.stdout).items():
        for error in found["errors"]:
            code = error["code"]
            of_the_action = Path(file).stem in OF_THE_ACTION and code in ABOUT_ARGUMENTS
            if code not in EVERYWHERE and not of_the_action:
                yield f"{file}: {code}: {error['msg']}"


def said(name: str, command: Sequence[str], given: str = "") -> Iterator[str]:
    """The lines of a program that prints a line for everything it finds."""
    done = run(command, given)
    yield from done.stdout.splitlines()
    if done.stderr or (done.returncode and not done.stdout):
        yield f"{name} ended with {done.returncode}: {done.stderr}"


def findings() -> Iterator[str]:
    """Everything that any of the programs finds."""
    for directory in KINDS:
        yield from validate_modules(directory)
    smells = PROGRAMS / "code-smell"
    yield from said("runtime-metadata", [sys.executable, str(smells / "runtime-metadata.py"), "meta/runtime.yml"])
    plugins = "\n".join([*files("plugins/modules"), *files("plugins/action")])
    yield from said("action-plugin-docs", [sys.executable, str(smells / "action-plugin-docs.py")], plugins)
    yield from said("antsibull-docs", ANTSIBULL)


def main() -> int:
    """Print what was found."""
    found = list(findings())
    print("\n".join(found) or "nothing was found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
